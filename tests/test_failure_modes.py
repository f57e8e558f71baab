"""The figure of failure modes: drawn from planted tables, and its sentence says what they hold."""

from itertools import product

import numpy as np
import pandas as pd

from bitalloc import figures
from bitalloc.figures.failure_modes import sentence
from tests.test_figures import drawn

LADDER = {"bf16": 0.001, "w8a8": 0.002, "w4a8": 0.05, "w4a4": 0.4}  # scheme -> damage


def planted() -> dict[str, pd.DataFrame]:
    schemes = [
        {"scheme": name, "task": task, "status": "measured", "quant_backend": "simulated", "ppl": 6 * np.exp(kl),
         "kl_nats_per_token": kl, "kl_lo": 0.8 * kl, "kl_hi": 1.3 * kl}
        for name, kl in ({"reference": 1e-7} | LADDER | {"w4a4+gptq": 0.2}).items()
        for task in ("world/report", "docstrings/report")
    ]  # fmt: skip
    passkey = [
        {"scheme": name, "length": length, "depth": depth, "n": 50, "chance": 0.01, "retention": 1 - damage,
         "status": "floor" if length == 1024 else "ok", "accuracy": (1 - damage) * 64 / length,
         "accuracy_lo": 0.5 * (1 - damage) * 64 / length, "accuracy_hi": min(1.0, 1.5 * (1 - damage) * 64 / length)}
        for name, damage in ({"reference": 0.0} | LADDER).items()
        for length, depth in product((64, 256, 1024), (-1.0, 0.5))
    ]  # fmt: skip
    drift = [
        {"scheme": name, "metric": "state_relerr", "t": t, "layer": -1, "value": damage * t**0.2,
         "lo": 0.9 * damage * t**0.2, "hi": 1.1 * damage * t**0.2}
        for (name, damage), t in product((LADDER | {"floor: step": 1e-6}).items(), (8, 32, 128, 512))
    ]  # fmt: skip
    drift += [
        {"scheme": name, "metric": "slope", "t": -1, "layer": -1, "value": 0.2, "lo": 0.19, "hi": 0.21}
        for name in [*LADDER, "floor: step"]
    ]
    layerwise = [
        {"scheme": "w4a4", "mode": "quantise", "block": block, "part": part, "kl_nats_per_token": 0.01 * (block + 1),
         "role": "out_proj" if part == "all" else "in_proj", "kl_lo": 0.008 * (block + 1), "kl_hi": 0.012 * (block + 1)}
        for block, part in product(range(4), ("all", "z", "x", "B", "C", "dt"))
    ]  # fmt: skip
    layerwise.append(layerwise[0] | {"mode": "all", "block": -1, "role": "", "kl_nats_per_token": 0.4})
    named = {"schemes": schemes, "passkey": passkey, "drift": drift, "layerwise": layerwise}
    return {name: pd.DataFrame(rows) for name, rows in named.items()}


def test_failure_modes_are_drawn_and_told(tmp_path):
    tables = planted()
    figures.failure_modes(tables, tmp_path / "figure.png", model="planted")
    drawn(tmp_path / "figure.png", 13.5)
    said = sentence(tables, "w4a4")
    assert said == (
        "W8A8: KL 0.002 nats a token, keeps 100 % of the keys, state off by 0.7 % after 512 tokens; "
        "W4A4: KL 0.4 nats a token, keeps 60 % of the keys, state off by 139 % after 512 tokens"
    )
    tables["passkey"]["status"] = "floor"
    assert "keys" not in sentence(tables, "w4a4")  # no claim
