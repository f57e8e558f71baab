"""Whole models quantised by bitalloc and by its peers, at equal bytes: quality beside cost.

python benchmarks/bench_peers.py [--models tiny /a/folder] [--text file.txt] [--budgets 2.5 2.75 3.25 4.25] [--seeds 1]
  ->  a table, benchmarks/results/peers.json and peers-MODEL.png

Every peer works in an environment of its own (`--environments`, made by pip at the first run from
benchmarks/peers/*.txt) through its public interface, with the settings that its documentation recommends
(benchmarks/peers/model_*.py say which). All see the same windows: those that bitalloc calibrates on and those that it
selects by. All are judged by one evaluation (comparison.py) on the windows of the report split.

    bytes      codes, scales, zeros and factors over the linear layers as the tool stores them; embedding, head and
               what a tool leaves alone count 16 bits
    missed_by  bytes / bytes that the budget allows - 1
    seconds    CPU seconds of all processes from the model to its packed checkpoint, imports included; peak memory: of
               the largest of them. bitalloc: calibrate, sweep, sensitivity and fit, which serve all budgets, and what
               one budget takes after them, `further_seconds`
    pairs      r = KL of ours over that of the strongest peer, at no more bytes than the peer's and on the same windows,
               and likewise PPL over PPL; 95 %: paired bootstrap over windows
    calibrations  exp(mean of log r +- t(.975; n - 1) s / sqrt(n)) over n seeds (s: deviation of log r). A seed draws
               calibrate, select and report windows anew, so this interval holds the choice of windows too

A job that is finished is not repeated (`--work`); a tool that fails says why, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from comparison import Evaluation, draw, over_seeds, perplexity_ratio, ratio, summary
from peers.whole import nbytes
from project import QUALITY, ROOT, STRATEGIES, Project, Subject, subject
from running import FailedError, Took, environment, threaded, timed
from safetensors.torch import save_file

from bitalloc.errors import BitallocError
from bitalloc.progress import Progress
from bitalloc.provenance import commit, run_record
from bitalloc.store import digest, write_atomically

HERE = Path(__file__).resolve().parent
MAP = "bitalloc map + autoround"
# tool -> (its environment, its worker)
PEERS = {
    "autoscheme": ("autoround", "model_autoscheme.py"),
    "autoround": ("autoround", "model_autoround.py"),
    "modelopt": ("modelopt", "model_modelopt.py"),
    "gptqmodel": ("gptqmodel", "model_gptqmodel.py"),
    "llmcompressor": ("llmcompressor", "model_llmcompressor.py"),
    "hqq": ("hqq", "model_hqq.py"),
    MAP: ("autoround", "model_map.py"),
}
RIVALS = [tool for tool in PEERS if tool != MAP]
OURS = [f"bitalloc {strategy}" for strategy in (*STRATEGIES, QUALITY)]
SAME = 1.005  # a peer may have so many times the budget before ours is given as much
NEAR = 0.1  # a peer that misses its budget by more is no rival at it
OVER = (
    "{tool} at {budget:g} bits: {ratio:.3f} [{lo:.3f}, {hi:.3f}] times the KL of {peer}, "
    "{ppl_ratio:.4f} [{ppl_lo:.4f}, {ppl_hi:.4f}] times its PPL, calibrations: {n}"
)
PLACE = ["model", "budget", "tool"]
PAIR = (
    "{tool} at {bytes:,} bytes: KL {ratio:.3f} [{lo:.3f}, {hi:.3f}], PPL {ppl_ratio:.4f} [{ppl_lo:.4f}, {ppl_hi:.4f}] "
    "times that of {peer} at {peer_bytes:,}"
)
RATIO, PPL_RATIO = ("ratio", "lo", "hi"), ("ppl_ratio", "ppl_lo", "ppl_hi")
# columns of what was not made
MADE = "bytes bpw seconds further_seconds wall_s peak_mem_mb missed_by setting version".split()
COLUMNS = "tool asked bytes bpw missed_% NLL PPL KL [95_%] top-1 CPU_s MB".split()
WIDTHS = (24, 8, 9, 6, 8, 7, 8, 8, 18, 6, 8, 6)


@dataclass(frozen=True)
class Job:
    """One tool at one budget in one calibration; what it leaves lies in `folder`."""

    tool: str
    budget: str
    folder: Path

    def known(self, identity: str) -> dict[str, Any] | None:
        """What is known of the job, if it is finished and nothing that it depends on has changed."""
        file = self.folder / "done.json"
        found = json.loads(file.read_text()) if file.is_file() else {}
        return found if found.get("identity") == identity else None

    def finish(self, found: dict[str, Any]) -> dict[str, Any]:
        write_atomically(self.folder / "done.json", json.dumps(found).encode())
        return found


class Comparison:
    """All jobs of one model and one calibration."""

    def __init__(self, project: Project, work: Path, arguments: argparse.Namespace) -> None:
        self.project, self.work, self.arguments = project, work, arguments
        self.subject, self.seed = project.subject, project.seed
        tokens, self.layers = project.tokens(), project.layers()
        self.weights = sum(math.prod(sides) for sides in self.layers.values())
        ids_NT = ids(tokens[tokens["split"].isin(["calibrate", "select"])])
        self.tokens = work / "windows.safetensors"
        save_file({"ids_NT": ids_NT}, self.tokens)
        self.source = digest([self.subject.content, ids_NT.tolist(), self.seed])
        device = self.subject.row["settings"].get("device", "auto")
        self.evaluation = Evaluation(self.subject.path, tokens, layers=list(self.layers), device=device)
        self.rows: list[dict[str, Any]] = []
        self.scores: dict[tuple[str, str], pd.DataFrame] = {}
        self._shared: Took | None = None

    def job(self, tool: str, budget: str) -> Job:
        folder = self.work / f"{tool.replace(' ', '-')}-{budget}"
        folder.mkdir(parents=True, exist_ok=True)
        return Job(tool, budget, folder)

    def allowed(self, budget: str) -> int:
        return math.floor(bits(budget) * self.weights / 8 + 1e-6)

    # ---- ours
    def shared(self) -> Took:
        """What calibrate, sweep, sensitivity and fit took; they serve all budgets."""
        if self._shared is None:
            job, identity = self.job("shared", "all"), digest(self.project.identity())
            found = job.known(identity)
            if not found or not (self.project.results / "gates/fit.json").is_file():
                took = self.project.run("gates/sweep.json", "gates/fit.json")
                found = job.finish({"identity": identity, "took": took._asdict()})
            self._shared = Took(**found["took"])
        return self._shared

    def asked(self, budget: str) -> str:
        """The budget that ours is given: the strongest peer's bytes where those are just below it."""
        peer, allowed = self.strongest(budget), self.allowed(budget)
        return self.exactly(peer["bytes"]) if peer and allowed / SAME <= peer["bytes"] < allowed else budget

    def exactly(self, size: int) -> str:
        return f"{math.floor(8e6 * size / self.weights) / 1e6:.6f}bpw"

    def ours(self, budgets: Mapping[str, str], strategies: Sequence[str]) -> None:
        """Rows of bitalloc at these budgets (that of the row by that which is given), which share one run."""
        identity = digest([self.project.identity(), self.arguments.threads, (ROOT / "config/best.yaml").read_text()])
        jobs = {(s, b): self.job(f"bitalloc {s}", b) for s in strategies for b in budgets}
        if not all(job.known(identity) for job in jobs.values()):
            shared, first = self.shared(), None
            swept = [strategy for strategy in strategies if strategy not in ("tuned", QUALITY)]
            for group in [swept, *([s] for s in ("tuned", QUALITY) if s in strategies)]:
                try:
                    took = self.project.run("checkpoints.parquet", budgets=list(budgets), plans=group)
                except FailedError as failed:
                    for strategy in group:
                        for budget in budgets:
                            self.fail(f"bitalloc {strategy}", budgets[budget], str(failed))
                    continue
                each = Took(took.cpu_s / len(budgets), took.wall_s / len(budgets), took.peak_mem_mb)
                spent = each if first is None else first + each  # what is learned comes after what was swept
                first = first or each
                for strategy in group:
                    for budget in budgets:
                        job = jobs[strategy, budget]
                        told = self.project.export(strategy, budget, job.folder)
                        told |= {"took": (shared + spent)._asdict(), "further": spent._asdict()}
                        job.finish({"identity": identity, "version": commit(), **told})
        for (strategy, budget), job in jobs.items():
            if found := job.known(identity):
                if strategy == "best" and "map" not in found:
                    found = job.finish({**found, "map": self._map(budget)})
                self.add(f"bitalloc {strategy}", budgets[budget], job, found)

    def _map(self, budget: str) -> dict[str, Any] | None:
        try:
            return self.project.map(budget)
        except FailedError:
            return None

    # ---- peers
    def peer(self, tool: str, budget: str) -> None:
        """The row of a peer at a budget; one that says why where it cannot be had."""
        name, worker = PEERS[tool]
        job, before = self.job(tool, budget), Took(0.0, 0.0, 0)
        given: dict[str, Any] = {
            "model": str(self.subject.path),
            "tokens": str(self.tokens),
            "out": str(job.folder),
            "layers": self.layers,
            "nbytes": self.allowed(budget),
            "threads": self.arguments.threads,
            "seed": self.seed,
        }
        if tool == MAP:
            ours = json.loads((self.job("bitalloc best", self.asked(budget)).folder / "done.json").read_text())
            if not ours.get("map"):
                return self.fail(tool, budget, "bitalloc has no plan without rank at this budget")
            given["plan"], before = ours["map"], Took(**ours["took"])
        placeless = {**given, "model": "", "tokens": "", "out": ""}
        identity = digest([self.source, placeless, (HERE / "peers" / worker).read_text()])
        found = job.known(identity)
        if found is None:
            for path in ("checkpoint", "said.json", "weights.safetensors"):
                old = job.folder / path
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            (job.folder / "job.json").write_text(json.dumps(given))
            try:
                python = self.arguments.pythons.get(name) or environment(self.arguments.environments, name)
                took = timed(
                    [str(python), str(HERE / "peers" / worker), str(job.folder / "job.json")],
                    log=job.folder / "log.txt",
                    environ=threaded(self.arguments.threads, ours=False),
                    limit_s=self.arguments.limit * 60,
                    cwd=job.folder,
                )
            except FailedError as failed:
                return self.fail(tool, budget, str(failed))
            said = json.loads((job.folder / "said.json").read_text())
            aside = said.pop("exchange")
            took = Took(took.cpu_s - aside["cpu_s"], took.wall_s - aside["wall_s"], took.peak_mem_mb) + before
            shutil.rmtree(job.folder / "checkpoint", ignore_errors=True)
            found = job.finish({"identity": identity, "took": took._asdict(), "further": None, **said})
        self.add(tool, budget, job, found)

    # ---- rows
    def add(self, tool: str, budget: str, job: Job, found: dict[str, Any]) -> None:
        file = job.folder / "scores.parquet"
        weights = job.folder / "weights.safetensors"
        if not file.is_file() or file.stat().st_mtime < weights.stat().st_mtime:
            try:
                self.evaluation.scores(weights).to_parquet(file)
            except FloatingPointError as failed:
                return self.fail(tool, budget, str(failed))
        scores = pd.read_parquet(file)
        size = nbytes(found["stored"])
        took = found["took"]
        row = {
            **self.place(tool, budget),
            "bytes": size,
            "bpw": 8 * size / self.weights,
            **summary(scores),
            "seconds": took["cpu_s"],
            "further_seconds": (found["further"] or took)["cpu_s"],
            "wall_s": took["wall_s"],
            "peak_mem_mb": took["peak_mem_mb"],
            "missed_by": size / self.allowed(budget) - 1,
            "setting": found["setting"],
            "version": found["version"],
            "why": None,
        }
        self.scores[tool, budget] = scores
        self.keep(row)

    def fail(self, tool: str, budget: str, why: str) -> None:
        empty = (
            "bytes bpw nll ppl kl top1 kl_lo kl_hi seconds cpu_s peak_mem_mb further_cpu_s missed_by setting version"
        )
        self.keep({**self.place(tool, budget), **dict.fromkeys(empty.split()), "corpora": {}, "why": why})

    def place(self, tool: str, budget: str) -> dict[str, Any]:
        asked = bits(budget) if budget else None
        return {"model": self.subject.name, "seed": self.seed, "tool": tool, "budget": asked}

    def keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        show(row)

    def reference(self) -> None:
        """The row of the unquantised model; nothing is put into the model before."""
        self.keep({**self.place("reference", ""), **dict.fromkeys([*MADE, "why"]), **summary(self.evaluation.scores())})

    # ---- pairs
    def strongest(self, budget: str) -> dict[str, Any] | None:
        """The row of the peer of least KL among those that keep near the budget."""
        asked = bits(budget)
        rivals = [
            row
            for row in self.rows
            if (row["budget"], row["tool"] in RIVALS) == (asked, True)
            if row["kl"] is not None and row["missed_by"] <= NEAR
        ]
        return min(rivals, key=lambda row: row["kl"], default=None)

    def pairs(self, budgets: list[str]) -> list[dict[str, Any]]:
        """Ours at no more bytes than the strongest peer of each budget: rows of theirs, and the ratios of KL."""
        rivals = {budget: peer for budget in budgets if (peer := self.strongest(budget))}
        if not (rivals and self.arguments.ours):
            return []
        least, most = self.project.reach()
        wanted = {}
        for budget, peer in rivals.items():
            ours = [row["bytes"] for row in self.rows if row["budget"] == peer["budget"] and row["tool"] in OURS]
            larger = max((size for size in ours if size), default=0) > peer["bytes"]
            if (larger or peer["bytes"] > SAME * self.allowed(budget)) and least <= peer["bytes"] <= most:
                wanted[budget] = self.exactly(peer["bytes"])
        if wanted:
            again = {text: text for text in sorted(set(wanted.values()))}
            self.ours(again, [s for s in self.arguments.ours if s != "uniform"])
        found = []
        for budget, peer in rivals.items():
            text = wanted.get(budget, budget)
            for row in self.rows:
                if not (row["tool"].startswith("bitalloc") and (row["tool"], text) in self.scores):
                    continue
                if row["budget"] != bits(text) or row["bytes"] > peer["bytes"]:
                    continue
                both = self.scores[row["tool"], text], self.scores[peer["tool"], budget]
                pair = {"model": self.subject.name, "seed": self.seed, "budget": peer["budget"]}
                pair |= {"tool": row["tool"], "bytes": row["bytes"], "peer": peer["tool"], "peer_bytes": peer["bytes"]}
                pair |= dict(zip(RATIO, ratio(*both), strict=True))
                pair |= dict(zip(PPL_RATIO, perplexity_ratio(*both), strict=True))
                found.append(pair)
        return found


