"""A sweep of 8,400 experiments: killed ten times and resumed, and what the workflow around the experiments costs.

python benchmarks/bench_resume.py [--blocks 80] [--kills 10] [--directory DIR]  ->  a table, and results/resume.json

A seeded checkpoint (80 blocks x 7 matrices, random, 64 to 128 wide, so that an experiment takes milliseconds) under
15 options (2, 3, 4 bits x 5 ranks), driven by snakemake in project folders of its own:

    undisturbed  empty folder -> moments.parquet -> sweep.parquet
    killed       the same in one command. In each tenth of the sweep, at a drawn experiment (every other time up to a
                 second later), the process group is stopped, looked at and killed (SIGKILL), then `snakemake --unlock`
                 and the same command again. In the end all tables must be those of the undisturbed run, `wall_s` apart.
                 lost       experiments that were stored at a kill and whose shard was written again later
                 in flight  experiments, at most, that were begun and not stored at a kill: the options of a matrix are
                            computed as one stack, so up to 15 of each of the jobs; this work is repeated
                 resume     from the start of `--unlock` to the first new experiment in the store
    no-op        the finished command again
    other units  the finished folder once more, cut into jobs of a matrix, then of an experiment: broken off after some
                 jobs, which must have taken every experiment from the store

Overhead is everything that is no experiment: slots x wall of `snakemake sweep.parquet` - the sum of `wall_s`, where
slots are jobs side by side and `wall_s` is the time in which an experiment was computed. So it holds snakemake, its
DAG, the start of Python, imports, weights and moments, shards, locks and tables, and slots that stand idle. The
experiments are far smaller than real ones, whose overhead is the same: `share` is overhead / (overhead + experiments x
0.5 s). On a busy machine the clock tells of other work too, so the same share is given in CPU seconds. For jobs of a
matrix or an experiment it is EXTRAPOLATED: the overhead a job, measured on a small checkpoint with an empty store and
in the whole DAG with a full one (the larger counts), x the jobs, + the start of the whole DAG.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from safetensors.numpy import save_file

from bitalloc.config import load
from bitalloc.families import FAMILIES
from bitalloc.provenance import run_record
from bitalloc.sweep import units
from bitalloc.tables import SWEEP

ROOT = Path(__file__).parents[1]
PARTS = ("Snakefile", "workflow", "scripts", "config", "profiles", "envs")
WIDTH, INNER, HEADS = 64, 128, 2
SECONDS = 0.5  # an experiment of the criterion
SMALL_BLOCKS, JOBS, REPEATS = 4, 12, 3
TARGET = "results/many/sweep.parquet"
HEAVY = {"transformers", "accelerate", "scipy", "matplotlib"}
Shards = dict[str, tuple[int, int]]


def write_checkpoint(folder: Path, blocks: int, seed: int) -> None:
    """A Qwen2 of random matrices in float16, with the embedded model's tokenizer."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    raw = json.loads((ROOT / "resources/tiny/config.json").read_text())
    raw |= {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": blocks}
    raw |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "layer_types": ["full_attention"] * blocks}
    (folder / "config.json").write_text(json.dumps(raw))
    shutil.copy(ROOT / "resources/tiny/tokenizer.json", folder)
    tensors = {
        "model.embed_tokens.weight": draw.normal(size=(raw["vocab_size"], WIDTH)),
        "model.norm.weight": np.ones(WIDTH),
    }
    for block in range(blocks):
        name = f"model.layers.{block}"
        for role in ("q", "k", "v", "o"):
            tensors[f"{name}.self_attn.{role}_proj.weight"] = draw.normal(0, 0.1, (WIDTH, WIDTH))
        for role in ("q", "k", "v"):
            tensors[f"{name}.self_attn.{role}_proj.bias"] = np.zeros(WIDTH)
        for role, shape in (("gate", (INNER, WIDTH)), ("up", (INNER, WIDTH)), ("down", (WIDTH, INNER))):
            tensors[f"{name}.mlp.{role}_proj.weight"] = draw.normal(0, 0.1, shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = np.ones(WIDTH)
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})


@dataclass
class Run:
    """A finished snakemake: seconds by the clock, and CPU seconds of it and all its jobs."""

    wall_s: float
    cpu_s: float


