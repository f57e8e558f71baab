"""Completions: greedy whatever the batch, cut where lm-eval cuts, resumed by batch, of the plan's own weights."""

import gzip
import json
import os
from pathlib import Path

import pandas as pd
import pytest
import torch

from bitalloc import humaneval
from bitalloc.compress import compress
from bitalloc.config import HumanEval
from bitalloc.errors import BitallocError
from bitalloc.humaneval import Writer, generate, problems
from bitalloc.models import Checkpoint, load_model
from bitalloc.option import Option
from bitalloc.tables import SAMPLES
from tests.small import CPU, Small, small

TINY = Path(__file__).parents[1] / "resources/tiny"
ONE = "def f():\n    ''' One. '''\n"
PROMPTS = (
    "def add(x):\n    ''' One more. '''\n",
    ONE,
    "import math\n\n\ndef area(r):\n    ''' Of a disc. '''\n",
)


def problem(number: int, prompt: str, **changed) -> dict:
    test = "def check(candidate):\n    assert candidate(1) == 2\n"
    return {"task_id": f"Test/{number}", "prompt": prompt, "entry_point": "f", "test": test, **changed}


def written(path: Path, rows) -> str:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return str(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Small:
    return small("qwen2", tmp_path_factory.mktemp("tiny"), source=TINY)


@pytest.fixture
def settings(tmp_path) -> HumanEval:
    source = written(tmp_path / "three.jsonl.gz", [problem(n, text) for n, text in enumerate(PROMPTS)])
    return HumanEval(sources=[source], max_new_tokens=12, batch=2)


def samples(model: Small, settings: HumanEval, **changed) -> pd.DataFrame:
    given = {"plan": "reference", "folder": None, "checkpoint": model.experiments.checkpoint, "store": model.store}
    return generate(**{**given, **changed}, inventory=model.inventory, settings=settings, device=CPU)


def writer(model: Small, settings: HumanEval, **changed) -> Writer:
    given = {"folder": None, "checkpoint": model.experiments.checkpoint, "inventory": model.inventory}
    return Writer(**{**given, **changed}, settings=settings, device=CPU)


@torch.inference_mode()
def greedy(model, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def test_a_batch_of_different_lengths_is_what_each_alone_gives(tiny, settings, tmp_path):
    frame = samples(tiny, settings)
    SAMPLES.write(frame, tmp_path / "samples.parquet")
    model, by_hand = load_model(TINY, device=CPU), writer(tiny, settings)
    for row in frame.to_dict("records"):
        ids = by_hand.tokens(row["prompt"])
        alone = by_hand._cut(ids, greedy(model, ids, 12))
        assert {name: row[name] for name in alone} == alone
        assert row["prompt_tokens"] == len(ids)
    assert frame["truncated"].any()


def test_the_text_ends_at_a_stop_sequence_or_an_end_token(tiny, settings):
    by_hand = writer(tiny, settings)
    prompt, end = by_hand.tokens(PROMPTS[0]), by_hand.ends[0]

    def cut(text: str, *more: int) -> tuple:
        return tuple(by_hand._cut(prompt, [*by_hand.tokens(text), *more]).values())[::2]

    assert cut("    return 1\n\ndef g():\n    if x: pass\n") == ("    return 1\n", False)
    assert cut("    return 1\n", end, *by_hand.tokens("# more")) == ("    return 1\n", False)
    assert cut("    if x:\n        return 1") == ("    if x:\n        return 1", True)


def test_generation_stops_at_a_stop_sequence(tiny, settings, monkeypatch):
    whole = samples(tiny, settings).set_index("task_id")
    longest = whole["completion"].str.len().idxmax()
    stop = whole.loc[longest, "completion"][3:6]
    monkeypatch.setattr(humaneval, "UNTIL", (stop,))
    row = samples(tiny, settings.model_copy(update={"batch": 1})).set_index("task_id").loc[longest]
    assert row["completion"] == whole.loc[longest, "completion"].partition(stop)[0]
    assert row["completion_tokens"] < whole.loc[longest, "completion_tokens"]
    assert not row["truncated"]


def test_finished_batches_are_not_written_again(tiny, settings, tmp_path, monkeypatch):
    from bitalloc.store import Store

    store, complete, done = Store(tmp_path / "store"), Writer.complete, []

    def killed(self, prompts):
        if done:
            raise KeyboardInterrupt
        done.append(len(prompts))
        return complete(self, prompts)

    monkeypatch.setattr(Writer, "complete", killed)
    with pytest.raises(KeyboardInterrupt):
        samples(tiny, settings, store=store)
    monkeypatch.setattr(Writer, "complete", lambda self, prompts: done.append(len(prompts)) or complete(self, prompts))
    frame = samples(tiny, settings, store=store)
    assert done == [2, 1]
    monkeypatch.setattr(humaneval, "load_model", None)  # all is in the store: no weights are read
    assert samples(tiny, settings, store=store).equals(frame)
    with pytest.raises(TypeError):
        samples(tiny, settings.model_copy(update={"max_new_tokens": 13}), store=store)


def test_a_plan_writes_with_its_own_weights(tiny, settings, tmp_path):
    plans = {
        "same": tiny.plan([Option("none", 16, 0, 0)]),
        "coarse": tiny.plan([Option("rtn", 2, 16, 0)]),
    }
    given = {"results": tmp_path, "experiments": tiny.experiments, "inventory": tiny.inventory, "verdicts": []}
    compress(plans, **given)
    text = {
        name: list(samples(tiny, settings, plan=name, folder=tmp_path / "models" / name)["completion"])
        for name in plans
    }
    reference = list(samples(tiny, settings)["completion"])
    assert text["same"] == reference
    assert text["coarse"] != reference


def test_a_prompt_that_fills_the_context_is_counted_not_fatal(tiny, settings, tmp_path):
    long = "x = 1  # a long line of code\n" * 200 + ONE
    source = written(tmp_path / "long.jsonl.gz", [problem(0, long), problem(1, ONE)])
    frame = samples(tiny, settings.model_copy(update={"sources": [source]}))
    assert frame["unfit"].tolist() == [True, False]
    assert frame["completion_tokens"].tolist()[0] == 0 < frame["completion_tokens"].tolist()[1]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no problem"),
        ([problem(0, ONE)] * 2, "twice"),
        ([{"task_id": "Test/0", "prompt": "x"}], "KeyError: 'entry_point'"),
        ([problem(0, "def f(:\n")], "SyntaxError"),
        ([problem(0, "def f():\n 1", test=None)], "no text"),
        ([["a list"]], "TypeError"),
    ],
)
def test_a_file_of_another_shape_is_one_line(tmp_path, rows, words):
    with pytest.raises(BitallocError, match=words) as error:
        problems([written(tmp_path / "bad.jsonl.gz", rows)])
    assert "\n" not in str(error.value)


