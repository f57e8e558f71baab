"""The whole configuration: all sections, a model's own settings laid over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

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
    Tune,
)
from bitalloc.config.gates import Gates
from bitalloc.config.profile import Profile
from bitalloc.config.reading import read, validate
from bitalloc.config.section import Positive, Section
from bitalloc.config.sheet import CORPORA, Corpus, Model
from bitalloc.config.studies import Drift, Evolve, Fairness, Passkey, Schemes, Study
from bitalloc.errors import BitallocError, nearest
from bitalloc.families import FUSED


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
    return validate(Config, raw, where)


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


def read_study(path: Path, known: Config) -> Study:
    """The study of a file; raises `BitallocError` for what is no study, and for models and corpora that are unknown."""
    study = read(Study, path, "the study ")
    for what, named, there in (("model", study.models, known.models), ("corpus", study.corpora, known.corpora)):
        for name in named:
            if name not in there:
                raise BitallocError(f"{path}: unknown {what} {name!r}: {nearest(name, there)}")
    return study


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both and key != "items" else value
    return merged
