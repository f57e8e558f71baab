from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from bitalloc import config, retrieve
from bitalloc import sensitivity as stage
from bitalloc.calibrate import calibrate
from bitalloc.errors import BitallocError
from bitalloc.experiments import Experiments
from bitalloc.families import FAMILIES
from bitalloc.models import Checkpoint, load_model, set_weight
from bitalloc.store import Store
from bitalloc.suites import Head, Windows, spread
from bitalloc.tables import SENSITIVITY
from tests.random_models import VOCABULARY
from tests.small import CPU, Small, small, tokens

EVERY = pytest.mark.parametrize("family", list(FAMILIES))
TINY = Path(__file__).parents[1] / "resources" / "tiny"
BOTH = config.Sensitivity(signals=["kl", "fisher"], windows=6)


def run(bench: Small, store: Path, settings: config.Sensitivity = BOTH, **over: Any) -> pd.DataFrame:
    return stage.sensitivity(
        experiments=bench.experiments,
        tokens=tokens(),
        settings=settings,
        store=Store(store),
        batch=4,
        **over,
    )


@EVERY
def test_kl_is_that_of_whole_forward_passes(family: str, tmp_path: Path) -> None:
    bench = small(family, tmp_path)
    frame = run(bench, tmp_path / "shards")
    SENSITIVITY.write(frame, tmp_path / "sensitivity.parquet")
    option = stage.probe(bench.experiments.sweep, BOTH)
    windows = Windows(spread(tokens(), 6), batch=4, device=CPU)
    model = load_model(bench.path, device=CPU)
    reference, found = windows.hidden(model), frame.set_index(["signal", "layer"])
    assert len(found) == 2 * len(bench.layers)
    for layer in (bench.layers[0], bench.layers[-1]):
        W_OI = bench.experiments.checkpoint.weight(layer)
        set_weight(model, FAMILIES[family], layer, bench.experiments.matrix(layer, option).dequantize())
        direct = windows.scores(Head(model), windows.hidden(model), reference)["kl"].mean()
        set_weight(model, FAMILIES[family], layer, W_OI)
        row = found.loc["kl", layer]
        assert row["kl_nats_per_token"] == pytest.approx(direct, rel=1e-4)
        assert row["lo"] <= row["kl_nats_per_token"] <= row["hi"]
        assert row["coefficient"] == pytest.approx(row["kl_nats_per_token"] / row["rel_error"])
    assert (found["coefficient"] > 0).all()


def test_sampled_gradient_is_that_of_the_loss_of_the_drawn_labels() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, VOCABULARY)
    head = object.__new__(Head)
    head.weight_VD, head.bias_V = linear.weight.detach(), linear.bias.detach()
    h_ND = torch.randn(5, 6, requires_grad=True)
    found = stage._sampled_gradient(head, h_ND.detach(), torch.Generator().manual_seed(7))
    p_NV = head.logits(h_ND.detach()).softmax(-1)
    labels = torch.multinomial(p_NV, 1, generator=torch.Generator().manual_seed(7))[:, 0]
    loss = torch.nn.functional.cross_entropy(head.logits(h_ND), labels, reduction="sum")
    assert torch.allclose(found, torch.autograd.grad(loss, h_ND)[0], atol=1e-6)


