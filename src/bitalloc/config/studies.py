"""What stands beside the chain: evolution, schemes, long contexts, languages, position."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from bitalloc.config.section import Positive, Precision, Rule, Section


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
