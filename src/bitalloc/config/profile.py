"""Speed, memory and what they cost."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, model_validator

from bitalloc.config.section import Positive, Section
from bitalloc.errors import nearest


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
