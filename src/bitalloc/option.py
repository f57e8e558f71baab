"""An option: how one matrix may be stored. Pure arithmetic, no torch, so that plans can be costed anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what is stored does not depend on how the configuration is written
    from bitalloc.config import Sweep

PASS_THROUGH = "none"
USUAL_GROUP = 64
ABSMAX = "absmax"  # rounded by the largest weight of a row: symmetric, and no calibration has a say


@dataclass(frozen=True, order=True)
class Option:
    """W_OI ~ Q + L R: `bits`-bit codes in groups of `group_size` along the input, plus a rank-`rank` part.

    The pass-through (`quantizer` none, 16 bits) stores the matrix in 16 bits and has neither groups nor rank.
    """

    quantizer: str
    bits: int
    group_size: int
    rank: int
    factor_bits: int = 8
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.quantizer == ABSMAX:
            object.__setattr__(self, "symmetric", True)

    @property
    def name(self) -> str:
        """Short name for files and figures.

        >>> Option("gptq", 3, 64, 8).name
        'gptq-3b-g64-r8'
        """
        return f"{self.quantizer}-{self.bits}b-g{self.group_size}-r{self.rank}"

    @classmethod
    def parse(cls, name: str, *, factor_bits: int, symmetric: bool) -> Option:
        """The inverse of `name`; raises `ValueError`.

        >>> Option.parse("gptq-3b-g64-r8", factor_bits=8, symmetric=False)
        Option(quantizer='gptq', bits=3, group_size=64, rank=8, factor_bits=8, symmetric=False)
        """
        quantizer, bits, group, rank = name.rsplit("-", 3)
        return cls(quantizer, int(bits[:-1]), int(group[1:]), int(rank[1:]), factor_bits, symmetric)

    def nbytes(self, rows: int, columns: int) -> int:
        """Exact bytes of the stored tensors of a [rows, columns] matrix, file headers not counted.

        Codes: rows of `bits` x columns, each padded to a byte; 16-bit scales, and zeros of `bits` bits
        unless symmetric, one for each row and group; factors with one 16-bit scale for each rank (8 bits).

        >>> Option("gptq", 2, 64, 0).nbytes(128, 128)  # codes 4096, scales 512, zeros 64
        4672
        >>> Option("gptq", 2, 64, 4).nbytes(128, 128) - 4672  # 4 x 256 int8 entries, 8 scales of 2 bytes
        1040
        >>> Option("none", 16, 0, 0).nbytes(128, 128)
        32768
        """
        if self.quantizer == PASS_THROUGH:
            return 2 * rows * columns
        groups = -(-columns // self.group_size)
        quantised = rows * -(-columns * self.bits // 8) + 2 * rows * groups
        if not self.symmetric:
            quantised += -(-rows * groups * self.bits // 8)
        factors = self.rank * (rows + columns) * self.factor_bits // 8
        if self.rank and self.factor_bits < 16:
            factors += 2 * 2 * self.rank
        return quantised + factors

    def key(self) -> dict[str, Any]:
        """What identifies the option in a shard."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def options(sweep: Sweep) -> list[Option]:
    """The options of the configuration, in order: quantizer, group size, bits, rank; 16 bits come once, last.

    >>> from bitalloc.config import Sweep
    >>> [option.name for option in options(Sweep(bits=[2, 16], group_sizes=[64], ranks=[0, 4]))]
    ['gptq-2b-g64-r0', 'gptq-2b-g64-r4', 'none-16b-g0-r0']
    """
    found = [
        Option(quantizer, bits, group_size, rank, sweep.factor_bits, sweep.symmetric)
        for quantizer in sweep.quantizers
        for group_size in sweep.group_sizes
        for bits in sweep.bits
        if bits < 16
        for rank in sweep.ranks
    ]
    return found + ([Option(PASS_THROUGH, 16, 0, 0)] if 16 in sweep.bits else [])


def usual_group(sweep: Sweep) -> int:
    """The group size nearest to 64, for what is measured at one group size only."""
    return min(sweep.group_sizes, key=lambda size: abs(size - USUAL_GROUP))


def from_row(row: Mapping[str, Any], sweep: Sweep) -> Option:
    """The option of a row of SWEEP, COSTS or PLAN."""
    if row["quantizer"] == PASS_THROUGH:
        return Option(PASS_THROUGH, 16, 0, 0)
    place = (str(row["quantizer"]), int(row["bits"]), int(row["group_size"]), int(row["rank"]))
    return Option(*place, sweep.factor_bits, sweep.symmetric)
