"""Passkey: is a key that was told somewhere in a long text still known at its end? -> PASSKEY.

A needle tells a key and a number, at a depth of 0 (behind the first sentence) to 1 (before the question) of a haystack;
the question stands last. Right is an answer, decoded greedily, that holds the number (substring), the protocol of
RULER's niah_single_1 (Hsieh et al. 2024, arXiv:2404.06654), with a wording of our own: numbers do not compare with
published ones. Every prompt of a length has exactly that many tokens, its first sentence being cut, and every precision
is asked the same items. Two kinds: `ruler`, one passage over and over, and `world`, facts of the synthetic world that
the embedded models were trained on, with its own way of asking.

    accuracy     share of items answered right; Wilson's interval
    key NLL      -sum of ln p over the tokens of the number, under teacher forcing, nats a key
    retention    P(right | the reference is right); Wilson's interval over those items

Where the reference is at its floor (lower end of its interval not above chance) nothing is claimed: status `floor`.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from bitalloc import config
from bitalloc.errors import BitallocError
from bitalloc.progress import Progress
from bitalloc.reader import Reader, greedy
from bitalloc.scan import scan_path_of
from bitalloc.statistics import jackknife, share_interval
from bitalloc.store import Store, digest
from bitalloc.tables import PASSKEY
from bitalloc.world import LETTERS, World

REFERENCE = "reference"
ALL_DEPTHS = -1.0  # of rows over all depths of a length
OBJECTS = "apple bottle candle drum engine feather garden hammer island jacket kettle ladder mirror orange".split()
PASSAGE = ("The lake is calm.", "The hill is steep.", "The wind is cold.", "We set out.", "We come home again.")


@dataclass(frozen=True)
class Template:
    """How a needle is told and asked for. `version` rises with any change of wording or of the haystack."""

    kind: str
    version: int
    haystack: str
    separator: str
    needle: str
    question: str
    answer: str
    digits: int
    new_tokens: int  # that are decoded and searched for the number

    @property
    def digest(self) -> str:
        """SHA-256 of the template: of all that a record says it was measured with."""
        return digest(vars(self))

    @property
    def chance(self) -> float:
        return 10.0**-self.digits


TEMPLATES = {
    "ruler": Template(
        kind="ruler",
        version=1,
        haystack=" ".join(PASSAGE),
        separator=" ",
        needle="The secret number of the {key} is {value}.",
        question="What is the secret number of the {key}? The secret number of the {key} is",
        answer=" {value}",
        digits=7,
        new_tokens=16,
    ),
    "world": Template(
        kind="world",
        version=1,
        haystack="facts of World(), a line each, drawn by World.filler",
        separator="\n",
        needle="key {key}={value};",
        question="key {key}=",
        answer="{value}",
        digits=2,
        new_tokens=2,
    ),
}


# ---- items -------------------------------------------------------------------------------------------
def items(tokenizer: Tokenizer, settings: config.Passkey, *, bos: int | None, seed: int) -> pd.DataFrame:
    """Length x depth x item: `prompt` of exactly `length` tokens, `answer` (its tokens) and `value` (its digits)."""
    template, world, rows = TEMPLATES[settings.kind], World(), []
    depths = np.linspace(0, 1, settings.depths).tolist() if settings.depths > 1 else [0.5]
    for length in settings.lengths:
        for depth in depths:
            for item in range(settings.items):
                draw = random.Random(f"passkey {template.kind} {length} {depth:.6f} {item} {seed}")
                key = draw.choice(LETTERS if template.kind == "world" else OBJECTS)
                value = f"{draw.randrange(10**template.digits):0{template.digits}d}"
                # a sentence is a token at least
                hay = (
                    [world.filler(draw) for _ in range(length)]
                    if template.kind == "world"
                    else list(islice(cycle(PASSAGE), length))
                )
                prompt, answer = _prompt(
                    tokenizer, template, hay, depth=depth, key=key, value=value, wanted=length - (bos is not None)
                )
                prompt = prompt if bos is None else [bos, *prompt]
                rows.append((length, depth, item, prompt, answer, value))
    return pd.DataFrame(rows, columns=["length", "depth", "item", "prompt", "answer", "value"])


def _prompt(
    tokenizer: Tokenizer, template: Template, hay: list[str], *, depth: float, key: str, value: str, wanted: int
) -> tuple[list[int], list[int]]:
    """Tokens of the prompt, `wanted` of them, and of the answer behind it."""

    def encode(sentences: int, tail: str = "") -> list[int]:
        lines = hay[:sentences]
        lines.insert(1 + round(depth * (sentences - 1)), template.needle.format(key=key, value=value))
        text = template.separator.join([*lines, template.question.format(key=key)])
        return tokenizer.encode(text + tail, add_special_tokens=False).ids

    few, many = 0, 1
    while len(encode(many)) < wanted:
        few, many = many, 2 * many
    while many - few > 1:  # the fewest sentences that fill the length: of the first one only a part is cut
        middle = (few + many) // 2
        few, many = (middle, many) if len(encode(middle)) < wanted else (few, middle)
    if few == 0:
        raise BitallocError(f"passkey.lengths: {wanted + 1} tokens hold no haystack; write more")
    ids = encode(many)
    whole = encode(many, template.answer.format(value=value))
    if whole[: len(ids)] != ids:  # the tokenizer joins the number to what stands before it
        raise BitallocError(
            f"passkey: this tokenizer cuts the answers of {template.kind!r} otherwise; take the other kind"
        )
    return ids[-wanted:], whole[len(ids) :]


def fitting(settings: config.Passkey, context: int | None) -> config.Passkey:
    """The settings without lengths that a model of so much context cannot read; says which on stderr."""
    room = (context or math.inf) - max(TEMPLATES[settings.kind].new_tokens, TEMPLATES[settings.kind].digits + 1)
    lengths = [length for length in settings.lengths if length <= room]
    if not lengths:
        raise BitallocError(f"passkey.lengths: the model takes {context} tokens in all; ask for shorter prompts")
    if left := sorted(set(settings.lengths) - set(lengths)):
        print(f"[passkey] the model takes {context} tokens in all: no prompts of {left}", file=sys.stderr, flush=True)
    return settings.model_copy(update={"lengths": lengths})


# ---- measurement -------------------------------------------------------------------------------------
@torch.inference_mode()
def answers(
    model: Any, asked: pd.DataFrame, tokenizer: Tokenizer, template: Template, *, batch: int, device: torch.device
) -> pd.DataFrame:
    """`right` (0 or 1) and `key_nll_nats` of items of one length."""
    right, nll = [], []
    for start in range(0, len(asked), batch):
        part = asked.iloc[start : start + batch]
        reader = Reader(model)
        logits_BV = reader.read(torch.tensor(part["prompt"].tolist(), device=device), last=1)[:, -1]
        told = reader.fork()
        new_BT, _ = greedy(reader, logits_BV, template.new_tokens)
        texts = tokenizer.decode_batch(new_BT.tolist())
        right += [float(value in text) for value, text in zip(part["value"], texts, strict=True)]
        nll += _forced(told, logits_BV, part["answer"].tolist())
    return pd.DataFrame({"right": right, "key_nll_nats": nll}, index=asked.index)


def _forced(reader: Reader, logits_BV: torch.Tensor, answers: list[list[int]]) -> list[float]:
    """-sum of ln p over the tokens of each answer; shorter ones are padded behind, where nothing looks."""
    longest = max(map(len, answers))
    target_BT = torch.full((len(answers), longest), -100, device=logits_BV.device)
    for row, ids in zip(target_BT, answers, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    logits_BTV = logits_BV[:, None]
    if longest > 1:
        logits_BTV = torch.cat([logits_BTV, reader.read(target_BT[:, :-1].clamp_min(0))], 1)
    return cross_entropy(logits_BTV.float().mT, target_BT, reduction="none").sum(1).tolist()


def passkey(
    models: Mapping[str, Callable[[], Any]],
    tokenizer: Tokenizer,
    settings: config.Passkey,
    *,
    bos: int | None,
    seed: int,
    store: Store,
    identities: Mapping[str, str],
    device: torch.device,
) -> pd.DataFrame:
    """PASSKEY of every model: by length and depth, and by length over all depths.

    `models` makes each when it is needed; `reference`, the unquantised one, is among them. `identities` says of each
    what its answers depend on: answers to a length are a shard of the store under it.
    """
    template, asked = TEMPLATES[settings.kind], items(tokenizer, settings, bos=bos, seed=seed)
    progress = Progress("passkey", len(models) * len(asked), unit="items")
    found = {}
    for name, make in models.items():
        model, parts = None, []
        for length, part in asked.groupby("length"):
            key = digest(["passkey", identities[name], template.digest, part.drop(columns="item").to_dict("list")])
            record = store.get(key)
            progress.advance(0 if record is None else len(part), cached=True)
            if record is None:
                model = model or make()
                said = answers(model, part, tokenizer, template, batch=_fits(settings, length), device=device)
                record = {"said": said.to_dict("list"), "scan_path": scan_path_of(model, device)}
                store.put(key, record)
                progress.advance(len(part), note=f"{name}, {length} tokens")
            parts.append(pd.DataFrame(record["said"], index=part.index))
        found[name] = asked[["length", "depth"]].join(pd.concat(parts))
    shared = {
        "kind": template.kind,
        "template_version": template.version,
        "template_digest": template.digest,
        "chance": template.chance,
        "scan_path": record["scan_path"],
        "seed": seed,
    }
    rows = summary(found, template.chance)
    return rows.assign(**shared)[PASSKEY.names]


def _fits(settings: config.Passkey, length: int) -> int:
    """Items a forward pass: `batch` windows of the shortest length, fewer of a longer one."""
    return max(1, settings.batch * min(settings.lengths) // length)


def summary(found: Mapping[str, pd.DataFrame], chance: float) -> pd.DataFrame:
    """Accuracy, key NLL and retention by scheme, length and depth, and over all depths of a length.

    >>> asked = pd.DataFrame({"length": 64, "depth": [0.0] * 4, "right": [1.0, 1, 1, 0], "key_nll_nats": 1.0})
    >>> worse = asked.assign(right=[1.0, 1, 0, 1])
    >>> whole = summary({"reference": asked, "w4a4": worse}, 0.01).query("depth == -1").set_index("scheme")
    >>> whole["accuracy"].tolist(), whole["retention"].round(2).tolist()
    ([0.75, 0.75], [1.0, 0.67])
    """
    rows = []
    for name, own in found.items():
        frame = own.assign(reference=found[REFERENCE]["right"])
        for (length, depth), cell in [
            *frame.groupby(["length", "depth"]),
            *(((length, ALL_DEPTHS), part) for length, part in frame.groupby("length")),
        ]:
            rows.append({"scheme": name, "length": length, "depth": depth, **_cell(cell, chance)})
    return pd.DataFrame(rows)


def _cell(cell: pd.DataFrame, chance: float) -> dict[str, Any]:
    n, kept = len(cell), cell.loc[cell["reference"] == 1, "right"]
    lowest, _ = share_interval(cell["reference"].mean(), 0.0, n)
    lo, hi = share_interval(cell["right"].mean(), 0.0, n)
    nll = cell["key_nll_nats"].to_numpy()
    row = {
        "status": "ok" if lowest > chance else "floor",
        "n": n,
        "accuracy": cell["right"].mean(),
        "accuracy_lo": lo,
        "accuracy_hi": hi,
        "key_nll_nats": nll.mean(),
        "key_nll_nats_lo": None,
        "key_nll_nats_hi": None,
        "n_retained": len(kept),
        "retention": None,
        "retention_lo": None,
        "retention_hi": None,
    }
    if n > 1:
        told = jackknife(nll.mean(), (nll.sum() - nll) / (n - 1))
        row |= {"key_nll_nats_lo": told.lo, "key_nll_nats_hi": told.hi}
    if lowest > chance:
        lo, hi = share_interval(kept.mean(), 0.0, len(kept))
        row |= {"retention": kept.mean(), "retention_lo": lo, "retention_hi": hi}
    return row
