"""SCHEMES and LAYERWISE of a small random Mamba2."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from bitalloc import config, retrieve
from bitalloc.errors import BitallocError
from bitalloc.families import FAMILIES
from bitalloc.models import load_model
from bitalloc.schemes import apply, ladder, scope
from bitalloc.schemes.layerwise import layerwise
from bitalloc.store import Store
from bitalloc.suites import Head, Windows
from bitalloc.suites.perplexity import eval_ppl
from bitalloc.tables import LAYERWISE, SCHEMES
from tests.random_models import BLOCKS, save
from tests.small import CPU, tokens

NAMES = ["bf16", "w8a8", "w8a8@torchao", "w4a4", "w4a4@torchao", "w4a4+gptq", "w4a4+gptq+dp"]
WINDOWS = 6
SETTINGS = config.Schemes(names=NAMES, layerwise=["w3a4"], windows=WINDOWS)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("mamba2", tmp_path_factory.mktemp("model"))


def bench(
    path: Path, store: Path, split: str = "report", settings: config.Schemes = SETTINGS, family: str = "mamba2"
) -> ladder.Bench:
    return ladder.Bench(
        path=path,
        inventory=retrieve.inventory("small", path, FAMILIES[family]),
        tokens=tokens(windows=WINDOWS),
        split=split,
        settings=settings,
        evaluate=config.Evaluate(resamples=200),
        store=Store(store),
        device=CPU,
    )


@pytest.fixture(scope="module")
def made(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[pd.DataFrame, Path]]:
    store = tmp_path_factory.mktemp("store")
    yield ladder.ladder(bench(path, store)), store


def test_table_has_every_scheme_with_its_scope(made: tuple[pd.DataFrame, Path], path: Path, tmp_path: Path) -> None:
    frame, _ = made
    SCHEMES.write(frame, tmp_path / "schemes.parquet")
    assert list(frame["scheme"]) == ["reference", *NAMES]
    found = scope(load_model(path, device=CPU))
    assert set(frame["scope_digest"]) == {found.digest}
    assert json.loads(frame["scope"].iloc[0]) == [dict(row) for row in found.rows]
    rows = frame.set_index("scheme")
    assert rows.at["reference", "kl_nats_per_token"] == pytest.approx(0, abs=1e-6)
    assert rows.at["w4a4@torchao", "status"] == "torchao cannot carry w4a4@torchao: it has no W4A4; the simulation can"
    measured = frame[frame["status"] == ladder.MEASURED]
    assert len(measured) == len(frame) - 1
    assert (measured["kl_lo"] <= measured["kl_nats_per_token"]).all()
    assert np.allclose(measured["ppl"], np.exp(measured["nll_nats_per_token"]))


def test_scores_are_those_of_the_model(made: tuple[pd.DataFrame, Path], path: Path) -> None:
    rows, report = made[0].set_index("scheme"), tokens(windows=WINDOWS).query("split == 'report'")
    ids = torch.tensor(np.stack(report["tokens"].to_list())).long()
    models = [load_model(path, device=CPU) for _ in range(2)]
    apply(models[1], "w4a4")
    with torch.inference_mode():
        log_p, log_q = (model(ids[:, :-1], use_cache=False).logits.log_softmax(-1) for model in models)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    nll = -float(log_q.gather(-1, ids[:, 1:, None]).mean())
    assert rows.at["w4a4", "kl_nats_per_token"] == pytest.approx(kl, rel=1e-3)
    assert rows.at["w4a4", "nll_nats_per_token"] == pytest.approx(nll, rel=1e-5)
    assert rows.at["w4a4", "n_tokens"] == ids[:, 1:].numel()


def test_changes_are_against_the_scheme_without_the_last_word(made: tuple[pd.DataFrame, Path]) -> None:
    rows = made[0].set_index("scheme")
    assert rows.at["w4a4+gptq+dp", "against"] == "w4a4+gptq"
    assert rows.at["w8a8@torchao", "against"] == "w8a8"
    assert rows.at["w4a4", "against"] == ""
    change = rows.at["w4a4+gptq", "kl_nats_per_token"] - rows.at["w4a4", "kl_nats_per_token"]
    assert rows.at["w4a4+gptq", "kl_change_nats_per_token"] == pytest.approx(change, rel=1e-6)
    assert math.isnan(rows.at["w4a4", "kl_change_nats_per_token"])
    assert rows.at["w4a4+gptq+dp", "nbytes"] <= rows.at["w4a4", "nbytes"]


def test_default_names_are_schemes_that_stand_beside_what_they_are_held_against() -> None:
    schemes = ladder.parse(config.Schemes(), [*config.Schemes().names, *config.Schemes().layerwise])
    names = {scheme.name for scheme in schemes}
    assert all(scheme.against in names or "+" not in scheme.against for scheme in schemes)
    assert len({str(scheme.key()) for scheme in schemes}) == len(schemes) - 2  # two are named in three orders


def test_what_is_known_is_not_measured_again(
    made: tuple[pd.DataFrame, Path], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(ladder, "apply", never)
    known = config.Schemes(
        **{**SETTINGS.model_dump(), "names": ["w4a4+dp+gptq", "w4a4+gptq"]}
    )  # another order, one thing
    again = ladder.ladder(bench(path, made[1], settings=known))
    columns = ["kl_nats_per_token", "kl_lo", "nbytes"]
    pairs = zip(again["scheme"], ["reference", "w4a4+gptq+dp", "w4a4+gptq"], strict=True)
    for name, same in pairs:
        first, second = (frame.set_index("scheme").loc[key, columns] for frame, key in ((again, name), (made[0], same)))
        assert first.tolist() == second.tolist()


def test_layerwise_quantises_one_and_spares_one(path: Path, tmp_path: Path) -> None:
    frame = layerwise(bench(path, tmp_path / "store", "select"))
    LAYERWISE.write(frame, tmp_path / "layerwise.parquet")
    assert frame.groupby("mode").size().to_dict() == {"all": 1, "quantise": 7 * BLOCKS, "protect": 7 * BLOCKS}
    rows = frame.set_index(["mode", "layer", "part"])
    whole = rows.loc[("all", "", "all"), "kl_nats_per_token"]
    layer = "backbone.layers.1.mixer.in_proj"
    # by hand: this module alone
    model, reference = load_model(path, device=CPU), load_model(path, device=CPU)
    apply(model, "w3a4")
    for block in range(BLOCKS):
        for name in ("in_proj", "out_proj"):
            if (block, name) != (1, "in_proj"):
                original = reference.backbone.layers[block].mixer.get_submodule(name)
                setattr(model.backbone.layers[block].mixer, name, original)
    windows = Windows(tokens(windows=WINDOWS).query("split == 'select'"), batch=8, device=CPU)
    alone = windows.scores(Head(model), windows.hidden(model), windows.hidden(reference))["kl"].mean()
    assert rows.loc[("quantise", layer, "all"), "kl_nats_per_token"] == pytest.approx(alone, rel=1e-4)
    assert 0 < alone < whole
    spared = rows.loc[("protect", layer, "all")]
    assert spared["saved_nats_per_token"] == pytest.approx(whole - spared["kl_nats_per_token"], rel=1e-5)
    sizes = frame.query("mode == 'quantise' and layer == @layer").set_index("part")["rows"]
    assert sizes["all"] == sizes.drop("all").sum()


def test_what_a_family_cannot_carry_is_a_row_that_says_so(tmp_path: Path) -> None:
    settings = config.Schemes(names=["w8a8", "w8a8+folded"], windows=2)
    frame = ladder.ladder(bench(save("llama", tmp_path / "model"), tmp_path, settings=settings, family="llama"))
    assert frame["status"].tolist()[:2] == [ladder.MEASURED] * 2
    assert "residual stream of llama is not folded yet" in frame["status"].iloc[2]
    assert frame["kl_nats_per_token"].notna().tolist() == [True, True, False]


def test_layerwise_is_of_the_simulation(path: Path, tmp_path: Path) -> None:
    other = config.Schemes(layerwise=["w8a8@torchao"])
    with pytest.raises(BitallocError, match="our simulation"):
        layerwise(bench(path, tmp_path, settings=other))


def test_eval_ppl_repeats_and_agrees_with_a_plain_loop(path: Path) -> None:
    model, report = load_model(path, device=CPU), tokens(windows=WINDOWS).query("split == 'report'")
    windows = Windows(report, batch=5, device=CPU, stride=8)
    first, second = (eval_ppl(model, windows, resamples=100) for _ in range(2))
    times = {"wall_s", "tokens_per_s"}
    assert {k: v for k, v in first.items() if k not in times} == {k: v for k, v in second.items() if k not in times}
    losses = []
    for ids in report["tokens"]:
        with torch.inference_mode():
            log_q = model(torch.tensor(ids[:-1])[None].long(), use_cache=False).logits[0].log_softmax(-1)
        losses += (-log_q.gather(-1, torch.tensor(ids[1:])[:, None].long())[-8:, 0]).tolist()
    assert first["ppl"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert first["n_tokens"] == len(losses)
    assert first["ppl_lo"] < first["ppl"] < first["ppl_hi"]
