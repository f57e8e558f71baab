import json
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from bitalloc import report, tables
from bitalloc.analyze import analyze, summary
from bitalloc.config import Analyze, Retrieve
from bitalloc.documents import grids, markdown
from bitalloc.errors import BitallocError
from tests.simulated import BUDGETS, controls, empty, gates, law, simulate, success

CHECKPOINTS = empty(
    tables.CHECKPOINTS,
    [
        {"plan": f"best-{b}", "path": f"models/best-{b}", "predicted_nbytes": 556_000, "nbytes": 556_123, "digest": "0"}
        for b in BUDGETS
    ],
)


@pytest.fixture(scope="module")
def results():
    return simulate(pool=8, items=60)


@pytest.fixture(scope="module")
def page(results):
    settings = Analyze(resamples=50, folds=2)
    found = analyze(results.plans, results.evaluate, results.responses, settings=settings, seed=0)
    made = {"gates": gates(), "law": law(), "goodhart": found}
    made |= {"success": success(results, found), "controls": controls(results)}

    def render(**changes):
        return markdown.render(report.page(
            "tiny", plans=results.plans, evaluate=results.evaluate, checkpoints=CHECKPOINTS,
            sentences=summary(found, results.evaluate, results.plans),
            figures=[Path("results/tiny/goodhart.png"), Path("law.png")], captions={"law": "Of the law."},
            **made | changes,
        ))  # fmt: skip

    return render


def test_the_table_has_every_named_plan_and_no_random_one(results):
    text = report.table(results.plans, results.evaluate, CHECKPOINTS, gates())
    lines = text.splitlines()
    for plan in results.plans.query("strategy != 'random'")["plan"]:
        assert sum(line.startswith(f"{plan} ") for line in lines) == 1
    assert "random-" not in text
    assert lines[2].startswith("reference ")
    assert "556 kB" in next(line for line in lines if line.startswith("best-2.6bpw"))
    assert "(" in next(line for line in lines if line.startswith("uniform-2.6bpw"))  # predicted, not written
    for task in ("facts", "sums", "keys", "passkey"):
        assert task in lines[0]
    columns = {len(line) for line in lines[2:] if line.startswith(("optimal", "uniform", "best", "greedy"))}
    assert len(columns) == 1, "the columns are not aligned"


def test_budgets_come_in_order_of_size(results):
    text = report.table(results.plans.iloc[::-1], results.evaluate, CHECKPOINTS, gates())
    assert text.index("best-2.6bpw") < text.index("best-2.8bpw") < text.index("best-3.3bpw")


def test_the_verdicts_follow(results):
    text = report.table(results.plans, results.evaluate, CHECKPOINTS, gates())
    assert "NO-GO (fallback)  fit: r2_rank 0.41, must be > 0.5" in text
    assert "WARN  pilot: manual_gain 0.004, must be > 0.02 (measured .004: manual is near uniform)" in text
    assert sum(line.startswith("GO  ") for line in text.splitlines()) == 4


def test_the_cells_are_those_of_the_tables(results):
    text = report.table(results.plans, results.evaluate, CHECKPOINTS, gates())
    row = results.evaluate.query("plan == 'optimal-2.8bpw' and metric == 'ppl' and task == 'world/report'").iloc[0]
    line = next(line for line in text.splitlines() if line.startswith("optimal-2.8bpw"))
    assert f"{row['value']:.3f} [{row['lo']:.3f}, {row['hi']:.3f}]" in line


