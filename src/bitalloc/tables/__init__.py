"""Every Parquet table: columns with type, unit and meaning.

Stages meet only here. `write` refuses a frame that departs from its schema, `read` refuses a file that
does: nothing half-written, foreign or corrupted is ever used. Files hold no time and no host, so two runs
write equal bytes wherever no column is a time. The verdicts of the gates that a table stands on travel in
its metadata (`verdicts`).
"""

from bitalloc.tables.chain import (
    ASIDE,
    CHECKPOINTS,
    COSTS,
    EMBEDDINGS,
    EXPORTS,
    FREE,
    INVENTORY,
    ITEMS,
    LAW,
    MOMENTS,
    PLAN,
    PLANS,
    READINGS,
    RESIDUALS,
    SENSITIVITY,
    SWEEP,
    TOKENS,
    TUNED,
    TUNED_OPTIONS,
    without_arms,
)
from bitalloc.tables.fairness import ANSWERS, ARMS, FAIRNESS, LANGUAGES, PARALLEL, PROTECTED, SENTENCES, SETS, SYNERGY
from bitalloc.tables.schema import Column, Table, as_verdicts, verdicts
from bitalloc.tables.scores import (
    BACKENDS,
    CONTROLS,
    COST,
    EVALUATE,
    GATES,
    GOODHART,
    HUMANEVAL,
    OUTCOMES,
    PHASE,
    RECORDS,
    RESPONSES,
    SAMPLES,
    SUCCESS,
)
from bitalloc.tables.studies import CRITERIA, DRIFT, EVOLUTION, LAYERWISE, PASSKEY, POSITION, SCHEMES

TABLES = {table.name: table for table in list(globals().values()) if isinstance(table, Table)}
