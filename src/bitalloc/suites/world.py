"""Questions with known answers: multiple choice by log-probability, and generation that must match.

Every continuation is scored under teacher forcing. Greedy decoding produces an answer exactly when each of its
tokens is the argmax given the ones before, so generation needs no generating.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

from bitalloc.errors import BitallocError
from bitalloc.store import JSON, digest
from bitalloc.suites.scoring import Reading, Responses, Scored, batches, check_finite, compare, hidden, total

BATCH = 256  # items whose answers are kept at once: short ones, which fill few passes

PROTOCOL = {
    True: "multiple choice: largest summed log-probability of the continuation; margin to the best wrong one",
    False: "greedy exact match, read under teacher forcing; margin = log-probability of the answer",
}


def responses(scored: Scored) -> Responses:
    """Per item: `acc` (1 = right) and `margin_nats`.

    Several choices: right when the answer's log-probability, summed over its tokens, exceeds every other;
    the margin is its lead over the best wrong choice. One choice: right when greedy decoding yields it; the
    margin is its log-probability. Ties count as wrong.
    """
    items = scored.items.reset_index(drop=True)
    if items.empty:
        raise BitallocError("suite world has no items: set retrieve.items, or take it out of evaluate.suites")
    records = pd.Series(index=items.index, dtype=object)
    for task, part in items.groupby("task", sort=False):
        records[part.index] = _answers(scored, str(task), part)
    values = []
    for record, choices, answer in zip(records, items["choices"], items["answer"], strict=True):
        lp = np.array(record["log_prob"])
        if len(choices) > 1:
            margin = lp[answer] - np.delete(lp, answer).max()
            values.append((float(margin > 0), margin))
        else:
            values.append((float(record["greedy"][0]), lp[0]))
    frame = items[["task", "item", "group"]].assign(suite="world", weight=1.0)
    rows = [
        frame.assign(metric="acc", value=np.array(values)[:, 0], chance=items["chance"]),
        frame.assign(metric="margin_nats", value=np.array(values)[:, 1]),
    ]
    several = items["choices"].map(len) > 1
    return pd.concat(rows), {task: PROTOCOL[bool(part.all())] for task, part in several.groupby(items["task"])}


def keys(items: pd.DataFrame) -> list[str]:
    """What each item is, by content; which choice is right does not matter to the model."""
    return [
        digest([np.asarray(prompt).tolist(), [np.asarray(choice).tolist() for choice in choices]])
        for prompt, choices in zip(items["prompt"], items["choices"], strict=True)
    ]


def sizes(items: pd.DataFrame) -> list[int]:
    """Tokens that are read for each item, at most."""
    return [
        sum(len(prompt) + len(choice) - 1 for choice in choices)
        for prompt, choices in zip(items["prompt"], items["choices"], strict=True)
    ]


def place(task: str) -> list[str]:
    """Where in the memory of a plan the answers to a task lie."""
    return ["world", task]


def _answers(scored: Scored, task: str, items: pd.DataFrame) -> list[JSON]:
    """`log_prob`, summed, of every choice of each item, and whether `greedy` decoding yields it."""

    def score(missing: list[int]) -> Iterator[dict[int, JSON]]:
        for start in range(0, len(missing), BATCH):
            some = missing[start : start + BATCH]
            yield dict(zip(some, _continuations(scored, items.iloc[some]), strict=True))

    return scored.memory.recall(place(task), keys(items), sizes(items), score)


@torch.inference_mode()
def _continuations(scored: Scored, items: pd.DataFrame) -> Iterator[JSON]:
    readings = _readings(items)
    counts = items["choices"].map(len)
    log_prob, wrong = np.zeros(counts.sum()), np.zeros(counts.sum())
    for batch in batches(readings, tokens=scored.windows.budget, device=scored.windows.device):
        scores = compare(scored.head, batch, hidden(scored.model, batch), None)
        check_finite(scores["nll"])
        log_prob -= total(scores["nll"], batch.owner_N, len(log_prob))
        wrong += total(1 - scores["greedy"], batch.owner_N, len(wrong))
    ends = counts.cumsum()
    for first, last in zip(ends - counts, ends, strict=True):
        yield {"log_prob": log_prob[first:last].tolist(), "greedy": (wrong[first:last] == 0).tolist()}


def _readings(items: pd.DataFrame) -> list[Reading]:
    """One reading for each different sequence; what begins another is read off that one."""
    wanted: dict[tuple[int, ...], list[tuple[int, list[int], int]]] = {}
    owner = 0
    for task, item, prompt, choices in zip(
        items["task"], items["item"], items["prompt"], items["choices"], strict=True
    ):
        start = np.asarray(prompt).tolist()
        for choice in (np.asarray(choice).tolist() for choice in choices):
            if not (start and choice):
                raise BitallocError(f"items: {task} {item} has an empty prompt or choice; remake items.parquet")
            wanted.setdefault((*start, *choice[:-1]), []).append((len(start) - 1, choice, owner))
            owner += 1
    readings: list[Reading] = []
    for tokens in sorted(wanted, reverse=True):  # a prefix comes right after what it begins
        if not readings or tuple(readings[-1].tokens[: len(tokens)]) != tokens:
            readings.append(Reading(list(tokens)))
        for start, choice, whose in wanted[tokens]:
            readings[-1].positions += range(start, start + len(choice))
            readings[-1].targets += choice
            readings[-1].owners += [whose] * len(choice)
    return readings