def test_truncated_and_absent_files_are_one_line(tmp_path):
    source = Path(written(tmp_path / "bad.jsonl.gz", [problem(0, ONE)]))
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(BitallocError, match="does not hold HumanEval"):
        problems([str(source)])
    with pytest.raises(BitallocError, match=r"tried /nowhere \(no such file\); point to a copy"):
        problems(["/nowhere"])


def test_parquet_is_read_as_the_hub_has_it(tmp_path):
    rows = pd.DataFrame([problem(0, ONE, canonical_solution="    return 2\n")])
    rows.to_parquet(tmp_path / "test.parquet")
    assert problems(["/nowhere", str(tmp_path / "test.parquet")]).equals(rows[list(humaneval.FIELDS)])


def test_a_tokenizer_without_pad_and_end_is_one_line(tmp_path, settings):
    bare = small("qwen2", tmp_path, source=TINY)
    file = bare.path / "tokenizer_config.json"
    kept = {name: value for name, value in json.loads(file.read_text()).items() if not name.endswith("_token")}
    file.write_text(json.dumps(kept))
    with pytest.raises(BitallocError, match="neither pad nor eos token") as error:
        samples(bare, settings)
    assert "\n" not in str(error.value)


@pytest.mark.data
@pytest.mark.skipif("BITALLOC_DATA" not in os.environ, reason="BITALLOC_DATA is not set")
def test_code_survives_real_tokenizers(settings):
    data = Path(os.environ["BITALLOC_DATA"])
    from bitalloc.families import FAMILIES

    real = Checkpoint(data / "models/stories260K/hf", FAMILIES["llama"])
    by_hand = Writer(folder=None, checkpoint=real, inventory=pd.DataFrame(), settings=settings, device=CPU)
    prompt = by_hand.tokens("def f():\n")
    for text in ("    return [x , y]\n", "return 1", "\tx = 1\n\n"):
        new = by_hand.tokens("def f():\n" + text)[len(prompt) :]
        assert by_hand._text(prompt, new) == text
    frame = problems([str(data / "humaneval/HumanEval.jsonl.gz")])
    assert len(frame) == 164
