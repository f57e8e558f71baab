"""The configuration: one section a stage, unknown keys forbidden, units in the descriptions.

`python -m bitalloc.config` writes `config/config.yaml` (every default with its meaning) and
`config/schema.json` from these classes; a test holds them in step.
"""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bitalloc.errors import BitallocError, nearest
from bitalloc.families import FAMILIES, FUSED

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Bits = Literal[2, 3, 4, 5, 6, 8, 16]
Rule = Literal["all_high", "all_low", "early", "early_0", "middle", "late", "last", "champion"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4", "int3", "int2"]
SPOKEN = ("fair", "english")  # strategies that ask what a plan costs each language


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Corpus(Section):
    """Where a corpus comes from. Sources are tried in order; environment variables expand."""

    sources: list[str] = Field(
        description="`world`, `docstrings`, a local .txt, .raw, .json, .jsonl, .json.gz or .parquet file, or "
        "hub:<dataset>@<revision>/<such a file>"
    )
    separator: str = Field(
        "\n\n", description="after each document of a model without a bos token; empty: pieces of one document"
    )
    field: str = Field("text", description="of a record of .jsonl, .json.gz or .parquet that holds its text")
    kind: Literal["documents", "wikitext"] = Field(
        "documents",
        description="wikitext: lines of WikiText, to be cut into articles by the protocols",
    )


class Retrieve(Section):
    calibrate: list[str] = Field(["wikitext2_train"], description="corpora that moments are measured on")
    select: list[str] = Field(["wikitext2"], description="corpora on which `best` is chosen")
    report: list[str] = Field(["wikitext2"], description="corpora that are reported; disjoint windows from select")
    window: Positive = Field(2048, description="tokens in a window")
    calibrate_windows: Positive = Field(1024, description="windows of the calibrate split, over all its corpora")
    select_windows: Positive = Field(32, description="windows of the select split, for each corpus")
    report_windows: Positive = Field(64, description="windows of the report split, for each corpus")
    items: dict[str, Positive] = Field({}, description="task of the synthetic world -> number of items")


class Calibrate(Section):
    token_normalised: bool = Field(False, description="scale each token's input to unit length before averaging")
    batch: Positive = Field(8, description="windows a forward pass")


class Sweep(Section):
    quantizers: list[str] = Field(["gptq"], description="members of the quantiser family")
    bits: list[Bits] = Field([2, 3, 4], description="bits of a code; 16 passes the matrix through")
    group_sizes: list[Positive] = Field([128], description="weights along the input that share one scale")
    ranks: list[Annotated[int, Field(ge=0)]] = Field([0, 32, 64, 128, 256], description="ranks of the low-rank part")
    embedding_bits: list[Bits] = Field(
        [16], description="bits offered to the embedding and to a head of its own; [16] leaves them as they are"
    )
    symmetric: bool = Field(False, description="codes without a zero point")
    factor_bits: Literal[8, 16] = Field(8, description="bits of an entry of the low-rank factors")
    damping: Annotated[float, Field(gt=0)] = Field(0.1, description="added to H, as a share of its mean diagonal")
    act_order: bool = Field(True, description="quantise groups, and columns within them, by falling activation energy")
    iterations: Annotated[int, Field(ge=0)] = Field(
        1, description="rounds of quantise, then refit the low-rank part; best is kept; 0: no refit"
    )
    unit: Literal["layer", "matrix", "experiment"] = Field("layer", description="experiments of a job (layer: a block)")
    keep_matrices: bool | Literal["auto"] = Field(
        "auto", description="keep compressed matrices beside the errors; auto: when all together take under keep_limit"
    )
    keep_limit: str = Field("2GB", description="bytes, for keep_matrices: auto")
    workspace: str = Field("4GB", description="bytes that stacked experiments may take; more are done in turns")


class Sensitivity(Section):
    signal: Literal["kl", "fisher"] = Field("kl", description="the signal that the allocation uses")
    signals: list[Literal["kl", "fisher"]] = Field(["kl"], description="the signals that are measured")
    probe_bits: Bits = Field(3, description="bits of the probe option, rank 0")
    windows: Positive = Field(16, description="calibrate windows that are scored")


class Fit(Section):
    form: Literal["additive", "multiplicative", "exponential"] = Field(
        "multiplicative", description="the law that fills in unmeasured options when its gate says GO"
    )
    extra_ranks: list[Positive] = Field([], description="ranks offered to the allocation without being swept")
    resamples: Positive = Field(200, description="bootstrap resamples over matrices")


class Allocate(Section):
    budgets: list[str] = Field(
        ["uniform 2b", "2.6bpw", "uniform 3b"],
        description="`8GB`/`8GiB` for the whole checkpoint, `2.6bpw` over the claimed matrices, `uniform 3b g64 r8`, "
        "`24GB context 8192 batch 1` for a card that also holds cache and activations, or as a mapping: "
        "`fits: {memory: 24GB, context: 8192, batch: 1}`",
    )
    format: Literal["bitalloc", "huggingface", "gptq", "gguf"] | None = Field(
        None, description="the format whose bytes the budgets count; null: the first of export.formats, else bitalloc"
    )
    strategies: list[str] = Field(
        ["uniform", "optimal", "bits_only", "rank_only", "manual", "greedy"], description="members of the family"
    )
    fuse: list[Literal["qkv", "gate_up"]] | None = Field(
        None,
        description="groups whose matrices take one option together, as servers merge them: qkv, gate_up; "
        "null: both when export.formats has huggingface, else none",
    )
    runners_up: Annotated[int, Field(ge=0)] = Field(2, description="near-optimal plans that compete for `best`")
    jitter: float = Field(0.2, description="log-normal spread of the coefficients from which runners-up are solved")
    pool: Annotated[int, Field(ge=0)] = Field(20, description="random plans for each budget")
    pool_slack: Share = Field(0.01, description="share of the budget that a random plan may leave unused")
    arms: list[Literal["component", "leaked"]] = Field(
        [],
        description="plans for the analysis alone, never shipped. component: one component harmed in steps, all else "
        "at 16 bits; leaked: sensitivities and choice from the report windows",
    )
    rules: list[Rule] = Field(
        [], description="plans by position alone, fp16 against int8, at no budget: strategies/position.py"
    )
    plans: list[str] = Field(
        [], description="precision maps of your own, .json or .yaml: a plan each, of the file's name, at no budget"
    )

    @field_validator("budgets", mode="before")
    @classmethod
    def _spelled(cls, budgets: Any) -> Any:
        """A mapping `fits` as the line that it stands for."""
        return [_fits(budget) for budget in budgets] if isinstance(budgets, list) else budgets


def _fits(budget: Any) -> Any:
    """
    >>> _fits({"fits": {"memory": "24GB", "context": 8192}})
    '24GB context 8192'
    """
    if not isinstance(budget, dict):
        return budget
    if set(budget) == {"fits"} and isinstance(budget["fits"], dict):
        card = budget["fits"]
        if set(card) <= {"memory", "context", "batch"} and "memory" in card and ("context" in card or len(card) == 1):
            return " ".join(
                [str(card["memory"]), *(f"{name} {card[name]}" for name in ("context", "batch") if name in card)]
            )
    raise ValueError("write a budget as 8GB, 2.6bpw, uniform 3b, or fits: {memory: 24GB, context: 8192, batch: 1}")


class Evolve(Section):
    precisions: list[Literal["fp32", "fp16", "int8", "int4", "int3", "int2"]] = Field(
        ["fp32", "fp16", "int8", "int4"], min_length=1, description="offered to every component but the final norm"
    )
    fitness: Literal["ppl", "kl"] = Field(
        "ppl",
        description="baseline bytes / bytes - penalty x degradation; ppl: max(0, (ppl - ppl0) / ppl0); kl: e^KL - 1",
    )
    penalty: Annotated[float, Field(ge=0)] = Field(10.0, description="compression that a degradation of 1 costs")
    budget: str | None = Field(
        None, description="bytes of the checkpoint that no genome exceeds, 141MB; fitness is then -degradation alone"
    )
    start: Literal["uniform", "optimal"] = Field(
        "uniform", description="the first champion; optimal: additive, from the KL of single components"
    )
    generations: Positive = Field(20, description="at most; fewer where nothing new is left to try")
    offspring: Positive = Field(16, description="children of a generation")
    switches: Positive = Field(3, description="levels that a child switches, at most")
    stages: list[tuple[Positive, Positive]] = Field(
        [(2048, 4), (8192, 1)],
        min_length=1,
        description="[tokens of the select split that are read, children that go on], the last stage with 1",
    )
    seeds: Positive = Field(1, description="searches, with seeds seed, seed + 1, ..; the fittest champion is kept")

    @field_validator("stages")
    @classmethod
    def _narrowing(cls, stages: list[tuple[int, int]]) -> list[tuple[int, int]]:
        tokens, survivors = zip(*stages, strict=True)
        if (
            list(tokens) != sorted(set(tokens))
            or list(survivors) != sorted(survivors, reverse=True)
            or survivors[-1] != 1
        ):
            raise ValueError("stages read more and more tokens and let fewer and fewer children on, the last one 1")
        return stages


class Compress(Section):
    plans: list[str] = Field(
        ["best"],
        description="strategies whose plans are written as checkpoints, at every budget; tuned: the map of best, its "
        "codes learned, tuned_<strategy>: that of another",
    )

    @field_validator("plans")
    @classmethod
    def _shipped(cls, plans: list[str]) -> list[str]:
        if kept := [name for name in plans if name.removeprefix("tuned_") in ("component", "leaked")]:
            raise ValueError(f"{kept[0]} plans serve the analysis alone; no checkpoint is made of them")
        if free := [name for name in plans if name in ("position", "file")]:
            raise ValueError(f"{free[0]} plans are at no budget; ask for results/<model>/models/<plan>")
        return plans


class Tune(Section):
    learn: list[Literal["rounding", "scales", "zeros", "factors"]] = Field(
        ["rounding", "scales"], description="what is learned block by block; bytes stay as they are"
    )
    iterations: Annotated[int, Field(ge=0)] = Field(200, description="steps a block")
    optimizer: Literal["sign", "adam"] = Field("sign", description="signed gradient descent, or Adam")
    rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of the first step, in codes; it falls linearly to 0; null: 1 / iterations"
    )
    start: Literal["swept", "nearest"] = Field("swept", description="from the plan's codes, or rounded to nearest")
    inputs: Literal["tuned", "original"] = Field(
        "tuned",
        description="what a block learns from: the output of the tuned blocks before it, or of the original ones",
    )
    windows: Positive = Field(128, description="calibrate windows that are learned on, drawn by seed; all if fewer")
    holdout: Share = Field(0.125, description="share of them that only judges the iterates")
    batch: Positive = Field(4, description="windows a step")
    polish: Annotated[int, Field(ge=0)] = Field(
        200,
        description="steps through the whole model, against the KL of its predictions; 0: none. In memory: the model "
        "and some 12 bytes for each weight of its matrices",
    )
    polish_learn: list[Literal["rounding", "scales", "zeros", "factors"]] = Field(
        ["rounding", "scales", "factors"], description="what these steps learn"
    )
    polish_optimizer: Literal["sign", "adam"] = Field("adam", description="signed gradient descent, or Adam")
    polish_rate: Annotated[float, Field(gt=0)] | None = Field(
        0.0003, description="of the first of them; null: 1 / polish"
    )
    sample: Positive = Field(32, description="blocks at one option that are learned for tune.png, drawn by seed")


