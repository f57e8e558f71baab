from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.image import imread

from bitalloc import figures, models, stream
from bitalloc import tune as stage
from bitalloc.allocate import tuned
from bitalloc.compress import compress
from bitalloc.config import Compress, Tune
from bitalloc.errors import BitallocError
from bitalloc.families import FAMILIES
from bitalloc.formats.bitalloc import load_model
from bitalloc.models import set_weight
from bitalloc.option import from_row
from bitalloc.quant.learned import LOOKS, Learned, descend
from bitalloc.store import Store
from bitalloc.tables import TUNED, TUNED_OPTIONS
from bitalloc.tune import BLOCK, POLISH, SELECT, Tuned
from tests.quant.test_learned import OPTIONS as MATRICES
from tests.quant.test_learned import given
from tests.random_models import BLOCKS
from tests.small import CPU, OPTIONS, Small, small, tokens

FAST = Tune(iterations=2, polish=2, batch=3, windows=6, holdout=0.5, optimizer="sign", rate=0.02)


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


def run(bench: Small, plan: pd.DataFrame, settings: Tune = FAST, seed: int = 0, **given: Any) -> pd.DataFrame:
    return stage.tune(
        name="tuned-x",
        plan=plan,
        **{"tokens": tokens(), "inventory": bench.inventory, "experiments": bench.experiments} | given,
        settings=settings,
        seed=seed,
    )


def sources(bench: Small, plan: pd.DataFrame, frame: pd.DataFrame) -> Tuned:
    return Tuned(bench.experiments, plan, frame.to_dict("records"))


def put_on(model: Any, bench: Small, plan: pd.DataFrame, of: dict[int, Any]) -> Any:
    """The model with the matrices of these blocks, and its own in all others."""
    checkpoint = bench.experiments.checkpoint
    for row in plan.to_dict("records"):
        source, option = of.get(row["block"]), from_row(row, bench.experiments.sweep)
        W_OI = checkpoint.weight(row["layer"]) if source is None else source.matrix(row["layer"], option).dequantize()
        set_weight(model, checkpoint.family, row["layer"], W_OI)
    return model


def outputs(model: Any, family: str, ids: torch.Tensor) -> list[torch.Tensor]:
    """What every block puts out."""
    found: list[torch.Tensor] = []

    def hook(*args: Any) -> None:
        found.append(args[2][0] if isinstance(args[2], tuple) else args[2])

    hooks = [block.register_forward_hook(hook) for block in model.get_submodule(FAMILIES[family].blocks)]
    with torch.no_grad():
        model(ids, use_cache=False)
    for each in hooks:
        each.remove()
    return found


