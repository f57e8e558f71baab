from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copyfile
from typing import Any

import pandas as pd
import pytest
import torch

from bitalloc import config
from bitalloc import evaluate as stage
from bitalloc.errors import BitallocError
from bitalloc.store import Ledger, Store
from bitalloc.suites import Head, Memory, copies, downstream, prefixes
from bitalloc.tables import EVALUATE, RESPONSES
from tests.random_models import CONFIGS, CONTEXT, VOCABULARY, build
from tests.small import OPTIONS, small, tokens

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'bitalloc[downstream]'")
LM_EVAL = Path(lm_eval.__file__).parent / "tasks"
TINY = Path(__file__).parents[2] / "resources" / "tiny"
WORDS = "the cat sat on a red mat and saw two big dogs run to town".split()
DATA = os.environ.get("BITALLOC_DATA")
data = pytest.mark.skipif(not DATA, reason="BITALLOC_DATA is not set")
Task = config.Task


@pytest.fixture(autouse=True)
def _no_data_but_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITALLOC_DATA", raising=False)
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.max_gen_toks", 8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 512 tokens that reads the tokenizer of the embedded model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"vocab_size": 1025, "max_position_embeddings": 512, "initializer_range": 0.2}
    LlamaForCausalLM(LlamaConfig(**shape, **sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copyfile(TINY / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up data in the original forms: mmlu (one subject), hellaswag, piqa, gsm8k; hub/: as the hub has them."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    def write(file: str, lines: list[str]) -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("".join(f"{line}\n" for line in lines))

    hub: dict[str, list[dict[str, Any]]] = {}
    for split, count in (("dev", 5), ("test", 9)):
        rows = [(text(4, 9) + ' "so"?', *(text(1, 3) for _ in "ABCD"), rng.choice("ABCD")) for _ in range(count)]
        (folder / "mmlu" / split).mkdir(parents=True)
        with (folder / "mmlu" / split / f"anatomy_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        hub[f"mmlu_anatomy/{split}"] = [
            {"question": q, "choices": choices, "answer": "ABCD".index(letter)} for q, *choices, letter in rows
        ]
    items = []
    for at in range(10):
        first, second = f"A man sat! {text(3, 9)}.", text(1, 3) if at % 2 else ""
        row = {"activity_label": text(2, 2), "ctx_a": first.capitalize(), "ctx_b": second, "label": str(at % 4)}
        items.append(row | {"endings": [text(2, 12) + "." for _ in range(4)]})
    hub["hellaswag/validation"] = items
    write("hellaswag/hellaswag_val_full.txt", [
        line
        for row in items
        for line in (
            f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b']}".rstrip(), row["label"], *row["endings"],
        )
    ])  # fmt: skip
    goals = [{"goal": text(3, 8), "sol1": text(4, 9), "sol2": text(4, 9)} for _ in range(11)]
    labels = [at % 2 for at in range(11)]
    write("piqa/valid.jsonl", list(map(json.dumps, goals)))
    write("piqa/valid-labels.lst", list(map(str, labels)))
    hub["piqa/validation"] = [row | {"label": label} for row, label in zip(goals, labels, strict=True)]
    for split, name, count in (("train", "train_first500", 7), ("test", "test", 6)):
        rows = [{"question": text(5, 12), "answer": f"{text(3, 6)}\n#### {rng.randint(1, 99)}"} for _ in range(count)]
        write(f"gsm8k/{name}.jsonl", list(map(json.dumps, rows)))
        hub[f"gsm8k/{split}"] = rows
    choices = {"text": ["cat", "dog", "a mat"], "label": ["1", "2", "3"]}
    plain = {
        "arc_easy/test": [
            {"question": text(3, 9), "choices": choices, "answerKey": str(at % 3 + 1)} for at in range(5)
        ],
        "winogrande/validation": [
            {"sentence": f"{text(2, 5)} _ {text(2, 5)}", "option1": "cat", "option2": "dog", "answer": str(at % 2 + 1)}
            for at in range(6)
        ],
        "lambada_openai/test": [{"text": text(6, 20)} for _ in range(5)],
    }
    for place, rows in plain.items():
        write(f"{place}.jsonl", list(map(json.dumps, rows)))
    for place, rows in hub.items():
        write(f"hub/{place}.jsonl", list(map(json.dumps, rows)))
    return folder


def tasks(forms: Path, **over: dict[str, Any]) -> dict[str, config.Task]:
    names = ("mmlu_anatomy", "hellaswag", "piqa", "gsm8k")
    folders = {name: str(forms / name.removesuffix("_anatomy")) for name in names}
    return {name: Task(**({"data": folders[name]} | over.get(name, {}))) for name in names}


def harness(model: Any, path: Path, chosen: dict[str, config.Task], **over: Any) -> downstream.Harness:
    settings = config.Evaluate(tasks=chosen, batch=4)
    return downstream.Harness(model, Head(model), path=path, settings=settings, **over)


def hflm(model: Any, path: Path, batch: int = 4) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=downstream._tokenizer(path), batch_size=batch)


# ---- scoring
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_scores_as_lm_eval_does(family: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared beginning, four continuations of a context, empty contexts, prompts too long, a batch not filled."""
    monkeypatch.setattr(prefixes, "WORTH", 1)
    rng, model = random.Random(0), build(family)

    def draw(low: int, high: int) -> list[int]:
        return [rng.randrange(2, VOCABULARY) for _ in range(rng.randint(low, high))]

    shots = draw(20, 20)
    contexts = [*(shots + draw(1, 12) for _ in range(7)), *(draw(1, 50) for _ in range(9)), draw(90, 90), [0]]
    pairs = [(context, draw(1, 1 + 7 * (at % 2))) for at, context in enumerate(contexts) for _ in range(4)]
    pairs += [(draw(5, 5), draw(CONTEXT, CONTEXT)), pairs[0]]
    requests = [((None, None), *pair) for pair in pairs]
    expected = hflm(model, path)._loglikelihood_tokens(requests, disable_tqdm=True)
    ours = downstream.language_model()(pretrained=model, tokenizer=downstream._tokenizer(path), batch_size=4)
    found = ours._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert ours.truncated == [len(a) + len(b) > ours.max_length + 1 for a, b in pairs]


def test_what_prompts_share_is_computed_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shots, read = build("llama"), list(range(2, 42)), []
    extend = prefixes._extend
    monkeypatch.setattr(
        prefixes, "_extend", lambda m, c, s, **k: (read.append(sum(map(len, s))), extend(m, c, s, **k))[1]
    )
    monkeypatch.setattr(prefixes, "WORTH", 40)
    pairs = [([*shots, item], [choice]) for item in range(50, 58) for choice in (90, 91, 92, 93)]
    prefixes.loglikelihoods(model, Head(model), pairs, longest=CONTEXT, rows=4)
    assert read == [40, 4, 4]  # the examples once, then one token of each of eight items
    read.clear()
    pairs = [([*range(item, item + 33)], [choice, choice]) for item in (2, 40) for choice in (90, 91, 92)]
    prefixes.loglikelihoods(model, Head(model), pairs, longest=CONTEXT, rows=6)
    assert read == [2 * 32, 6 * 2]  # contexts without their last token, then that and half of each continuation
    read.clear()
    monkeypatch.setattr(prefixes, "WORTH", 65)
    prefixes.loglikelihoods(model, Head(model), pairs[:3], longest=CONTEXT, rows=6)
    assert read == [3 * 34]  # a pass of its own would save too little


def test_texts_are_scored_as_lm_eval_does(model: Any, path: Path) -> None:
    from lm_eval.api.instance import Instance

    pairs = [
        ("", " the cat"),
        ("the cat sat", " on"),
        ("the cat sat", " on a mat"),
        ("dogs ", "run"),
        ("a " * 400, "b"),
    ]
    requests = [Instance("loglikelihood", {}, pair, 0, ("t", at, 1)) for at, pair in enumerate(pairs)]
    ours = downstream.language_model()(pretrained=model, tokenizer=downstream._tokenizer(path), batch_size=2)
    theirs = hflm(model, path)
    for found, expected in zip(
        ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert found == (pytest.approx(expected[0], abs=1e-4), expected[1])
    texts = [Instance("loglikelihood_rolling", {}, ("the cat sat on a mat " * 90,), 0, ("t", 0, 1))]
    rolling = (lm.loglikelihood_rolling(texts, disable_tqdm=True)[0] for lm in (ours, theirs))
    assert next(rolling) == pytest.approx(next(rolling), abs=1e-3)


# ---- tasks
@pytest.mark.parametrize("name", ["mmlu_anatomy", "hellaswag", "piqa", "gsm8k"])
def test_local_forms_give_the_requests_of_lm_evals_own_task(
    forms: Path, model: Any, path: Path, tmp_path: Path, name: str
) -> None:
    """lm-eval's definition, once on our reading of the original form, once on lm-eval's reading of the hub's rows."""
    from lm_eval.tasks import TaskManager

    files = {file.stem: str(file) for file in (forms / "hub" / name).glob("*.jsonl")}
    fewshot = {"num_fewshot": 5} if name == "mmlu_anatomy" else {}
    hub = {"dataset_path": "json", "dataset_name": None, **fewshot}
    if name in {"hellaswag", "piqa"}:
        hub["training_split"] = None  # lm-eval reads it although prompts have no examples
    kwargs = {"dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path)}}
    with downstream._quiet():
        manager = TaskManager(include_path=str(LM_EVAL / downstream.FOLDERS[copies.kind(name)]), include_defaults=False)
        (task,) = manager.load({"group": "g", "task": [{"task": name, **hub, **kwargs}]})["tasks"].values()
        task.set_fewshot_seed(1234)
        task.build_all_requests()
    (part,) = harness(model, path, {name: tasks(forms)[name]}).parts
    assert [(i.doc_id, i.idx, i.arguments) for i in part.task.instances] == [
        (i.doc_id, i.idx, i.arguments) for i in task.instances
    ]
    assert len(part.ids) == len(set(i.doc_id for i in task.instances)) > 5


def test_metrics_are_those_of_simple_evaluate(
    forms: Path, model: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means and standard errors, of all items and of a draw."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)  # it lists all of lm-eval otherwise
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # runs pip for ten seconds
    others = {name: Task(data=str(forms / name)) for name in ("arc_easy", "winogrande", "lambada_openai")}
    chosen = tasks(forms, mmlu_anatomy={"limit": 4}, gsm8k={"limit": 4, "fewshot": 2}) | others
    ours = harness(model, path, chosen, seed=3)
    rows, protocols = ours(Memory(), ours.lm.head)
    frame = stage.summarise(
        rows.assign(plan="reference"), {("reference", "downstream", t): p for t, p in protocols.items()}, {},
        resamples=50, seed=0,
    ).set_index(["task", "metric"])["value"]  # fmt: skip
    drawn = {part.name: part.ids for part in ours.parts}
    assert (len(drawn["gsm8k"]), len(drawn["piqa"])) == (4, 11)
    with downstream._quiet():
        fresh = [task for several in downstream.load(chosen).values() for task in several]
        theirs = simple_evaluate(
            hflm(model, path), tasks=fresh, samples=drawn, bootstrap_iters=10, task_manager=manager
        )
    expected = {
        (task, metric): value
        for task, scores in theirs["results"].items()
        for metric, value in scores.items()
        if "," in metric and "perplexity" not in metric  # no mean over items
    }
    assert frame.to_dict() == pytest.approx(expected)
    assert len(expected) == 22


def test_rows_of_the_hub_are_read_from_parquet_too(forms: Path, tmp_path: Path) -> None:
    rows = copies.read("arc_easy", forms / "arc_easy")["test"]
    pd.DataFrame(rows).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    assert copies.read("arc_easy", tmp_path)["test"] == rows
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(BitallocError, match=r"cannot read .*parquet"):
        copies.read("arc_easy", tmp_path)


def test_subjects_make_up_mmlu_and_its_error_is_lm_evals(model: Any, path: Path, tmp_path: Path) -> None:
    from lm_eval.api.metrics import pooled_sample_stderr

    rng = random.Random(0)
    for split, count in (("dev", 5), ("test", 4)):
        (tmp_path / split).mkdir()
        for subject in (LM_EVAL / "mmlu/default").glob("mmlu_*.yaml"):
            lines = [f"what {rng.randrange(99)},a,b,c,d,{rng.choice('ABCD')}\n" for _ in range(count)]
            (tmp_path / split / f"{subject.stem.removeprefix('mmlu_')}_{split}.csv").write_text("".join(lines))
    ours = harness(model, path, {"mmlu": Task(data=str(tmp_path), limit=3)})
    rows, protocols = ours(Memory(), ours.lm.head)
    whole, parts = rows[rows["task"] == "mmlu"], rows[rows["task"] != "mmlu"]
    assert (parts["task"].nunique(), len(parts), len(whole)) == (57, 171, 171)
    assert whole["item"].tolist() == list(range(171))
    assert whole["group"].tolist() == parts["task"].tolist()
    assert protocols["mmlu"].startswith("lm-eval 0.4.13, version 1.0; 5-shot; local data; 171 items (drawn by seed 0)")
    error = stage.intervals.standard_error(whole["value"], whole["group"])
    errors = [stage.intervals.standard_error(part["value"], part["group"]) for _, part in parts.groupby("task")]
    assert error == pytest.approx(pooled_sample_stderr(errors, [3] * 57))


# ---- resume and faults
@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many requests each call of the model was given."""
    calls: list[int] = []
    for kind in ("loglikelihood", "generate_until"):
        original = getattr(downstream.language_model(), kind)

        def call(self: Any, requests: Any, *, original: Callable = original, **rest: Any) -> Any:
            found = original(self, requests, **rest)
            calls.append(len(requests))
            return found

        monkeypatch.setattr(downstream.language_model(), kind, call)
    return calls


def test_a_run_that_broke_off_computes_nothing_twice(  # noqa: PLR0917
    forms: Path, model: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[int]
) -> None:
    monkeypatch.setattr(downstream, "SHARD", 4)
    ours = harness(model, path, tasks(forms, mmlu_anatomy={"limit": 8}))
    expected = ours(Memory(), ours.lm.head)
    undisturbed, add, kept = list(asked), Ledger.add, []

    def breaking(ledger: Ledger, records: Any) -> None:
        add(ledger, records)
        kept.append(len(records))
        if len(kept) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "add", breaking)
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        ours(Memory(Store(tmp_path), "weights"), ours.lm.head)
    resumed = ours(Memory(Store(tmp_path), "weights"), ours.lm.head)
    assert asked == undisturbed
    pd.testing.assert_frame_equal(resumed[0], expected[0])
    assert resumed[1] == expected[1]
    assert len(list(tmp_path.rglob("*.jsonl"))) == len(ours.parts)
    asked.clear()
    ours(Memory(Store(tmp_path), "other weights"), ours.lm.head)
    assert asked == undisturbed  # answers belong to the weights that gave them


def test_a_subset_is_spread_over_subjects_and_what_is_added_to_it_is_all_that_is_asked(
    forms: Path, model: Any, path: Path, tmp_path: Path, asked: list[int]
) -> None:
    names = ("piqa", "hellaswag")
    ours = harness(model, path, {name: tasks(forms)[name] for name in names})
    memory = Memory(Store(tmp_path), "weights")
    few, protocols = ours(memory, ours.lm.head, 3)
    assert few.drop_duplicates(["task", "item"]).groupby("task").size().to_dict() == dict.fromkeys(names, 3)
    assert protocols["piqa"].endswith("3 items (drawn by seed 0)")
    assert [(w.task, w.items, w.stored == w.tokens) for w in ours.works(memory, 3)] == [
        ("piqa", 3, True), ("hellaswag", 3, True)
    ]  # fmt: skip
    asked.clear()
    more, _ = ours(memory, ours.lm.head, 5)
    assert asked == [2 * 2, 2 * 4]  # two items of two and of four choices
    both = more.merge(few, on=["task", "item", "metric"], suffixes=("", "_few"))
    assert len(both) == len(few) and (both["value"] == both["value_few"]).all()


def test_an_item_that_fails_is_left_out_and_the_rest_goes_on(  # noqa: PLR0917
    forms: Path, model: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ours = harness(model, path, tasks(forms))
    expected, _ = ours(Memory(), ours.lm.head)
    score = downstream.language_model()._loglikelihood_tokens
    broken = ours.parts[2].task.instances[4].arguments[0]  # third item of piqa

    def failing(lm: Any, requests: Any, **rest: Any) -> Any:
        if any(text[0] == broken for text, *_ in requests):
            raise RuntimeError("out of memory")
        return score(lm, requests, **rest)

    monkeypatch.setattr(downstream.language_model(), "_loglikelihood_tokens", failing)
    other = harness(model, path, tasks(forms))
    rows, protocols = other(Memory(), other.lm.head)
    assert "task piqa: item 2 left out (RuntimeError: out of memory)\n" in capsys.readouterr().err
    assert "; 11 items, 1 missing (all)" in protocols["piqa"]
    kept = expected[~((expected["task"] == "piqa") & (expected["item"] == 2))]
    assert rows[["task", "metric", "item"]].to_dict("list") == kept[["task", "metric", "item"]].to_dict("list")
    assert rows["value"].tolist() == kept["value"].tolist()


def test_an_answer_that_takes_too_long_is_missing(  # noqa: PLR0917
    forms: Path, model: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    only = {"gsm8k": tasks(forms)["gsm8k"].model_copy(update={"limit": 2})}
    ours = harness(model, path, only)
    now = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(downstream.time, "monotonic", lambda: next(now))
    with pytest.raises(BitallocError, match=r"task gsm8k: every item failed \(TimeoutError: no answer within 600 s\)"):
        ours(Memory(), ours.lm.head)
    assert capsys.readouterr().err.count("left out") == 2


def test_answers_that_are_not_finite_stop(
    forms: Path, model: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = harness(model, path, {"piqa": tasks(forms)["piqa"]})
    monkeypatch.setattr(downstream, "loglikelihoods", lambda m, h, pairs, **_: [(float("nan"), False)] * len(pairs))
    with pytest.raises(BitallocError, match=r"every item failed \(ValueError: a log-likelihood is NaN or Inf\)"):
        ours(Memory(), ours.lm.head)


BAD = [
    ("piqa", "valid-labels.lst", "0\n1\n", "does not hold 0 or 1 for each of the 11 lines of valid.jsonl"),
    ("piqa", "valid.jsonl", '{"goal": "a"}\n' * 11, "task piqa: .* lacks what lm-eval's definition reads"),
    ("piqa", "valid.jsonl", "not json\n" * 11, "line 1 is not a JSON object"),
    ("hellaswag", "hellaswag_val_full.txt", "A: b c\n7\nx\ny\nz\nw\n", "line 1: not context, label 0 to 3"),
    ("mmlu_anatomy", "test/anatomy_test.csv", "q,a,b,c,d,E\n", r"anatomy_test.csv row 1 is not: question, four"),
    ("gsm8k", "test.jsonl", '{"question": "a"}\n', r"lack(s)? what lm-eval's definition reads"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad[0]} {bad[1]}")
def test_data_of_the_wrong_shape_is_one_line(
    forms: Path, model: Any, path: Path, tmp_path: Path, bad: tuple[str, str, str, str]
) -> None:
    name, file, text, message = bad
    source = forms / name.removesuffix("_anatomy")
    for each in source.rglob("*.*"):
        (tmp_path / each.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        copyfile(each, tmp_path / each.relative_to(source))
    (tmp_path / file).write_text(text)
    with pytest.raises(BitallocError, match=message) as caught:
        harness(model, path, {name: Task(data=str(tmp_path))})
    assert "\n" not in str(caught.value)


def test_what_cannot_be_had_is_one_line(
    forms: Path, model: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(downstream.FOLDERS, "hellaswagg", "hellaswag")  # listing all of lm-eval takes ten seconds

    def refused(**chosen: config.Task) -> str:
        with pytest.raises(BitallocError) as caught:
            harness(model, path, chosen)
        return str(caught.value)

    assert "unknown task 'hellaswagg' in evaluate.tasks: did you mean 'hellaswag'?" in refused(hellaswagg=Task())
    assert refused(piqa=Task(data="/not/here")) == "evaluate.tasks.piqa: no such data: /not/here"
    assert "has no chat template; set chat: false" in refused(piqa=tasks(forms, piqa={"chat": True})["piqa"])
    assert "has no examples for prompts" in refused(piqa=tasks(forms, piqa={"fewshot": 2})["piqa"])
    assert "holds neither the original form nor" in refused(arc_easy=Task(data=str(tmp_path)))

    (tmp_path / "test.jsonl").write_text('{"page": "the cat"}\n')
    monkeypatch.setitem(downstream.FOLDERS, "wikitext", "wikitext")
    assert "wikitext has no metric that is a mean over items; take" in refused(wikitext=Task(data=str(tmp_path)))

    def offline(**_: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    said = refused(arc_easy=Task())
    assert said.startswith("task arc_easy: tried ${BITALLOC_DATA}/arc_easy (no such folder) and the hub (ConnectionErr")
    assert said.endswith("point evaluate.tasks.arc_easy.data to a local copy")
    monkeypatch.setattr(model.config, "max_position_embeddings", 8)
    assert "task gsm8k: answers of 8 tokens, but the model takes 8" in refused(gsm8k=tasks(forms)["gsm8k"])
    monkeypatch.setattr(downstream.util, "find_spec", lambda name: None)
    assert refused(piqa=Task()) == "suite downstream needs lm-eval: pip install 'bitalloc[downstream]'"


def test_prompts_go_through_the_chat_template(forms: Path, model: Any, path: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        copyfile(path / name, tmp_path / name)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    turns = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": turns}))
    ours = harness(model, tmp_path, {"piqa": tasks(forms, piqa={"chat": True})["piqa"]})
    assert all(i.arguments[0].startswith("<user>Question: ") for i in ours.parts[0].task.instances)
    assert "chat template" in ours(Memory(), ours.lm.head)[1]["piqa"]


def test_a_tokenizer_that_cannot_pad_is_one_line(forms: Path, model: Any, path: Path, tmp_path: Path) -> None:
    copyfile(path / "config.json", tmp_path / "config.json")
    copyfile(path / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    with pytest.raises(BitallocError, match="has neither a pad nor an eos token, which batches need; name one in"):
        harness(model, tmp_path, tasks(forms))


# ---- the stage
def test_plans_are_scored_and_floors_are_told(forms: Path, path: Path, tmp_path: Path, asked: list[int]) -> None:
    bench = small("llama", tmp_path, source=path, dtype=torch.float32)
    settings = config.Evaluate(suites=["perplexity", "downstream"], resamples=50, batch=4, tasks=tasks(forms))
    given = {
        "experiments": bench.experiments, "tokens": tokens(2),
        "items": pd.DataFrame(), "split": "report", "store": Store(tmp_path / "store"),
    }  # fmt: skip
    plans = {"two": bench.plan(OPTIONS[:1])}
    frame, responses = stage.evaluate(plans=plans, settings=settings, **given)
    EVALUATE.write(frame, tmp_path / "evaluate.parquet")
    RESPONSES.write(responses, tmp_path / "responses.parquet")
    rows = frame[frame["suite"] == "downstream"].set_index(["plan", "task", "metric"])
    chance = {"mmlu_anatomy": 0.25, "hellaswag": 0.25, "piqa": 0.5}
    for task, guess in chance.items():
        assert rows.at[("two", task, "acc,none"), "chance"] == guess
    for (_, task, metric), row in rows.iterrows():
        if "_stderr" not in metric:
            reference = rows.loc[("reference", task, metric)]
            assert row["status"] == reference["status"]
            assert row["status"] == "floor" or reference["lo"] > row["chance"]
    assert rows.at[("two", "gsm8k", "exact_match,strict-match"), "status"] == "floor"  # noise answers nothing
    assert asked[: len(asked) // 2] * 2 == asked  # the plan is asked what the reference was
    asked.clear()
    again, _ = stage.evaluate(plans=plans, settings=settings, **given)
    pd.testing.assert_frame_equal(again, frame)
    assert not asked
    fewer = settings.model_copy(update={"suites": ["downstream"]})
    stage.evaluate(plans=plans, settings=fewer, **given)
    assert not asked  # another set of suites finds the answers that are there
    with pytest.raises(BitallocError, match=r"suite downstream has no tasks: set evaluate\.tasks"):
        stage.evaluate(plans={}, settings=fewer.model_copy(update={"tasks": {}}), **given)


@data
@pytest.mark.data
def test_real_copies_are_read_whole() -> None:
    folder = Path(DATA or "")
    counts = {"hellaswag": 10_042, "piqa": 1_838, "gsm8k": 1_319, "mmlu_anatomy": 135}
    for name, count in counts.items():
        splits = copies.read(name, folder / name.removesuffix("_anatomy"))
        assert len(splits.get("test") or splits["validation"]) == count
    rows = copies.read("hellaswag", folder / "hellaswag")["validation"]
    assert sum(bool(row["ctx_b"]) for row in rows) == 3_243  # captions of two sentences; the rest are how-tos
