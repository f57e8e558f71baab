"""The DAG end to end: products, idleness, resume after kill -9, gates, bad input."""

import json
import shutil
import signal
import subprocess

import pandas as pd
import pytest

from bitalloc import tables

from ..browser import LOOK, complaints, opened, requests
from .conftest import ROOT, TARGETS, Project

pytestmark = pytest.mark.workflow


def without_times(path) -> pd.DataFrame:
    return pd.read_parquet(path).drop(columns="wall_s", errors="ignore")


def test_every_product_is_there_and_every_table_is_of_its_schema(finished):
    results = finished.folder / "results/tiny"
    assert (results / "goodhart.png").stat().st_size > 20_000
    assert "best-2.55bpw" in (results / "report.md").read_text()
    assert (results / "domains.png").stat().st_size > 20_000
    made = "inventory tokens items readings moments sweep sensitivity law plans checkpoints"
    for name in made.split():
        assert len(tables.TABLES[name].read(results / f"{name}.parquet"))
    plans = tables.PLANS.read(results / "plans.parquet").set_index("plan")
    assert (plans["nbytes"] <= plans["budget_bytes"]).all()
    scores = tables.EVALUATE.read(results / "evaluate.parquet")
    assert set(plans.index) | {"reference", "reference-rerun"} == set(scores["plan"])
    whole = tables.EVALUATE.read(results / "protocols.parquet")
    assert set(whole["plan"]) == {"reference", "best-2.55bpw", "uniform-2.55bpw"}
    assert set(whole["task"]) == {f"docstrings/{protocol}" for protocol in ("gptq", "lm-eval", "llama.cpp")}


def test_a_browser_shows_every_figure_of_the_page_and_asks_for_nothing(finished, tmp_path):
    page = finished.folder / "results/tiny/report.html"
    with opened(page, tmp_path, width=390) as (evaluate, events):
        seen = evaluate(LOOK)
        assert len(seen["widths"]) == 6 and min(seen["widths"]) > 500 and all(seen["visible"]) and seen["overflow"] <= 0
    assert complaints(events) == [] and requests(events) == {page.resolve().as_uri()}


def test_snakemakes_own_report_has_our_captions(finished, tmp_path):
    status, output = finished.run("results/tiny/report.html", "--report", str(tmp_path / "run.html"))
    assert status == 0, output
    told = " ".join((tmp_path / "run.html").read_text().split())
    for name in ("goodhart", "domains", "sensitivity", "errors", "law", "report"):
        assert " ".join((ROOT / f"workflow/report/{name}.rst").read_text().split())[:40] in told


def test_the_paper_is_written_from_the_tables_and_compiles(project):
    status, output = project.run("results/tiny/paper/main.tex")
    assert status == 0, output
    folder = project.folder / "results/tiny/paper"
    best = tables.EVALUATE.read(folder.parent / "evaluate.parquet").query("plan == 'best-2.55bpw' and metric == 'ppl'")
    assert f"{best['value'].iloc[0]:.3f} [{best['lo'].iloc[0]:.3f}" in (folder / "main.tex").read_text()
    if shutil.which("pdflatex"):
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
        assert done.returncode == 0, done.stdout[-2000:]


def test_rank_stands_against_bits_and_what_was_promised_is_graded(finished):
    results = finished.folder / "results/tiny"
    controls = tables.CONTROLS.read(results / "controls.parquet")
    assert set(controls["control"]) == {"bits_only", "rank_only"} and controls["value"].notna().all()
    assert len(tables.PHASE.read(results / "phase.parquet")) and (results / "phase.png").stat().st_size > 20_000
    success = tables.SUCCESS.read(results / "success.parquet")
    assert set(success["criterion"]) == {"ppl_gain_percent", "accuracy_drop_points", "r2_log", "r2_loo"}


def test_the_arms_are_plans_of_the_analysis_alone(project):
    results = project.folder / "results/tiny"
    project.configure(allocate={"arms": ["component", "leaked"]})
    status, output = project.run("results/tiny/plans.parquet", "results/tiny/gates/pilot.json")
    assert status == 0, output
    plans = tables.PLANS.read(results / "plans.parquet")
    arms = plans[~plans["plan"].isin(tables.without_arms(plans)["plan"])]
    assert {"leaked-2.55bpw", "component-attention-1", "component-mlp-1"} <= set(arms["plan"])
    assert "report split" in arms.set_index("plan").loc["leaked-2.55bpw", "note"]
    assert {path.stem for path in (results / "plans").glob("*.parquet")} == set(plans["plan"])
    scores = tables.EVALUATE.read(results / "leaked/evaluate.parquet")
    assert set(scores["task"]) == {"world/report", "docstrings/report"} and set(scores["suite"]) == {"perplexity"}


