import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imsave

from bitalloc import paper, tables
from bitalloc.analyze import analyze, summary
from bitalloc.config import Analyze
from tests.simulated import controls, empty, gates, law, sensitivity, simulate, success, sweep

FOLDER = Path(__file__).parents[1] / "workflow/report"
TEMPLATE = (FOLDER / "paper.tex").read_text()
CAPTIONS = {path.stem: " ".join(path.read_text().split()) for path in FOLDER.glob("*.rst")}
SHOWN = ("goodhart", "domains", "sensitivity", "errors", "law")


@pytest.fixture(scope="module")
def read():
    """The tables of a model that never was, and the sentences that sum them up."""
    results, errors = simulate(pool=4, items=40), sweep(2)
    goodhart = analyze(
        results.plans, results.evaluate, results.responses, settings=Analyze(resamples=20, folds=2), seed=0
    )
    matrices = errors.drop_duplicates("layer").assign(claimed=True, rows=128, columns=128)
    moments = empty(tables.MOMENTS, [{"site": f"{i}.in", "n_tokens": 16384} for i in range(4)])
    return {
        "inventory": matrices, "moments": moments, "sweep": errors, "sensitivity": sensitivity(2), "law": law(),
        "plans": results.plans, "checkpoints": empty(tables.CHECKPOINTS, []), "evaluate": results.evaluate,
        "goodhart": goodhart, "gates": gates(), "success": success(results, goodhart), "controls": controls(results),
        "sentences": summary(goodhart, results.evaluate, results.plans, gates()),
        "captions": {name: CAPTIONS[name] for name in SHOWN},
    }  # fmt: skip


def written(read, **changes):
    return paper.paper("a_model", TEMPLATE, **read | changes)


def prose(text):
    """The body without floats, formulas, references and the appendix, on one line."""
    body = text.partition(r"\begin{document}")[2].partition(r"\begin{thebibliography}")[0]
    body = re.sub(r"\\begin\{(table|figure|align\*)\}.*?\\end\{\1\}", "", body, flags=re.S)
    return " ".join(body.split())


def gain(read, strategy, **ends):
    """GOODHART with another PPL gain of a strategy, at every budget."""
    rows = read["goodhart"].copy()
    at = (rows["statistic"] == "ppl_gain_percent") & (rows["proxy"] == strategy)
    rows.loc[at, list(ends)] = list(ends.values())
    return {"goodhart": rows}


def test_no_number_stands_in_the_prose_of_the_template():
    blocks, _, rest = re.sub(r"<<.*?>>|<%.*?%>|<#.*?#>", "", TEMPLATE, flags=re.S).partition(r"\documentclass")
    body = blocks + prose(rest)
    body = re.sub(r"\\\[.*?\\\]|\$[^$]*\$|\\\w+(\[[^]]*\])?", "", body)
    assert len(body) > 2000
    assert re.findall(r"[^ ]*\d[^ ]*", body) == []
    words = "one two three four five six seven eight nine ten half twice percent".split()
    # definitions: one option, one model, one backward pass, two plans that are compared, the other half of the items
    assert {word for word in words if re.search(rf"\b{word}\b", body)} <= {"one", "two", "three", "half", "percent"}


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ({"value": 43.21, "lo": 40.01, "hi": 46.02}, ["bits are suboptimal at every budget", "43.2 [40.0, 46.0]"]),
        ({"value": -43.21, "lo": -46.02, "hi": -40.01}, ["not seen to be suboptimal", "is worse than uniform"]),
        ({"value": 1.0, "lo": -1.0, "hi": 3.0}, ["not seen to be suboptimal", "The interval covers no difference at"]),
    ],
    ids=["better", "worse", "open"],
)  # fmt: skip
def test_prose_follows_the_cells(read, ends, says):
    text = prose(written(read, **gain(read, paper.BEST, **ends)))
    for words in says:
        assert words in text.replace(r"\,\%", " %").replace("$-$", "-")
    conclusions = {"better": "Uniform bits are suboptimal on this model at every", "worse": "budgets they are worse",
                   "open": "On this model uniform will do"}  # fmt: skip
    found = [word for word, sentence in conclusions.items() if sentence in text]
    assert found == ["better" if ends["lo"] > 0 else "worse" if ends["hi"] < 0 else "open"]


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ((-2e-3, -3e-3, -1e-3), "Rank is worth its bytes at some budgets."),
        ((2e-3, 1e-3, 3e-3), "Rank is not worth its bytes: bits and group size do it."),
        ((0.0, -1e-3, 1e-3), "That rank is worth its bytes cannot be shown here."),
    ],
)
def test_rank_is_worth_its_bytes_only_where_the_paired_interval_says_so(read, ends, says):
    controls = read["controls"].copy()
    controls[["value", "lo", "hi"]] = ends
    text = prose(written(read, controls=controls))
    told = "{:.2f} [{:.2f}, {:.2f}]".format(*(1000 * end for end in ends))
    assert says in text and told.replace("-", "$-$") in text
    assert "were not both evaluated" in prose(written(read, controls=controls.iloc[:0]))