class Export(Section):
    formats: list[Literal["huggingface", "gptq", "gguf"]] = Field(
        [], description="formats in which the checkpoints of compress.plans are exported"
    )
    k_quants: bool = Field(
        False, description="gguf: smaller types for what is rounded anew, by llama-cpp-python, which must be installed"
    )


class Task(Section):
    """A task of lm-eval (suite downstream), by its name there; `mmlu` is all of its subjects."""

    limit: Positive | None = Field(None, description="items, drawn by seed; of each subject of mmlu; null: all")
    fewshot: Annotated[int, Field(ge=0)] | None = Field(
        None, description="examples in the prompt; null: as lm-eval defines the task, 5 for mmlu"
    )
    data: str | None = Field(
        None,
        description="local copy: the original form, or <split>.jsonl or .parquet with the rows of the hub; "
        "null: ${BITALLOC_DATA}/<task> where it exists, else the hub",
    )
    chat: bool = Field(False, description="prompts go through the tokenizer's chat template")
    timeout_s: Positive = Field(600, description="an answer that takes longer to generate is missing")


class Evaluate(Section):
    suites: list[str] = Field(["perplexity", "divergence"], description="members of the suite family")
    batch: Positive = Field(8, description="windows a forward pass")
    stride: Positive | None = Field(
        None, description="tokens scored at the end of a window, as if it slid by so much; null = all but the first"
    )
    protocols: list[Literal["gptq", "lm-eval", "llama.cpp"]] = Field(
        [], description="conventions by which whole texts are read, for PPL that compares with published numbers"
    )
    texts: list[str] = Field(["wikitext2"], description="corpora that the protocols read")
    documents: Positive | None = Field(None, description="documents of a text that protocols read at most; null = all")
    tokens: Positive | None = Field(None, description="tokens of a text that protocols read at most; null = all")
    tasks: dict[str, Task] = Field(
        {}, description="suite downstream: task of lm-eval -> {limit, fewshot, data, chat, timeout_s}"
    )
    pool_points: Annotated[float, Field(gt=0, le=100)] | None = Field(
        5.0,
        description="points of a task that two random plans must differ by to be told apart with 80 % power: random "
        "plans are asked only as many items of a task as that takes, the others all; null: all",
    )
    pool_discordant: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="share of items on which two random plans differ, for that; a run before tells it (power)"
    )
    rerun: bool = Field(
        True, description="score the unquantised model twice, in other batches: the floor of flips and of KL"
    )
    ceiling_hours: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of the device: an evaluation that is estimated to take longer does not start; null: none"
    )
    resamples: Positive = Field(2000, description="bootstrap resamples of an interval")
    jobs: Positive = Field(1, description="jobs among which the plans are shared out")


