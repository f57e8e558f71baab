"""Suites: (a model in one state, what to read) -> rows of RESPONSES. One module a suite, one registry."""

from __future__ import annotations

from collections.abc import Callable

from bitalloc.suites import divergence, downstream, perplexity, protocols, world
from bitalloc.suites.scoring import Head, Memory, Responses, Scored, Windows, spread

Suite = Callable[[Scored], Responses]

SUITES: dict[str, Suite] = {
    "perplexity": perplexity.responses,
    "divergence": divergence.responses,
    "world": world.responses,
    "protocols": protocols.responses,
    "downstream": downstream.responses,
}

__all__ = ["SUITES", "Head", "Memory", "Responses", "Scored", "Suite", "Windows", "spread"]
