"""Log-likelihoods of continuations; what their contexts have in common (the examples of a subject, the context of four
endings) is read once.

Legend: B sequences of a batch, T tokens, N scored positions. A pair is the tokens of a context and a continuation.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bitalloc.suites.scoring import Batch, Head, Reading, compare, total

SHARED = 16  # tokens that prompts must have in common before these are computed apart
WORTH = 128  # tokens that a pass over what prompts have in common must save
SLACK = 8  # tokens that a stem may be computed again for each continuation, so that stems of other lengths join a batch

Pair = tuple[list[int], list[int]]
Stem = tuple[tuple[int, ...], list[Reading]]  # what comes before the first scored position, and whose beginning it is


@torch.inference_mode()
def loglikelihoods(
    model: Any, head: Head, pairs: Sequence[Pair], *, longest: int, rows: int
) -> list[tuple[float, bool]]:
    """(sum of log q(token), whether greedy decoding yields it) of each continuation, nats, as lm-eval defines them.

    Of context and continuation the last `longest` + 1 tokens count. At most `rows` sequences a forward pass. Prompts
    that begin alike share the keys and values of their beginning, on two levels: what a whole run of prompts has in
    common, then the context of several continuations. No padding ever lies before a scored token, so that neither
    masks nor positions are needed: a family that can generate can be scored so. One that keeps a state instead of
    keys and values reads every prompt whole.
    """
    shares = not getattr(model, "_is_stateful", False)
    unique: dict[tuple[int, ...], Reading] = {}
    for owner, (context, continuation) in enumerate(pairs):
        if not context or not 0 < len(continuation) <= longest:
            raise ValueError(f"a continuation of {len(continuation)} tokens after {len(context)} cannot be scored")
        tokens = (context + continuation)[-longest - 1 : -1]
        reading = unique.setdefault(tuple(tokens), Reading(tokens))
        reading.positions += range(len(tokens) - len(continuation), len(tokens))
        reading.targets += continuation
        reading.owners += [owner] * len(continuation)
    by_stem: dict[tuple[int, ...], list[Reading]] = defaultdict(list)
    for reading in unique.values():
        by_stem[tuple(reading.tokens[: min(reading.positions)])].append(reading)
    stems = [
        (stem, readings[at : at + rows])
        for stem, readings in sorted(by_stem.items())
        for at in range(0, len(readings), rows)
    ]
    log_prob, wrong = np.zeros(len(pairs)), np.zeros(len(pairs))
    for start, members in _runs(stems) if shares else [((), stems)]:
        cache = _extend(model, None, [list(start)])[1] if start else None
        for depth, batch in _batches(members, len(start), rows):
            scores, owner_N = _score(model, head, cache, batch, start=len(start), depth=depth if shares else 0)
            log_prob -= total(scores["nll"], owner_N, len(pairs))
            wrong += total(1 - scores["greedy"], owner_N, len(pairs))
    return [(float(value), not off) for value, off in zip(log_prob, wrong, strict=True)]


def _runs(stems: list[Stem]) -> list[tuple[tuple[int, ...], list[Stem]]]:
    """(common beginning, stems) of sorted stems; those that share too little come together, with nothing in common.

    A stem joins a run when the run keeps half of what it has in common: examples stay, a chance likeness goes.

    >>> shots = tuple(range(200))
    >>> runs = _runs([((*shots, 1), []), ((*shots, 2), []), ((*shots[1:], 3), []), ((7,), [])])
    >>> [(len(start), len(members)) for start, members in runs]
    [(200, 2), (0, 2)]
    """
    runs: list[tuple[tuple[int, ...], list[Stem]]] = []
    for stem in stems:
        if runs:
            start, members = runs[-1]
            pairs = enumerate(zip(start, stem[0], strict=False))
            alike = next((at for at, (a, b) in pairs if a != b), min(len(start), len(stem[0])))
            if alike >= max(SHARED, len(start) // 2):
                runs[-1] = (start[:alike], [*members, stem])
                continue
        runs.append((stem[0], [stem]))
    worth = [len(start) * (len(members) - 1) >= WORTH for start, members in runs]
    alone = [stem for (_, members), kept in zip(runs, worth, strict=True) if not kept for stem in members]
    return [run for run, kept in zip(runs, worth, strict=True) if kept] + ([((), alone)] if alone else [])


def _batches(stems: list[Stem], start: int, rows: int) -> Iterator[tuple[int, list[Stem]]]:
    """(depth, stems) such that the `depth` tokens of each stem after the first `start` serve all of its readings.

    0 where too little would be saved: a pass of its own costs something, too.
    """

    def place(stem: Stem) -> tuple[int, int]:
        beginning, readings = stem
        return (len(beginning) - start if len(readings) > 1 else 0), max(len(reading.tokens) for reading in readings)

    def count(batch: list[Stem]) -> int:
        return sum(len(readings) for _, readings in batch)

    batches: list[list[Stem]] = []
    for stem in sorted(stems, key=place):
        joins = batches and count([*batches[-1], stem]) <= rows
        if joins and place(stem)[0] <= place(batches[-1][0])[0] + SLACK:
            batches[-1].append(stem)
        else:
            batches.append([stem])
    for batch in batches:
        depth = place(batch[0])[0]
        yield depth if depth * (count(batch) - len(batch)) >= WORTH else 0, batch


def _score(
    model: Any, head: Head, cache: Any, stems: list[Stem], *, start: int, depth: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Scores of the scored positions of `stems`, whose first `start` tokens are in `cache`, and their owners."""
    which = [place for place, (_, readings) in enumerate(stems) for _ in readings]
    if cache is not None:
        cache = _select(cache, [0] * (len(stems) if depth else len(which)), model.device)
    if depth:
        beginnings = [list(stem[start : start + depth]) for stem, _ in stems]
        cache = _select(_extend(model, cache, beginnings)[1], which, model.device)
    readings, skip = [reading for _, several in stems for reading in several], start + depth
    h_BTD, _ = _extend(model, cache, [reading.tokens[skip:] for reading in readings], keep=cache is not None)
    place = [row * h_BTD.shape[1] + at - skip for row, reading in enumerate(readings) for at in reading.positions]
    batch = Batch(
        tokens_BT=torch.empty(0),  # read already
        flat_N=torch.tensor(place, device=model.device),
        target_N=torch.tensor([token for reading in readings for token in reading.targets], device=model.device),
        owner_N=torch.tensor([owner for reading in readings for owner in reading.owners], device=model.device),
    )
    return compare(head, batch, h_BTD.flatten(0, 1)[batch.flat_N].float(), None), batch.owner_N


def _extend(model: Any, cache: Any, sequences: list[list[int]], *, keep: bool = True) -> tuple[torch.Tensor, Any]:
    """Last hidden states of sequences that go on after `cache`, padded on the right, and the cache with them."""
    tokens_BT = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
    for row, tokens in zip(tokens_BT, sequences, strict=True):
        row[: len(tokens)] = tokens
    ids_BT = torch.from_numpy(tokens_BT).to(model.device)
    out = model.base_model(input_ids=ids_BT, past_key_values=cache, use_cache=keep)
    return out.last_hidden_state, out.past_key_values if keep else None


def _select(cache: Any, rows: list[int], device: torch.device) -> Any:
    """A copy of a cache with these of its sequences."""
    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(torch.tensor(rows, device=device))
    return chosen