class HumanEval(Section):
    execute: bool = Field(False, description="execute what the model writes, in bubblewrap; off: nothing is executed")
    sources: list[str] = Field(
        [
            "${BITALLOC_DATA}/humaneval/HumanEval.jsonl.gz",
            "hub:openai/openai_humaneval@main/openai_humaneval/test-00000-of-00001.parquet",
        ],
        description="the problems: a .jsonl, .jsonl.gz or .parquet file, tried in order",
    )
    max_new_tokens: Positive = Field(1024, description="tokens of a completion, greedy, as in lm-eval's `humaneval`")
    batch: Positive = Field(8, description="prompts a forward pass")
    timeout_s: Annotated[float, Field(gt=0)] = Field(10.0, description="seconds on the clock that a program may take")
    memory: str = Field("512MiB", description="bytes of address space that a program may take")


class Analyze(Section):
    resamples: Positive = Field(2000, description="bootstrap resamples")
    folds: Positive = Field(
        20, description="random item splits of whatever is chosen on one half and scored on the other"
    )
    margin: Annotated[float, Field(gt=0)] = Field(
        1.0, description="points of accuracy within which a plan counts as equal to another (equivalence test)"
    )


class Passkey(Section):
    kind: Literal["ruler", "world"] = Field(
        "ruler", description="ruler: one passage over and over; world: facts, for models trained on them"
    )
    lengths: list[Annotated[int, Field(ge=32)]] = Field(
        [256, 512, 1024, 2048, 4096, 8192], min_length=1, description="tokens of a prompt"
    )
    depths: Positive = Field(10, description="places of the needle, evenly from the beginning to the end")
    items: Positive = Field(5, description="items of a length and depth, the same for every scheme")
    schemes: list[str] = Field(
        ["bf16", "w8a8", "w4a8", "w4a4"], description="schemes of weights and activations, bitalloc/scheme.py"
    )
    batch: Positive = Field(16, description="prompts of the shortest length a forward pass, fewer of longer ones")


