"""From a checkpoint to compressed plans: what retrieve, calibrate, sweep, fit, allocate, tune and compress write."""

from __future__ import annotations

import pandas as pd

from bitalloc.tables.schema import (
    BOOL,
    FLOAT,
    INT,
    INTERVAL,
    INTS,
    INTSS,
    LAYER,
    MODEL,
    OPTION,
    PLACE,
    STR,
    Column,
    Table,
)

INVENTORY = Table(
    "inventory",
    "Every tensor of the checkpoint: what it is, and whether a plan may touch it.",
    ("model", "tensor"),
    (
        MODEL,
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
        MODEL,
        LAYER,
        *PLACE,
        Column("kind", STR, "attention or mlp"),
        Column("site", STR, "name of the input that the matrix reads"),
        *OPTION,
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
        MODEL,
        LAYER,
        *PLACE,
        Column("kind", STR, "attention or mlp"),
        Column("signal", STR, "kl: measured at the probe option; fisher: Kronecker-factored, one backward pass"),
        Column("coefficient", FLOAT, "nats a token for each unit of rel_error"),
        Column("kl_nats_per_token", FLOAT, "KL to the reference with this matrix alone at the probe option"),
        Column("lo", FLOAT, "lower end of its 95 % interval over windows", nullable=True),
        Column("hi", FLOAT, "upper end of its 95 % interval over windows", nullable=True),
        Column("rel_error", FLOAT, "rel_error of the probe option"),
    ),
)
EMBEDDINGS = Table(
    "embeddings",
    "What the embedding and a head of its own cost at fewer bits, each measured by itself.",
    ("model", "layer", "quantizer", "bits", "group_size", "rank"),
    (
        MODEL,
        LAYER,
        *PLACE,
        Column("kind", STR, "embedding or head"),
        *OPTION,
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
LAW = Table(
    "law",
    "The fitted error laws: parameters and goodness, by form and scope.",
    ("form", "scope", "statistic"),
    (
        Column("form", STR, "additive, multiplicative, exponential or interpolation"),
        Column("scope", STR, "pooled, a kind, a third of the depth, or a layer"),
        Column("statistic", STR, "a parameter (beta, delta, ...) or a goodness (r2_log, r2_loo, r2_rank, ...)"),
        *INTERVAL,
    ),
)
RESIDUALS = Table(
    "residuals",
    "What the law that the configuration names leaves of each error.",
    ("layer", "quantizer", "bits", "group_size", "rank"),
    (
        LAYER,
        *PLACE,
        Column("kind", STR, "attention or mlp"),
        *OPTION,
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
        MODEL,
        LAYER,
        *PLACE,
        Column("kind", STR, "attention or mlp"),
        *OPTION,
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
        LAYER,
        *PLACE,
        *OPTION,
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
            "block: ||Y - Y*||^2 / ||Y*||^2 of its output on held-out calibrate windows, swept codes; polish: KL "
            "there, codes learned block by block; select: KL on the select split, swept codes; nats a token",
        ),
        Column(
            "loss_after",
            FLOAT,
            "the same of what was learned; polish: + w (NLL - NLL before), w = polish_truth sqrt(loss_before)",
        ),
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
        *OPTION,
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
