"""The configuration: one section a stage, unknown keys forbidden, units in the descriptions.

`python -m bitalloc.config` writes `config/config.yaml` (every default with its meaning) and
`config/schema.json` from these classes; a test holds them in step.
"""

from bitalloc.config.chain import (
    Allocate,
    Analyze,
    Backends,
    Calibrate,
    Compress,
    Evaluate,
    Export,
    Fit,
    HumanEval,
    Report,
    Retrieve,
    Sensitivity,
    Sweep,
    Task,
    Tune,
)
from bitalloc.config.gates import Check, Checks, Gates
from bitalloc.config.profile import Price, Profile, Timing
from bitalloc.config.render import default_yaml, schema_json
from bitalloc.config.run import LongContext, Perplexity, Run, Texts, read_run
from bitalloc.config.section import SPOKEN, Bits, Positive, Precision, Rule, Section, Share
from bitalloc.config.sheet import CORPORA, Corpus, Model
from bitalloc.config.studies import Drift, Evolve, Fairness, Passkey, Schemes, Study
from bitalloc.config.whole import Config, load, parse, read_study
from bitalloc.config.words import budget_slug, expand, parse_bytes, tuned_from
