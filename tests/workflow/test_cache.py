"""Snakemake's cache between workflows: a second project takes tables from it, and never the wrong ones."""

import shutil

import pandas as pd
import pytest
import yaml

from bitalloc import tables

pytestmark = [pytest.mark.workflow, pytest.mark.xdist_group("workflow")]

MOMENTS, *UNITS = TARGETS = [
    f"results/tiny/{name}.parquet" for name in ("moments", "sweep/block-000", "sweep/block-001")
]


@pytest.fixture
def store(finished, tmp_path, monkeypatch):
    """A store that projects share, and a place for the cache."""
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("SNAKEMAKE_OUTPUT_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(finished.folder / "results/store", tmp_path / "store")


def test_a_second_project_takes_moments_and_sweep_from_the_cache(finished, store, tmp_path):
    def run(project, *targets):
        status, output = project.run(*targets, "--cache", "--config", f"store={store}")
        assert status == 0, output
        scripts = [path for path in (project.folder / "logs").rglob("*.log") if path.stat().st_size]
        return output.count("from cache") - output.count("to cache"), {path.stem for path in scripts}

    projects = [finished.copy(tmp_path / name) for name in ("first", "second")]
    for project in projects:
        shutil.rmtree(project.folder / "logs")
        for target in TARGETS:
            (project.folder / target).unlink()
    first, second = projects
    assert run(first, *TARGETS) == (0, {"calibrate", "block-000", "block-001"})
    assert run(second, *TARGETS) == (3, set())
    for target in TARGETS:
        table = (second.folder / target).read_bytes()
        assert table == (first.folder / target).read_bytes()
        if target == MOMENTS:
            assert table == (finished.folder / target).read_bytes()
    assert list(pd.read_parquet(second.folder / UNITS[1])["block"].unique()) == [1]

    # another name for the same model: what is named in the tables is not taken, what the store holds is
    results, sheet = second.folder / "results", second.folder / "config/models.yaml"
    (results / "renamed").mkdir()
    inventory = tables.INVENTORY.read(results / "tiny/inventory.parquet").assign(model="renamed")
    tables.INVENTORY.write(inventory, results / "renamed/inventory.parquet")
    for name in ("checkpoint.json", "tokens.parquet", "moments.parquet"):
        shutil.copy(results / "tiny" / name, results / "renamed")
    models = yaml.safe_load(sheet.read_text())["models"]
    sheet.write_text(yaml.safe_dump({"models": models | {"renamed": models["tiny"]}}))
    renamed = UNITS[0].replace("tiny", "renamed")
    shards = sorted(store.glob("??/*"))
    assert run(second, renamed) == (0, {"block-000"})
    assert set(pd.read_parquet(second.folder / renamed)["model"]) == {"renamed"}
    assert sorted(store.glob("??/*")) == shards

    # the moments of the cache lie in a store that is gone
    shutil.rmtree(store)
    (second.folder / MOMENTS).unlink()
    assert run(second, MOMENTS)[0] == 0
    keys = tables.MOMENTS.read(second.folder / MOMENTS)["key"]
    assert all((store / key[:2] / f"{key}.safetensors").exists() for key in keys)


@pytest.mark.parametrize("place", [None, "relative"])
def test_the_cache_without_a_place_is_one_line(finished, monkeypatch, place):
    monkeypatch.delenv("SNAKEMAKE_OUTPUT_CACHE", raising=False)
    if place:
        monkeypatch.setenv("SNAKEMAKE_OUTPUT_CACHE", place)
    status, output = finished.run(MOMENTS, "-n", "--cache")
    assert status != 0
    assert "--cache needs a folder to keep tables in: export SNAKEMAKE_OUTPUT_CACHE=" in output
    assert "Traceback" not in output
