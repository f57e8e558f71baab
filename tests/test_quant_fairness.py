"""The command quant-fairness on the embedded model: from end to end, interrupted and gone on with, and refused."""

import json
import tomllib
from pathlib import Path
from shutil import copytree

import numpy as np
import pandas as pd
import pytest

from bitalloc import languages, precision, quant_fairness, retrieve
from bitalloc.fairness import Choice, Units
from bitalloc.families import family
from bitalloc.quant_fairness import main
from bitalloc.tables import ARMS, FAIRNESS, PROTECTED, SENTENCES, SYNERGY
from tests.test_figures import drawn
from tests.test_languages import TINY, files

ROOT = Path(__file__).parents[1]
BUDGET = 600_000
SWEEP = ["sweep", "--model", "tiny", "--langs", "en,he,zh", "--bits", "2", "--budget", str(BUDGET), "--sentences", "40"]
SWEEP += ["--items", "24", "--pairs", "3", "--batch", "64", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def _here():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


def read(monkeypatch, limit: int | None = None) -> list[str]:
    """The states that the model is really put in, by layers that are rounded; the limit-th is a kill."""
    states: list[str] = []
    put_on = languages.Bench._put_on

    def counted(self, state):
        if limit is not None and len(states) == limit:
            raise KeyboardInterrupt
        states.append(json.dumps(sorted(state.items())))
        put_on(self, state)

    monkeypatch.setattr(languages.Bench, "_put_on", counted)
    return states


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """(folder, states read before the interruption, states read after it, what was printed)."""
    folder = tmp_path_factory.mktemp("fairness")
    files_given = [f"--{name}={folder / f'out.{name}'}" for name in ("json", "parquet", "figure")]
    with pytest.MonkeyPatch.context() as patch:
        before = read(patch, limit=5)
        assert main([*SWEEP, f"--out={folder}"]) == 130
    assert not (folder / "sentences.parquet").exists()
    with pytest.MonkeyPatch.context() as patch:
        after = read(patch)
        assert main([*SWEEP, f"--out={folder}", *files_given]) == 0
    return folder, before, after


def test_a_sweep_that_was_interrupted_goes_on_where_it_was(swept, monkeypatch, capsys):
    folder, before, after = swept
    assert len(before) == 5
    first = [layer for layer, level in json.loads(after[0]) if level == "fp16"]
    assert {layer.split(".")[2] for layer in first} == {"1"}  # reference twice, nothing, wte and h.0 were there
    read(monkeypatch, limit=0)  # nothing is left to read
    assert main([*SWEEP, f"--out={folder}"]) == 0
    assert "protect h.0" in capsys.readouterr().out


def test_all_tables_are_there_and_agree(swept):
    folder, *_ = swept
    table = FAIRNESS.read(folder / "fairness.parquet")
    assert (folder / "out.parquet").read_bytes() == (folder / "fairness.parquet").read_bytes()
    drawn(folder / "out.figure", 13.5)
    told = json.loads((folder / "out.json").read_text())
    assert len(told["table"]) == len(table)
    protect, units = told["protect"], PROTECTED.read(folder / "protected.parquet")
    assert protect["units"] == units.loc[units["chosen"], "unit"].tolist() == ["h.0"]
    assert protect["nbytes"] <= protect["budget_nbytes"] == BUDGET
    assert protect["added_nbytes"] == units.loc[units["chosen"], "nbytes"].sum()
    assert 0 < protect["confidence"] <= 1
    assert len(SYNERGY.read(folder / "synergy.parquet")) == 3
    sentences = SENTENCES.read(folder / "sentences.parquet")
    assert not set.intersection(*(set(part["sentence"]) for _, part in sentences.groupby("split")))
    assert ARMS.read(folder / "arms.parquet")["arm"].str.startswith("random-").sum() == 20
    worst = table[table["metric"] == "worst_rel"].set_index("arm")["value"]
    assert worst["fair"] < worst["none"]


def test_the_map_is_a_plan_of_the_size_that_was_said(swept):
    folder, *_ = swept
    inventory = retrieve.inventory("tiny", TINY, family("qwen2"))
    mapping = precision.parse(folder / "protect.json", precision.components(inventory))
    told = json.loads((folder / "out.json").read_text())["protect"]
    assert precision.nbytes(inventory, mapping) == told["nbytes"]


def test_recommend_and_report_need_no_model(swept, monkeypatch, capsys, tmp_path):
    folder, *_ = swept
    monkeypatch.setattr(languages, "load_model", None)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert main(["report", str(folder), "--json", "-"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}  # it may be the workflow's
    assert json.loads(capsys.readouterr().out)["protect"]["units"] == ["h.0"]
    assert main(["recommend", str(folder), "--budget", "4.0bpw", "--map", str(tmp_path / "map.json")]) == 0
    told = capsys.readouterr().out
    assert "protect nothing: 0 bytes more" in told
    assert "worst relative damage on the report split" in told
    assert json.loads((tmp_path / "map.json").read_text()) == {"default": "int2"}
    assert main(["recommend", str(folder), "--budget", "1.3MB"]) == 0
    assert "promises" in capsys.readouterr().out  # three units were never read together


@pytest.mark.parametrize(("confidence", "unsure"), [(0.3, True), (0.6, False)])
def test_a_choice_that_seldom_wins_is_said_to_be_unsure(confidence, unsure):
    row = {"unit": "h.0", "nbytes": 1, "chosen": True, "frequency": 0.6, "value": 0.1, "lo": 0.0, "hi": 0.2}
    found = Choice("h.0", confidence, {"h.0": 0.6})
    told = quant_fairness._protected(pd.DataFrame([row]), found, Units({"h.0": 1}, base=1, rest=0, weights=1))
    assert any(line.startswith("unsure") for line in told) == unsure


def lines(count: int, text: str) -> bytes:
    return "".join(f"{text} {n}.\n" for n in range(count)).encode()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--langs", "en,hee"], "unknown language 'hee' in the built-in text: did you mean 'he'?"),
        (["--model", "tinny"], "model 'tinny': no such folder, not in config/models.yaml, and not from the hub"),
        (["--bits", "8", "--protect-bits", "8"], "--protect-bits 8 must be more than --bits 8"),
        (["--budget", "much"], "--budget 'much': cannot read 'much' as bytes"),
        (["--budget", "2bpw"], "budget '2bpw' is .* below the least possible; reachable: "),
        (["--budget", "8GB"], "budget '8GB' is 8,000,000,000 bytes, above the most possible"),
        (["--sentences", "8"], "4 aligned facts or sentences are too few"),
        (["--text", "absent"], "--text absent is no folder"),
        (["--text", "en=a.txt", "--text", "he"], "--text he: give one folder, or en=/a/file for every language"),
    ],
)
def test_bad_input_is_one_line(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([*SWEEP, f"--out={tmp_path}", *arguments]) == 1
    told = capsys.readouterr()
    assert not told.out
    [line] = told.err.splitlines()
    assert line.startswith("quant-fairness: error: ")
    assert pd.Series([line]).str.contains(words).item(), line
    assert not (tmp_path / "sentences.parquet").exists()


def test_files_that_are_not_aligned_and_a_model_without_tokenizer(tmp_path, capsys):
    folder = files(tmp_path, en=lines(40, "Rome is a city"), he=lines(39, "שלום"))
    assert main(["sweep", "--model", "tiny", "--langs", "en,he", "--text", str(folder)]) == 1
    assert "they are not aligned" in capsys.readouterr().err
    bare = copytree(TINY, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert main(["sweep", "--model", str(bare), "--langs", "en,he"]) == 1
    told = capsys.readouterr().err
    assert "no tokenizer in" in told
    assert told.count("\n") == 1


def test_folders_without_a_sweep_and_commands_that_cannot_be_read(tmp_path, capsys):
    for command in ("recommend", "report"):
        assert main([command, str(tmp_path)]) == 1
        assert "holds no sweep; run `quant-fairness sweep" in capsys.readouterr().err
    for arguments in (["sweep"], [*SWEEP, "--bits", "5"], [*SWEEP, "--margin-en", "-1"], [*SWEEP, "--pairs", "0"], []):
        with pytest.raises(SystemExit) as status:
            main(arguments)
        assert status.value.code == 2
    assert "usage: quant-fairness" in capsys.readouterr().err


def test_languages_that_the_model_does_not_know_are_flagged(tmp_path, capsys):
    """Bytes drawn at random: nothing predicts them better than their frequencies."""
    rng = np.random.default_rng(0)
    texts = {
        name: "\n".join("".join(rng.choice(list(letters), 24)) for _ in range(24)).encode()
        for name, letters in (("en", "abcdefghij"), ("he", "אבגדהוזחטי"))
    }
    given = ["--langs", "en,he", "--text", str(files(tmp_path, **texts)), "--out", str(tmp_path / "out")]
    assert main([*SWEEP, *given, "--sentences", "24", "--figure", str(tmp_path / "f.png")]) == 0
    told = capsys.readouterr().out
    assert told.count("floor: not ranked") == 2
    assert "nothing is recommended" in told
    drawn(tmp_path / "f.png", 10)
    assert main(["recommend", str(tmp_path / "out")]) == 1
    assert "nothing can be ranked" in capsys.readouterr().err


def test_the_console_script_is_declared():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["quant-fairness"] == "bitalloc.quant_fairness:main"