class Drift(Section):
    length: Annotated[int, Field(ge=16)] = Field(2048, description="tokens of a sequence")
    first: Annotated[int, Field(ge=2)] = Field(8, description="tokens before the first look; then twice as many each")
    sequences: Annotated[int, Field(ge=2)] = Field(16, description="at most, from the report windows")
    schemes: list[str] = Field(
        ["bf16", "w8a8", "w4a8", "w4a4"], description="schemes of weights and activations, bitalloc/scheme.py"
    )
    prompt: Positive = Field(64, description="tokens before a model runs freely")
    new_tokens: Annotated[int, Field(ge=4)] = Field(128, description="that it then goes on by itself")
    batch: Positive = Field(8, description="sequences a forward pass")


class Schemes(Section):
    names: list[str] = Field(
        [
            "bf16", "fp16", "w8a8", "w8a8@torchao", "w8a8+static", "w8a8+online",
            "w4a16", "w4a16+rtn", "w4a16+gptq", "w4a16+gptq+dp",
            "w4a8", "w4a8+g32", "w4a8+asym", "w4a8+asym@torchao", "w4a8+static", "w4a8+online", "w4a8+dp",
            "w4a8+gptq", "w4a8+gptq+online", "w4a8+gptq+online+dp",
            "w4a4", "w4a4@compressed-tensors", "w4a4+rtn", "w4a4+gptq", "w4a4+g32", "w4a4+static", "w4a4+static+p99",
            "w4a4+static+p100", "w4a4+asym", "w4a4+clip", "w4a4+online", "w4a4+folded", "w4a4+dp",
            "w4a4+gptq+online", "w4a4+gptq+online+dp", "w4a4+gptq+dp", "w4a4+gptq+dp+online", "w4a4+online+dp",
            "w4a4+online+dp+gptq", "w4a4+gptq+online+dp+folded", "w4a4+gptq+online+dp+clip", "w4a4+gptq+online+dp+asym",
        ],
        description="schemes of weights and activations that are scored, as bitalloc/scheme.py names them; each is "
        "held against the one without what its name says last",
    )  # fmt: skip
    layerwise: list[str] = Field(["w4a4"], description="schemes whose modules are quantised, and spared, one by one")
    group_size: Positive | None = Field(
        None, description="weights along the input that share one scale; null: all of a row; +g32 in a name goes before"
    )
    percentile: Annotated[float, Field(gt=0, le=100)] = Field(
        99.9, description="of |x|, percent: what `static` does not clip"
    )
    windows: Positive = Field(64, description="calibrate windows that are read, evenly over all")


class Report(Section):
    authors: list[str] = Field([], description="author line of the paper; none: bitalloc")


class Backends(Section):
    plans: list[str] = Field(
        [], description="plans that are run, e.g. bits_only-2.6bpw; none: `best` of the first budget"
    )
    names: list[str] = Field(
        [
            "reference", "dequantised", "native", "huggingface", "gptq", "gguf", "torchao", "torchao_int8",
            "bitsandbytes", "bitsandbytes_int8",
        ],
        description="members of the family of backends",
    )  # fmt: skip


class Price(Section):
    """What an hour of a machine costs, where that was read and when."""

    usd_per_hour: Annotated[float, Field(gt=0)] | None = Field(None, description="null: unknown, and no cost is told")
    source: str = Field("", description="where the price was read")
    date: str = Field("", description="when, YYYY-MM-DD")

    @model_validator(mode="after")
    def _dated(self) -> Price:
        if self.usd_per_hour is not None and not (self.source and re.fullmatch(r"\d{4}-\d\d-\d\d", self.date)):
            raise ValueError("a price needs its `source` and its `date`, 2026-01-31 in quotes")
        return self