def test_fisher_is_half_the_trace(tmp_path: Path) -> None:
    """tr(G E H E^T) / 2 with G = E[g g^T] formed from per-token gradients of the summed loss."""
    bench, layer = small("llama", tmp_path), "model.layers.1.mlp.up_proj"
    frame = run(bench, tmp_path / "shards", config.Sensitivity(signals=["fisher"], signal="fisher", windows=6))
    option = stage.probe(bench.experiments.sweep, BOTH)
    windows, model = Windows(spread(tokens(), 6), batch=4, device=CPU), load_model(bench.path, device=CPU)
    generator, gradients = torch.Generator().manual_seed(0), []
    for batch in windows.batches:
        outputs: list[torch.Tensor] = []
        handle = model.get_submodule(layer).register_forward_hook(lambda m, a, out, to=outputs: to.append(out))
        logits = model(input_ids=batch.tokens_BT).logits
        handle.remove()
        flat = logits.flatten(0, 1)
        labels = torch.multinomial(flat.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = torch.nn.functional.cross_entropy(flat, labels, reduction="sum")
        gradients.append(torch.autograd.grad(loss, outputs[0])[0].flatten(0, 1))
    g_NO = torch.cat(gradients).double()
    E_OI = bench.experiments.checkpoint.weight(layer) - bench.experiments.matrix(layer, option).dequantize()
    H_II = bench.experiments.H(bench.experiments.layers[layer]["site"]).double()
    expected = torch.trace(g_NO.T @ g_NO / len(g_NO) @ E_OI.double() @ H_II @ E_OI.double().T) / 2
    assert frame.set_index("layer").at[layer, "kl_nats_per_token"] == pytest.approx(expected.item(), rel=1e-3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Both signals on the embedded model with its real moments, few windows."""
    store, family = Store(tmp_path_factory.mktemp("tiny")), FAMILIES["qwen2"]
    counts = {"window": 128, "calibrate_windows": 12, "select_windows": 1, "report_windows": 1}
    corpora = {split: ["world"] for split in ("calibrate", "select", "report")}
    text = retrieve.tokens(config.Config(retrieve=config.Retrieve(**counts, **corpora)), TINY)
    inventory = retrieve.inventory("tiny", TINY, family)
    where = {"inventory": inventory, "store": store, "device": CPU}
    moments = calibrate(path=TINY, family=family, tokens=text, settings=config.Calibrate(), **where)
    sweep = config.Sweep(bits=[3], group_sizes=[64], ranks=[0])
    experiments = Experiments(checkpoint=Checkpoint(TINY, family), moments=moments, sweep=sweep, **where)
    return stage.sensitivity(experiments=experiments, tokens=text, settings=BOTH)


def test_the_cheap_signal_ranks_like_the_measured_one(tiny: pd.DataFrame) -> None:
    kl = tiny.pivot(index="layer", columns="signal", values="kl_nats_per_token")
    assert spearmanr(kl["kl"], kl["fisher"]).statistic > 0.7
    assert 0.3 < (kl["fisher"] / kl["kl"]).median() < 3  # and predicts its size
    coefficient = tiny[tiny["signal"] == "kl"]["coefficient"]
    assert coefficient.max() / coefficient.min() > 3


def test_a_run_that_broke_off_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = small("llama", tmp_path)
    whole = run(bench, tmp_path / "whole")
    suffixes, put = [], Store.put

    def breaking(self: Store, key: str, record: Any, tensors: Any = None) -> None:
        put(self, key, record, tensors)
        if self.root == tmp_path / "broken":
            suffixes.append(key)
            if len(suffixes) == 9:
                raise KeyboardInterrupt

    monkeypatch.setattr(Store, "put", breaking)
    with pytest.raises(KeyboardInterrupt):
        run(bench, tmp_path / "broken")
    resumed = run(bench, tmp_path / "broken")
    assert len(suffixes) == len(set(suffixes)) == len(whole)  # nothing was measured twice
    pd.testing.assert_frame_equal(whole, resumed)


def test_the_windows_are_spread_over_the_corpora() -> None:
    text = pd.concat([tokens(), tokens().assign(corpus="other")], ignore_index=True)
    chosen = spread(text, 6)
    assert chosen["corpus"].value_counts().to_dict() == {"noise": 3, "other": 3}
    assert set(chosen["split"]) == {"calibrate"}
    assert len(spread(text, 1000)) == 24


def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = small("llama", tmp_path)
    with pytest.raises(BitallocError, match="probe_bits of 16 changes nothing"):
        run(bench, tmp_path / "s", config.Sensitivity(probe_bits=16))
    with pytest.raises(BitallocError, match="no windows of the split calibrate"):
        spread(tokens().query("split == 'report'"), 3)
    scores = Windows.scores
    monkeypatch.setattr(Windows, "scores", lambda *a: scores(*a).assign(kl=np.nan))
    with pytest.raises(BitallocError, match=r"q_proj at rtn-3b-g16-r0 makes the model's scores NaN"):
        run(bench, tmp_path / "s")
