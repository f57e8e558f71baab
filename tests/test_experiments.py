import contextlib
import hashlib
import resource
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save, save_file

from bitalloc import experiments as module
from bitalloc.config import Sweep
from bitalloc.errors import BitallocError
from bitalloc.experiments import Experiments
from bitalloc.families import FAMILIES
from bitalloc.lowrank import working_bytes
from bitalloc.models import Checkpoint
from bitalloc.option import Option, options
from bitalloc.progress import Progress
from bitalloc.store import Store, digest
from bitalloc.tables import SWEEP
from tests.quant.reference import moments, weights

SHAPES = {"q_proj": (24, 40), "k_proj": (12, 40), "v_proj": (12, 40), "o_proj": (40, 24)}
SHAPES |= {"gate_proj": (56, 40), "up_proj": (56, 40), "down_proj": (40, 56)}
SETTINGS = Sweep(bits=[2, 3, 16], group_sizes=[16, 32], ranks=[0, 2])
FAMILY = FAMILIES["llama"]
BLOCKS = 2


class World:
    """A checkpoint of two blocks with random weights, its inventory and moments, and a store."""

    def __init__(self, folder: Path, *, name: str = "small", dtype: torch.dtype = torch.float16) -> None:
        self.folder, self.store = folder, Store(folder / "store")
        (folder / "model").mkdir(parents=True)
        self.tensors = {
            f"{FAMILY.layer(block, role)}.weight": weights(*SHAPES[role.name], seed=block).to(dtype)
            for block in range(BLOCKS)
            for role in FAMILY.roles
        }
        self.moments = self._moments()
        self.name = name

    def _moments(self) -> pd.DataFrame:
        rows = []
        for block in range(BLOCKS):
            for site, roles in FAMILY.sites().items():
                columns = SHAPES[roles[0].name][1]
                key = digest([block, site])
                data = save({"H_II": moments(columns, seed=block, outliers=1)})
                self.store.put(key, {}, data)
                rows.append({"site": f"{block}.{site}", "block": block, "dim": columns, "key": key, "digest": key})
        return pd.DataFrame(rows)

    @property
    def inventory(self) -> pd.DataFrame:
        rows = []
        for block in range(BLOCKS):
            for role in FAMILY.roles:
                layer = FAMILY.layer(block, role)
                tensor = self.tensors[f"{layer}.weight"]
                place = {"model": self.name, "layer": layer, "block": block, "role": role.name, "kind": role.kind}
                shape = {"rows": tensor.shape[0], "columns": tensor.shape[1], "dtype": "F16", "claimed": True}
                content = hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()
                rows.append({**place, **shape, "site": f"{block}.{role.site}", "digest": content})
        rows.append({**rows[0], "layer": "model.norm", "claimed": False, "role": "", "site": ""})
        return pd.DataFrame(rows)

    def experiments(self, sweep: Sweep = SETTINGS, **replaced) -> Experiments:
        save_file(self.tensors, self.folder / "model" / "model.safetensors")
        given = {
            "checkpoint": Checkpoint(self.folder / "model", FAMILY),
            "inventory": self.inventory,
            "moments": self.moments,
            "store": self.store,
            "sweep": sweep,
            "device": torch.device("cpu"),
        }
        return Experiments(**given | replaced)


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
ALL = options(SETTINGS)


def untimed(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns="wall_s")


def count_work(monkeypatch) -> list[list[Option]]:
    calls, real = [], module.compress
    monkeypatch.setattr(
        module, "compress", lambda items, **how: calls.append([option for _, option in items]) or real(items, **how)
    )
    return calls