def test_the_page_tells_divergence_and_flips_plan_by_plan(results):
    corpus, plan = "world/report", "optimal-2.8bpw"
    told = dict.fromkeys([*grids.KL_BLOCK.values(), *grids.P_BLOCK.values(), *grids.STANDARD_ERROR.values()], 0.01234)
    place = [
        (name, corpus, "divergence", metric, value) for name in results.plans["plan"] for metric, value in told.items()
    ]
    flipped = dict(zip(grids.FLIPS, (0.05, 0.04, 0.01), strict=True))
    place += [(name, "facts", "world", metric, v) for name in results.plans["plan"] for metric, v in flipped.items()]
    added = pd.DataFrame(place, columns=["plan", "task", "suite", "metric", "value"]).assign(n=9, protocol="")
    whole = pd.concat([results.evaluate, added]).drop_duplicates(["plan", "task", "metric"], keep="last")
    blocks = [block for section in grids.divergence(results.plans, whole) for block in section.blocks]
    parts = "\n".join(map(markdown.block, blocks))
    lines = [line for line in parts.splitlines() if line.startswith(f"| {plan} |")]
    assert lines[0] == f"| {plan} | 0.0123 ± 0.0123 |" + " 0.0123 |" * 8
    assert lines[1].startswith(f"| {plan} | 1.23 ± 1.23 | 1.23 ± 1.23 | 1.23 |")
    assert lines[1].endswith("| 1.23 ± 1.23 | 0.0123 ± 0.0123 | 0.0123 |")
    assert grids._flipped(pd.Series(0.0, index=grids.FLIPS)) == "0"
    assert lines[2] == f"| {plan} | 5.0 = 4.0 + 1.0 |"
    assert "random-" not in parts
    assert grids.divergence(results.plans, results.evaluate) == []  # nothing was told


def test_the_page_tells_perplexity_by_protocol(page):
    rows = [
        ("reference", "wikitext2/lm-eval", "word_perplexity", 20.0, 19.0, 21.0, "lm-eval: how"),
        ("best", "wikitext2/lm-eval", "word_perplexity", 30.0, 29.0, 31.0, "lm-eval: how"),
        ("reference", "wikitext2/gptq", "ppl", 5.0, 4.0, 6.0, "gptq: how"),
    ]
    frame = pd.DataFrame(rows, columns=["plan", "task", "metric", "value", "lo", "hi", "protocol"])
    text = page(protocols=frame)
    assert "| wikitext2 | gptq | reference | 5.000 [4.000, 6.000] | - |" in text
    assert text.index("| lm-eval | reference |") < text.index("| lm-eval | best |") < text.index("| gptq |")
    assert "| 30 [29, 31] |" in text and "- `wikitext2/gptq`: gptq: how." in text
    assert "by protocol" not in page()


def test_the_page_is_headed_by_the_levels_and_links_figures_with_their_captions(page):
    text = page()
    head = "# tiny\n\n## What was reached\n\n| criterion | budget | on | measured | reached | certainly | minimal |"
    assert text.startswith(head)
    assert "![goodhart](goodhart.png)\n\n![law](law.png)\n\nOf the law.\n" in text and "4 of 6 checks say GO" in text
    row = "| 0.995 [0.975, 1.000] | stretch | stretch | ≥ 0.6 | ≥ 0.8 | ≥ 0.9 | 28 |"
    assert f"| R² of log error, in sample |  | multiplicative {row}" in text


def test_what_was_not_measured_is_a_row_that_says_why(results, page):
    bare = empty(tables.GOODHART, [])
    text = page(law=law().iloc[:0], goodhart=bare, success=success(results, bare, law=law().iloc[:0]))
    assert (
        "| PPL gain of best over uniform | 2.6bpw |  | no uniform plan to compare with | none | none | ≥ 3 % |" in text
    )
    assert "| R² of log error, in sample |  | multiplicative | not defined | none | none | ≥ 0.6 |" in text


@pytest.fixture
def logs(tmp_path):
    """The logs of jobs that ended well, were killed, failed, came from a cache, were cut short."""
    ended = {"sweep/block-000": ("sweep", 100, 150), "sweep/block-001": ("sweep", 50, 75)}
    ended |= {"sweep_assemble": ("sweep_assemble", 10, 5), "retrieve_model": ("retrieve_model", 30, 20)}
    ended |= {"gate_fit": ("gate_fit", 10, 10)}
    folder = tmp_path / "logs/tiny"
    (folder / "sweep").mkdir(parents=True)
    for name, (rule, wall, cpu) in ended.items():
        (folder / f"{name}.log").write_text(json.dumps({"rule": rule, "wall_s": wall, "cpu_s": cpu}))
    (folder / "calibrate.log").write_text("")
    (folder / "fit.log").write_text(json.dumps({"rule": "fit"}))
    (folder / "compress.log").write_text(json.dumps({"rule": "compress"}) + "\nerror: compress: disk full\n")
    (folder / "evaluate.log").write_text('{"rule": "evalu')
    return folder