def bits(budget: str) -> float:
    return float(budget.removesuffix("bpw"))


def ids(frame: pd.DataFrame) -> torch.Tensor:
    return torch.from_numpy(np.stack(frame["tokens"].tolist()).astype(np.int32))


def show(row: dict[str, Any]) -> None:
    if row["kl"] is None:
        print(f"{row['tool']} at {row['budget']:g}: {row['why']}", flush=True)
        return
    asked = row["budget"] is not None
    cells = [
        row["tool"],
        f"{row['budget']:.4g}" if asked else "",
        row["bytes"] or "",
        f"{row['bpw']:.3f}" if asked else "",
        f"{100 * row['missed_by']:+.1f}" if asked else "",
        f"{row['nll']:.4f}",
        f"{row['ppl']:.3f}",
        f"{row['kl']:.4f}",
        f"[{row['kl_lo']:.4f}, {row['kl_hi']:.4f}]",
        f"{row['top1']:.3f}",
        f"{row['seconds']:.0f}" if asked else "",
        row["peak_mem_mb"] or "",
    ]
    line(cells)


def line(cells: list[Any]) -> None:
    print(" ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)), flush=True)


def save(path: Path, rows: list[dict], pairs: list[dict]) -> dict[str, Any]:
    """Put these rows in the place of old ones of the same tool and calibration; returns all there is."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"rows": [], "pairs": []}
    for name, new in (("rows", rows), ("pairs", pairs)):
        done = {(row["model"], row["seed"], row["tool"]) for row in new}
        found[name] = [row for row in found[name] if (row["model"], row["seed"], row["tool"]) not in done] + new
    found["record"] = run_record("torch", "transformers", "snakemake")
    found["calibrations"] = []
    frame = pd.DataFrame(found["pairs"], columns=[*PLACE, "peer", "ratio", "ppl_ratio"])
    for (model, budget, tool), part in frame.groupby(PLACE, sort=False):
        if len(part) < 2:
            continue
        place = {"model": model, "budget": budget, "tool": tool, "peer": ", ".join(sorted(set(part["peer"])))}
        over = {"n": len(part)}
        for names in (RATIO, PPL_RATIO):
            over |= dict(zip(names, over_seeds(part[names[0]].tolist()), strict=True))
        found["calibrations"].append({**place, **over})
    write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
    return found


def compare(subject: Subject, arguments: argparse.Namespace) -> None:
    """All rows of one model, saved as they come."""
    budgets = [f"{float(budget):g}bpw" for budget in arguments.budgets]
    tools = list(arguments.tools)
    for seed in range(arguments.seeds):
        work = arguments.work / f"{subject.name}-{subject.content[:8]}-s{seed}"
        print(f"\n{subject.name}, calibration {seed}", flush=True)
        line(COLUMNS)
        given = {"seed": seed, "threads": arguments.threads, "limit_s": arguments.limit * 60}
        project = Project(work / "bitalloc", subject, **given)
        project.run("tokens.parquet", "inventory.parquet", "checkpoint.json")
        comparison = Comparison(project, work, arguments)
        comparison.reference()
        progress = Progress("peers", (1 + len(tools)) * len(budgets), unit="jobs", every_s=0)
        # ours after the peers, the strongest of which says what bytes ours may take; before what rounds our map
        for tool in [*(tool for tool in tools if tool != MAP), "bitalloc", *(tool for tool in tools if tool == MAP)]:
            if tool == "bitalloc":
                asked = {comparison.asked(budget): budget for budget in budgets}
                # a run for each budget says what one costs; further calibrations share a run
                for part in [asked] if seed else [{text: budget} for text, budget in asked.items()]:
                    comparison.ours(part, arguments.ours)
            else:
                for budget in budgets:
                    comparison.peer(tool, budget)
            progress.advance(len(budgets), note=tool)
            save(arguments.results, comparison.rows, [])
        pairs = comparison.pairs(budgets)
        for pair in pairs:
            print(PAIR.format(**pair), flush=True)
        record = save(arguments.results, comparison.rows, pairs)
        if seed == 0:
            # further calibrations are for the rivals alone
            rivals = {peer["tool"] for budget in budgets if (peer := comparison.strongest(budget))}
            tools = [tool for tool in tools if tool in rivals]
    for row in record["calibrations"]:
        if row["model"] == subject.name:
            print(OVER.format(**row), flush=True)
    rows = [row for row in record["rows"] if row["model"] == subject.name]
    draw(rows, subject.name, arguments.results.with_name(f"peers-{subject.name}.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tiny"], help="names of config/models.yaml, or folders")
    parser.add_argument("--text", type=Path, help="a text file: calibrate, select and report windows of a folder")
    parser.add_argument("--budgets", nargs="+", default=["2.5", "2.75", "3.25", "4.25"], help="bits a weight")
    parser.add_argument("--tools", nargs="*", choices=list(PEERS), default=list(PEERS), help="the peers that run")
    parser.add_argument(
        "--ours", nargs="*", choices=[*STRATEGIES, QUALITY], default=STRATEGIES,
        help="quality: tuned with config/best.yaml, which takes several times as long",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, help="calibrations; from the second on of ours and the rivals")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=120, help="minutes that a job may take")
    parser.add_argument("--environments", type=Path, default=ROOT / ".peers", help="where the peers live")
    parser.add_argument("--work", type=Path, default=ROOT / ".peers/work", help="where finished jobs are kept")
    parser.add_argument("--results", type=Path, default=HERE / "results/peers.json")
    arguments = parser.parse_args()
    arguments.pythons = {}
    try:
        for model in arguments.models:
            compare(subject(model, arguments.text), arguments)
    except (BitallocError, FailedError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
