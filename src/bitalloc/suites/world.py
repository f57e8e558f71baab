"""Questions with known answers: multiple choice by log-probability, and generation that must match.

Every continuation is scored under teacher forcing. Greedy decoding produces an answer exactly when each of its
tokens is the argmax given the ones before, so generation needs no generating.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from bitalloc.errors import BitallocError
from bitalloc.suites.scoring import Reading, Responses, Scored, batches, compare, hidden, total

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
    log_prob, greedy = _continuations(scored, items)
    values, first = [], 0
    for choices, answer in zip(items["choices"], items["answer"], strict=True):
        lp, last = log_prob[first : first + len(choices)], first + len(choices)
        if len(choices) > 1:
            margin = lp[answer] - np.delete(lp, answer).max()
            values.append((float(margin > 0), margin))
        else:
            values.append((float(greedy[first]), lp[0]))
        first = last
    frame = items[["task", "item", "group"]].assign(suite="world", weight=1.0)
    rows = [
        frame.assign(metric="acc", value=np.array(values)[:, 0], chance=items["chance"]),
        frame.assign(metric="margin_nats", value=np.array(values)[:, 1]),
    ]
    several = items["choices"].map(len) > 1
    return pd.concat(rows), {task: PROTOCOL[bool(part.all())] for task, part in several.groupby(items["task"])}


@torch.inference_mode()
def _continuations(scored: Scored, items: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Summed log-probability of every choice of every item, in order, and whether greedy decoding yields it."""
    readings = _readings(items)
    owners = int(items["choices"].map(len).sum())
    log_prob, wrong = np.zeros(owners), np.zeros(owners)
    for batch in batches(readings, tokens=scored.windows.budget, device=scored.windows.device):
        scores = compare(scored.head, batch, hidden(scored.model, batch), None)
        log_prob -= total(scores["nll"], batch.owner_N, owners)
        wrong += total(1 - scores["greedy"], batch.owner_N, owners)
    return log_prob, wrong == 0


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
