"""Which items of a task are asked when not all are (`cost.needed` says how many), spread over the subjects.

A drawn order, not a drawn set: its first n items are the subset for every n, so a larger subset holds the smaller one
and what was answered for that is not asked again.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence


def order(subjects: Sequence[str], seed: str) -> list[int]:
    """A seeded order of the items whose beginnings hold every subject in proportion to its items.

    The k-th of the n items of a subject, in a drawn order, has the place (k + 1/2) / n.

    >>> subjects = ["a"] * 6 + ["b"] * 3
    >>> ["".join(sorted(subjects[item] for item in order(subjects, "seed 0")[:n])) for n in (3, 6)]
    ['aab', 'aaaabb']
    """
    members: dict[str, list[int]] = defaultdict(list)
    for item, subject in enumerate(subjects):
        members[subject].append(item)
    places = []
    for subject, items in members.items():
        shuffled = random.Random(f"{seed} {subject}").sample(items, len(items))
        places += [((k + 0.5) / len(items), subject, item) for k, item in enumerate(shuffled)]
    return [item for *_, item in sorted(places)]