class Timing(Section):
    lengths: list[Positive] = Field([128, 512, 2048], min_length=1, description="tokens of a prompt")
    batches: list[Positive] = Field([1, 4], min_length=1, description="sequences side by side")
    new_tokens: Annotated[int, Field(ge=2)] = Field(32, description="tokens that each writes; none ends early")
    warmup: Positive = Field(2, description="generations before the clock counts, for every variant, length and batch")
    iterations: Positive = Field(10, description="generations that are timed, at least")
    seconds: Annotated[float, Field(ge=0)] = Field(10.0, description="seconds of them, at least, of every variant")
    compile: bool = Field(False, description="torch.compile, of what is timed; what it takes is told apart")
    utilisation: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of a paid hour in which the device is at work, for the cost; 1: the least it can be"
    )
    prices: dict[str, Price] = Field({}, description="machine -> {usd_per_hour, source, date}")
    priced_as: str | None = Field(
        None, description="the machine of prices that the tokens are costed on; null: no cost is told"
    )
    resamples: Positive = Field(2000, description="bootstrap resamples of an interval")

    @model_validator(mode="after")
    def _priced(self) -> Timing:
        if self.priced_as is None:
            return self
        if self.priced_as not in self.prices:
            raise ValueError(f"no price of {self.priced_as!r}: {nearest(self.priced_as, self.prices)}")
        if self.prices[self.priced_as].usd_per_hour is None:
            raise ValueError(f"the price of {self.priced_as!r} is null; give usd_per_hour, its source and date")
        return self


class Profile(Timing):
    variants: list[str] = Field(
        ["reference", "all_low:torchao_int8", "champion:native"],
        min_length=1,
        description="what is held against the first of them: reference, <rule or plan>:<backend>, or a scheme",
    )


class Check(Section):
    threshold: float = Field(description="what the measured value is held against")
    mode: Literal["stop", "warn", "fallback"] | None = Field(None, description="overrides gates.mode for this check")
    why: str = Field("", description="the measured value and the reason, required where a check only warns")

    @model_validator(mode="after")
    def _explained(self) -> Check:
        if self.mode == "warn" and not self.why:
            raise ValueError("a check that only warns needs `why`: the measured value and the reason")
        return self


def _check(threshold: float, description: str, **kwargs: Any) -> Any:
    return Field(Check(threshold=threshold, **kwargs), description=description)


class Checks(Section):
    completeness: Check = _check(1.0, "share of the planned experiments that have a finite error, at least")
    sensitivity_spread: Check = _check(3.0, "largest over smallest coefficient, more than")
    error_range: Check = _check(10.0, "largest over smallest rel_error of the median matrix, more than")
    layer_spread: Check = _check(1.5, "largest over smallest rel_error of a matrix at the probe option, more than")
    r2: Check = _check(0.7, "R^2 of log error, in sample, more than", mode="fallback")
    r2_leave_one_out: Check = _check(0.9, "R^2 of log error, each option left out in turn, more than", mode="fallback")
    r2_rank: Check = _check(0.5, "R^2 of the effect of rank, log E(b,r) - log E(b,0), more than", mode="fallback")
    r2_interpolation: Check = _check(0.6, "leave-one-out R^2 of the fallback, monotone interpolation, more than")
    beta: Check = _check(0.0, "decay with bits: lower end of its interval, more than")
    delta: Check = _check(0.0, "decay with rank: lower end of its interval, more than")
    r2_attention: Check = _check(0.7, "R^2 of log error over attention matrices, more than", mode="fallback")
    r2_mlp: Check = _check(0.7, "R^2 of log error over MLP matrices, more than", mode="fallback")
    objective_gap: Check = _check(
        0.005, "1 - objective of optimal over uniform, best budget, more than", mode="fallback"
    )
    predicted_bytes: Check = _check(0.001, "|bytes on disk / predicted - 1|, at most")
    manual_gain: Check = _check(0.02, "1 - PPL of manual over uniform at equal bytes, more than")
    optimal_recovery: Check = _check(
        0.25, "share of uniform's excess loss that best recovers at 2.4-2.7 bits a weight (or 5 % PPL), at least"
    )
    downstream: Check = _check(2.0, "points of accuracy that best loses to the reference, at most")
    languages: Check = _check(2, "languages in which the reference is better than a byte-unigram model, at least")


class Gates(Section):
    mode: Literal["stop", "warn"] = Field(
        "stop", description="what a NO-GO does: halt its branch, or stamp what follows"
    )
    checks: Checks = Field(default_factory=Checks, description="the criteria")


class Model(Section):
    """A row of the model sheet. Give a hub id with a revision, or a local directory."""

    hub: str | None = Field(None, description="Hugging Face id")
    revision: str = Field("main", description="commit, tag or branch of the hub id")
    path: str | None = Field(None, description="local directory, tried before the hub; environment variables expand")
    family: str = Field(description="architecture, see bitalloc/families.py")
    blocks: Positive = Field(description="transformer blocks; the work is planned from it before the weights are here")
    remote_code: bool = Field(False, description="never set by us: run code that ships with the checkpoint")
    settings: dict[str, Any] = Field({}, description="what departs from the configuration for this model")

    @model_validator(mode="after")
    def _complete(self) -> Model:
        if self.hub is None and self.path is None:
            raise ValueError("give `hub` (an id) or `path` (a local directory)")
        if self.family not in FAMILIES:
            raise ValueError(f"unknown family {self.family!r}: {nearest(self.family, FAMILIES)}")
        return self


