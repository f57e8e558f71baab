"""Fairness: what quantisation costs each language, and which layers to protect so that none pays for the others.

Everything is computed from SENTENCES: the summed NLL of every aligned sentence in every language, under the unquantised
model (`reference`), with every layer at low precision (`none`) and with sets of layers protected (`h.0+h.3`). One
split selects, another reports. Intervals are 95 %, from one bootstrap of aligned sentences: a resample takes the same
sentences in every language and under every plan, so that differences are paired.

A unit is what is protected as a whole: a block (`h.3`), an embedding (`wte`) or a head of its own (`lm_head`).

Legend: L languages, I aligned sentences, R bootstrap resamples; a set is a frozenset of units.
"""

from bitalloc.fairness.arms import (
    ALLOCATOR,
    ENGLISH_ONLY,
    FAIR,
    PATTERN,
    RANDOM,
    conditions,
    fairness,
    plan_arms,
    protected,
    read_sets,
    synergies,
)
from bitalloc.fairness.claims import criteria
from bitalloc.fairness.damage import (
    ALL,
    ENGLISH,
    NONE,
    REFERENCE,
    Damage,
    damage_nats,
    delta_bits,
    delta_ppl,
    fertility,
    gap,
    ratio,
    relative_damage,
    synergy,
    unigram_nats,
    worst_rel,
)
from bitalloc.fairness.search import Choice, Search, Set, Units, choose, published, random_sets, winner
