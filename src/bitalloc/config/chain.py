"""The stages of the chain, from retrieve to report: a section each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from bitalloc.config.section import Bits, Positive, Rule, Section, Share


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
        "and some 40 bytes for each weight of its matrices",
    )
    polish_learn: list[Literal["rounding", "scales", "zeros", "factors"]] = Field(
        ["rounding", "scales", "factors"], description="what these steps learn"
    )
    polish_optimizer: Literal["sign", "adam"] = Field("adam", description="signed gradient descent, or Adam")
    polish_rate: Annotated[float, Field(gt=0)] | None = Field(
        0.0006, description="of the first of them; null: 1 / polish"
    )
    polish_truth: Annotated[float, Field(ge=0)] = Field(
        0.15,
        description="weight of the NLL of the text beside the KL, in square roots of the KL at the start: a lower "
        "perplexity for some 2 % more of KL; 0: KL alone",
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


class Report(Section):
    authors: list[str] = Field([], description="author line of the paper; none: bitalloc")
