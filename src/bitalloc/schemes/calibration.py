"""What schemes learn from text: moments of every input in scope, and a sample of it.

Shapes: I inputs, T tokens, N windows.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from bitalloc.errors import BitallocError
from bitalloc.schemes.matrices import device_of, scope
from bitalloc.suites import Windows

SAMPLE = 2**20  # activations of a site that are kept for percentiles


class Calibration:
    """What schemes of one model share: moments H_II of every input in scope, and a sample of it; float32.

    Takes the model as it is: one whose residual stream was rotated has a calibration of its own.
    """

    def __init__(self, model: nn.Module, tokens_NT: Tensor, *, batch: int = 8) -> None:
        """`tokens_NT`: token ids of windows of equal length, from the calibrate split."""
        if tokens_NT.dim() != 2 or not tokens_NT.numel():
            raise BitallocError("schemes are calibrated on windows of equal length: give token ids [windows, tokens]")
        self.tokens_NT, self.batch = tokens_NT, batch
        matrices = {matrix.site: matrix for matrix in scope(model).matrices}
        self.H = {site: torch.zeros(m.columns, m.columns, dtype=torch.float64) for site, m in matrices.items()}
        kept: dict[str, list[Tensor]] = {site: [] for site in matrices}
        steps = {site: -(-tokens_NT.numel() * m.columns // SAMPLE) for site, m in matrices.items()}

        def hook(site: str, x_BTI: Tensor) -> None:
            X_TI = x_BTI.detach().flatten(0, -2).float()
            self.H[site] += (X_TI.T @ X_TI).cpu()
            kept[site].append(X_TI[:: steps[site]].cpu())

        handles = [
            model.get_submodule(m.layer).register_forward_pre_hook(lambda _, args, site=site: hook(site, args[0]))
            for site, m in matrices.items()
        ]
        try:
            with torch.inference_mode():
                for part in tokens_NT.split(batch):
                    model.base_model(input_ids=part.to(device_of(model)), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self.H = {site: (H_II / tokens_NT.numel()).float() for site, H_II in self.H.items()}
        self.X = {site: torch.cat(parts) for site, parts in kept.items()}

    def windows(self, device: torch.device, count: int = 16) -> Windows:
        """At most `count` of the windows, evenly over all, to be scored."""
        places = np.linspace(0, len(self.tokens_NT) - 1, min(count, len(self.tokens_NT))).round().astype(int)
        rows = [self.tokens_NT[place].tolist() for place in places]
        frame = pd.DataFrame({"tokens": rows, "split": "calibrate", "corpus": "calibrate", "window": places})
        return Windows(frame, batch=self.batch, device=device)