_DATA = "${BITALLOC_DATA}"
CORPORA = {
    "world": Corpus(sources=["world"], separator="\n"),
    "docstrings": Corpus(sources=["docstrings"]),
    "tinystories": Corpus(sources=[f"{_DATA}/tinystories/tinystories_1000.json"]),
    "wikitext2": Corpus(
        sources=[
            f"{_DATA}/wikitext2/wiki.test.raw",
            "hub:Salesforce/wikitext@main/wikitext-2-raw-v1/test-00000-of-00001.parquet",
        ],
        separator="",
        kind="wikitext",
    ),
    "wikitext2_train": Corpus(
        sources=[
            f"{_DATA}/wikitext2/wikitext2_train_5k.txt",
            "hub:Salesforce/wikitext@main/wikitext-2-raw-v1/train-00000-of-00001.parquet",
        ],
        separator="",
        kind="wikitext",
    ),
    "c4": Corpus(
        sources=[f"{_DATA}/c4/validation.jsonl", "hub:allenai/c4@main/en/c4-validation.00000-of-00008.json.gz"],
        separator=" ",
    ),
    "python": Corpus(
        sources=[
            f"{_DATA}/code/python_requests.txt",
            "hub:codeparrot/codeparrot-clean-valid@main/file-000000000054.json.gz",
        ],
        field="content",
    ),
    "pile": Corpus(
        sources=[
            f"{_DATA}/pile/test.jsonl",
            "hub:NeelNanda/pile-10k@main/data/train-00000-of-00001-4746b8785c874cc7.parquet",
        ]
    ),
    "redpajama": Corpus(
        sources=[
            f"{_DATA}/redpajama/sample.jsonl",
            "hub:togethercomputer/RedPajama-Data-1T-Sample@main/cc_2023-06_sample.jsonl",
        ]
    ),
}


class Fairness(Section):
    """Multilingual disparity: parallel text, and what may be protected on whose behalf."""

    languages: list[str] = Field(["en", "he", "ar", "zh"], description="as their texts are named; en has the margin")
    text: str = Field(
        "", description="folder of <language>.txt, aligned line by line; empty: built in, of the tiny world"
    )
    sentences: Annotated[int, Field(gt=0)] | None = Field(None, description="aligned sentences drawn of the text")
    bits: Literal[2, 3, 4, 8] = Field(4, description="of what is not protected: absmax codes, one scale a row")
    protect_bits: Literal[3, 4, 8, 16] = Field(16, description="of a block or embedding that is protected")
    budget: str = Field(
        "", description="5.2bpw over all that may be rounded, or bytes of all; empty: as blocks 0, 9 and 11 of 12 take"
    )
    margin_en: Annotated[float, Field(ge=0)] = Field(
        0.01,
        description="what English may lose more, as a share of its NLL, than under the plan that ignores languages",
    )
    pairs: Annotated[int, Field(ge=0)] = Field(100, description="pairs of units that are measured, at most")
    seeds: Positive = Field(20, description="random sets that the fair one is compared with")


class Study(Section):
    """One file of config/studies: which models are held against one another, on which texts."""

    title: str = Field(description="the question, for people")
    kind: Literal["scale", "architectures"] = Field(description="what its models differ in, hence what it can show")
    models: list[str] = Field(description="rows of the model sheet, in the order of the columns")
    corpora: list[str] = Field(
        description="corpora that are scored; the first is home, the others ask whether it holds"
    )
    rules: list[Rule] = Field(list(get_args(Rule)), description="rules of strategies/position.py, in order of the rows")
    high: Precision = Field("fp16", description="precision of what a rule keeps")
    low: Precision = Field("int8", description="precision of all else")
    settings: dict[str, Any] = Field({}, description="what departs from the settings of each model")


class Perplexity(Section):
    corpora: list[str] = Field(["wikitext2"], min_length=1, description="texts that are scored")
    split: Literal["select", "report"] = Field("report", description="windows of a split share none with another's")
    window: Positive = Field(2048, description="tokens in a window")
    windows: Positive = Field(64, description="of each corpus")
    stride: Positive | None = Field(
        None, description="tokens scored at the end of a window, as if it slid by so much; null = all but the first"
    )
    batch: Positive = Field(8, description="windows a forward pass")
    resamples: Positive = Field(2000, description="bootstrap resamples of an interval")


class LongContext(Section):
    kind: Literal["ruler", "world"] = Field("ruler", description="world: facts, for models trained on them")
    lengths: list[Annotated[int, Field(ge=32)]] = Field(
        [256, 512, 1024, 2048, 4096, 8192], min_length=1, description="tokens of a prompt"
    )
    depths: Positive = Field(10, description="places of the key, evenly from the beginning to the end")
    items: Positive = Field(5, description="items of a length and depth, the same for every variant")
    batch: Positive = Field(16, description="prompts of the shortest length a forward pass, fewer of longer ones")


class Texts(Section):
    corpora: list[str] = Field(["wikitext2_train"], description="that a scheme is calibrated on, if it needs to be")
    window: Positive = Field(512, description="tokens in a window")
    windows: Positive = Field(64, description="over all of these corpora")


