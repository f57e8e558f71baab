"""Drift: planted slopes are found, what loses nothing strays nowhere, and pieces are the whole."""

import numpy as np
import pandas as pd
import pytest
import torch

from bitalloc import config, drift
from bitalloc.errors import BitallocError
from bitalloc.reader import Reader
from bitalloc.store import Store
from bitalloc.tables import DRIFT
from tests import random_models

CPU = torch.device("cpu")
SETTINGS = config.Drift(length=48, first=4, sequences=4, prompt=6, new_tokens=12, batch=3)
IDS = torch.randint(0, 60, (4, 48), generator=torch.Generator().manual_seed(0))


def rounded(bits: int) -> torch.nn.Module:
    """Projections rounded to so many bits, a scale a row."""
    model = random_models.build("mamba2")
    for block in model.backbone.layers:
        for linear in (block.mixer.in_proj, block.mixer.out_proj):
            W_OI = linear.weight.data
            scale = W_OI.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            W_OI.copy_((W_OI / scale).round() * scale)
    return model


def frame(models, **how) -> pd.DataFrame:
    return drift.drift(
        models, IDS, SETTINGS, resamples=100, seed=0, identities={name: name for name in models}, device=CPU, **how
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("drift")
    build = lambda: random_models.build("mamba2")  # noqa: E731
    models = {"reference": build, "lossless": build, "w8": lambda: rounded(8), "w4": lambda: rounded(4)}
    store = Store(folder / "store")
    found = frame(models, store=store)
    DRIFT.write(found, folder / "drift.parquet")
    refused = dict.fromkeys(models, lambda: pytest.fail("a model was made though all is in the store"))
    assert frame(refused, store=store).equals(found)
    return found.set_index(["scheme", "metric", "t", "layer", "head"]).sort_index()


def test_what_loses_nothing_strays_nowhere(measured):
    own = measured.loc["lossless"]
    assert (own.loc[["state_relerr", "readout_relerr", "kl_nats_per_token"], "value"] == 0).all()
    assert (own.loc["top1", "value"] == 1).all()
    assert own.loc[("first_divergence_tokens", -1, -1, -1), "value"] == SETTINGS.new_tokens + 1
    assert own.loc["slope", "value"].isna().all()


def test_fewer_bits_stray_further_and_both_further_than_the_floors(measured):
    def last(scheme: str) -> float:
        return measured.loc[(scheme, "state_relerr", 48, -1, -1), "value"]

    assert 0 < last(drift.STEP) < 1e-5 < last(drift.BF16) < 0.05
    assert last(drift.STEP) < last("w8") < last("w4")
    assert measured.loc[(drift.BF16, "readout_relerr", 48, -1, -1), "value"] > 1e-5  # the same model, read otherwise
    w4 = measured.loc[("w4", "state_relerr", 48, -1, -1)]
    assert w4["lo"] < w4["value"] < w4["hi"]


def test_states_are_those_of_the_recurrence_at_that_time():
    """A state that is read in pieces is the one behind the same tokens read at once."""
    model = random_models.build("mamba2")
    with torch.inference_mode():
        pieces, whole = Reader(model), Reader(model)
        for piece in IDS.split(7, dim=1):
            logits = pieces.read(piece)
        assert torch.allclose(logits, whole.read(IDS)[:, 42:], atol=1e-4)
    for found, expected in zip(pieces.states, whole.states, strict=True):
        assert torch.allclose(found, expected, atol=1e-4)


def test_a_planted_slope_is_found_within_its_interval():
    draw, at = np.random.default_rng(0), drift.times(config.Drift(first=8, length=2048))
    planted = np.repeat([0.0, 0.5, 1.0], 40)  # 40 heads of each slope, 24 sequences
    noise = np.exp(0.2 * draw.normal(size=(24, len(at), 1, 120)))
    found = drift.slopes(1e-3 * np.array(at)[None, :, None, None] ** planted * noise, at)
    counts = draw.multinomial(24, [1 / 24] * 24, size=300)
    rows = pd.DataFrame([drift._mean(found[:, 0, head], counts) for head in range(120)])
    assert 0.88 <= ((rows["lo"] < planted) & (planted < rows["hi"])).mean() <= 1
    assert (rows["hi"] - rows["lo"]).max() < 0.1


def test_half_lives_are_those_of_a_constant_step():
    model = random_models.build("mamba2")
    for block in model.backbone.layers:
        mixer = block.mixer
        mixer.in_proj.weight.data[-mixer.num_heads :] = 0  # dt is softplus(dt_bias) at every token
        mixer.dt_bias.data[:] = torch.tensor([-4.0, -2.0, 0.0, 2.0])
        mixer.A_log.data[:] = 0.0
    expected = np.log(2) / np.log1p(np.exp([-4.0, -2.0, 0.0, 2.0]))
    assert np.allclose(drift.half_lives(model, IDS, batch=2), expected, rtol=1e-5)


def test_a_model_without_a_state_is_refused(tmp_path):
    with pytest.raises(BitallocError, match="a llama has none"):
        frame({"reference": lambda: random_models.build("llama")}, store=Store(tmp_path))


def test_too_little_text_is_refused():
    windows = pd.DataFrame({"split": "report", "corpus": "world", "tokens": [list(range(30))] * 3})
    with pytest.raises(BitallocError, match="fewer than two such sequences"):
        drift.sequences(windows, config.Drift(length=48))
    assert drift.sequences(windows, config.Drift(length=40)).shape == (2, 40)
