"""A scheme: in how many bits the weights and activations of a model's Linears are, and by which techniques.

Its name says all of it, so that a name in the configuration, a table or on a command line is a scheme:

    bf16, fp16                 16-bit weights and activations
    w8a8, w4a8, w4a4, w4a16    codes of weights and activations; plain: largest value, a scale a row, a scale a token
    w4a4+gptq+online           techniques, in any order
    w4a4+g32, w8a8+static+p99  inputs that share a scale of the weights; percentile that `static` does not clip
    w8a8@torchao               by other software than our simulation

No torch: a workflow plans by it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from bitalloc.errors import BitallocError, nearest

TECHNIQUES = {
    "rtn": "scales of the weights searched, weighted by the inputs' energy; rounded to nearest",
    "gptq": "the same, and errors fed forward (GPTQ)",
    "static": "activations: one calibrated scale for each tensor, at a percentile",
    "asym": "activations: with a zero point",
    "clip": "activations: a share of the largest value sets a token's scale, the best on the calibrated inputs",
    "online": "Hadamard rotation of the input of the last matrix of a mixer or MLP, at run time: an extra operation",
    "folded": "Hadamard rotation of the residual stream, folded into the weights: exact, at no cost",
    "dp": "bits of the weights per unit, 2 to 8, by the exact solver, at no more bytes than uniform",
}
_NUMBER = r"([gp])(\d+(?:\.\d+)?)"  # group size, percentile
BACKENDS = ("simulated", "torchao", "compressed-tensors")
DTYPES = ("bf16", "fp16")
LADDER = ("bf16", "w8a8", "w4a8", "w4a4")


@dataclass(frozen=True)
class Scheme:
    """`w_bits` and `a_bits` of 16 are floats of `dtype`; `group_size` inputs share a scale, None: a whole row."""

    name: str
    w_bits: int = 16
    a_bits: int = 16
    dtype: str = "bf16"
    techniques: tuple[str, ...] = field(default=())
    group_size: int | None = None
    percentile: float = 99.9
    quant_backend: str = "simulated"

    @classmethod
    def parse(cls, name: str, *, group_size: int | None = None, percentile: float = 99.9) -> Scheme:
        """The scheme of that name; raises `BitallocError` for one that says nothing or contradicts itself.

        >>> scheme = Scheme.parse("w4a8+gptq+online")
        >>> scheme.w_bits, scheme.a_bits, scheme.calib_method, scheme.online, scheme.per_channel
        (4, 8, 'gptq', True, True)
        >>> Scheme.parse("w8a8@torchao").quant_backend
        'torchao'
        >>> Scheme.parse("w4a4+static+g32+p99").group_size, Scheme.parse("w4a4+static+g32+p99").percentile
        (32, 99.0)
        """
        rest, _, backend = name.partition("@")
        base, *words = rest.split("+")
        techniques = [word for word in words if not re.fullmatch(_NUMBER, word)]
        for kind, number in (match.groups() for word in words if (match := re.fullmatch(_NUMBER, word))):
            if kind == "g":
                group_size = int(float(number))
            else:
                percentile = float(number)
        match = re.fullmatch(r"w([2-8]|16)a([2-8]|16)", base)
        if not match and base not in DTYPES:
            raise BitallocError(
                f"no scheme {name!r}: it begins with w<bits>a<bits>, 2 to 8 or 16 bits, or bf16 or fp16"
            )
        for technique in techniques:
            if technique not in TECHNIQUES:
                raise BitallocError(
                    f"scheme {name!r}: unknown technique {technique!r}: {nearest(technique, TECHNIQUES)}"
                )
        if (backend or "simulated") not in BACKENDS:
            raise BitallocError(f"scheme {name!r}: unknown backend {backend!r}: {nearest(backend, BACKENDS)}")
        bits = (int(match[1]), int(match[2])) if match else (16, 16)
        idle = {"weights": {"rtn", "gptq", "dp"}, "activations": {"static", "asym", "clip"}}
        for (what, named), width in zip(idle.items(), bits, strict=True):
            if width == 16 and (found := named & set(techniques)):
                raise BitallocError(f"scheme {name!r}: {sorted(found)[0]} is about {what}, which are of 16 bits here")
        if not 0 < percentile <= 100 or (group_size is not None and group_size < 1):
            raise BitallocError(f"scheme {name!r}: a percentile is from 0 to 100, a group has an input at least")
        for pair in ({"rtn", "gptq"}, {"static", "asym"}, {"static", "clip"}):
            if pair <= set(techniques):
                raise BitallocError(f"scheme {name!r}: {' and '.join(sorted(pair))} exclude each other")
        dtype = base if base in DTYPES else "bf16"
        return cls(name, *bits, dtype, tuple(techniques), group_size, percentile, backend or "simulated")

    @property
    def per_channel(self) -> bool:
        """A scale for each row of the weights."""
        return self.group_size is None

    @property
    def calib_method(self) -> str:
        """What sets the codes of the weights: absmax, rtn, gptq, or none at 16 bits."""
        named = [name for name in ("rtn", "gptq") if name in self.techniques]
        return "none" if self.w_bits == 16 else named[0] if named else "absmax"

    @property
    def weights(self) -> str:
        return self.dtype if self.w_bits == 16 else f"int{self.w_bits} {self.calib_method}"

    @property
    def activations(self) -> str:
        if self.a_bits == 16:
            return self.dtype
        how = f"static p{self.percentile:g}" if self.static else "dynamic"
        more = " asymmetric" * (not self.symmetric) + " clipped" * self.clipped
        return f"int{self.a_bits} {how}{more}"

    @property
    def rotation(self) -> str:
        return "+".join(name for name in ("online", "folded") if name in self.techniques) or "none"

    @property
    def allocation(self) -> str:
        return "optimal" if "dp" in self.techniques else "uniform"

    @property
    def static(self) -> bool:
        return "static" in self.techniques

    @property
    def symmetric(self) -> bool:
        return "asym" not in self.techniques

    @property
    def clipped(self) -> bool:
        return "clip" in self.techniques

    @property
    def online(self) -> bool:
        return "online" in self.techniques

    @property
    def folded(self) -> bool:
        return "folded" in self.techniques

    @property
    def calibrated(self) -> bool:
        """Text has to be read before the codes are known."""
        return bool({"rtn", "gptq", "static", "clip", "dp"} & set(self.techniques))

    @property
    def against(self) -> str:
        """The scheme that lacks what this one's name says last: its difference is what that is worth.

        >>> Scheme.parse("w4a4+gptq+online").against, Scheme.parse("w8a8@torchao").against, Scheme.parse("w8a8").against
        ('w4a4+gptq', 'w8a8', '')
        """
        if "@" in self.name:
            return self.name.partition("@")[0]
        return self.name.rpartition("+")[0]

    def key(self) -> dict[str, Any]:
        """What its codes depend on: not the order of its name."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "name"}
        return {**fields, "techniques": sorted(self.techniques), "percentile": self.percentile if self.static else None}

    def row(self) -> dict[str, Any]:
        """Plain values for a record of a run."""
        named = "w_bits a_bits group_size per_channel quant_backend calib_method".split()
        return {"scheme": self.name, **{name: getattr(self, name) for name in named}}