def test_time_is_added_up_by_stage_in_the_order_of_the_flow(logs):
    assert report.times(logs) == [
        ("retrieve", "1", "0:30", "0:20", "15 %"),
        ("sweep", "3", "2:40", "3:50", "80 %"),
        ("gates", "1", "0:10", "0:10", "5 %"),
        ("all", "5", "3:20", "4:20", "100 %"),
    ]
    assert report.times(logs / "none") == []


def test_the_page_ends_with_the_time_if_there_is_one(page, logs):
    assert "went" not in page()
    assert "| sweep | 3 | 2:40 | 3:50 | 80 % |" in page(times=report.times(logs))


def test_no_perplexity_is_one_clear_line(results):
    with pytest.raises(BitallocError, match="add the suite perplexity"):
        report.table(results.plans, results.evaluate.query("suite == 'world'"), CHECKPOINTS, gates())


def test_the_command_prints_the_table_and_the_time(results, logs, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "results/tiny"
    frames = {tables.PLANS: results.plans, tables.EVALUATE: results.evaluate, tables.CHECKPOINTS: CHECKPOINTS}
    for table, frame in (frames | {tables.GATES: gates()}).items():
        table.write(frame, folder / f"{table.name}.parquet")
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    runpy.run_path(report.__file__, run_name="__main__")
    said = capsys.readouterr().out
    assert said.startswith("plan ") and "best-2.6bpw" in said
    assert "sweep        3  2:40  3:50           80 %" in said.splitlines()
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"^1$"):
        runpy.run_path(report.__file__, run_name="__main__")
    said = capsys.readouterr().err
    assert said.startswith("error: cannot read") and said.count("\n") == 1


def test_the_model_card_says_what_it_is_and_how_to_load_it(results):
    name = results.plans.query("strategy == 'best'")["plan"].iloc[0]
    plan = pd.DataFrame({"quantizer": "gptq", "bits": [2, 2, 3], "group_size": 64, "rank": [0, 0, 8]})

    def made(plan, licence):
        return report.card(
            "tiny", name, form="huggingface", nbytes=1234567, base=licence and "someone/base", fused=["qkv"],
            licence=licence, calibrated=Retrieve(), plan=plan, plans=results.plans, evaluate=results.evaluate,
            gates=gates(),
        )  # fmt: skip

    text = made(plan, "apache-2.0")
    front = yaml.safe_load(text.split("---")[1])
    assert (front["license"], front["base_model"]) == ("apache-2.0", "someone/base")
    assert "| gptq | 2 | 64 | 0 | 2 |" in text and "| gptq | 3 | 64 | 8 | 1 |" in text
    assert "1024 windows of 2048 tokens of wikitext2_train" in text
    for row in ("| reference |", f"| {name} |", "| uniform-"):
        assert text.count(row) == 1
    assert "checks say GO" in text and "PeftModel" in text
    assert "1.23 MB on disk (1,234,567 bytes)" in text and "qkv take one option" in text
    without = made(plan.assign(rank=0), None)
    assert "PeftModel" not in without and list(yaml.safe_load(without.split("---")[1])) == ["tags"]
    assert "not stated beside its weights" in without


def test_tasks_at_the_floor_are_marked(results):
    at = results.evaluate["task"] == "facts"
    evaluate = results.evaluate.assign(status=at.map({True: "floor", False: "ok"}))
    header = report.table(results.plans, evaluate, CHECKPOINTS, gates()).splitlines()[0]
    assert "facts (floor)" in header and "sums (floor)" not in header and "sums" in header
