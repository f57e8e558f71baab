"""What GGUF costs: weights of the embedded model at an option, and how far its type moves them.

python benchmarks/bench_gguf.py  ->  a table. `paid`, `gguf`: bits a weight of the native checkpoint and of the file;
`plan`: ||What - W|| / ||W||, rounding to nearest; `moved`: ||What' - What|| / ||W||, What' as the file has it;
`both`: ||What' - W|| / ||W||. Norms are taken over all matrices.
"""

from __future__ import annotations

from pathlib import Path

import gguf as package
import torch

from bitalloc.families import FAMILIES
from bitalloc.formats import gguf
from bitalloc.lowrank import Factor, decompose
from bitalloc.models import Checkpoint
from bitalloc.option import Option

TINY = Path(__file__).parents[1] / "resources" / "tiny"
OPTIONS = [Option("rtn", bits, 32, 0, symmetric=True) for bits in (2, 3, 4, 8)]
OPTIONS += [Option("rtn", bits, size, rank) for size, rank in ((32, 0), (16, 0), (64, 8)) for bits in (2, 3, 4, 8)]


def main() -> None:
    checkpoint = Checkpoint(TINY, FAMILIES["qwen2"])
    family = checkpoint.family
    layers = [family.layer(block, role) for block in range(4) for role in family.roles]
    print(f"{'option':16} {'zeros':>6} {'paid':>6} {'gguf':>6} {'plan':>8} {'moved':>9} {'both':>8}  types")
    for option in OPTIONS:
        weights = paid = spent = 0.0
        norms = torch.zeros(4, dtype=torch.float64)
        types = set()
        for layer in layers:
            W_OI = checkpoint.weight(layer)
            rows, columns = W_OI.shape
            (found,) = decompose(W_OI, Factor(torch.eye(columns), 0.01), [option], act_order=False, iterations=1)
            kind = gguf.coded(option, rows, columns)
            What_OI = found.matrix.dequantize()
            there_OI = torch.from_numpy(
                package.dequantize(gguf.encode(found.matrix, kind), package.GGMLQuantizationType[kind])
            )
            parts = (W_OI, What_OI - W_OI, there_OI - What_OI, there_OI - W_OI)
            norms += torch.stack([part.double().square().sum() for part in parts])
            weights, types = weights + W_OI.numel(), types | {kind}
            paid, spent = paid + 8 * option.nbytes(rows, columns), spent + gguf.BITS[kind] * W_OI.numel()
        plan, moved, both = (100 * (norms[1:] / norms[0]).sqrt()).tolist()
        row = f"{paid / weights:6.2f} {spent / weights:6.2f} {plan:6.2f} % {moved:7.3f} % {both:6.2f} %"
        print(f"{option.name:16} {'no' if option.symmetric else 'yes':>6} {row}  {' '.join(sorted(types))}")


if __name__ == "__main__":
    main()
