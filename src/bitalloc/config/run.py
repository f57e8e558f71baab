"""One file for measurements by hand, without the workflow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from bitalloc.config.profile import Timing
from bitalloc.config.reading import read
from bitalloc.config.section import Positive, Section
from bitalloc.config.sheet import CORPORA, Corpus
from bitalloc.errors import BitallocError, nearest


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


def read_run(path: Path) -> Run:
    """The configuration of a run by hand; every fault is one line with the key and the nearest valid name."""
    run = read(Run, path)
    for name in (*run.calibrate.corpora, *run.perplexity.corpora):
        if name not in run.corpora:
            raise BitallocError(f"{path}: unknown corpus {name!r}: {nearest(name, run.corpora)}")
    return run