def test_rows_are_a_sweep_table_of_what_is_stored(world, tmp_path):
    ours = world.experiments()
    frame = ours.rows([Q, DOWN], ALL)
    SWEEP.write(frame, tmp_path / "sweep.parquet")
    assert frame["layer"].tolist() == [Q] * len(ALL) + [DOWN] * len(ALL)
    assert frame["nbytes"].tolist()[: len(ALL)] == [option.nbytes(24, 40) for option in ALL]
    for layer, site in ((Q, "0.attn_in"), (DOWN, "1.mlp_out")):
        W, H = world.tensors[f"{layer}.weight"].double(), ours.H(site).double()
        for (_, row), option in zip(frame[frame["layer"] == layer].iterrows(), ALL, strict=True):
            What = ours.matrix(layer, option).dequantize().double()
            E = W - What
            assert row["mse"] == pytest.approx(float(E.square().mean()), rel=1e-3, abs=1e-15)
            assert row["nmse"] == pytest.approx(float(E.square().sum() / W.square().sum()), rel=1e-3, abs=1e-12)
            expected = float(torch.trace(E @ H @ E.T) / torch.trace(W @ H @ W.T))
            assert row["rel_error"] == pytest.approx(expected, rel=1e-3, abs=1e-12)
            share = float(What.square().sum() / W.square().sum())
            assert row["weight_energy_ratio"] == pytest.approx(share, rel=1e-4)
    assert frame[frame["quantizer"] == "none"]["rel_error"].tolist() == [0.0, 0.0]


def test_what_is_stored_is_not_computed_again(world, monkeypatch):
    calls = count_work(monkeypatch)
    first = world.experiments().rows([Q], ALL)
    assert calls
    calls.clear()
    progress = Progress("sweep", len(ALL))
    assert world.experiments().rows([Q], ALL, progress).equals(first)
    assert not calls and (progress.done, progress.cached) == (len(ALL), len(ALL))


def test_a_run_killed_in_the_middle_resumes_to_the_same_table(world, tmp_path, monkeypatch):
    other = World(tmp_path / "other")
    whole = other.experiments().rows([Q, DOWN], ALL)
    real, puts = Store.put, []

    def dying(self, key, *args):
        if len(puts) == 5:
            raise KeyboardInterrupt
        real(self, key, *args)
        puts.append(key)

    monkeypatch.setattr(Store, "put", dying)
    ours = world.experiments()
    with pytest.raises(KeyboardInterrupt):
        ours.rows([Q, DOWN], ALL)
    monkeypatch.setattr(Store, "put", real)
    calls = count_work(monkeypatch)
    resumed = world.experiments().rows([Q, DOWN], ALL)
    assert sum(map(len, calls)) == 2 * len(ALL) - 5
    assert untimed(resumed).equals(untimed(whole))
    for key in whole["key"]:
        assert world.store.tensors(key).read_bytes() == other.store.tensors(key).read_bytes()


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_corrupted_shard_is_computed_again(world, monkeypatch, suffix):
    first = world.experiments().rows([Q], ALL)
    path = world.store.path(first["key"][3], suffix)
    path.write_bytes(path.read_bytes()[:-20])
    calls = count_work(monkeypatch)
    assert untimed(world.experiments().rows([Q], ALL)).equals(untimed(first))
    assert calls == [[ALL[3]]]


def test_matrices_are_the_same_kept_or_not(world, tmp_path):
    kept = world.experiments()
    frame = kept.rows([Q], ALL)
    bare = World(tmp_path / "bare").experiments(SETTINGS.model_copy(update={"keep_limit": "1kB"}))
    assert kept.keep and not bare.keep
    assert untimed(bare.rows([Q], ALL)).equals(untimed(frame))
    for option in ALL:
        assert bare.store.tensors(frame["key"][ALL.index(option)]) is None
        a, b = (ours.matrix(Q, option).tensors() for ours in (kept, bare))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    unswept = Option("gptq", 3, 32, 5)
    assert kept.matrix(Q, unswept).nbytes == unswept.nbytes(24, 40)


def test_keys_follow_content_and_nothing_else(world, tmp_path):
    def keys(**changed) -> list[str]:
        return list(world.experiments(SETTINGS.model_copy(update=changed))._key(Q, option) for option in ALL)

    first = keys()
    assert len(set(first)) == len(ALL)
    assert keys(workspace="1MB", keep_matrices=False, ranks=[0]) == first
    for changed in ({"damping": 0.2}, {"act_order": False}, {"iterations": 2}):
        assert not set(keys(**changed)) & set(first)
    world.name = "renamed"
    assert keys() == first
    world.moments.loc[0, "digest"] = "another"
    assert not set(keys()) & set(first)
    world.moments = world._moments()
    world.tensors[f"{Q}.weight"] = world.tensors[f"{Q}.weight"] * 2
    assert not set(keys()) & set(first)