def kl(reference: Any, model: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        log_p, log_q = (each(ids, use_cache=False).logits[:, :-1].log_softmax(-1) for each in (reference, model))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def nll(model: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return model(ids, labels=ids).loss.item()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_losses_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    """Each block reads what the tuned ones before it put out and aims at what the original puts out."""
    bench = small(family, tmp_path)
    plan = bench.random_plan(1)
    frame = run(bench, plan)
    TUNED.write(frame, tmp_path / "tuned.parquet")
    assert frame["part"].tolist() == [BLOCK] * BLOCKS + [POLISH, SELECT]
    rows = frame.to_dict("records")
    swept, learned = bench.experiments, Tuned(bench.experiments, plan, rows[:BLOCKS])
    split = tokens().groupby("split")["tokens"].apply(lambda ids: torch.tensor(np.stack(ids.to_list())).long())
    drawn = np.random.default_rng([0, *b"windows"]).permutation(12)[:6]
    held = split["calibrate"][drawn[:3]]
    reference, model = (models.load_model(bench.path, device=CPU) for _ in range(2))
    aims = outputs(reference, family, held)
    for block, row in enumerate(rows[:BLOCKS]):
        before = {each: learned for each in range(block)} | {block: swept}
        for source, loss in ((swept, row["loss_before"]), (learned, row["loss_after"])):
            out = outputs(put_on(model, bench, plan, before | {block: source}), family, held)[block]
            error = (out - aims[block]).square().sum() / aims[block].square().sum()
            assert loss == pytest.approx(error.item(), rel=1e-3)
        assert row["kept"] == (row["loss_after"] < row["loss_before"])
    assert frame["kept"][:BLOCKS].any()
    polished = Tuned(bench.experiments, plan, rows[:-1])
    before = nll(put_on(model, bench, plan, dict.fromkeys(range(BLOCKS), learned)), held)
    truth = Tune().polish_truth * rows[-2]["loss_before"] ** 0.5
    for row, source, loss, ids, weight in (
        (rows[-2], learned, "loss_before", held, truth),
        (rows[-2], polished, "loss_after", held, truth),
        (rows[-1], swept, "loss_before", split["select"], 0),
        (rows[-1], polished, "loss_after", split["select"], 0),
    ):
        put_on(model, bench, plan, dict.fromkeys(range(BLOCKS), source))
        expected = kl(reference, model, ids) + weight * (nll(model, ids) - before)
        assert row[loss] == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return small("llama", tmp_path_factory.mktemp("tune"))


def test_learning_beats_the_swept_codes_at_their_bytes(bench: Small, tmp_path: Path) -> None:
    plan = bench.plan([from_row({"quantizer": "rtn", "bits": 2, "group_size": 16, "rank": 0}, bench.experiments.sweep)])
    frame = run(bench, plan, FAST.model_copy(update={"iterations": 20, "rate": None, "windows": 12, "holdout": 0.25}))
    assert frame["kept"].all() and (frame["loss_after"] < frame["loss_before"]).all()
    last = frame.iloc[-1]
    made = compress(
        {"swept": plan, "tuned": plan},
        results=tmp_path,
        experiments=bench.experiments,
        inventory=bench.inventory,
        tuned={"tuned": sources(bench, plan, frame)},
    )
    assert made["nbytes"].nunique() == 1 and made["digest"].nunique() == 2
    ids = torch.tensor(np.stack(tokens().query("split == 'select'")["tokens"].to_list())).long()
    reference, written = models.load_model(bench.path, device=CPU), load_model(tmp_path / "models/tuned", device=CPU)
    assert kl(reference, written, ids) == pytest.approx(last["loss_after"], rel=1e-3)


def test_swept_codes_are_shipped_where_learning_does_harm(bench: Small, tmp_path: Path) -> None:
    plan = bench.random_plan(0)
    none = run(bench, plan, FAST.model_copy(update={"rate": 50.0, "learn": ["rounding"], "polish_rate": 50.0}))
    assert not none["kept"].any() and (none["step"] == 0).all()
    assert none["note"].str.contains("no iterate|not better").all()
    rows = run(bench, plan).to_dict("records")
    rows[-1]["kept"] = False  # whatever the blocks have gained
    for found in (none.to_dict("records"), rows):
        matrices = Tuned(bench.experiments, plan, found)
        for row in plan.to_dict("records"):
            option = from_row(row, bench.experiments.sweep)
            assert matrices.shard(row["layer"], option) == bench.experiments.shard(row["layer"], option)


def test_bytes_repeat_and_depend_on_what_matters(bench: Small, tmp_path: Path) -> None:
    plan, twin = bench.random_plan(0), small("llama", tmp_path)
    first = run(bench, plan)
    assert run(twin, plan).drop(columns="wall_s").equals(first.drop(columns="wall_s"))
    for key in first["key"]:
        mine, other = (store.tensors(key) for store in (bench.store, twin.store))
        assert (mine and mine.read_bytes()) == (other and other.read_bytes())
    short = FAST.model_copy(update={"iterations": 1, "polish": 0})
    keys = [set(run(bench, plan, short, **how)["key"]) for how in ({}, {"seed": 1}, {"tokens": tokens(length=20)})]
    assert len(set.union(*keys, first["key"])) == sum(map(len, keys)) + len(first)
    # another polish goes on from the same blocks, another option from the block before
    other = plan.copy()
    other.loc[other["block"] == 1, ["quantizer", "bits", "group_size", "rank"]] = ["rtn", 4, 16, 0]
    for changed, same in ((run(bench, plan, FAST.model_copy(update={"polish": 1})), BLOCKS), (run(bench, other), 1)):
        assert (changed["key"] == first["key"]).tolist() == [True] * same + [False] * (BLOCKS + 2 - same)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [2])
def test_killed_run_goes_on_at_the_first_unfinished_block(
    after: int, bench: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, twin = bench.random_plan(0), small("llama", tmp_path)
    undisturbed = run(bench, plan)
    for layer, option in zip(plan["layer"], plan.to_dict("records"), strict=True):
        twin.experiments.shard(layer, from_row(option, twin.experiments.sweep))
    put, done, tuned_blocks = Store.put, [], []

    def dying(self: Store, *args: Any) -> None:
        if len(done) == after:
            raise Killed
        put(self, *args)
        done.append(args)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", dying)
        with pytest.raises(Killed):
            run(twin, plan)
    block = stage._Run._block

    def counted(self: Any, work: Any) -> Any:
        tuned_blocks.append(work.block)
        return block(self, work)

    monkeypatch.setattr(stage._Run, "_block", counted)
    assert run(twin, plan).drop(columns="wall_s").equals(undisturbed.drop(columns="wall_s"))
    assert tuned_blocks == list(range(after, BLOCKS))
    assert not list((tmp_path / "store/scratch").iterdir())
    # scratch that somebody cleared away: the streams start over, finished blocks do not
    tuned_blocks.clear()
    twin.store.path(undisturbed["key"][1]).unlink()
    assert run(twin, plan).drop(columns="wall_s").equals(undisturbed.drop(columns="wall_s"))
    assert tuned_blocks == [1]


def test_a_model_too_large_for_the_polish_is_refused_before_the_blocks(
    bench: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = bench.random_plan(8)
    weights = (bench.inventory["rows"] * bench.inventory["columns"])[bench.inventory["claimed"]].sum()
    monkeypatch.setattr(stage, "total_memory", lambda _: 10 * weights)
    monkeypatch.setattr(stage._Run, "_block", lambda *_: pytest.fail("a block was learned"))
    with pytest.raises(BitallocError, match=r"takes some \d+ GB, cpu has \d+: set tune.polish to 0"):
        run(bench, plan)
    with pytest.raises(pytest.fail.Exception):
        run(bench, plan, FAST.model_copy(update={"polish": 0}))


def test_never_more_than_a_block_until_the_whole_is_judged(
    bench: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hollow, resident = [], []

    def skeleton(*args: Any, **kwargs: Any) -> Any:
        hollow.append(models.skeleton(*args, **kwargs))
        return hollow[0]

    def materialise(*args: Any, **kwargs: Any) -> None:
        models.materialise(*args, **kwargs)
        resident.append({name for name, parameter in hollow[0].named_parameters() if not parameter.is_meta})

    monkeypatch.setattr(stream, "skeleton", skeleton)
    monkeypatch.setattr(stream, "materialise", materialise)
    monkeypatch.setattr(stage, "load_model", lambda *_, **__: pytest.fail("the whole model"))
    with pytest.raises(pytest.fail.Exception):
        run(bench, bench.random_plan(7))
    blocks = [
        {f"model.layers.{b}." for b in range(BLOCKS) if any(f"layers.{b}." in n for n in names)} for names in resident
    ]
    assert max(map(len, blocks)) == 1 and set().union(*blocks) == {f"model.layers.{b}." for b in range(BLOCKS)}
    assert all(parameter.is_meta for parameter in hollow[0].parameters())


@pytest.mark.parametrize("optimizer", ["sign", "adam"])
def test_descent_leaves_the_best_iterate(optimizer: str) -> None:
    matrix, W_OI = given(MATRICES[1])
    aim_OI = W_OI + 0.05
    how: dict[str, Any] = {"train": [0], "batch": 1, "optimizer": optimizer, "seed": [0]}

    def distance() -> torch.Tensor:
        return (learned.weight() - aim_OI).square().mean()

    losses: list[float] = []

    def held() -> float:
        losses.append(distance().item())
        return losses[-1]

    learned = Learned(matrix, W_OI)
    start = distance().item()
    step, least = descend(
        {"x": learned},
        ["rounding", "scales", "factors"],
        loss=lambda _: distance(),
        held=held,
        steps=20,
        rate=None,
        **how,
    )
    assert least == min(losses) == distance().item() < start == losses[0] and 0 < step <= 20
    assert len(losses) == 1 + LOOKS
    # a rate that only harms: the start stays
    learned = Learned(matrix, W_OI)
    before = learned.compressed().tensors()
    step, _ = descend({"x": learned}, ["rounding"], loss=lambda _: -distance(), held=held, steps=10, rate=1.0, **how)
    after = learned.compressed().tensors()
    assert step == 0 and all(torch.equal(before[name], after[name]) for name in before)


def test_faults_are_one_line(bench: Small) -> None:
    few = tokens()
    few = few[(few["split"] != "calibrate") | (few["window"] < 1)]
    with pytest.raises(BitallocError, match=r"set retrieve\.calibrate_windows to 2 or more"):
        run(bench, bench.random_plan(0), tokens=few)
    plan = bench.random_plan(3)
    frame = run(bench, plan)
    key = frame["key"][BLOCKS]
    bench.store.tensors(key).unlink()
    matrices, row = sources(bench, plan, frame), plan.query("quantizer != 'none'").iloc[0]
    with pytest.raises(BitallocError, match="delete the tables of tune"):
        matrices.matrix(row["layer"], from_row(row, bench.experiments.sweep))


def test_tuned_plans_copy_the_map_of_others() -> None:
    rows = [
        {"plan": f"{strategy}-{budget}", "strategy": strategy, "budget": budget, "nbytes": 7, "note": "x"}
        for budget in ("2bpw", "3bpw")
        for strategy in ("best", "uniform", "random")
    ]
    plans = pd.DataFrame(rows)
    frames = {name: pd.DataFrame({"layer": [name]}) for name in plans["plan"]}
    copies, copied = tuned(plans, frames, ["best", "tuned", "tuned_uniform"])
    assert copies["plan"].tolist() == ["tuned-2bpw", "tuned-3bpw", "tuned_uniform-2bpw", "tuned_uniform-3bpw"]
    assert copies["note"][2] == "the map of uniform-2bpw, codes learned (tune)"
    assert copied["tuned_uniform-3bpw"] is frames["uniform-3bpw"] and (copies["nbytes"] == 7).all()
    assert tuned(plans, frames, ["best"])[0].empty
    with pytest.raises(BitallocError, match=r"no plan 'manual' at 2bpw; add it to allocate\.strategies"):
        tuned(plans, frames, ["tuned_manual"])
    with pytest.raises(ValueError, match="no checkpoint is made"):
        Compress(plans=["tuned_leaked"])


def test_options_are_learned_alone_and_drawn(bench: Small, tmp_path: Path) -> None:
    layers = [layer for layer in bench.layers if bench.experiments.layers[layer]["block"] < 2]
    sweep = bench.experiments.rows(layers, [*OPTIONS])
    given = {"sweep": sweep, "tokens": tokens(), "inventory": bench.inventory, "experiments": bench.experiments}
    frame = stage.options(**given, settings=FAST.model_copy(update={"sample": 4}), seed=0)
    TUNED_OPTIONS.write(frame, tmp_path / "tune_options.parquet")
    assert len(frame) == 4 and set(frame["quantizer"]) == {"rtn"}  # 16 bits have nothing to learn
    assert (frame["block_error_learned"] <= frame["block_error_swept"]).all()
    row = frame.iloc[-1].to_dict()
    assert row["rel_error"] == pytest.approx(
        sweep[(sweep["block"] == row["block"]) & (sweep["bits"] == row["bits"])]["rel_error"].mean()
    )
    plan = bench.plan([from_row(row, bench.experiments.sweep)])
    held = np.random.default_rng([0, *b"windows"]).permutation(12)[:3]
    ids = torch.tensor(np.stack(tokens().query("split == 'calibrate'")["tokens"].to_list()))[held].long()
    model = models.load_model(bench.path, device=CPU)
    aim = outputs(model, "llama", ids)[row["block"]]
    out = outputs(put_on(model, bench, plan, {row["block"]: bench.experiments}), "llama", ids)[row["block"]]
    error = ((out - aim).square().sum() / aim.square().sum()).item()
    assert row["block_error_swept"] == pytest.approx(error, rel=1e-3)
    figures.tune(frame, tmp_path / "tune.png", "GO", model="small", seed=0)
    pixels = imread(tmp_path / "tune.png")[..., :3]
    assert pixels.shape[1] == round(8.0 * 160) and pixels[:, :6].min() == 1 and pixels[:, -6:].min() == 1