def test_bytes_on_disk_are_the_promised_ones(finished):
    checkpoints = tables.CHECKPOINTS.read(finished.folder / "results/tiny/checkpoints.parquet")
    assert len(checkpoints)
    assert (checkpoints["nbytes"] == checkpoints["predicted_nbytes"]).all()


def test_verdicts_are_stamped_into_what_stands_on_them(finished):
    stamped = tables.verdicts(finished.folder / "results/tiny/goodhart.parquet")
    assert {row["gate"] for row in stamped} >= {"sweep", "fit", "allocate", "pilot"}
    assert {row["mode"] for row in stamped} & {"warn", "fallback"}


def test_a_second_run_does_nothing(finished):
    status, output = finished.run(*TARGETS)
    assert status == 0
    assert "Nothing to be done" in output


def test_killed_at_any_moment_and_run_again_the_tables_are_those_of_an_undisturbed_run(finished, tmp_path):
    project = Project(tmp_path)
    store, results = tmp_path / "results/store", tmp_path / "results/tiny"
    scores = "results/tiny/evaluate.parquet"  # what follows is made from tables alone, in seconds
    # kill -9 in the middle of the sweep and of the evaluation, Ctrl-C before the fit
    project.kill_once(lambda: len(list(store.glob("??/*.json"))) > 60, scores)
    project.run("--unlock")
    project.kill_once((results / "sensitivity.parquet").exists, scores, by=signal.SIGINT)
    project.kill_once(lambda: len(list(store.glob("??/*.jsonl"))) > 12, scores)  # candidates leave 5 or 6
    project.run("--unlock")
    status, output = project.run(scores)
    assert status == 0, output
    ours, theirs = project.tables(), finished.tables()
    assert {"sweep.parquet", "responses.parquet"} < set(ours) < set(theirs)
    different = []
    for name, path in ours.items():
        if "wall_s" in pd.read_parquet(path).columns:
            same = without_times(path).equals(without_times(theirs[name]))
        else:
            same = path.read_bytes() == theirs[name].read_bytes()
        different += [] if same else [name]
    assert not different
    assert not list(tmp_path.rglob("*.tmp"))
    status, output = project.run("results/tiny/cost.parquet")
    cost = tables.COST.read(results / "cost.parquet")
    assert status == 0, output
    assert (cost["stored_tokens"] == cost["tokens"]).all() and not cost["hours"].any()


def test_a_no_go_stops_its_branch_and_keeps_what_is_finished(project):
    kept = (project.folder / "results/tiny/sweep.parquet").read_bytes()
    (project.folder / "results/tiny/law.parquet").unlink()
    project.configure(gates={"mode": "stop", "checks": {"error_range": {"threshold": 1e9}}})
    status, output = project.run(*TARGETS)
    assert status != 0
    line = next(line for line in output.splitlines() if "error_range" in line)
    assert "1e+09" in line or "1000000000" in line
    assert "sweep.parquet" in output
    assert "gates.mode" in output
    assert (project.folder / "results/tiny/sweep.parquet").read_bytes() == kept
    assert not (project.folder / "results/tiny/law.parquet").exists()


def test_a_law_that_does_not_hold_gives_way_to_interpolation(project):
    project.configure(gates={"mode": "warn", "checks": {"r2_rank": {"threshold": 0.9999, "mode": "fallback"}}})
    status, output = project.run("results/tiny/candidates.parquet")
    assert status == 0, output
    assert json.loads((project.folder / "results/tiny/gates/fit.json").read_text())["route"] == "interpolation"


def test_uniform_near_optimal_is_analysed_without_the_pool(project):
    """What the report then says is told in test_analyze.py."""
    checks = {"objective_gap": {"threshold": 0.99, "mode": "fallback"}}
    project.configure(gates={"mode": "warn", "checks": checks})
    status, output = project.run("results/tiny/goodhart.png")
    assert status == 0, output
    results = project.folder / "results/tiny"
    assert json.loads((results / "gates/allocate.json").read_text())["route"] == "near_uniform"
    assert not tables.EVALUATE.read(results / "evaluate.parquet")["plan"].str.startswith("random").any()


def test_a_corrupted_table_is_refused_with_the_remedy(project):
    path = project.folder / "results/tiny/sweep.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    status, output = project.run(*TARGETS)
    assert status != 0
    assert any("sweep.parquet" in line and "delete it and rerun" in line for line in output.splitlines())
    path.unlink()
    status, output = project.run("results/tiny/law.parquet")
    assert status == 0, output