class Run(Section):
    """One file for the scripts that run by hand: what is measured, of which model, at which precisions."""

    model: str = Field(
        description="a row of config/models.yaml, a local folder, or a hub id, with @revision if you like"
    )
    variants: list[str] = Field(
        ["reference"], min_length=1, description="reference, <rule>:<backend>, or schemes of weights and activations"
    )
    seed: int = Field(0, description="of everything that is drawn")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU when there is one")
    threads: Positive = Field(4, description="CPU threads")
    notes: str = Field("", description="kept with every record")
    store: str = Field("results/store", description="content-addressed shards, from which what was cut off goes on")
    corpora: dict[str, Corpus] = Field(CORPORA, description="where texts come from")
    calibrate: Texts = Field(default_factory=Texts)
    perplexity: Perplexity = Field(default_factory=Perplexity)
    long_context: LongContext = Field(default_factory=LongContext)
    profile: Timing = Field(default_factory=Timing)

    @field_validator("corpora", mode="before")
    @classmethod
    def _known(cls, corpora: Any) -> Any:
        """The project's corpora, and those given here over them."""
        return {name: corpus.model_dump() for name, corpus in CORPORA.items()} | corpora

    @field_validator("variants")
    @classmethod
    def _once(cls, variants: list[str]) -> list[str]:
        if len(set(variants)) < len(variants):
            raise ValueError("a variant stands there twice")
        return variants


class Config(Section):
    seed: int = Field(0, description="of everything that is drawn")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU when there is one")
    threads: Positive = Field(
        4,
        description="CPU threads of a job that runs alone, shared by jobs side by side; bytes repeat for equal threads",
    )
    store: str = Field("results/store", description="content-addressed shards, shared by models and runs")
    corpora: dict[str, Corpus] = Field(CORPORA, description="where texts come from")
    retrieve: Retrieve = Field(default_factory=Retrieve)
    calibrate: Calibrate = Field(default_factory=Calibrate)
    sweep: Sweep = Field(default_factory=Sweep)
    sensitivity: Sensitivity = Field(default_factory=Sensitivity)
    fit: Fit = Field(default_factory=Fit)
    allocate: Allocate = Field(default_factory=Allocate)
    tune: Tune = Field(default_factory=Tune)
    evolve: Evolve = Field(default_factory=Evolve)
    compress: Compress = Field(default_factory=Compress)
    export: Export = Field(default_factory=Export)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    humaneval: HumanEval = Field(default_factory=HumanEval)
    analyze: Analyze = Field(default_factory=Analyze)
    passkey: Passkey = Field(default_factory=Passkey)
    drift: Drift = Field(default_factory=Drift)
    schemes: Schemes = Field(default_factory=Schemes)
    report: Report = Field(default_factory=Report)
    backends: Backends = Field(default_factory=Backends)
    profile: Profile = Field(default_factory=Profile)
    fairness: Fairness = Field(default_factory=Fairness)
    gates: Gates = Field(default_factory=Gates)
    skip: dict[str, str] = Field(
        {}, description="model -> why studies leave it out; `make validate` fills it in for what the machine lacks"
    )
    models: dict[str, Model] = Field({}, description="the model sheet, config/models.yaml")

    @property
    def fuse(self) -> list[str]:
        """Groups of `families.FUSED` whose matrices take one option together."""
        if self.allocate.fuse is not None:
            return list(self.allocate.fuse)
        return list(FUSED) if "huggingface" in self.export.formats else []

    @property
    def format(self) -> str:
        """The format whose bytes budgets count."""
        return self.allocate.format or next(iter(self.export.formats), "bitalloc")

    def for_model(self, name: str) -> Config:
        """This configuration with the model's own settings laid over it."""
        return parse(_merge(self.model_dump(mode="json"), self.model(name).settings), where=f"models.{name}.settings")

    def for_study(self, name: str, study: Study) -> Config:
        """The configuration of one model in a study: its corpora are the report split, and nothing else is read."""
        asked = {"retrieve": {"calibrate": [], "select": [], "report": study.corpora, "items": {}}}
        whole = self.for_model(name).model_dump(mode="json")
        return parse(_merge(_merge(whole, study.settings), asked), where=f"study settings of {name}")

    def model(self, name: str) -> Model:
        if name not in self.models:
            raise BitallocError(f"unknown model {name!r}: {nearest(name, self.models)} (config/models.yaml)")
        return self.models[name]


