from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitalloc import calibrate as stage
from bitalloc import models, retrieve, stream, tables
from bitalloc.config import Calibrate
from bitalloc.errors import BitallocError
from bitalloc.families import FAMILIES
from bitalloc.store import Store
from tests.random_models import BLOCKS, VOCABULARY, save

CPU = torch.device("cpu")
EVERY = pytest.mark.parametrize("name", list(FAMILIES))


def windows(count: int = 5, length: int = 24) -> pd.DataFrame:
    """Calibrate windows, and a select window that must be left alone."""
    ids_NT = np.random.default_rng(0).integers(0, VOCABULARY, (count + 1, length), dtype=np.int32)
    split = ["calibrate"] * count + ["select"]
    return pd.DataFrame(
        {"split": split, "corpus": "x", "window": range(count + 1), "tokens": list(ids_NT), "nbytes": 1}
    )


def run(name: str, path: Path, store: Path, **settings: Any) -> pd.DataFrame:
    return stage.calibrate(
        path=path,
        family=FAMILIES[name],
        tokens=windows(),
        inventory=retrieve.inventory("m", path, FAMILIES[name]),
        settings=Calibrate(**{"batch": 2} | settings),
        store=Store(store),
        device=CPU,
    )


def naive(name: str, path: Path, *, token_normalised: bool = False) -> dict[str, torch.Tensor]:
    """Layer -> H_II in float64, by hooks on every matrix of the whole model."""
    known, model, inputs = FAMILIES[name], models.load_model(path, device=CPU), {}
    layers = [known.layer(block, role) for block in range(BLOCKS) for role in known.roles]
    for layer in layers:
        model.get_submodule(layer).register_forward_pre_hook(
            lambda _, args, layer=layer: inputs.__setitem__(layer, args[0].double().flatten(0, -2))
        )
    chosen = windows().query("split == 'calibrate'")
    with torch.no_grad():
        model(torch.tensor(np.stack(chosen["tokens"].to_list())).long())
    if token_normalised:
        inputs = {layer: X_TI / X_TI.norm(dim=1, keepdim=True) for layer, X_TI in inputs.items()}
    return {layer: X_TI.T @ X_TI / len(X_TI) for layer, X_TI in inputs.items()}


@EVERY
@pytest.mark.parametrize("token_normalised", [False, True])
@pytest.mark.parametrize("panel", [models.PANEL, 20])
def test_equals_hooks_on_the_whole_model(
    name: str, token_normalised: bool, panel: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "PANEL", panel)
    path, store = save(name, tmp_path / "model"), Store(tmp_path / "store")
    moments = run(name, path, store.root, token_normalised=token_normalised).set_index("site")
    expected = naive(name, path, token_normalised=token_normalised)
    for row in retrieve.inventory("m", path, FAMILIES[name]).query("claimed").itertuples():
        H_II, expected_II = models.read_moment(store, moments.loc[row.site, "key"]), expected[row.layer].float()
        torch.testing.assert_close(H_II, expected_II, rtol=0, atol=1e-4 * expected_II.abs().max().item())
    assert set(moments["n_tokens"]) == {5 * 24}
    if token_normalised:
        np.testing.assert_allclose(moments["trace"], 1.0, rtol=1e-5)


@EVERY
def test_runs_in_bfloat16_as_on_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, store = save(name, tmp_path / "model"), Store(tmp_path / "store")
    exact = run(name, path, store.root).set_index("site")
    for module in (stage, stream):
        monkeypatch.setattr(module, "working_dtype", lambda _: torch.bfloat16)
    rounded = run(name, path, store.root).set_index("site")
    assert not set(rounded["key"]) & set(exact["key"])
    for site in exact.index:
        H_II, rounded_II = (models.read_moment(store, table.loc[site, "key"]) for table in (exact, rounded))
        assert (H_II - rounded_II).norm() < 0.05 * H_II.norm()


def test_table_says_what_the_shards_hold(tmp_path: Path) -> None:
    path, store = save("phi", tmp_path / "model"), Store(tmp_path / "store")
    moments = run("phi", path, store.root)
    tables.MOMENTS.write(moments, tmp_path / "moments.parquet")
    known = FAMILIES["phi"]
    assert list(moments["site"]) == [f"{block}.{site}" for block in range(BLOCKS) for site in known.sites()]
    for row in moments.itertuples():
        diagonal_I = models.read_moment(store, row.key).diagonal().double()
        assert row.dim == len(diagonal_I)
        assert row.trace == pytest.approx(diagonal_I.sum().item())
        assert row.outlier_ratio == pytest.approx((diagonal_I.max() / diagonal_I.median()).item())
        assert row.digest == stage.hashlib.sha256(store.tensors(row.key).read_bytes()).hexdigest()


def test_bytes_repeat_and_depend_on_what_matters(tmp_path: Path) -> None:
    path = save("llama", tmp_path / "model")
    first = run("llama", path, tmp_path / "a")
    assert run("llama", path, tmp_path / "b").equals(first)
    other = save("llama", tmp_path / "other", seed=1)
    for changed in (run("llama", path, tmp_path / "a", token_normalised=True), run("llama", other, tmp_path / "a")):
        assert not set(changed["key"]) & set(first["key"])