def test_a_missing_checkpoint_is_one_line_with_what_was_tried(tmp_path):
    project = Project(tmp_path)
    shutil.rmtree(tmp_path / "resources")
    overrides = ["--config", "models={lost: {path: /nowhere/at/all, family: llama, blocks: 2}}"]
    status, output = project.run("results/lost/inventory.parquet", *overrides)
    assert status != 0
    assert any("/nowhere/at/all" in line and line.startswith("error: ") for line in output.splitlines())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["results/qwen2_7B/goodhart.png"], ["unknown model 'qwen2_7B'", "did you mean 'qwen2_7b'"]),
        ([*TARGETS, "--config", "swep={}"], ["unknown key 'swep'", "did you mean 'sweep'"]),
        ([*TARGETS, "--config", "seed=x"], ["seed", "'x'"]),
    ],
)
def test_bad_input_is_one_clear_line(finished, arguments, words):
    status, output = finished.run(*arguments)
    assert status != 0
    assert any(all(word in line for word in words) for line in output.splitlines()), output
    assert "Traceback" not in output


def test_the_plan_of_work_for_a_7b_needs_no_weights(finished):
    status, output = finished.run("results/qwen2_7b/goodhart.png", "-n")
    assert status == 0, output
    assert "sweep " in output
    assert any(line.split()[:2] == ["sweep", "28"] for line in output.splitlines())


@pytest.mark.parametrize(("unit", "jobs"), [("matrix", 28), ("experiment", 252)])
def test_the_unit_of_the_sweep_decides_how_many_jobs_there_are(tmp_path, unit, jobs):
    status, output = Project(tmp_path, sweep={"unit": unit}).run("results/tiny/sweep.parquet", "-n")
    assert status == 0, output
    assert any(line.split()[:2] == ["sweep", str(jobs)] for line in output.splitlines())


def test_checkpoints_leave_in_the_formats_that_the_configuration_names(project):
    status, output = project.run("results/tiny/exports.parquet")
    assert status == 0, output
    results = project.folder / "results/tiny"
    exports = tables.EXPORTS.read(results / "exports.parquet")
    checkpoints = tables.CHECKPOINTS.read(results / "checkpoints.parquet")
    assert sorted(exports["plan"]) == sorted([*checkpoints["plan"], *checkpoints["plan"]])
    assert (exports["nbytes"] == exports["predicted_nbytes"]).all()
    for row in exports.itertuples():
        card = results / row.format / (f"{row.plan}.md" if row.format == "gguf" else f"{row.plan}/README.md")
        assert f"({row.nbytes:,} bytes)" in card.read_text()
    assert tables.verdicts(results / "exports.parquet") == tables.verdicts(results / "plans.parquet")


def test_exports_without_a_format_are_one_line(project):
    project.configure(export={"formats": []})
    status, output = project.run("results/tiny/exports.parquet")
    assert status != 0 and "set export.formats" in output


def test_a_plan_in_real_backends_is_the_simulated_one(project):
    project.configure(backends={"plans": [], "names": ["huggingface"]})
    status, output = project.run("results/tiny/backends.png")
    assert status == 0, output
    results = project.folder / "results/tiny"
    table = tables.BACKENDS.read(results / "backends.parquet")
    assert tables.verdicts(results / "backends.parquet") == tables.verdicts(results / "plans.parquet")
    assert (table["status"] == "measured").all()
    found = table.set_index("task")
    # the same windows and statistics as the evaluation
    scores = tables.EVALUATE.read(results / "evaluate.parquet").query("plan == 'best-2.55bpw'")
    for metric in ("ppl", "kl_nats_per_token"):
        expected = scores[scores["metric"] == metric].set_index("task").loc[found.index, "value"]
        assert found[metric].to_list() == pytest.approx(expected.to_list(), rel=1e-4)
    assert (results / "backends.png").stat().st_size > 20_000 and not list((results / "backends").rglob(".*"))


def test_a_mistyped_plan_of_the_backends_is_one_line(finished):
    status, output = finished.run("results/tiny/backends.png", "-n")  # the sheet names plans of another budget
    assert status != 0
    assert "unknown plan 'best-2.3bpw' in the section backends: did you mean 'best-2.55bpw'?" in output


def test_an_evolution_leaves_a_table_a_map_and_a_figure(project):
    """That it goes on after a kill is told in test_evolve.py."""
    project.configure(evolve={"precisions": ["fp16", "int4"], "generations": 2, "offspring": 3, "stages": [[1024, 1]]})
    target = "results/tiny/evolution.png"
    status, output = project.run(target)
    assert status == 0, output
    frame = tables.EVOLUTION.read(project.folder / "results/tiny/evolution.parquet")
    assert frame["evaluations"].tolist() == [1, 4, 7]
    champion = json.loads((project.folder / "results/tiny/evolved.json").read_text())
    assert champion == json.loads(frame.loc[frame["fitness"].idxmax(), "champion"])
    assert (project.folder / target).stat().st_size > 20_000
