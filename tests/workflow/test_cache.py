"""Snakemake's cache between workflows: a second project takes tables from it, and never the wrong ones."""

import shutil

import pandas as pd
import pytest
import yaml

from bitalloc import tables

pytestmark = pytest.mark.workflow

MOMENTS, UNIT, OTHER_UNIT, RENAMED = (
    f"results/{name}.parquet"
    for name in ("tiny/moments", "tiny/sweep/block-000", "tiny/sweep/block-001", "renamed/sweep/block-000")
)


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

    first, second = (finished.copy(tmp_path / name) for name in ("first", "second"))
    for project in (first, second):
        shutil.rmtree(project.folder / "logs")
        for target in (MOMENTS, UNIT, OTHER_UNIT):
            (project.folder / target).unlink()
    assert run(first, MOMENTS, UNIT) == (0, {"calibrate", "block-000"})

    # the same model under another name, as far as its moments
    results, sheet = second.folder / "results", second.folder / "config/models.yaml"
    (results / "renamed").mkdir()
    inventory = tables.INVENTORY.read(results / "tiny/inventory.parquet").assign(model="renamed")
    tables.INVENTORY.write(inventory, results / "renamed/inventory.parquet")
    for name in ("checkpoint.json", "tokens.parquet"):
        shutil.copy(results / "tiny" / name, results / "renamed")
    shutil.copy(first.folder / MOMENTS, results / "renamed")
    models = yaml.safe_load(sheet.read_text())["models"]
    sheet.write_text(yaml.safe_dump({"models": models | {"renamed": models["tiny"]}}))

    shards = sorted(store.glob("??/*"))
    assert run(second, MOMENTS, UNIT, OTHER_UNIT, RENAMED) == (2, {"block-000", "block-001"})
    assert {path.parts[-3] for path in (second.folder / "logs").rglob("block-000.log") if path.stat().st_size} == {
        "renamed"
    }
    for target in (MOMENTS, UNIT):
        assert (second.folder / target).read_bytes() == (first.folder / target).read_bytes()
    assert (second.folder / MOMENTS).read_bytes() == (finished.folder / MOMENTS).read_bytes()
    assert set(pd.read_parquet(second.folder / OTHER_UNIT)["block"]) == {1}
    assert set(pd.read_parquet(second.folder / RENAMED)["model"]) == {"renamed"}
    assert sorted(store.glob("??/*")) == shards  # what was not in the cache was in the store

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
