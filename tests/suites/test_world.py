from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitalloc import config, retrieve
from bitalloc.errors import BitallocError
from bitalloc.models import load_model
from bitalloc.suites import SUITES, Head, Scored, Windows, world
from tests.random_models import VOCABULARY, build

CPU = torch.device("cpu")
TINY = Path(__file__).parents[2] / "resources" / "tiny"


@pytest.fixture(scope="module")
def tiny_items() -> pd.DataFrame:
    count = {"facts": 40, "sums": 20, "keys": 20, "passkey": 10}
    return retrieve.items(config.Config(retrieve=config.Retrieve(items=count)), TINY)


def windows(length: int = 256, batch: int = 4) -> Windows:
    row = {"split": "report", "corpus": "a", "window": 0, "nbytes": 1, "tokens": [1] * length}
    return Windows(pd.DataFrame([row]), batch=batch, device=CPU)


def run(model: Any, items: pd.DataFrame, **sizes: int) -> pd.DataFrame:
    rows, _ = SUITES["world"](Scored(model, Head(model), windows(**sizes), items))
    return rows.set_index(["metric", "task", "item"])["value"]


def test_the_tiny_model_knows_its_world(tiny_items: pd.DataFrame) -> None:
    rows = run(load_model(TINY, device=CPU), tiny_items)
    acc = rows["acc"].groupby("task").mean()
    assert acc["facts"] >= 0.95
    assert acc["keys"] >= 0.95
    assert acc["passkey"] >= 0.9
    assert acc["sums"] >= 0.8


def test_teacher_forcing_tells_what_greedy_decoding_would_do(tiny_items: pd.DataFrame) -> None:
    model = load_model(TINY, device=CPU)
    torch.manual_seed(0)
    with torch.no_grad():  # spoil it until it gets about half of them right
        for name, parameter in model.named_parameters():
            if "proj.weight" in name:
                parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.6)
    items = tiny_items[tiny_items["choices"].map(len) == 1]
    rows = run(model, items)["acc"]
    generated = {}
    for row in items.itertuples():
        prompt, answer = torch.tensor([row.prompt]), list(row.choices[0])
        with torch.inference_mode():
            out = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=len(answer),
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
        generated[row.task, row.item] = float(out[0, prompt.shape[1] :].tolist() == answer)
    assert rows.to_dict() == generated
    assert 0.1 < rows.mean() < 0.9  # both outcomes were there to be told apart


def test_choices_are_scored_as_one_by_one() -> None:
    model, rng = build("llama"), np.random.default_rng(0)
    rows = []
    for item in range(12):
        choices = [rng.integers(0, VOCABULARY, rng.integers(1, 4)).astype(np.int32) for _ in range(4)]
        prompt = rng.integers(0, VOCABULARY, rng.integers(2, 9)).astype(np.int32)
        rows.append({"task": "t", "item": item, "group": "g", "prompt": prompt, "choices": choices})
        rows[-1] |= {"answer": item % 4, "chance": 0.25}
    found = run(model, pd.DataFrame(rows), length=8, batch=2)
    for row in rows:
        scores = []
        for choice in row["choices"]:
            ids = torch.tensor([[*row["prompt"], *choice]], dtype=torch.long)
            with torch.inference_mode():
                log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
            start = len(row["prompt"])
            scores.append(sum(log_p[start - 1 + i, token].item() for i, token in enumerate(choice)))
        margin = scores[row["answer"]] - max(scores[: row["answer"]] + scores[row["answer"] + 1 :])
        assert found["margin_nats", "t", row["item"]] == pytest.approx(margin, abs=1e-4)
        assert found["acc", "t", row["item"]] == float(margin > 0)


ids = st.lists(st.integers(0, 3), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=3)), min_size=1, max_size=6))
def test_every_choice_is_read_after_its_prompt_and_nothing_is_read_twice(drawn: list) -> None:
    rows = [
        {"task": "t", "item": item, "prompt": prompt, "choices": choices}
        for item, (prompt, choices) in enumerate(drawn)
    ]
    readings = world._readings(pd.DataFrame(rows))
    found: dict[int, tuple[list[int], list[int]]] = {}
    for reading in readings:
        for owner in dict.fromkeys(reading.owners):
            mine = [i for i, whose in enumerate(reading.owners) if whose == owner]
            targets = [reading.targets[i] for i in mine]
            start = reading.positions[mine[0]]
            assert [reading.positions[i] for i in mine] == list(range(start, start + len(mine)))
            assert reading.tokens[start + 1 : start + len(mine)] == targets[:-1]
            found[owner] = (reading.tokens[: start + 1], targets)
    wanted = [(prompt, choice) for prompt, choices in drawn for choice in choices]
    assert [found[owner] for owner in range(len(wanted))] == wanted
    for a in readings:
        assert not any(b is not a and b.tokens[: len(a.tokens)] == a.tokens for b in readings)


def test_an_empty_prompt_is_one_line() -> None:
    row = {"task": "t", "item": 3, "group": "g", "prompt": [], "choices": [[1]], "answer": 0, "chance": 0.0}
    with pytest.raises(BitallocError, match="t 3 has an empty prompt"):
        run(build("llama"), pd.DataFrame([row]))
