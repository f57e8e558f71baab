"""The GO/NO-GO criteria: thresholds, and what a NO-GO does."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from bitalloc.config.section import Section


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