def test_every_cell_of_the_plans_and_every_refusal_is_in_it(read):
    text = written(read)
    row = read["evaluate"].query("plan == 'optimal-2.8bpw' and metric == 'ppl' and task == 'world/report'").iloc[0]
    assert f"{row['value']:.3f} [{row['lo']:.3f}, {row['hi']:.3f}]" in text
    assert r"pilot, manual\_gain: 0.004, must be $>$ 0.02" in text
    assert "16,384 tokens" in prose(text) and "a_model" not in text and r"\texttt{a\_model}" in text
    assert "Options that were not swept are interpolated" in text  # the gate of the law falls back
    assert written(read) == text


def test_nothing_to_say_is_said(read):
    bare = {"goodhart": empty(tables.GOODHART, []), "law": law().iloc[:0], "gates": gates().assign(go=True)}
    bare |= {"controls": read["controls"].iloc[:0]}
    ppl = read["evaluate"].query("metric == 'ppl'")
    text = written(read, **bare, evaluate=ppl, sentences=["Nothing."], captions={})
    for words in ("No plan was compared with uniform", "the two were not both evaluated", "No task was run on",
                  "could not be asked here", "All 6 checks say GO"):  # fmt: skip
        assert words in prose(text)
    assert (
        "top-1 agreement with the unquantised model" in prose(text)
        and r"\appendix" in text
        and r"\section{Est" not in text
    )
    assert "figure" not in text.partition(r"\begin{document}")[2].partition(r"\cite")[0]


def test_rows_of_other_analyses_are_taken_as_they_come(read):
    place = {"analysis": "regressional", "proxy": "nll:world", "gold": "facts", "budget": "all", "status": "ok"}
    row = place | {"statistic": "shrinkage_x", "value": 0.123, "lo": 0.1, "hi": 0.2, "n": 9, "p_adjusted": np.nan}
    text = written(read, goodhart=pd.concat([read["goodhart"], pd.DataFrame([row])]))
    assert r"\paragraph{Regressional.}" in text and "shrinkage x & 0.123 [0.1, 0.2] & 9" in text


def test_it_compiles_and_every_reference_is_resolved(read, tmp_path):
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex here: apt-get install texlive-latex-recommended")
    for name in SHOWN:
        imsave(tmp_path / f"{name}.png", np.ones((40, 80, 3)))
    hostile = [r"100 % of \end{document} & ~ ^ _ # $ { } < > | " + '"quoted" \u2192 \u4e16']
    (tmp_path / "main.tex").write_text(written(read, sentences=hostile, authors=["A & B", "C_D"]))
    for _ in range(2):
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "main.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
        assert done.returncode == 0, done.stdout[-2000:]
    log = (tmp_path / "main.log").read_text(errors="replace")
    assert not re.search("undefined|multiply defined|Missing character", log)
    assert (tmp_path / "main.pdf").read_bytes().startswith(b"%PDF")
