"""Every Parquet table in the order of the flow: columns with type, unit and meaning.

Stages meet only here. `write` refuses a frame that departs from its schema, `read` refuses a file that
does: nothing half-written, foreign or corrupted is ever used. Files hold no time and no host, so two runs
write equal bytes wherever no column is a time. The verdicts of the gates that a table stands on travel in
its metadata (`verdicts`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from bitalloc.errors import BitallocError
from bitalloc.store import write_atomically

STR, INT, FLOAT, BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()
INTS, INTSS = pa.list_(pa.int32()), pa.list_(pa.list_(pa.int32()))


@dataclass(frozen=True)
class Column:
    name: str
    type: pa.DataType
    doc: str
    nullable: bool = False


@dataclass(frozen=True)
class Table:
    """A schema. `key` names the columns that identify a row; rows are kept sorted as they were given."""

    name: str
    doc: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in self.columns])

    def write(self, frame: pd.DataFrame, path: Path, *, verdicts: Sequence[Mapping] = ()) -> None:
        """Write `frame` atomically; raises `BitallocError` when it departs from the schema."""
        names = [c.name for c in self.columns]
        if set(frame.columns) != set(names):
            off = sorted(set(frame.columns) ^ set(names))
            raise BitallocError(f"table {self.name}: columns {off} are missing or unknown; see bitalloc/tables.py")
        if frame.duplicated(list(self.key)).any():
            raise BitallocError(f"table {self.name}: two rows share one key {self.key}")
        try:
            table = pa.Table.from_pandas(frame[names], schema=self.schema, preserve_index=False, safe=True)
            table.validate(full=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
            raise BitallocError(f"table {self.name}: {str(error).splitlines()[0]}") from None
        for column in self.columns:
            if not column.nullable and table[column.name].null_count:
                raise BitallocError(f"table {self.name}: column {column.name} has missing values")
        stamp = json.dumps(list(verdicts), sort_keys=True)
        table = table.replace_schema_metadata({"bitalloc.table": self.name, "bitalloc.verdicts": stamp})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        write_atomically(path, buffer.getvalue())

    def merge(self, parts: Sequence[Path], path: Path) -> None:
        """Write the rows of all `parts` as one table, a row that several hold once; verdicts as in the first."""
        merged = pd.concat([self.read(part) for part in parts], ignore_index=True)
        self.write(merged.drop_duplicates(list(self.key), ignore_index=True), path, verdicts=verdicts(parts[0]))

    def read(self, path: Path) -> pd.DataFrame:
        """Read the table; raises `BitallocError` when the file is absent, corrupted or another table."""
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise BitallocError(f"cannot read {path} ({reason}); delete it and rerun, it is made again") from None
        if table.schema.remove_metadata() != self.schema:
            raise BitallocError(f"{path} is not a {self.name} table of this version; delete it and rerun")
        return table.to_pandas(ignore_metadata=True)


def verdicts(path: Path) -> list[dict]:
    """The gate verdicts that the table at `path` stands on (rows of `GATES`)."""
    metadata = pq.read_schema(path).metadata or {}
    return json.loads(metadata.get(b"bitalloc.verdicts", b"[]"))


_MODEL = Column("model", STR, "name in the model sheet")
_LAYER = Column("layer", STR, "module path of the matrix")
_PLACE = (
    Column("block", INT, "index of the transformer block, from 0; -1 for embedding and head"),
    Column("role", STR, "the matrix's role in its block, e.g. q_proj; embedding or head outside"),
)
_OPTION = (
    Column("quantizer", STR, "member of the quantiser family; `none` = passed through"),
    Column("bits", INT, "bits of a code; 16 = passed through"),
    Column("group_size", INT, "weights along the input that share one scale"),
    Column("rank", INT, "rank of the low-rank part, 0 = none"),
)
_INTERVAL = (
    Column("value", FLOAT, "the point estimate, unit by metric", nullable=True),
    Column("lo", FLOAT, "lower end of the 95 % interval", nullable=True),
    Column("hi", FLOAT, "upper end of the 95 % interval", nullable=True),
    Column("n", INT, "units behind the value: windows, documents, items, plans; tokens where it has no interval"),
)


def _estimate(name: str, doc: str) -> tuple[Column, Column, Column]:
    """A column of point estimates and those of the ends of their 95 % intervals; missing where not measured."""
    short, ends = name.removesuffix("_nats_per_token"), (("lo", "lower"), ("hi", "upper"))
    whole = Column(name, FLOAT, doc, nullable=True)
    return whole, *(
        Column(f"{short}_{end}", FLOAT, f"{word} end of its 95 % interval", nullable=True) for end, word in ends
    )


INVENTORY = Table(
    "inventory",
    "Every tensor of the checkpoint: what it is, and whether a plan may touch it.",
    ("model", "tensor"),
    (
        _MODEL,
        Column("tensor", STR, "name in the checkpoint"),
        Column("layer", STR, "module path"),
        Column("block", INT, "index of the block; -1 outside the blocks"),
        Column("role", STR, "role in the block; empty when excluded"),
        Column("kind", STR, "attention, mlp, mixer, embedding, head, norm, bias, filter or buffer"),
        Column("site", STR, "name of the input that the matrix reads, unique in the model; empty when excluded"),
        Column("rows", INT, "outputs O of a claimed matrix W_OI; first dimension otherwise"),
        Column("columns", INT, "inputs I of a claimed matrix W_OI; 1 for a vector"),
        Column("dtype", STR, "as stored"),
        Column("nbytes", INT, "bytes as stored"),
        Column("tied", BOOL, "shares its storage with the embedding; counted once"),
        Column("claimed", BOOL, "a plan gives it an option"),
        Column("reason", STR, "why it is excluded; empty when claimed"),
        Column("file", STR, "safetensors file, relative to the checkpoint"),
        Column("digest", STR, "SHA-256 of the stored bytes"),
    ),
)
TOKENS = Table(
    "tokens",
    "Token windows of the disjoint splits calibrate, select and report.",
    ("split", "corpus", "window"),
    (
        Column("split", STR, "calibrate, select or report"),
        Column("corpus", STR, "name of the corpus in the configuration"),
        Column("window", INT, "index within split and corpus"),
        Column("tokens", INTS, "token ids"),
        Column("nbytes", INT, "UTF-8 bytes of the text that the scored tokens cover"),
    ),
)
ITEMS = Table(
    "items",
    "Questions with known answers, tokenised.",
    ("task", "item"),
    (
        Column("task", STR, "name of the task"),
        Column("item", INT, "index within the task"),
        Column("group", STR, "cluster for resampling: a language, a depth, a subject"),
        Column("prompt", INTS, "token ids of the prompt"),
        Column("choices", INTSS, "token ids of each possible continuation; one = greedy generation must match it"),
        Column("answer", INT, "index of the right choice"),
        Column("chance", FLOAT, "accuracy of guessing, 0 to 1"),
    ),
)
READINGS = Table(
    "readings",
    "Whole texts as the protocols of perplexity read them; empty where the configuration names no protocol.",
    ("protocol", "corpus", "window"),
    (
        Column("protocol", STR, "gptq, lm-eval or llama.cpp"),
        Column("corpus", STR, "name of the corpus in the configuration"),
        Column("window", INT, "index within protocol and corpus"),
        Column("document", INT, "what is averaged over: the document of lm-eval, the window of the others"),
        Column("tokens", INTS, "token ids"),
        Column("scored", INT, "tokens at the end of the window that are scored"),
        Column("nbytes", INT, "UTF-8 bytes of the text behind them; those of a document stand in its first window"),
        Column("words", INT, "words of the document, likewise; 0 where the protocol counts none"),
        Column("how", STR, "the protocol in full, and how far the text was read"),
    ),
)
MOMENTS = Table(
    "moments",
    "Second moments H_II = X^T X / n of every site's input; the matrices lie in the store.",
    ("site",),
    (
        Column("site", STR, "unique name of the input, <block>.<site of the family>"),
        Column("block", INT, "index of the block"),
        Column("dim", INT, "inputs I"),
        Column("n_tokens", INT, "tokens that were averaged"),
        Column("trace", FLOAT, "trace of H"),
        Column("outlier_ratio", FLOAT, "largest over median diagonal entry of H"),
        Column("key", STR, "shard in the store that holds H_II, float32"),
        Column("digest", STR, "SHA-256 of the shard's tensors"),
    ),
)
SWEEP = Table(
    "sweep",
    "The error of every claimed matrix W_OI under every option, E = W - What.",
    ("model", "layer", "quantizer", "bits", "group_size", "rank"),
    (
        _MODEL,
        _LAYER,
        *_PLACE,
        Column("kind", STR, "attention or mlp"),
        Column("site", STR, "name of the input that the matrix reads"),
        *_OPTION,
        Column("nbytes", INT, "bytes of codes, scales, zeros and factors as stored"),
        Column("mse", FLOAT, "||E||_F^2 / (O I)"),
        Column("nmse", FLOAT, "||E||_F^2 / ||W||_F^2, dimensionless"),
        Column("rel_error", FLOAT, "tr(E H E^T) / tr(W H W^T): relative output error, an energy ratio"),
        Column("weight_energy_ratio", FLOAT, "||What||_F^2 / ||W||_F^2"),
        Column("key", STR, "shard in the store"),
        Column("wall_s", FLOAT, "seconds of this experiment; its share when several were computed together"),
    ),
)
SENSITIVITY = Table(
    "sensitivity",
    "What a unit of relative error in one matrix costs in KL, by each signal that was measured.",
    ("model", "layer", "signal"),
    (
        _MODEL,
        _LAYER,
        *_PLACE,
        Column("kind", STR, "attention or mlp"),
        Column("signal", STR, "kl: measured at the probe option; fisher: Kronecker-factored, one backward pass"),
        Column("coefficient", FLOAT, "nats a token for each unit of rel_error"),
        Column("kl_nats_per_token", FLOAT, "KL to the reference with this matrix alone at the probe option"),
        Column("lo", FLOAT, "lower end of its 95 % interval over windows", nullable=True),
        Column("hi", FLOAT, "upper end of its 95 % interval over windows", nullable=True),
        Column("rel_error", FLOAT, "rel_error of the probe option"),
    ),
)
LANGUAGES = Table(
    "languages",
    "What a unit of relative error in one matrix costs each language, on the select half of the parallel text.",
    ("model", "layer", "language"),
    (
        _MODEL,
        _LAYER,
        Column("language", STR, "as its text is named, e.g. he"),
        Column("signal", STR, "as in SENSITIVITY"),
        Column("coefficient", FLOAT, "nats a token of this language for each unit of rel_error"),
        Column("reference_nll_nats_per_token", FLOAT, "what the reference needs for this language"),
        Column("floor", BOOL, "the reference is no better than a byte-unigram model: no plan is judged by it"),
    ),
)
EMBEDDINGS = Table(
    "embeddings",
    "What the embedding and a head of its own cost at fewer bits, each measured by itself.",
    ("model", "layer", "quantizer", "bits", "group_size", "rank"),
    (
        _MODEL,
        _LAYER,
        *_PLACE,
        Column("kind", STR, "embedding or head"),
        *_OPTION,
        Column("nbytes", INT, "bytes of codes, scales and zeros as stored"),
        Column(
            "rel_error", FLOAT, "tr(E H E^T) / tr(W H W^T); H is that of the head's input, 1 for an embedding alone"
        ),
        Column("kl_nats_per_token", FLOAT, "KL to the reference with this table alone at the option"),
        Column("lo", FLOAT, "lower end of its 95 % interval over windows"),
        Column("hi", FLOAT, "upper end of its 95 % interval over windows"),
        Column("key", STR, "shard in the store that holds the tensors"),
    ),
)
_SCHEME = (
    Column("scheme", STR, "its name, as bitalloc/scheme.py reads it; reference: the unquantised model"),
    Column("weights", STR, "type and method of the weights in scope"),
    Column("activations", STR, "type and scale of what they are multiplied with"),
    Column("rotation", STR, "none, online (an extra operation at run time), folded (into weights, exact), or both"),
    Column("allocation", STR, "uniform, or optimal: bits per unit by the exact solver"),
    Column("w_bits", INT, "bits of a weight; under optimal: of the uniform plan whose bytes are the budget"),
    Column("a_bits", INT, "bits of an activation"),
    Column("group_size", INT, "weights along the input that share one scale; missing: a whole row", nullable=True),
    Column("per_channel", BOOL, "one scale a row"),
    Column("quant_backend", STR, "simulated (ours), torchao or compressed-tensors; no speed follows from any"),
    Column("calib_method", STR, "what sets the codes of the weights: absmax, rtn, gptq or none"),
)
SCHEMES = Table(
    "schemes",
    "Weights and activations in few bits: what every scheme does to perplexity and predictions, corpus by corpus.",
    ("scheme", "task"),
    (
        *_SCHEME,
        Column("task", STR, "<corpus>/<split>"),
        Column("status", STR, "measured, or why this backend or family does not carry it, or the library is not here"),
        *_estimate("ppl", "e^nll"),
        *_estimate("nll_nats_per_token", "-log q of the next token, mean over scored tokens"),
        *_estimate("kl_nats_per_token", "KL(reference || scheme), mean over scored tokens"),
        *_estimate("top1", "share of tokens at which both have the same argmax"),
        Column("against", STR, "the scheme without what the name says last; empty where the table has none"),
        *_estimate("kl_change_nats_per_token", "KL less that of `against`, paired by window"),
        *_estimate("nll_change_nats_per_token", "nll less that of `against`, paired by window"),
        Column("n_tokens", INT, "scored tokens"),
        Column("n_windows", INT, "windows, which are resampled"),
        Column("nbytes", INT, "bytes of the matrices in scope as stored there", nullable=True),
        Column("bits_per_weight", FLOAT, "8 nbytes / their weights", nullable=True),
        Column("rotations", INT, "modules whose input is rotated at run time", nullable=True),
        Column("bits", STR, "unit -> bits, JSON", nullable=True),
        Column("seed", INT, "of the rotations and the resampling"),
        Column("scope", STR, "what is quantised and what is not, with reasons, JSON"),
        Column("scope_digest", STR, "SHA-256 of it"),
        Column("protocol", STR, "how it was measured, in full"),
    ),
)
LAYERWISE = Table(
    "layerwise",
    "A scheme for one module alone, and for all but one: where it hurts. Select split, all corpora.",
    ("scheme", "mode", "layer", "part"),
    (
        Column("scheme", STR, "its name, as bitalloc/scheme.py reads it"),
        Column("mode", STR, "all; quantise: this one alone; protect: all but this one, whose weights and input stay"),
        Column("layer", STR, "module path of the matrix; empty for all"),
        Column("block", INT, "index of the block; -1 for all"),
        Column("role", STR, "in_proj, out_proj, ...; empty for all"),
        Column("part", STR, "all, or rows of in_proj of Mamba2: z, x, B, C, dt"),
        Column("rows", INT, "outputs that are meant"),
        *_estimate("kl_nats_per_token", "KL(reference || model), mean over scored tokens"),
        *_estimate("saved_nats_per_token", "protect: KL of all less this one, paired by window"),
        Column("n_tokens", INT, "scored tokens"),
        Column("n_windows", INT, "windows, which are resampled"),
        Column("scope_digest", STR, "SHA-256 of what is in scope and what is not"),
        Column("protocol", STR, "how it was measured, in full"),
    ),
)
LAW = Table(
    "law",
    "The fitted error laws: parameters and goodness, by form and scope.",
    ("form", "scope", "statistic"),
    (
        Column("form", STR, "additive, multiplicative, exponential or interpolation"),
        Column("scope", STR, "pooled, a kind, a third of the depth, or a layer"),
        Column("statistic", STR, "a parameter (beta, delta, ...) or a goodness (r2_log, r2_loo, r2_rank, ...)"),
        *_INTERVAL,
    ),
)
RESIDUALS = Table(
    "residuals",
    "What the law that the configuration names leaves of each error.",
    ("layer", "quantizer", "bits", "group_size", "rank"),
    (
        _LAYER,
        *_PLACE,
        Column("kind", STR, "attention or mlp"),
        *_OPTION,
        Column("log_error", FLOAT, "natural logarithm of rel_error"),
        Column("log_predicted", FLOAT, "the same by the law"),
        Column("residual", FLOAT, "log_error - log_predicted"),
    ),
)
COSTS = Table(
    "costs",
    "What each option of each matrix costs: the input of the allocation.",
    ("model", "layer", "quantizer", "bits", "group_size", "rank"),
    (
        _MODEL,
        _LAYER,
        *_PLACE,
        Column("kind", STR, "attention or mlp"),
        *_OPTION,
        Column("nbytes", INT, "bytes as stored"),
        Column("rel_error", FLOAT, "tr(E H E^T) / tr(W H W^T)"),
        Column("source", STR, "measured, law or interpolation"),
    ),
)
PLAN = Table(
    "plan",
    "One option for each claimed matrix.",
    ("layer",),
    (
        _LAYER,
        *_PLACE,
        *_OPTION,
        Column("nbytes", INT, "bytes as stored"),
        Column("cost_nats_per_token", FLOAT, "coefficient x rel_error: predicted KL; missing: unknown", nullable=True),
    ),
)
PLANS = Table(
    "plans",
    "All plans of a model.",
    ("plan",),
    (
        Column("plan", STR, "name: <strategy>-<budget>, with a serial number in the random pool"),
        Column("strategy", STR, "member of the strategy family"),
        Column("budget", STR, "as the configuration states it; `component <name>`, `position`, `file` are none"),
        Column("budget_bytes", INT, "bytes that the claimed matrices may take, in the format that budgets count"),
        Column("nbytes", INT, "bytes that they take"),
        Column("bits_per_weight", FLOAT, "8 nbytes / weights of the claimed matrices"),
        Column("checkpoint_nbytes", INT, "predicted bytes of the whole checkpoint on disk"),
        Column("objective", FLOAT, "sum of coefficient x rel_error, nats a token; missing: unknown", nullable=True),
        Column("lower_bound", FLOAT, "no plan within the budget has a lower objective", nullable=True),
        Column("gap", FLOAT, "objective / lower_bound - 1", nullable=True),
        Column("note", STR, "who won (best), what was restricted, why a control is missing (optimal), or empty"),
    ),
)
EVOLUTION = Table(
    "evolution",
    "The champion of every generation of the evolutionary search, by seed.",
    ("seed", "generation"),
    (
        Column("seed", INT, "of the search"),
        Column("generation", INT, "0 is the start"),
        Column("champion", STR, "its precision map, JSON"),
        Column("fitness", FLOAT, "compression - penalty x degradation; -degradation where a budget is set"),
        Column("nbytes", INT, "bytes of the checkpoint, scales included, a tied head once"),
        Column("compression", FLOAT, "bytes with 16 bits everywhere / nbytes"),
        Column("ppl", FLOAT, "e^nll over the windows of the last stage, select split"),
        Column("reference_ppl", FLOAT, "the same of the unquantised model"),
        Column("kl_nats_per_token", FLOAT, "KL to the unquantised model on those windows"),
        Column("report_ppl", FLOAT, "e^nll over the report windows, which choose nothing"),
        Column("report_reference_ppl", FLOAT, "the same of the unquantised model"),
        *_estimate("report_loss_nats_per_token", "nll less that of the unquantised model on the report windows"),
        Column("report_kl_nats_per_token", FLOAT, "KL to the unquantised model on the report windows"),
        Column("changed", STR, "components that differ from the champion before; empty where it stayed"),
        Column("evaluations", INT, "genomes tried up to here, at whatever stage"),
    ),
)
ASIDE = ("component", "leaked")  # arms for one analysis each
FREE = ("position", "file")  # plans by rule and of the user's own: at no equal-byte budget


def without_arms(plans: pd.DataFrame) -> pd.DataFrame:
    """PLANS that compete at equal bytes: without those that keep to no budget or have seen the report windows."""
    return plans[~plans["strategy"].str.fullmatch("|".join(rf"{arm}(_\d+)?" for arm in (*ASIDE, *FREE)))]


TUNED = Table(
    "tuned",
    "What learning the codes of a plan brought: each block, the polish of the whole model, and the verdict.",
    ("plan", "part", "block"),
    (
        Column("plan", STR, "name of the plan"),
        Column("part", STR, "block; polish: all blocks at once; select: whether the tuned plan is shipped"),
        Column("block", INT, "index of the block; -1 for the whole model"),
        Column("step", INT, "the iterate that was kept, 0 = the start"),
        Column(
            "loss_before",
            FLOAT,
            "block: ||Y - Y*||^2 / ||Y*||^2 of its output on held-out calibrate windows, swept codes; polish: KL, "
            "there too, codes learned block by block; select: KL on the select split, swept codes; nats a token",
        ),
        Column("loss_after", FLOAT, "the same of what was learned"),
        Column("kept", BOOL, "lower than before; else the codes before it stay"),
        Column("note", STR, "why nothing was kept, or empty"),
        Column("wall_s", FLOAT, "seconds"),
        Column("key", STR, "shard in the store"),
    ),
)
TUNED_OPTIONS = Table(
    "tuned_options",
    "Blocks with all their matrices at one option, a draw of them: does the cheap error rank options as learning does?",
    ("block", "quantizer", "bits", "group_size", "rank"),
    (
        Column("block", INT, "index of the block, whose inputs are those of the original model"),
        *_OPTION,
        Column("rel_error", FLOAT, "mean of the sweep's rel_error over the matrices of the block"),
        Column("block_error_swept", FLOAT, "||Y - Y*||^2 / ||Y*||^2 of its output on held-out windows, swept codes"),
        Column("block_error_learned", FLOAT, "the same of learned codes; of the swept where no iterate was better"),
        Column("key", STR, "shard in the store"),
    ),
)
CHECKPOINTS = Table(
    "checkpoints",
    "Checkpoints that were written, and whether they have the promised size.",
    ("plan",),
    (
        Column("plan", STR, "name of the plan"),
        Column("path", STR, "folder, relative to the model's results"),
        Column("predicted_nbytes", INT, "bytes promised by the plan"),
        Column("nbytes", INT, "bytes on disk"),
        Column("digest", STR, "SHA-256 over names and digests of the weights files"),
    ),
)
EXPORTS = Table(
    "exports",
    "A checkpoint in a format of other software, and whether it has the promised size.",
    ("plan", "format"),
    (
        Column("plan", STR, "name of the plan"),
        Column("format", STR, "member of bitalloc.export.FORMATS"),
        Column("path", STR, "file or folder, beside this table"),
        Column("predicted_nbytes", INT, "bytes computed before writing"),
        Column("nbytes", INT, "bytes on disk: weights, headers, index, adapter"),
    ),
)
COST = Table(
    "cost",
    "What the evaluation is estimated to cost: what it reads, at which rate. All but the counts are times.",
    ("suite", "task", "role"),
    (
        Column("suite", STR, "windows (perplexity and divergence), world, downstream, or weights"),
        Column("task", STR, "<corpus>/<split>, <corpus>/<protocol>, task, or recomputed: matrices that no shard keeps"),
        Column("role", STR, "named, with the reference and its rerun, or pool: random plans"),
        Column("plans", INT, "plans that are scored"),
        Column("items", INT, "windows, items or matrices, over all of these plans"),
        Column("tokens", INT, "tokens to be read, or written, for them"),
        Column("stored_tokens", INT, "of these, found in the store"),
        Column("rate_tokens_per_s", FLOAT, "measured on this device within seconds", nullable=True),
        Column("hours", FLOAT, "of the device, for what is not in the store"),
    ),
)
EVALUATE = Table(
    "evaluate",
    "Scores of every plan, long form. The plan `reference` is the unquantised model.",
    ("plan", "suite", "task", "metric"),
    (
        Column("plan", STR, "name of the plan; reference-rerun: the unquantised model again, in other batches"),
        Column("suite", STR, "perplexity, divergence, world, protocols or downstream"),
        Column("task", STR, "<corpus>/<split>, <corpus>/<protocol>, or task"),
        Column(
            "metric",
            STR,
            "nll_nats_per_token, ppl, median_nll, bits_per_byte; kl_nats_per_token, top1, delta_p, ln_ppl_ratio, their "
            "percentiles and standard errors; word_perplexity, byte_perplexity; acc, margin_nats, flips; of downstream "
            "lm-eval's: acc,none, acc_stderr,none, exact_match,strict-match, ...",
        ),
        *_INTERVAL,
        Column("chance", FLOAT, "the score of guessing, where there is one", nullable=True),
        Column("status", STR, "ok, or floor: the reference is not above chance"),
        Column("protocol", STR, "how it was measured, in full"),
    ),
)
RESPONSES = Table(
    "responses",
    "What stands behind EVALUATE, one row a window or an item: for paired tests. Random plans may have fewer items.",
    ("plan", "suite", "task", "metric", "item"),
    (
        Column("plan", STR, "name of the plan"),
        Column("suite", STR, "perplexity, divergence, world, protocols or downstream"),
        Column("task", STR, "<corpus>/<split>, <corpus>/<protocol>, or task"),
        Column("metric", STR, "as in EVALUATE, before averaging"),
        Column("item", INT, "window, document or item"),
        Column("group", STR, "cluster for resampling"),
        Column("value", FLOAT, "the response"),
        Column("weight", FLOAT, "tokens or bytes behind it, or 1"),
    ),
)
SAMPLES = Table(
    "samples",
    "What a plan writes for each problem of HumanEval, and all that execution needs. Nothing of it has been executed.",
    ("plan", "task_id"),
    (
        Column("plan", STR, "name of the plan"),
        Column("task_id", STR, "of the data set"),
        Column("prompt", STR, "text that the model continues"),
        Column("completion", STR, "greedy continuation, up to the first stop sequence; written by the model"),
        Column("entry_point", STR, "function that the tests call"),
        Column("test", STR, "the data set's tests: defines check(candidate)"),
        Column("prompt_tokens", INT, "tokens of the prompt"),
        Column("completion_tokens", INT, "tokens generated, those of a stop sequence included"),
        Column("truncated", BOOL, "ended by max_new_tokens or the context, not by the model"),
        Column("unfit", BOOL, "the prompt leaves no room in the context: nothing was generated"),
    ),
)
OUTCOMES = Table(
    "outcomes",
    "What became of the samples in the sandbox.",
    ("plan", "task_id"),
    (
        Column("plan", STR, "name of the plan"),
        Column("task_id", STR, "of the data set"),
        Column("passed", BOOL, "all tests passed"),
        Column(
            "outcome",
            STR,
            "passed; failed: a wrong answer; error: raised, died or gave no plain value; timeout; unfit: not executed",
        ),
        Column("detail", STR, "name of the exception, or how it died; empty when it passed"),
        Column("truncated", BOOL, "ended by max_new_tokens or the context, not by the model"),
        Column("sandbox_backend", STR, "what contained the program"),
        Column("wall_s", FLOAT, "seconds of program and tests"),
    ),
)
HUMANEVAL = Table(
    "humaneval",
    "pass@1 of every plan on HumanEval.",
    ("plan", "metric"),
    (
        Column("plan", STR, "name of the plan"),
        Column("metric", STR, "pass@1"),
        *_INTERVAL,
        Column("stderr", FLOAT, "sqrt(p (1 - p) / (n - 1))"),
        Column("truncated", INT, "problems whose completion was cut off"),
        Column("unfit", INT, "problems whose prompt leaves no room in the context"),
        Column("timeouts", INT, "programs that were stopped"),
        Column("status", STR, "ok, or floor: the reference solves nothing, so that no plan can be told from it"),
        Column("sandbox_backend", STR, "what contained the programs"),
        Column("protocol", STR, "how it was measured, in full"),
    ),
)
GATES = Table(
    "gates",
    "Verdicts of the GO/NO-GO checks.",
    ("gate", "check"),
    (
        Column("gate", STR, "the checkpoint rule"),
        Column("check", STR, "the criterion"),
        Column("value", FLOAT, "measured; missing = could not be measured, a NO-GO", nullable=True),
        Column("threshold", FLOAT, "from the configuration"),
        Column("comparison", STR, "how value must stand to threshold, e.g. >="),
        Column("go", BOOL, "the criterion is met"),
        Column("mode", STR, "stop, warn or fallback: what a NO-GO does"),
        Column("why", STR, "why a check only warns, or empty"),
        Column("evidence", STR, "the table it was read from"),
    ),
)
GOODHART = Table(
    "goodhart",
    "Does perplexity tell the truth about the tasks?",
    ("analysis", "proxy", "gold", "budget", "statistic"),
    (
        Column("analysis", STR, "member of bitalloc.analyses, power first"),
        Column("proxy", STR, "what was optimised or selected by, or `all`"),
        Column("gold", STR, "what one cares about: a task, ppl:<corpus>, or `all` that can tell plans apart"),
        Column("budget", STR, "stratum of equal bytes, two components, or `all`"),
        Column("statistic", STR, "spearman, regret_points, ...; the analysis says what it is"),
        *_INTERVAL,
        Column("p_adjusted", FLOAT, "Holm over declared tests, Benjamini and Hochberg over others", nullable=True),
        Column(
            "status",
            STR,
            "ok; floor: reference not above chance; saturated: all as good as it; too_few plans; missing: not "
            "evaluated; beyond: outside what the pool reaches; no_overlap of two curves",
        ),
    ),
)
PHASE = Table(
    "phase",
    "Rank against bits at equal bytes, from the sweep alone: which family of options costs less, matrix by matrix.",
    ("scope", "name", "budget", "bits_per_weight"),
    (
        _MODEL,
        Column("scope", STR, "matrix, or shape: all matrices of one kind and shape together"),
        Column("name", STR, "module path of the matrix, or <kind> <rows> x <columns>"),
        Column("kind", STR, "attention or mlp"),
        Column("rows", INT, "outputs O"),
        Column("columns", INT, "inputs I"),
        Column("width", INT, "min(O, I): the largest rank there could be"),
        Column("budget", STR, "the budget whose bits a weight these are; empty: a level of the grid"),
        Column("bits_per_weight", FLOAT, "8 bytes / weights, everything counted, that the matrix may take"),
        Column("bits_only", STR, "option of rank 0, or the two that share the bytes; empty for a shape"),
        Column("with_rank", STR, "option with a low-rank part, or the two that share the bytes; empty for a shape"),
        Column("cost_bits_only", FLOAT, "predicted KL, coefficient x rel_error, nats a token", nullable=True),
        Column("cost_with_rank", FLOAT, "predicted KL, nats a token; missing: too few bytes for any", nullable=True),
        Column("cost_joint", FLOAT, "predicted KL where both families share the bytes, nats a token", nullable=True),
        *_estimate("saved", "1 - cost_joint / cost_bits_only: what offering rank beside bits saves, 0 = nothing"),
        *_estimate("ratio", "cost_with_rank / cost_bits_only: every matrix with rank against none with it"),
        Column("n", INT, "matrices that the intervals are over: the spread between them"),
        Column("ratio_alone", FLOAT, "the ratio for a matrix that cannot share bytes with others", nullable=True),
        Column("winner", STR, "rank: saves 2 % or more, interval included; bits: less; else open, or out of reach"),
    ),
)
CONTROLS = Table(
    "controls",
    "The joint plan against bits alone and rank alone at equal bytes, paired window by window.",
    ("budget", "control", "task", "metric"),
    (
        Column("budget", STR, "as the configuration states it"),
        Column("control", STR, "bits_only or rank_only"),
        Column("task", STR, "<corpus>/report; empty where nothing could be compared"),
        Column("metric", STR, "nll_nats_per_token or kl_nats_per_token"),
        Column("joint", FLOAT, "of the plan `optimal`, nats a token", nullable=True),
        Column("alone", FLOAT, "of the control", nullable=True),
        Column("value", FLOAT, "joint - alone: below 0 the joint plan is better", nullable=True),
        Column("lo", FLOAT, "lower end of its 95 % interval over windows, paired", nullable=True),
        Column("hi", FLOAT, "upper end of its 95 % interval", nullable=True),
        Column("n", INT, "windows"),
        Column("status", STR, "ok; same plan; or why there is nothing to compare"),
    ),
)
SUCCESS = Table(
    "success",
    "What was promised, at three levels, and the level that was reached.",
    ("criterion", "budget", "gold"),
    (
        Column("criterion", STR, "ppl_gain_percent, accuracy_drop_points, r2_log or r2_loo"),
        Column("budget", STR, "as the configuration states it, or `all`"),
        Column("gold", STR, "corpus, task in which most is lost, or form of the law"),
        Column("unit", STR, "%, points, or 1"),
        Column("comparison", STR, "how value must stand to a level: >= or <="),
        Column("minimal", FLOAT, "the least level"),
        Column("target", FLOAT, "what was aimed at"),
        Column("stretch", FLOAT, "the highest level"),
        *_INTERVAL,
        Column("level", STR, "reached by the value: none, minimal, target or stretch"),
        Column("level_sure", STR, "reached by the whole interval; none where there is none"),
        Column("status", STR, "ok, or why there is no value"),
        Column("verdicts", STR, "the gates it stands on, every NO-GO by name"),
    ),
)
BACKENDS = Table(
    "backends",
    "One plan in every backend: does what was simulated survive the software that runs it?",
    ("plan", "backend", "task"),
    (
        Column("plan", STR, "name of the plan"),
        Column("backend", STR, "member of bitalloc.backends.BACKENDS"),
        Column("task", STR, "<corpus>/report: the windows of the evaluation"),
        Column("status", STR, "`measured`, or in one line why not"),
        *_estimate("ppl", "perplexity, exp of the mean of nll_nats_per_token"),
        *_estimate("kl_nats_per_token", "KL to the unquantised model"),
        *_estimate("top1", "share of tokens whose argmax is the unquantised model's"),
        Column("max_logit_difference", FLOAT, "max |z' - z| / max |z|, z the dequantised plan's logits", nullable=True),
        Column("nbytes", INT, "bytes of the weights, where `held` says", nullable=True),
        Column("held", STR, "disk: weights files; memory: all parameters once loaded", nullable=True),
        Column("load_s", FLOAT, "seconds from files, read before, to a model", nullable=True),
        Column("tokens_per_s", FLOAT, "without the head, the first pass not counted; gguf: llama.cpp's", nullable=True),
        *_estimate("loss_nats_per_token", "mean NLL above the dequantised plan's, paired over windows"),
        *_estimate("speedup", "how many times as fast as the unquantised model, paired over batches; a time"),
    ),
)

POSITION = Table(
    "position",
    "What every rule by position does to every model of a study: damage against the unquantised model.",
    ("model", "rule", "corpus", "metric"),
    (
        _MODEL,
        Column("blocks", INT, "transformer blocks of the model"),
        Column("rule", STR, "member of strategies/position.py"),
        Column("corpus", STR, "name of the corpus in the configuration"),
        Column("metric", STR, "ln_ppl_ratio or kl_nats_per_token"),
        Column("nbytes", INT, "bytes of all tensors under the rule, scales included"),
        *_INTERVAL,
    ),
)
CRITERIA = Table(
    "criteria",
    "What was claimed of positions, and the verdict on each claim.",
    ("criterion", "model", "corpus", "metric"),
    (
        Column("criterion", STR, "the claim"),
        Column("model", STR, "name in the model sheet, or `all` of the study"),
        Column("corpus", STR, "corpus, or empty where the claim is about several models"),
        Column("metric", STR, "ln_ppl_ratio, kl_nats_per_token (nats a token) or speedup (a ratio, of times)"),
        *_INTERVAL,
        Column("comparison", STR, "how the value must stand, e.g. > 0; empty where it was not run"),
        Column("verdict", STR, "met, not met: the whole interval says so; open: it does not; not run"),
        Column("why", STR, "what stands behind the value, or why there is none"),
    ),
)
PASSKEY = Table(
    "passkey",
    "Is a key that was told in a long text still known at its end? By length and depth, same items for every scheme.",
    ("scheme", "length", "depth"),
    (
        Column("scheme", STR, "its name, as bitalloc/scheme.py reads it; reference: the unquantised model"),
        Column("length", INT, "tokens of the prompt"),
        Column("depth", FLOAT, "place of the needle, 0 the beginning, 1 the end; -1: over all depths"),
        Column("status", STR, "ok, or floor: the reference is not above chance, and nothing is claimed"),
        Column("n", INT, "items"),
        *_estimate("accuracy", "share of items whose answer holds the number; Wilson's interval"),
        *_estimate("key_nll_nats", "-sum of ln p over the tokens of the number, nats a key, mean over items"),
        Column("n_retained", INT, "items that the reference has right"),
        *_estimate("retention", "share of them that are right; Wilson's interval; missing at the floor"),
        Column("kind", STR, "ruler or world"),
        Column("template_version", INT, "of the wording and the haystack"),
        Column("template_digest", STR, "SHA-256 of the template"),
        Column("chance", FLOAT, "accuracy of guessing"),
        Column(
            "scan_path", STR, "how a state space scanned prompts: matrix, transformers, cuda kernels", nullable=True
        ),
        Column("seed", INT, "of the items"),
    ),
)
DRIFT = Table(
    "drift",
    "How far the state of a Mamba2 strays when its projections are quantised; the state itself is not.",
    ("scheme", "metric", "t", "layer", "head"),
    (
        Column("scheme", STR, "its name; reference; floor: step, floor: bf16 state (the reference, read otherwise)"),
        Column(
            "metric", STR,
            "state_relerr, readout_relerr, kl_nats_per_token, top1, slope, rho, half_life_tokens, "
            "first_divergence_tokens, repetition_rate or nonfinite",
        ),
        Column("t", INT, "tokens that were read; -1 where the metric is about all of them"),
        Column("layer", INT, "index of the layer; -1: the mean over all"),
        Column("head", INT, "index of the head; -1: the mean over all"),
        *_INTERVAL,
        Column("scan_path", STR, "how sequences were scanned: matrix, transformers or cuda kernels"),
        Column("state_dtype", STR, "type of the recurrent state"),
        Column("seed", INT, "of the resampling"),
    ),
)  # fmt: skip

PARALLEL = Table(
    "parallel",
    "Aligned sentences as a model reads them: each by itself, from a beginning-of-text token on.",
    ("language", "sentence"),
    (
        Column("language", STR, "as its file is named, e.g. he"),
        Column("sentence", INT, "the same sentence has one number in every language"),
        Column("group", INT, "sentences of one group share a fact; whole groups are split and resampled"),
        Column("split", STR, "select or report; they share no group"),
        Column("tokens", INTS, "the beginning, then the sentence"),
        Column("ntokens", INT, "tokens of the sentence, all of them scored"),
        Column("nbytes", INT, "UTF-8 bytes of the sentence"),
        Column("nchars", INT, "characters of the sentence"),
        Column("unigram_nats", FLOAT, "nats under the byte frequencies of the language's select split"),
    ),
)
SENTENCES = Table(
    "sentences",
    "Every aligned sentence in every language under every plan that was read: what fairness is computed from.",
    ("plan", "language", "sentence"),
    (
        _MODEL,
        Column("plan", STR, "reference, none, or the units that are protected, joined by +"),
        Column("language", STR, "as its file is named, e.g. he"),
        Column("sentence", INT, "the same sentence has one number in every language"),
        Column("group", INT, "sentences of one group share a fact; whole groups are split and resampled"),
        Column("split", STR, "select or report; they share no group"),
        Column("nll_nats", FLOAT, "negative log-likelihood of the whole sentence, nats"),
        Column("ntokens", INT, "tokens of the sentence, all of them scored"),
        Column("nbytes", INT, "UTF-8 bytes of the sentence"),
        Column("nchars", INT, "characters of the sentence"),
        Column("unigram_nats", FLOAT, "nats under the byte frequencies of the language's select split"),
    ),
)
SETS = Table(
    "sets",
    "Every set of protected units that was read, and its bytes.",
    ("plan",),
    (
        _MODEL,
        Column("plan", STR, "none, or the units that are protected, joined by +"),
        Column("size", INT, "how many units"),
        Column("low", STR, "precision of what is not protected, e.g. int4"),
        Column("high", STR, "precision of what is, e.g. fp16"),
        Column("nbytes", INT, "bytes of all tensors, scales included, a tied head once"),
        Column("matrices_nbytes", INT, "of them those of the matrices that may be rounded, embeddings and head too"),
        Column("weights", INT, "weights of these matrices"),
    ),
)
ARMS = Table(
    "arms",
    "What is compared at one budget: the fair set, and what else could be protected.",
    ("budget", "arm"),
    (
        _MODEL,
        Column("budget", STR, "as it was asked for"),
        Column("budget_nbytes", INT, "bytes of the whole checkpoint"),
        Column("arm", STR, "none, fair, english, allocator, pattern, or random-<seed>"),
        Column("plan", STR, "the set: a row of SETS"),
        Column("confidence", FLOAT, "share of resamples of the select split in which this set wins", nullable=True),
        Column("note", STR, "how it came about"),
    ),
)
ANSWERS = Table(
    "answers",
    "Multiple-choice items by language: which of them every arm answers rightly.",
    ("plan", "language", "item"),
    (
        Column("plan", STR, "reference, or a row of SETS"),
        Column("language", STR, "language of the question"),
        Column("item", STR, "task and number"),
        Column("acc", FLOAT, "1 = right"),
    ),
)
PROTECTED = Table(
    "protected",
    "Every unit that can be protected: what it costs, what it saves alone, and how often it is selected.",
    ("budget", "unit"),
    (
        _MODEL,
        Column("budget", STR, "as it was asked for"),
        Column("unit", STR, "block, embedding or head, with GPT-2's short names"),
        Column("nbytes", INT, "bytes that protecting it adds"),
        Column("chosen", BOOL, "it is in the fair set"),
        Column("frequency", FLOAT, "share of resamples of the select split whose best set holds it"),
        *_INTERVAL,
    ),
)
SYNERGY = Table(
    "synergy",
    "Pairs of units: what protecting both removes of worst_rel beyond the sum of each alone, on the select split.",
    ("first", "second"),
    (
        _MODEL,
        Column("first", STR, "unit"),
        Column("second", STR, "unit"),
        Column("worst_rel", FLOAT, "worst relative damage with both protected"),
        *_INTERVAL,
    ),
)
FAIRNESS = Table(
    "fairness",
    "What every arm does to every language, on the report split.",
    ("budget", "arm", "split", "language", "metric"),
    (
        _MODEL,
        Column("budget", STR, "as it was asked for"),
        Column("arm", STR, "reference, or as in ARMS; random: the mean over its seeds"),
        Column("plan", STR, "the set that is protected; empty for a mean"),
        Column("nbytes", FLOAT, "bytes of the whole checkpoint; missing for the reference", nullable=True),
        Column("split", STR, "report, or items"),
        Column("language", STR, "language, or `all` that are ranked"),
        Column("metric", STR, "damage_nats, damage_rel, delta_ppl ..: src/bitalloc/fairness.py has the formulas"),
        *_INTERVAL,
        Column("status", STR, "ok; floor: no better than byte unigrams, not ranked; or why there is no value"),
    ),
)
RECORDS = Table(
    "records",
    "What was measured of a model at some precision, one row a number, with all that it depends on. Missing: absent or "
    "not known, never 0. What differs between two equal runs stands in records.VARYING.",
    ("run_id", "stage", "variant", "task", "batch", "prompt_length", "gen_len", "depth", "metric"),
    (
        Column("run_id", STR, "of the configuration, the model and the seed: records.run_id"),
        Column("stage", STR, "perplexity, long_context or profile"),
        _MODEL,
        Column("revision", STR, "commit on the hub, or `local`", nullable=True),
        Column("variant", STR, "the model as it is (reference), a plan in a backend, or a scheme"),
        Column("task", STR, "<corpus>/<split>, or the task; missing for a profile", nullable=True),
        Column("batch", INT, "sequences side by side", nullable=True),
        Column("prompt_length", INT, "tokens of a prompt, or of a window", nullable=True),
        Column("gen_len", INT, "tokens that are generated", nullable=True),
        Column("stride", INT, "tokens scored at the end of a window", nullable=True),
        Column("depth", FLOAT, "where in the prompt the passkey stands, 0 to 1", nullable=True),
        Column("metric", STR, "what was measured, with its unit: records.METRICS"),
        Column("value", FLOAT, "the point estimate; of a profile the median", nullable=True),
        Column("lo", FLOAT, "lower end of its 95 % interval", nullable=True),
        Column("hi", FLOAT, "upper end of its 95 % interval", nullable=True),
        Column("q25", FLOAT, "lower quartile over the iterations", nullable=True),
        Column("q75", FLOAT, "upper quartile over the iterations", nullable=True),
        Column("n", INT, "iterations, windows or items behind the value", nullable=True),
        Column("status", STR, "ok, or in one line why there is no value"),
        Column("simulated", BOOL, "rounded, but computed in full: tells nothing of speed or memory"),
        Column("w_bits", FLOAT, "bits of a weight's code, mean over the plan; 16 = as it is", nullable=True),
        Column("a_bits", INT, "bits of an activation's code; 16 = as it is", nullable=True),
        Column("group_size", INT, "weights that share one scale, where all groups are alike", nullable=True),
        Column("per_channel", BOOL, "one scale an output", nullable=True),
        Column("quant_backend", STR, "what computes with the codes", nullable=True),
        Column("calib_method", STR, "how the codes were found", nullable=True),
        Column("scope_digest", STR, "of the names of the matrices that are quantised", nullable=True),
        Column("scan_path", STR, "how a state-space model scans; missing for others", nullable=True),
        Column("template_hash", STR, "of the prompt's template", nullable=True),
        Column("template_version", STR, "of the prompt's template", nullable=True),
        Column("dtype", STR, "that the model computes in", nullable=True),
        Column("device", STR, "cpu or cuda"),
        Column("threads", INT, "of the CPU", nullable=True),
        Column("isa", STR, "vector instructions that torch uses on the CPU", nullable=True),
        Column("seed", INT, "of everything that is drawn"),
        Column("git_commit", STR, "of bitalloc; + where files differ from it"),
        Column("host", STR, "name of the machine"),
        Column("gpu", STR, "name of the GPU", nullable=True),
        Column("driver", STR, "version of its driver", nullable=True),
        Column("cuda", STR, "version of CUDA that torch was built for", nullable=True),
        Column("versions", STR, "of Python and of the libraries"),
        Column("notes", STR, "anything else"),
    ),
)

TABLES = {table.name: table for table in list(globals().values()) if isinstance(table, Table)}