def parse(raw: dict[str, Any], *, where: str = "configuration") -> Config:
    """Validate a mapping; every fault becomes one line with the key and the nearest valid name."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise BitallocError("; ".join(_explain(fault, where) for fault in error.errors()[:3])) from None


def read_study(path: Path, known: Config) -> Study:
    """The study of a file; raises `BitallocError` for what is no study, and for models and corpora that are unknown."""
    try:
        study = Study.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (OSError, yaml.YAMLError) as error:
        raise BitallocError(f"cannot read the study {path}: {' '.join(str(error).split())[:200]}") from None
    except ValidationError as error:
        raise BitallocError("; ".join(_explain(fault, str(path), Study) for fault in error.errors()[:3])) from None
    for what, named, there in (("model", study.models, known.models), ("corpus", study.corpora, known.corpora)):
        for name in named:
            if name not in there:
                raise BitallocError(f"{path}: unknown {what} {name!r}: {nearest(name, there)}")
    return study


def read_run(path: Path) -> Run:
    """The configuration of a run by hand; every fault is one line with the key and the nearest valid name."""
    try:
        run = Run.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (OSError, yaml.YAMLError) as error:
        raise BitallocError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None
    except ValidationError as error:
        raise BitallocError("; ".join(_explain(fault, str(path), Run) for fault in error.errors()[:3])) from None
    for name in (*run.calibrate.corpora, *run.perplexity.corpora):
        if name not in run.corpora:
            raise BitallocError(f"{path}: unknown corpus {name!r}: {nearest(name, run.corpora)}")
    return run


def _explain(fault: Any, where: str, root: Any = None) -> str:
    path = [str(part) for part in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key {'.'.join(path)!r}: {nearest(path[-1], _keys(path[:-1], root))}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {'.'.join(path)}: {message} (got {str(fault['input'])[:60]!r})"


def _keys(path: list[str], root: Any = None) -> list[str]:
    """Valid keys of the section at `path`."""
    section: Any = root or Config
    for part in path:
        field = getattr(section, "model_fields", {}).get(part)
        named = {"models": Model, "corpora": Corpus, "tasks": Task, "prices": Price}
        section = named.get(part, field.annotation if field else section)
    return list(section.model_fields)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both and key != "items" else value
    return merged


def load(*files: Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read YAML files in order, later ones over earlier ones, then `overrides`."""
    raw: dict[str, Any] = {}
    for path in files:
        try:
            raw = _merge(raw, yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        except OSError as error:
            raise BitallocError(f"cannot read the configuration {path}: {error.strerror}") from None
        except yaml.YAMLError as error:
            raise BitallocError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return parse(_merge(raw, overrides or {}))


_UNITS = {"": 1, "B": 1} | {f"{p}{i}B": (1024 if i else 1000) ** e for e, p in enumerate("KMGT", 1) for i in ("", "i")}


def parse_bytes(text: str) -> int:
    """Bytes of "8GB", "8GiB" or "123".

    >>> parse_bytes("8GB"), parse_bytes("1.5KiB"), parse_bytes("123")
    (8000000000, 1536, 123)
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if not match:
        raise BitallocError(f"cannot read {text!r} as bytes; write for example 8GB, 8GiB or 1200000")
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if match[2].lower() not in units:
        raise BitallocError(f"unknown unit {match[2]!r} in {text!r}: {nearest(match[2], list(_UNITS)[1:])}")
    return round(float(match[1]) * units[match[2].lower()])


def budget_slug(text: str) -> str:
    """The budget in the names of plans.

    >>> budget_slug("2.6bpw"), budget_slug("8 GB"), budget_slug("uniform 3b  g64 r8"), budget_slug("8GB context 4096")
    ('2.6bpw', '8GB', 'uniform-3b-g64-r8', '8GB-context-4096')
    """
    text = " ".join(text.split())
    return text.replace(" ", "-") if text.startswith("uniform") or " context " in text else text.replace(" ", "")


def tuned_from(strategy: str) -> str | None:
    """The strategy whose map a tuned one keeps; None for one that is not tuned.

    >>> tuned_from("tuned"), tuned_from("tuned_uniform"), tuned_from("best")
    ('best', 'uniform', None)
    """
    if strategy != "tuned" and not strategy.startswith("tuned_"):
        return None
    return strategy.removeprefix("tuned").removeprefix("_") or "best"


def expand(text: str) -> str | None:
    """`text` with environment variables and ~ expanded; None when a variable is not set."""
    expanded = os.path.expanduser(os.path.expandvars(text))
    return None if re.search(r"\$\{?\w+", expanded) else expanded


def default_yaml() -> str:
    """Every default with its description: the text of config/config.yaml."""
    lines = ["# Every setting with its default. Written by `python -m bitalloc.config`; a test keeps it in step.", ""]
    for name, field in Config.model_fields.items():
        if name == "models":
            continue
        default = getattr(Config(), name)
        if isinstance(default, Section):
            lines += [f"{name}:", *_section_lines(default, 2), ""]
        else:
            value = {k: v.model_dump() for k, v in default.items()} if isinstance(default, dict) else default
            lines += [f"# {field.description}", yaml.safe_dump({name: value}, sort_keys=False, width=110).rstrip(), ""]
    return "\n".join(lines)


def _section_lines(section: Section, indent: int) -> list[str]:
    pad, lines = " " * indent, []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        lines += [f"{pad}# {line}" for line in textwrap.wrap(field.description or "", 100)]
        if isinstance(value, Check):
            shown = yaml.safe_dump(value.model_dump(exclude_defaults=True), default_flow_style=True, width=110).strip()
            lines.append(f"{pad}{name}: {shown}")
        elif isinstance(value, Section):
            lines += [f"{pad}{name}:", *_section_lines(value, indent + 2)]
        else:
            dumped = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
            lines.append(f"{pad}{name}: {dumped}")
    return lines


def schema_json() -> str:
    return json.dumps(Config.model_json_schema(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "config")
    (folder / "config.yaml").write_text(default_yaml(), encoding="utf-8")
    (folder / "schema.json").write_text(schema_json(), encoding="utf-8")