class Project:
    """A copy of the workflow in a folder of its own, with one model in its sheet: `many`."""

    def __init__(self, folder: Path, *, blocks: int, slots: int, seed: int) -> None:
        self.folder, self.slots = folder, slots
        self.results, self.store = folder / "results/many", folder / "results/store"
        for part in PARTS:
            source, target = ROOT / part, folder / part
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        write_checkpoint(folder / "checkpoint", blocks, seed)
        settings: dict[str, Any] = {"device": "cpu", "threads": 1}  # as many jobs side by side as there are cores
        settings["retrieve"] = {"window": 128, "calibrate_windows": 8, "select_windows": 1, "report_windows": 1}
        settings["retrieve"] |= {split: ["world"] for split in ("calibrate", "select", "report")}
        settings["sweep"] = {"bits": [2, 3, 4], "group_sizes": [32], "ranks": [0, 2, 4, 8, 16]}
        row = {"path": "checkpoint", "family": "qwen2", "blocks": blocks, "settings": settings}
        (folder / "config/models.yaml").write_text(yaml.safe_dump({"models": {"many": row}}))

    def start(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "snakemake", "--cores", str(self.slots), *arguments]
        with (self.folder / "snakemake.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip

    def run(self, *arguments: str) -> Run:
        clock = time.perf_counter()
        process = self.start(*arguments)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"snakemake {' '.join(arguments)} failed; see {self.folder / 'snakemake.log'}")
        return Run(time.perf_counter() - clock, usage.ru_utime + usage.ru_stime)

    def shards(self, keys: set[str]) -> Shards:
        """The experiments among `keys` that are stored, with what changes when a file is written again."""
        found = ((path.stem, path.stat()) for path in self.store.glob("??/*.json") if path.stem in keys)
        return {key: (stat.st_ino, stat.st_mtime_ns) for key, stat in found}

    def units(self) -> dict[Path, int]:
        """Finished tables of units, with what changes when one is written again."""
        return {path: path.stat().st_ino for path in (self.results / "sweep").glob("*.parquet")}

    def held(self) -> int:
        """Matrices that are being worked on: a job holds a lock for each."""
        count = 0
        for path in (self.store / "locks").glob("*.lock"):
            with path.open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    count += 1
        return count

    def tables(self) -> dict[str, pd.DataFrame]:
        """Name -> table without times."""
        frames = {str(p.relative_to(self.results)): pd.read_parquet(p) for p in self.results.rglob("*.parquet")}
        return {name: frame.drop(columns="wall_s", errors="ignore") for name, frame in frames.items()}