def another_code(world, monkeypatch):
    monkeypatch.setattr(module, "source_digest", lambda *names: "another")


def other_weights(world, monkeypatch):
    world.tensors[f"{Q}.weight"] = world.tensors[f"{Q}.weight"] * 2


def other_moments(world, monkeypatch):
    world.moments["digest"] = world.moments["digest"].where(world.moments["site"] != "0.attn_in", "another")


def renamed(world, monkeypatch):
    world.name = "renamed"


def elsewhere(world, monkeypatch):
    world.folder = world.folder / "elsewhere"
    (world.folder / "model").mkdir(parents=True)


@pytest.mark.parametrize(
    ("change", "settings", "computed"),
    [
        (renamed, {}, 0),
        (elsewhere, {}, 0),
        (None, {"workspace": "1MB", "unit": "matrix"}, 0),
        (None, {"bits": [2, 3, 4, 16]}, 2 * 4),  # 4 bits, two groups, two ranks
        (None, {"damping": 0.2}, 2 * len(ALL)),
        (None, {"act_order": False}, 2 * len(ALL)),
        (None, {"iterations": 2}, 2 * len(ALL)),
        (other_weights, {}, len(ALL)),  # those of q_proj alone
        (other_moments, {}, len(ALL)),  # those of its site alone
        (another_code, {}, 2 * len(ALL)),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_a_rerun_computes_what_has_changed_and_nothing_else(world, monkeypatch, change, settings, computed):
    world.experiments().rows([Q, DOWN], ALL)
    calls = count_work(monkeypatch)
    if change:
        change(world, monkeypatch)
    again = SETTINGS.model_copy(update=settings)
    frame = world.experiments(again).rows([Q, DOWN], options(again))
    assert sum(len(turn) for turn in calls) == computed
    assert set(frame["model"]) == {world.name}
    calls.clear()
    world.experiments(again).rows([Q, DOWN], options(again))
    assert not calls


def test_bfloat16_weights_pass_through_as_bfloat16(tmp_path):
    world = World(tmp_path, dtype=torch.bfloat16)
    inventory = world.inventory.assign(dtype="BF16")
    matrix = world.experiments(inventory=inventory).matrix(Q, Option("none", 16, 0, 0))
    assert torch.equal(matrix.weight_OI, world.tensors[f"{Q}.weight"])


def test_a_small_workspace_changes_nothing_but_memory(world, tmp_path, monkeypatch):
    whole = world.experiments().rows([Q], ALL)
    calls = count_work(monkeypatch)
    held = working_bytes([(Q, 24, 40, option) for option in ALL[:3]], iterations=SETTINGS.iterations)
    settings = SETTINGS.model_copy(update={"workspace": str(held)})
    assert untimed(World(tmp_path / "other").experiments(settings).rows([Q], ALL)).equals(untimed(whole))
    assert [len(turn) for turn in calls] == [3, 1, 3, 1, 1]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_stack_too_large_for_memory_is_halved(world, tmp_path, monkeypatch, capsys, error):
    whole = world.experiments().rows([Q, DOWN], ALL)
    real, sizes = module.compress, []

    def narrow(items, **how):
        sizes.append(len(items))
        if len(items) > 2:
            raise error
        return real(items, **how)

    monkeypatch.setattr(module, "compress", narrow)
    assert untimed(World(tmp_path / "other").experiments().rows([Q, DOWN], ALL)).equals(untimed(whole))
    assert sizes.count(4) == 1 and max(sizes[1:]) == 2
    assert capsys.readouterr().err.count("out of memory") == 1


def test_memory_that_does_not_suffice_for_one_option_is_one_line(world, monkeypatch):
    def never(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "compress", never)
    with pytest.raises(BitallocError, match=r"not enough memory.*q_proj.*gptq-2b-g16-r0"):
        world.experiments().rows([Q], ALL)


def test_other_runtime_errors_are_not_swallowed(world, monkeypatch):
    def broken(*args, **how):
        raise RuntimeError("shapes")

    monkeypatch.setattr(module, "compress", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        world.experiments().rows([Q], ALL)


def test_bad_input_is_one_clear_line(world):
    ours = world.experiments()
    with pytest.raises(BitallocError, match=r"did you mean 'model\.layers\.0\.self_attn\.q_proj'"):
        ours.rows(["model.layers.0.self_attn.q_prj"], ALL)
    with pytest.raises(BitallocError, match=r"gptqq.*'gptq'"):
        ours.rows([Q], [Option("gptqq", 2, 16, 0)])
    with pytest.raises(BitallocError, match="rerun calibrate"):
        world.experiments(moments=world.moments[1:]).rows([Q], ALL)
    world.store.path(world.moments["key"][0], ".safetensors").write_bytes(b"")
    with pytest.raises(BitallocError, match="damaged"):
        world.experiments().rows([Q], ALL)


def test_nan_weights_and_moments_are_refused_by_name(world):
    site = world.moments.iloc[0]
    world.store.put(site["key"], {}, save({"H_II": torch.full((40, 40), float("nan"))}))
    with pytest.raises(BitallocError, match=r"0\.attn_in.*NaN"):
        world.experiments().rows([Q], ALL)
    world.tensors[f"{DOWN}.weight"][3, 3] = float("nan")
    with pytest.raises(BitallocError, match=r"1\.mlp\.down_proj.*NaN"):
        world.experiments().rows([DOWN], ALL)


def test_an_error_that_is_not_finite_is_refused_with_layer_and_option(world, monkeypatch):
    # the pass-through has no room for 1e6 in 16 bits
    world.tensors = {name: tensor.float() for name, tensor in world.tensors.items()}
    world.tensors[f"{Q}.weight"][0, 0] = 1e6
    with pytest.raises(BitallocError, match=r"q_proj at none-16b-g0-r0 is not finite"):
        world.experiments().rows([Q], ALL)


def test_a_shape_that_departs_from_the_inventory_or_the_moments_is_refused(world):
    with pytest.raises(BitallocError, match="rerun retrieve"):
        world.experiments(inventory=world.inventory.assign(rows=7)).rows([Q], ALL)
    world.store.put(world.moments["key"][0], {}, save({"H_II": moments(24)}))
    with pytest.raises(BitallocError, match="has 40 inputs; rerun calibrate"):
        world.experiments().rows([Q], ALL)


def test_a_disk_that_fills_up_within_a_shard_is_one_line_and_leaves_no_half(world, tmp_path):
    whole = World(tmp_path / "other").experiments().rows([Q, DOWN], ALL)
    ours, limits = world.experiments(), resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = [ours.matrix(Q, option).nbytes for option in ALL]
    resource.setrlimit(resource.RLIMIT_FSIZE, (sorted(sizes)[len(sizes) // 2] + 500, limits[1]))
    try:
        with pytest.raises(BitallocError, match=r"cannot write .*safetensors: File too large; free space .* rerun"):
            ours.rows([Q, DOWN], ALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    there = ours.stored([Q, DOWN], ALL)
    assert 0 < there < len(ALL)
    assert not list(tmp_path.rglob("*.tmp"))
    progress = Progress("sweep", 2 * len(ALL))
    assert untimed(ours.rows([Q, DOWN], ALL, progress)).equals(untimed(whole))
    assert progress.cached == there


def test_two_runs_do_not_do_the_same_work_at_once(world, monkeypatch):
    ours, said, there = world.experiments(), [], []
    work = digest(sorted(ours._key(Q, option) for option in ALL))
    other = contextlib.ExitStack()
    other.enter_context(Store(world.store.root).lock(work, ""))

    def wait(line, **_):  # until we say that we wait, the other holds the lock
        said.append(line)
        there.append(world.store.get(ours._key(Q, ALL[0])))
        other.close()

    monkeypatch.setattr("bitalloc.store.print", wait, raising=False)
    assert len(ours.rows([Q], ALL)) == len(ALL)
    assert there == [None]  # nothing was computed before
    [line] = said
    assert f"another process computes {Q}" in line
