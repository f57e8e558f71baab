"""What all sections share: unknown keys are forbidden, nothing changes after it was read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Bits = Literal[2, 3, 4, 5, 6, 8, 16]
Rule = Literal["all_high", "all_low", "early", "early_0", "middle", "late", "last", "champion"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4", "int3", "int2"]
SPOKEN = ("fair", "english")  # strategies that ask what a plan costs each language


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