@contextmanager
def stopped(process: subprocess.Popen) -> Iterator[None]:
    """Snakemake and all its jobs stand still, then they are killed."""
    os.killpg(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def units_of(unit: str) -> tuple[str, str]:
    return "--config", f"sweep={{unit: {unit}}}"


def until(condition: Callable[[], bool], process: subprocess.Popen | None = None) -> bool:
    """Wait for `condition`; False when `process` ended before it held."""
    while not condition():
        if process is not None and process.poll() is not None:
            return False
        time.sleep(0.05)
    return True


def in_flight(project: Project, sweep: pd.DataFrame, stored: Shards, since: float) -> int:
    """Experiments begun and not stored, at most: what is missing of the matrix that each running job is at."""
    missing = []
    for block, rows in sweep.groupby("block"):
        log = project.folder / f"logs/many/sweep/block-{block:03d}.log"  # written when a job starts
        table = project.results / f"sweep/block-{block:03d}.parquet"
        if log.exists() and log.stat().st_mtime >= since and not table.exists():
            counts = (~rows["key"].isin(stored.keys())).groupby(rows["layer"], sort=False).sum()
            missing += counts[counts > 0].tolist()[:1]
    return sum(sorted(missing, reverse=True)[: project.held()])


def killed(project: Project, sweep: pd.DataFrame, kills: int, seed: int) -> dict[str, Any]:
    """The sweep with `kills` kills; `sweep` is the table of an undisturbed run."""
    draw, keys, log = random.Random(seed), set(sweep["key"]), project.folder / "snakemake.log"
    marks = [int(len(keys) * (k + draw.random()) / kills) for k in range(kills)]
    rows, stamps = [], []
    begun = resumed = time.perf_counter()
    since, process = time.time(), project.start(TARGET)
    for mark in marks:
        if not until(lambda: len(project.shards(keys)) > mark, process):  # noqa: B023 - called here
            raise SystemExit(f"the sweep ended before {mark} experiments; see {log}")
        time.sleep(draw.random() * (len(rows) % 2))  # half in the thick of a job, half anywhere
        with stopped(process):
            stored, finished = project.shards(keys), project.units()
            row: dict[str, Any] = {"stored": len(stored), "in_flight": in_flight(project, sweep, stored, since)}
        until(lambda: not project.held())  # a killed process takes a moment to go
        clock = time.perf_counter()
        row["unlock_s"] = project.run("--unlock").wall_s
        since, process = time.time(), project.start(TARGET)
        until(lambda: len(project.shards(keys)) > len(stored), process)  # noqa: B023
        resumed = time.perf_counter()
        row["resume_s"] = resumed - clock
        rows.append(row)
        stamps.append((stored, finished))
        print(f"  {row['stored']} stored, {row['in_flight']} in flight, resumed in {row['resume_s']:.1f} s", flush=True)
    if process.wait():
        raise SystemExit(f"the resumed sweep failed; see {log}")
    after, tables = project.shards(keys), project.units()
    for row, (stored, finished) in zip(rows, stamps, strict=True):
        row["lost"] = sum(after.get(key) != stamp for key, stamp in stored.items())
        row["units_repeated"] = sum(tables.get(path) != stamp for path, stamp in finished.items())
    end = time.perf_counter()
    return {"wall_s": end - begun, "last_resume_to_end_s": end - resumed, "kills": rows}


def other_unit(project: Project, unit: str, sweep: pd.DataFrame, jobs: int) -> dict[str, Any]:
    """Jobs of another size in the whole DAG over a full store, broken off when `jobs` have ended."""
    keys = set(sweep["key"])
    stored = project.shards(keys)
    shutil.rmtree(project.results / "sweep")
    start, process = time.time(), project.start(TARGET, *units_of(unit))
    until(lambda: len(project.units()) >= jobs, process)
    with stopped(process):
        made = sorted(path.stat().st_mtime for path in project.units())
    project.run("--unlock")
    found = pd.concat([SWEEP.read(path) for path in project.units()], ignore_index=True)
    wanted = sweep.set_index("key").loc[found["key"]].reset_index()[found.columns]
    per_job = {"matrix": sweep.groupby("layer").size().max(), "experiment": 1}[unit]
    return {
        "jobs": len(sweep) // int(per_job),
        "jobs_run": len(made),
        "experiments_found": len(found),
        "computed_anew": sum(stamp != stored[key] for key, stamp in project.shards(keys).items()),
        "rows_equal": found.equals(wanted),
        "start_s": made[0] - start,
        "job_s": project.slots * (made[-1] - made[0]) / (len(made) - 1),
    }


def small_unit(folder: Path, unit: str, jobs: int, *, slots: int, seed: int) -> float:
    """Overhead in slot-seconds of a job on a small checkpoint, from an empty store."""
    project = Project(folder, blocks=SMALL_BLOCKS, slots=slots, seed=seed)
    project.run("results/many/moments.parquet", *units_of(unit))
    settings = load(folder / "config/config.yaml", folder / "config/models.yaml", overrides={"sweep": {"unit": unit}})
    names = units(FAMILIES["qwen2"], SMALL_BLOCKS, settings.for_model("many").sweep)[:jobs]
    targets = [f"results/many/sweep/{name}.parquet" for name in names]
    swept, idle = project.run(*targets, *units_of(unit)), project.run(*targets, *units_of(unit))
    computing = sum(SWEEP.read(folder / target)["wall_s"].sum() for target in targets)
    return (slots * (swept.wall_s - idle.wall_s) - computing) / len(names)


def start_up() -> dict[str, Any]:
    """Seconds from the start of Python until scripts/sweep.py has imported all it needs; beside, torch alone."""
    job = "from snakemake.iocontainers import Snakemake; from snakemake.logging import logger; import runpy; "
    job += "runpy.run_path('scripts/sweep.py', run_name='imported'); import bitalloc.experiments"
    programs = {"job": job, "torch": "import torch", "pandas": "import pandas, pyarrow.parquet"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as snakemake sets it for one thread
    runs: list[dict[str, float]] = []
    for _ in range(REPEATS):
        row = {}
        for name, program in programs.items():
            clock = time.perf_counter()
            process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment)
            _, process.returncode, usage = os.wait4(process.pid, 0)
            row |= {f"{name}_wall_s": time.perf_counter() - clock, f"{name}_cpu_s": usage.ru_utime + usage.ru_stime}
        runs.append(row)
    check = f"{job}; import sys; print(*{HEAVY} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    return {"heavy_modules": loaded.stdout.split(), **pd.DataFrame(runs).median().to_dict()}


def share(overhead: float, experiments: int) -> float:
    return overhead / (overhead + experiments * SECONDS)


def run(folder: Path, *, blocks: int, kills: int, slots: int, seed: int) -> dict[str, Any]:
    first = Project(folder / "undisturbed", blocks=blocks, slots=slots, seed=seed)
    prepared, swept = first.run("results/many/moments.parquet"), first.run(TARGET)
    sweep = SWEEP.read(first.folder / TARGET)
    experiments, computing = len(sweep), float(sweep["wall_s"].sum())
    print(f"{experiments} experiments: moments in {prepared.wall_s:.0f} s, sweep in {swept.wall_s:.0f} s", flush=True)
    overhead, overhead_cpu = slots * swept.wall_s - computing, swept.cpu_s - computing
    result: dict[str, Any] = {
        "experiments": experiments,
        "blocks": blocks,
        "slots": slots,
        "prepare_wall_s": prepared.wall_s,
        "sweep_wall_s": swept.wall_s,
        "sweep_cpu_s": swept.cpu_s,
        "experiments_s": computing,
        "noop_wall_s": statistics.median(first.run(TARGET).wall_s for _ in range(REPEATS)),
        "start_up": start_up(),
        "layer": {"jobs": blocks, "overhead_s": overhead, "share": share(overhead, experiments)}
        | {"overhead_cpu_s": overhead_cpu, "share_cpu": share(overhead_cpu, experiments)},
    }
    second = Project(folder / "killed", blocks=blocks, slots=slots, seed=seed)
    result["killed"] = killed(second, sweep, kills, seed)
    ours, theirs = second.tables(), first.tables()
    equal = set(ours) == set(theirs) and all(ours[name].equals(theirs[name]) for name in theirs)
    result["killed"] |= {"tables": len(theirs), "tables_equal": equal}
    for unit in ("matrix", "experiment"):
        row = other_unit(first, unit, sweep, JOBS)
        row["small_job_s"] = small_unit(folder / unit, unit, JOBS, slots=slots, seed=seed)
        row["overhead_s_extrapolated"] = slots * row["start_s"] + row["jobs"] * max(row["job_s"], row["small_job_s"])
        row["share_extrapolated"] = share(row["overhead_s_extrapolated"], experiments)
        result[unit] = row
    return result


def say(result: dict[str, Any]) -> None:
    kills, started, layer = pd.DataFrame(result["killed"]["kills"]), result["start_up"], result["layer"]
    lost, units_repeated = kills["lost"].sum(), kills["units_repeated"].sum()
    in_flight, resume = kills["in_flight"], kills["resume_s"]
    print(f"no-op {result['noop_wall_s']:.1f} s")
    print(f"start-up of a job {started['job_cpu_s']:.2f} CPU s, of torch alone {started['torch_cpu_s']:.2f}")
    print(f"{len(kills)} kills in {result['killed']['wall_s']:.0f} s, tables equal: {result['killed']['tables_equal']}")
    print(f"  finished experiments computed again {lost}, tables of units made again from the store {units_repeated}")
    print(f"  in flight {in_flight.min()} to {in_flight.max()}, {in_flight.sum()} of {result['experiments']} in all")
    print(f"  resume {resume.median():.1f} s, after the last kill {resume.iloc[-1]:.1f} s")
    print(f"layer       overhead {layer['overhead_s']:6.0f} s, share {layer['share']:.1%}, ", end="")
    print(f"{layer['share_cpu']:.1%} in CPU seconds")
    for unit in ("matrix", "experiment"):
        row = result[unit]
        print(
            f"{unit:11} overhead {row['overhead_s_extrapolated']:6.0f} s, share {row['share_extrapolated']:.1%}, ",
            end="",
        )
        print(f"extrapolated from {row['jobs_run']} of {row['jobs']} jobs; computed anew {row['computed_anew']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--slots", type=int, default=2, help="jobs side by side, of one thread each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="an empty folder that is kept; a temporary one otherwise")
    arguments = parser.parse_args()
    given = {"blocks": arguments.blocks, "kills": arguments.kills, "slots": arguments.slots, "seed": arguments.seed}
    if arguments.directory:
        result = run(arguments.directory.resolve(), **given)
    else:
        with tempfile.TemporaryDirectory(prefix="bench-resume-") as folder:
            result = run(Path(folder), **given)
    say(result)
    path = Path(__file__).parent / "results/resume.json"
    path.parent.mkdir(exist_ok=True)
    record = run_record("torch", "snakemake", "pandas")
    path.write_text(json.dumps({"record": record, **result}, indent=1) + "\n")
    if not result["killed"]["tables_equal"] or any(row["lost"] for row in result["killed"]["kills"]):
        sys.exit("a kill has cost finished experiments or changed a table")


if __name__ == "__main__":
    main()
