import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from bitalloc.config import Sweep
from bitalloc.errors import BitallocError
from bitalloc.families import FAMILIES
from bitalloc.option import options
from bitalloc.sweep import assemble, parse_unit, sweep, units
from bitalloc.tables import SWEEP
from tests.test_experiments import BLOCKS, FAMILY, World

SETTINGS = Sweep(bits=[2], group_sizes=[16, 32], ranks=[0, 2])


@pytest.mark.parametrize("unit", ["layer", "matrix", "experiment"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_units_cover_every_experiment_once(family, unit):
    settings = SETTINGS.model_copy(update={"unit": unit})
    names = units(family, 3, settings)
    assert len(set(names)) == len(names)
    covered = []
    for name in names:
        layers, wanted_options = parse_unit(name, family, settings)
        covered += [(layer, option) for layer in layers for option in wanted_options]
    wanted = [
        (family.layer(b, role), option) for b in range(3) for role in family.roles for option in options(settings)
    ]
    assert covered == wanted


@pytest.mark.parametrize(
    ("unit", "words"),
    [
        ("blok-003", "is no unit"),
        ("block-003.q_prj", r"no role 'q_prj': did you mean 'q_proj'"),
        ("block-003.q_proj.gptq-5b-g16-r0", r"no option 'gptq-5b-g16-r0': did you mean"),
    ],
)
def test_a_name_that_is_no_unit_is_refused(unit, words):
    with pytest.raises(BitallocError, match=words):
        parse_unit(unit, FAMILY, SETTINGS)


def test_planning_needs_no_torch():
    """Nor pandas and scipy, which all starts of snakemake would pay for."""
    rules = (Path(__file__).parents[1] / "workflow/rules/common.smk").read_text()
    code = "\n".join(line for line in rules.splitlines() if line.startswith(("from bitalloc", "import bitalloc")))
    code += "\nimport sys; print(*{'torch', 'pandas', 'pyarrow', 'scipy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_a_job_starts_without_what_it_does_not_need():
    """Of every job, starting is the dearest part that is not an experiment."""
    script = Path(__file__).parents[1] / "scripts/sweep.py"
    code = f"import runpy, sys; runpy.run_path({str(script)!r}, run_name='imported'); import bitalloc.experiments; "
    code += "print(*{'torch', 'transformers', 'accelerate', 'scipy', 'matplotlib', 'torch._dynamo'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["torch"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    world = World(tmp_path_factory.mktemp("first") / "world")
    world.experiments()  # writes the checkpoint
    return world


def run(world: World, unit: str, settings: Sweep) -> pd.DataFrame:
    return sweep(
        unit,
        path=world.folder / "model",
        family=FAMILY,
        inventory=world.inventory,
        moments=world.moments,
        settings=settings,
        store=world.store,
        device=torch.device("cpu"),
    )


def whole(world: World, unit: str) -> pd.DataFrame:
    settings = SETTINGS.model_copy(update={"unit": unit})
    frames = [run(world, name, settings) for name in units(FAMILY, BLOCKS, settings)]
    return assemble(frames[::-1], inventory=world.inventory, family=FAMILY, settings=settings)


def test_the_table_does_not_depend_on_how_the_work_was_cut(world, tmp_path_factory):
    by_layer = whole(world, "layer")
    other = World(tmp_path_factory.mktemp("other") / "world")
    other.experiments()
    by_experiment = whole(other, "experiment")
    assert by_layer.drop(columns="wall_s").equals(by_experiment.drop(columns="wall_s"))
    assert by_layer["layer"].tolist()[:: len(options(SETTINGS))] == [
        FAMILY.layer(block, role) for block in range(BLOCKS) for role in FAMILY.roles
    ]


def test_another_unit_finds_every_experiment_in_the_store(world):
    by_layer = whole(world, "layer")

    def shards() -> dict:
        paths = [path for path in world.store.root.rglob("*") if path.suffix in (".json", ".safetensors")]
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}

    before = shards()
    assert len(before) >= len(by_layer)
    for unit in ("matrix", "experiment"):
        assert whole(world, unit).equals(by_layer)  # `wall_s` too
    assert shards() == before


def test_the_assembled_table_is_complete_or_refused(world, tmp_path):
    frame = whole(world, "layer")
    SWEEP.write(frame, tmp_path / "sweep.parquet")
    assert SWEEP.read(tmp_path / "sweep.parquet").equals(frame)
    given = {"inventory": world.inventory, "family": FAMILY, "settings": SETTINGS}
    with pytest.raises(BitallocError, match=r"1 of 56 experiments.*rank 2 is missing"):
        assemble([frame.drop(index=3)], **given)
    with pytest.raises(BitallocError, match="is not asked for"):
        assemble([frame], **given | {"settings": SETTINGS.model_copy(update={"ranks": [0]})})
    with pytest.raises(BitallocError, match="56 of 56"):
        assemble([], **given)
    with pytest.raises(BitallocError, match="more than once"):
        assemble([frame, frame[:1]], **given)


def test_a_unit_says_first_what_is_left_of_the_sweep_and_of_itself(tmp_path, capsys):
    world = World(tmp_path / "world")
    world.experiments()
    run(world, "block-000", SETTINGS)
    layer, option = parse_unit("block-001.q_proj", FAMILY, SETTINGS)[0], options(SETTINGS)[:1]
    world.experiments(SETTINGS).rows(layer, option)
    run(world, "block-001", SETTINGS)
    said = capsys.readouterr().err.splitlines()
    # progress is told between them where the machine is slow
    assert [line for line in said if line.startswith("[sweep] ")] == [
        "[sweep] small: 0 of 56 experiments are in the store, 56 to do; 28 of them in block-000",
        "[sweep] small: 29 of 56 experiments are in the store, 27 to do; 27 of them in block-001",
    ]


def test_shards_are_shared_by_models_of_equal_content(world, tmp_path):
    first = run(world, "block-000", SETTINGS)
    world.name = "renamed"
    second = run(world, "block-000", SETTINGS)
    world.name = "small"
    assert set(second["model"]) == {"renamed"}
    assert first.drop(columns="model").equals(second.drop(columns="model"))