@EVERY
def test_never_more_than_a_block_or_the_embeddings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, known, hollow, resident = save(name, tmp_path / "model"), FAMILIES[name], [], []

    def skeleton(*args: Any, **kwargs: Any) -> Any:
        hollow.append(models.skeleton(*args, **kwargs))
        return hollow[0]

    def materialise(*args: Any, **kwargs: Any) -> None:
        models.materialise(*args, **kwargs)
        resident.append({n for n, parameter in hollow[0].named_parameters() if not parameter.is_meta})

    monkeypatch.setattr(stream, "skeleton", skeleton)
    monkeypatch.setattr(stream, "materialise", materialise)
    run(name, path, tmp_path / "store")
    names = [n for n, _ in hollow[0].named_parameters()]
    embeddings = {n for n in names if known.claim(n)[2] == "embedding"}
    allowed = [embeddings, *({n for n in names if n.startswith(f"{known.blocks}.{b}.")} for b in range(BLOCKS))]
    assert all(any(filled <= part for part in allowed) for filled in resident)
    assert set().union(*resident) == set().union(*allowed)
    assert all(parameter.is_meta for parameter in hollow[0].parameters())
    assert not any(module._forward_pre_hooks for module in hollow[0].modules())  # they would hold all moments


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [2, 4, 6])
def test_killed_run_goes_on_at_the_first_unfinished_block(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after some shards: finished blocks are not filled again, and the result is the undisturbed one."""
    path = save("mistral", tmp_path / "model")
    undisturbed = run("mistral", path, tmp_path / "a")
    put, filled, done = Store.put, [], []

    def dying(self: Store, *args: Any) -> None:
        if len(done) == after:
            raise Killed
        put(self, *args)
        done.append(args)

    def materialise(module: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        filled.append(prefix)
        models.materialise(module, prefix, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", dying)
        with pytest.raises(Killed):
            run("mistral", path, tmp_path / "b")
    stale = tmp_path / "b" / "scratch" / "of another run" / "0002"
    stale.mkdir(parents=True)
    monkeypatch.setattr(stream, "materialise", materialise)
    assert run("mistral", path, tmp_path / "b").equals(undisturbed)
    first = after // len(FAMILIES["mistral"].sites())
    assert filled == ["model.embed_tokens", *(f"model.layers.{block}" for block in range(first, BLOCKS))]
    assert stale.exists()
    assert [folder.name for folder in (tmp_path / "b" / "scratch").iterdir()] == ["of another run"]
    filled.clear()
    assert run("mistral", path, tmp_path / "b").equals(undisturbed)
    assert filled == []


def test_damaged_shard_is_computed_again(tmp_path: Path) -> None:
    path, store = save("opt", tmp_path / "model"), Store(tmp_path / "store")
    moments = run("opt", path, store.root)
    shard = store.tensors(moments["key"][5])
    shard.write_bytes(shard.read_bytes()[:-3])
    assert run("opt", path, store.root).equals(moments)
    assert store.get(moments["key"][5]) is not None


def test_nan_names_the_site_and_stores_nothing(tmp_path: Path) -> None:
    path = save("llama", tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][0] = float("nan")
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(BitallocError, match=r"the inputs of site 1\.mlp_in hold NaN or Inf"):
        run("llama", path, tmp_path / "store")
    assert len(list((tmp_path / "store").glob("??/*.json"))) == 4 + 2


def test_no_windows_are_one_line(tmp_path: Path) -> None:
    path = save("llama", tmp_path / "model")
    with pytest.raises(BitallocError, match="hold no window of the split calibrate"):
        stage.calibrate(
            path=path,
            family=FAMILIES["llama"],
            tokens=windows()[-1:],
            inventory=retrieve.inventory("m", path, FAMILIES["llama"]),
            settings=Calibrate(),
            store=Store(tmp_path),
            device=CPU,
        )


def test_a_second_run_waits_for_the_first_and_does_nothing_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs at once, or an orphan that outlived a kill -9: it starts at the first shard of the first."""
    path, said, filled, second = save("llama", tmp_path / "model"), threading.Event(), [], []
    put = Store.put

    def slow(self: Store, *args: Any) -> None:
        if not second:
            second.append(ThreadPoolExecutor(1).submit(run, "llama", path, tmp_path / "store"))
            assert said.wait(30)
        put(self, *args)

    def materialise(module: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        filled.append(prefix)
        models.materialise(module, prefix, *args, **kwargs)

    monkeypatch.setattr(Store, "put", slow)
    monkeypatch.setattr(stream, "materialise", materialise)
    monkeypatch.setattr("bitalloc.store.print", lambda line, **_: "waiting" in line and said.set(), raising=False)
    first = run("llama", path, tmp_path / "store")
    assert second[0].result(30).equals(first)
    blocks = [name for name in filled if name.startswith("model.layers.")]
    assert blocks == [f"model.layers.{block}" for block in range(BLOCKS)]


def test_dead_inputs_have_a_finite_outlier_ratio(tmp_path: Path) -> None:
    moment = stage._Moment(4, token_normalised=True, device=CPU)
    moment.hook(torch.nn.Identity(), (torch.tensor([[0.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]]),))
    record = moment.put(Store(tmp_path), "ab" * 32, site="0.x", block=0)
    assert record["trace"] == 0.5
    assert np.isfinite(record["outlier_ratio"])


def test_a_shard_holds_little_more_than_half_of_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "PANEL", 16)
    store, X_TI = Store(tmp_path), torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    moment = stage._Moment(200, token_normalised=False, device=CPU)
    for batch in X_TI.split(70):
        moment.hook(torch.nn.Identity(), (batch,))
    moment.put(store, "ab" * 32, site="0.x", block=0)
    assert store.tensors("ab" * 32).stat().st_size < 0.58 * 4 * 200**2
    assert moment.sums == []  # let go of
    H_II = models.read_moment(store, "ab" * 32)
    torch.testing.assert_close(H_II, (X_TI.T.double() @ X_TI.double() / 300).float(), rtol=0, atol=1e-5)
    assert torch.equal(H_II, H_II.T)
