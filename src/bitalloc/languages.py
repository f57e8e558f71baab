"""Languages: parallel text, and a model with protected layers that reads it -> SENTENCES, SETS, ARMS.

Parallel text is built in (the statements of the tiny world, in its four scripts) or comes from files of one sentence a
line, aligned. Every sentence is read by itself from a beginning-of-text token on, so all of its tokens are scored.

What is not protected has absmax codes, one scale a row (`bitalloc.precision`), embedding and head too; a set of
protected units is a precision map, `{"default": "int4", "h.0": "fp16"}`, which `allocate.plans` reads. Scores are kept
in the store batch by batch and plan by plan: a sweep that was killed goes on where it was.

Legend: L languages, I sentences; W_OI a matrix of O outputs and I inputs.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer

from bitalloc import fairness, precision
from bitalloc.config import Config
from bitalloc.errors import BitallocError, nearest
from bitalloc.fairness import ALLOCATOR, ENGLISH, ENGLISH_ONLY, FAIR, NONE, PATTERN, RANDOM, REFERENCE, Set, Units
from bitalloc.models import Checkpoint, context_length, load_model, set_weight
from bitalloc.option import Option
from bitalloc.progress import Progress
from bitalloc.provenance import source_digest
from bitalloc.quant.absmax import absmax
from bitalloc.statistics import MIN_CLUSTERS
from bitalloc.store import Store
from bitalloc.strategies import Instance
from bitalloc.strategies.optimal import solve
from bitalloc.suites import Head, Windows, world
from bitalloc.suites.scoring import Memory, Scored, windows_place
from bitalloc.tables import SENTENCES
from bitalloc.world import ATTRIBUTES, LANGUAGES, World

LEAST = 2 * MIN_CLUSTERS  # aligned groups of sentences: fewer on a side are no sample
WINDOW = 512  # tokens of a language: as many as a context, or these
UNKNOWN = 0.01  # share of characters that a tokenizer may lose
HIGH, LOW = {3: "int3", 4: "int4", 8: "int8", 16: "fp16"}, {2: "int2", 3: "int3", 4: "int4", 8: "int8"}
SEEDS = 20  # of random protection
BUILT_IN = "the built-in text"


# ---- parallel text -----------------------------------------------------------------------------------------
def built_in(languages: Sequence[str]) -> pd.DataFrame:
    """language, sentence, group, text: every fact of the tiny world in two forms; both are one group.

    Raises `BitallocError` for a language that it does not speak.
    """
    _known(languages, LANGUAGES, BUILT_IN)
    told, rows = World(), []
    facts = [(person, attribute) for person in range(told.people) for attribute in ATTRIBUTES]
    for group, fact in enumerate(facts):
        for form in range(2):
            for language in languages:
                text = told.sentence(language, *fact, form)
                rows.append({"language": language, "sentence": 2 * group + form, "group": group, "text": text})
    return pd.DataFrame(rows)


def read(where: Path | Mapping[str, Path], languages: Sequence[str]) -> pd.DataFrame:
    """language, sentence, group, text from a folder of `<language>.txt` or from files by language; line N is line N.

    Raises `BitallocError` for a language without a file, files that are not aligned or not UTF-8, and empty lines.
    """
    if isinstance(where, Path):
        if not where.is_dir():
            raise BitallocError(f"--text {where} is no folder; give one that holds en.txt and so on, or en=/a/file")
        place, files = str(where), {file.stem: file for file in sorted(where.glob("*.txt"))}
    else:
        place, files = "--text", dict(where)
    _known(languages, files, place)
    lines = {language: _lines(files[language]) for language in languages}
    first, *others = languages
    for language in others:
        if len(lines[language]) != len(lines[first]):
            raise BitallocError(
                f"{files[first]} has {len(lines[first]):,} lines, {files[language]} {len(lines[language]):,}: they are "
                "not aligned; line N must be the same sentence in every file"
            )
    group_I = pd.factorize(pd.Series(lines[first], dtype=object))[0].tolist()  # a line that is there twice, on one side
    return pd.DataFrame(
        {"language": language, "sentence": n, "group": group_I[n], "text": lines[language][n]}
        for n in range(len(lines[first]))
        for language in languages
    )


def _known(languages: Sequence[str], there: Mapping[str, Any] | Sequence[str], place: str) -> None:
    for language in languages:
        if language not in there:
            raise BitallocError(f"unknown language {language!r} in {place}: {nearest(language, there)}")
    if len(set(languages)) != len(languages) or len(languages) < 2:
        raise BitallocError(f"--langs {','.join(languages)}: name two or more different languages")


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BitallocError(f"{file} is not UTF-8 (byte {error.start:,}); convert it") from None
    except OSError as error:
        raise BitallocError(f"cannot read {file}: {error.strerror}") from None
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]  # never at U+2028 and the like
    if empty := [str(n) for n, line in enumerate(lines, 1) if not line.strip()]:
        more = f" and {len(empty) - 3} more" * (len(empty) > 3)
        raise BitallocError(
            f"{file}: line {', '.join(empty[:3])}{more} is empty; every line is a sentence, in all files"
        )
    return lines


def tokenise(text: pd.DataFrame, tokenizer: Tokenizer, config: Mapping[str, Any]) -> pd.DataFrame:
    """The text with `tokens` (the beginning, then the sentence) and what SENTENCES says of every sentence.

    `config`: config.json of the model. Raises `BitallocError` for a tokenizer that loses over 1 % of a
    language's characters, and a text that does not fill one context. Sentences that do not fit the context in some
    language are left out of all, and said.
    """
    start = config.get("bos_token_id") if config.get("bos_token_id") is not None else config.get("eos_token_id")
    start = start[0] if isinstance(start, list) else start
    if start is None:
        raise BitallocError("config.json names neither bos_token_id nor eos_token_id: no sentence has a beginning")
    context, parts = context_length(dict(config)), []
    for language, part in text.groupby("language", sort=False):
        encodings = tokenizer.encode_batch(part["text"].tolist(), add_special_tokens=False)
        lost = _lost(tokenizer, part["text"].tolist(), encodings)
        if lost > UNKNOWN:
            raise BitallocError(
                f"{language}: the tokenizer maps {lost:.1%} of the characters to unknown tokens; leave the language "
                "out, or take a model that can spell it"
            )
        sizes = [len(encoding.ids) for encoding in encodings]
        if context is not None and sum(sizes) < min(context, WINDOW):
            raise BitallocError(
                f"{language}: the text has {sum(sizes)} tokens, fewer than one context of {min(context, WINDOW)}; give "
                "more sentences"
            )
        parts.append(
            part.assign(
                tokens=[[start, *encoding.ids] for encoding in encodings],
                ntokens=sizes,
                nbytes=[len(each.encode()) for each in part["text"]],
                nchars=part["text"].map(len),
            )
        )
    largest, vocabulary = max(max(ids) for ids in pd.concat(parts)["tokens"]), config.get("vocab_size")
    if vocabulary is not None and largest >= vocabulary:
        raise BitallocError(f"the tokenizer gives token {largest}, config.json has {vocabulary}; it is another model's")
    found = pd.concat(parts, ignore_index=True)
    if context is not None and (found["ntokens"] >= context).any():  # the beginning takes one
        long = found.loc[found["ntokens"] >= context, "sentence"].unique()
        told = f"{len(long):,} of {found['sentence'].nunique():,} sentences do not fit the context of {context} tokens"
        print(f"[sweep] {told} in some language; they are left out", file=sys.stderr, flush=True)
        found = found[~found["sentence"].isin(long)].reset_index(drop=True)
    return found


def _lost(tokenizer: Tokenizer, texts: Sequence[str], encodings: Sequence[Any]) -> float:
    """Share of the characters, spaces aside, that lie in an unknown token or in none."""
    named = {getattr(tokenizer.model, "unk_token", None), "<unk>", "[UNK]"} - {None}
    unknown = {tokenizer.token_to_id(name) for name in named} - {None}
    characters = lost = 0
    for text, encoding in zip(texts, encodings, strict=True):
        spelt = np.zeros(len(text), dtype=bool)
        for token, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            spelt[first:last] |= token not in unknown
        solid = np.array([not character.isspace() for character in text], dtype=bool)
        characters, lost = characters + solid.sum(), lost + (solid & ~spelt).sum()
    return float(lost / max(characters, 1))


def split(text: pd.DataFrame, *, sentences: int | None = None, seed: int = 0) -> pd.DataFrame:
    """The text with columns `split` and `unigram_nats`: half of the groups, drawn by seed, select, the others report.

    `sentences`: draw about as many. Raises `BitallocError` for too few.
    """
    rng, groups = np.random.default_rng([seed, 1]), text["group"].unique()
    if sentences is not None:
        groups = rng.permutation(groups)[: -(-sentences * len(groups) // text["sentence"].nunique())]
    if len(groups) < LEAST:
        raise BitallocError(
            f"{len(groups)} aligned facts or sentences are too few: half select, half report; give {LEAST} or more"
        )
    chosen = rng.permutation(groups)[: len(groups) // 2]
    text = text[text["group"].isin(groups)].reset_index(drop=True)
    text["split"] = np.where(text["group"].isin(chosen), "select", "report")
    for _, part in text.groupby("language", sort=False):
        fitted = part.loc[part["split"] == "select", "text"]
        text.loc[part.index, "unigram_nats"] = fairness.unigram_nats(fitted, part["text"])
    return text


# ---- units -------------------------------------------------------------------------------------------------
def unit_of(component: str) -> str:
    """Block of a component, or the component itself outside the blocks.

    >>> unit_of("h.3.attn"), unit_of("wte")
    ('h.3', 'wte')
    """
    return ".".join(component.split(".")[:2]) if component.startswith("h.") else component


def units(inventory: pd.DataFrame, low: str, high: str) -> Units:
    """What can be protected in a model, and its bytes."""
    matrices, parts = precision.rounded(inventory), precision.components(inventory)
    held = set(matrices["tensor"])
    names = dict.fromkeys(unit_of(name) for name, tensors in parts.items() if held & set(tensors))

    def nbytes(rows: pd.DataFrame, kept: str | None = None) -> int:
        return precision.nbytes(rows, {name: high if unit_of(name) == kept else low for name in parts})

    none = nbytes(matrices)
    base = nbytes(inventory)
    added = {name: nbytes(matrices, name) - none for name in names}
    return Units(added, base, base - none, int((matrices["rows"] * matrices["columns"]).sum()))


def mapping(protected: Set | Sequence[str], low: str, high: str) -> dict[str, str]:
    """The precision map of a set: `allocate.plans` reads it from a JSON file.

    >>> mapping(["h.0", "wte"], "int4", "fp16")
    {'default': 'int4', 'h.0': 'fp16', 'wte': 'fp16'}
    """
    return {precision.DEFAULT: low} | dict.fromkeys(sorted(protected), high)


# ---- the model that reads ------------------------------------------------------------------------------------
class Bench:
    """One model whose layers are rounded or protected in place, and the sentences that it reads."""

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        inventory: pd.DataFrame,
        text: pd.DataFrame,
        *,
        low: str,
        high: str,
        store: Store,
        device: torch.device,
        batch: int = 16,
        items: pd.DataFrame | None = None,
        remote_code: bool = False,
    ) -> None:
        """`text`: what `tokenise` and `split` return; `items`: ITEMS, multiple choice, whose group is the language."""
        self.name, self.checkpoint, self.text, self.items = name, checkpoint, text, items
        self.low, self.high, self.store, self.device, self.remote_code = low, high, store, device, remote_code
        self.units = units(inventory, low, high)
        self._windows = {
            part: Windows(rows[["tokens", "split"]].reset_index(drop=True), batch=batch, device=device)
            for part, rows in text.groupby("split", sort=False)
        }
        rounded = precision.rounded(inventory).set_index("tensor")["layer"]
        self._component = {
            rounded[tensor]: name
            for name, tensors in precision.components(inventory).items()
            for tensor in tensors
            if tensor in rounded
        }
        self._parts = precision.components(inventory)
        digests = precision.rounded(inventory).set_index("layer")["digest"].to_dict()
        code = source_digest("bitalloc.suites.scoring", "bitalloc.models", "bitalloc.quant.absmax")
        others = sorted(inventory["digest"])  # norms and biases too
        self._identity = [code, digests, others, device.type, batch]
        self._now: dict[str, str] = {}

    @functools.cached_property
    def model(self) -> Any:
        return load_model(self.checkpoint.path, device=self.device, remote_code=self.remote_code)

    @functools.cached_property
    def head(self) -> Head:
        return Head(self.model)

    def state(self, plan: str) -> dict[str, str]:
        """Layer -> precision; nothing for the reference."""
        if plan == REFERENCE:
            return {}
        named = precision.parse(mapping(self.units.parse(plan), self.low, self.high), self._parts)
        return {layer: named[component] for layer, component in self._component.items()}

    def _put_on(self, state: Mapping[str, str]) -> None:
        head = self.head  # checked once, on the weights of the checkpoint
        changed = [layer for layer in self._component if self._now.get(layer) != state.get(layer)]
        for layer in changed:
            set_weight(self.model, self.checkpoint.family, layer, self._weight(layer, state.get(layer)))
        self._now = dict(state)
        if changed:
            head.refresh()

    def _weight(self, layer: str, level: str | None) -> torch.Tensor:
        W_OI = self.checkpoint.weight(layer)
        if level is None:
            return W_OI
        option: Option = precision.option(level, W_OI.shape[1])
        if precision.BITS[level] < 16:
            return absmax(W_OI, option).dequantize()
        stored = self.checkpoint.tensor(f"{layer}.weight").dtype  # what the pipeline passes through keeps its half type
        return W_OI if stored == torch.bfloat16 else W_OI.half().float()

    def _scored(self, plan: str, part: str, items: pd.DataFrame | None = None) -> Scored:
        """What reads under a plan. The model is touched where an answer is missing only."""
        state, windows = self.state(plan), self._windows[part]
        memory = Memory(self.store, ["fairness", *self._identity, sorted(state.items())])
        known = [set(memory.known(windows_place(divergence=False))) >= set(windows.keys)]
        if items is not None:
            known = [
                set(memory.known(world.place(str(task)))) >= set(world.keys(rows))
                for task, rows in items.groupby("task", sort=False)
            ]
        self.found = all(known)
        if not self.found:
            self._put_on(state)
        model, head = (None, None) if self.found else (self.model, self.head)
        return Scored(model, head, windows, items, memory=memory)  # type: ignore[arg-type]

    def sentences(self, plan: str, part: str) -> pd.DataFrame:
        """SENTENCES of one plan and split. Raises `BitallocError` when a score is NaN or Inf."""
        rows = self.text[self.text["split"] == part].reset_index(drop=True)
        try:
            tokens = self._scored(plan, part).tokens
        except FloatingPointError:
            raise BitallocError(f"protecting {plan} leaves NaN or Inf in the scores; give more --bits") from None
        nll_N = np.bincount(tokens["window"], tokens["nll"].astype(float), minlength=len(rows))
        frame = rows.assign(nll_nats=nll_N, model=self.name, plan=plan)
        return frame[SENTENCES.names]

    def answers(self, plan: str) -> pd.DataFrame:
        """plan, language, item, acc of every multiple-choice item."""
        assert self.items is not None
        rows, _ = world.responses(self._scored(plan, "report", self.items))
        rows = rows[rows["metric"] == "acc"]
        item = rows["task"] + " " + rows["item"].astype(str)
        return pd.DataFrame({"plan": plan, "language": rows["group"], "item": item, "acc": rows["value"]})


def windows(text: pd.DataFrame) -> pd.DataFrame:
    """PARALLEL as TOKENS: a corpus for each language, a window for each sentence."""
    named = text.rename(columns={"language": "corpus", "sentence": "window"})
    return named[["split", "corpus", "window", "tokens", "nbytes"]]


def batch(text: pd.DataFrame, settings: Config) -> int:
    """Sentences a forward pass, of as many tokens as the evaluation reads in windows."""
    return settings.evaluate.batch * max(1, settings.retrieve.window // int(text["tokens"].map(len).max()))


def of_responses(responses: pd.DataFrame, text: pd.DataFrame, model: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(SENTENCES, ANSWERS) of plans that `evaluate` has scored on `windows(text)` and on items of several languages."""
    scored = responses[(responses["suite"] == "perplexity") & (responses["metric"] == "nll_nats_per_token")]
    place = scored["task"].str.split("/", expand=True).set_axis(["language", "split"], axis=1)
    rows = pd.DataFrame({"plan": scored["plan"], **place, "sentence": scored["item"]})
    rows = rows.assign(nll_nats=scored["value"] * scored["weight"], model=model)
    sentences = rows.merge(text, on=["language", "split", "sentence"], validate="many_to_one")
    asked = responses[(responses["suite"] == "world") & (responses["metric"] == "acc")]
    item = asked["task"] + " " + asked["item"].astype(str)
    answers = pd.DataFrame({"plan": asked["plan"], "language": asked["group"], "item": item, "acc": asked["value"]})
    return sentences[SENTENCES.names], answers.reset_index(drop=True)


def spoken(items: pd.DataFrame, text: pd.DataFrame) -> pd.DataFrame:
    """The multiple-choice items whose group is one of the languages of the text."""
    if items.empty:  # columns of no type
        return items
    several = items["choices"].map(len) > 1
    return items[several & items["group"].isin(set(text["language"]))].reset_index(drop=True)


# ---- the study: everything that the model must be asked ----------------------------------------------------------
@dataclass(frozen=True)
class Study:
    """The tables that `fairness` goes on from, without the model; `answers` of the arms, where there are items."""

    sentences: pd.DataFrame
    sets: pd.DataFrame
    arms: pd.DataFrame
    answers: pd.DataFrame | None


def study(
    bench: Bench,
    budget: int,
    *,
    asked: str,
    margin: float = 0.01,
    pairs: int = 100,
    seeds: int = SEEDS,
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Study:
    """Read what must be read: the sweep of units and pairs, the search, and what the fair set is compared with.

    `budget`: bytes of the whole checkpoint, `asked` how it was written. Every arm obeys it but the published pattern,
    whose bytes are its own. Raises `BitallocError` for a budget that cannot be reached, and when no language is ranked.
    """
    units = bench.units
    units.require(budget, asked)
    count = len(units.added)
    progress = progress or Progress("sweep", 0, unit="plans")
    progress.total = 2 + 2 * count + min(pairs, count * (count - 1) // 2)  # the search adds to it
    frames = [_read(bench, REFERENCE, "select", progress), bench.sentences(REFERENCE, "report")]
    # the report split says which languages are floored; its other scores choose nothing
    damage, _ = fairness.Damage.both(pd.concat(frames), resamples=resamples, seed=seed)

    def measure(sets: Sequence[Set]) -> None:
        progress.total = max(progress.total, progress.done + len(sets))
        for each in sets:
            frames.append(_read(bench, units.name(each), "select", progress))
            damage.add(units.name(each), frames[-1])

    search = fairness.Search(units, budget, damage, measure, pairs=pairs)
    everything = frozenset(units.added)
    alone = [frozenset([unit]) for unit in units.added]
    search.measure([frozenset(), *alone, *(everything - unit for unit in alone)])  # protected alone, rounded alone
    places = damage.ranked or list(range(len(damage.languages)))  # all floored: the sweep is shown, nothing is chosen
    search.explore(lambda relative_L: float(relative_L[places].max()))
    if ENGLISH in damage.languages:
        english = [damage.share(ENGLISH)]
        search.explore(lambda relative_L: float(relative_L[english[0]]))
    arms = _arms(search, budget, margin=margin, seeds=seeds, seed=seed)
    plans = list(dict.fromkeys(plan for _, plan, _, _ in arms))
    search.measure(units.parse(plan) for plan in plans)
    frames += [bench.sentences(plan, "report") for plan in plans]
    answers = None
    progress.total = progress.done
    if bench.items is not None and len(bench.items):
        answers = pd.concat([bench.answers(plan) for plan in (REFERENCE, *plans)], ignore_index=True)
    read_plans = [plan for plan in damage.nll if plan != REFERENCE]
    sets = fairness.read_sets(bench.name, read_plans, units, low=bench.low, high=bench.high)
    place = {"model": bench.name, "budget": asked, "budget_nbytes": budget}
    rows = [
        place | {"arm": arm, "plan": plan, "confidence": confidence, "note": note}
        for arm, plan, confidence, note in arms
    ]
    return Study(pd.concat(frames, ignore_index=True), sets, pd.DataFrame(rows), answers)


def _read(bench: Bench, plan: str, part: str, progress: Progress) -> pd.DataFrame:
    rows = bench.sentences(plan, part)
    progress.advance(cached=bench.found, note=plan)
    return rows


def _arms(
    search: fairness.Search, budget: int, *, margin: float, seeds: int, seed: int
) -> list[tuple[str, str, float, str]]:
    """(arm, plan, confidence, note) of everything that is compared."""
    units, damage, unknown = search.units, search.damage, float("nan")
    arms = [(NONE, NONE, unknown, "nothing is protected")]
    if damage.ranked:
        fair = fairness.choose(damage, units, budget, margin=margin)
        note = f"least worst_rel of {len(damage.nll) - 1} sets that were read, English within {margin:g}"
        arms.append((FAIR, fair.plan, fair.confidence, note))
    if ENGLISH in damage.languages:
        english = fairness.choose(damage, units, budget, objective=[damage.share(ENGLISH)])
        arms.append((ENGLISH_ONLY, english.plan, english.confidence, "least relative damage of English alone"))
    arms.append((ALLOCATOR, units.name(_allocated(search, budget)), unknown, "least total damage, languages ignored"))
    pattern = fairness.published(units)
    over = units.nbytes(pattern) - budget
    note = f"blocks 0, 9 and 11 of 12, scaled; {abs(over):,} bytes {'over' if over > 0 else 'within'} the budget"
    arms.append((PATTERN, units.name(pattern), unknown, note))
    drawn = fairness.random_sets(units, budget, range(seed, seed + seeds))
    return arms + [
        (f"{RANDOM}-{n:02d}", units.name(each), unknown, "in random order as long as they fit")
        for n, each in enumerate(drawn)
    ]


def _allocated(search: fairness.Search, budget: int) -> Set:
    """The set of least additive cost: nats that each unit alone at low precision costs, all languages together.

    What the allocator of this package does, with units for matrices; exact (`strategies.optimal`).
    """
    units, damage = search.units, search.damage
    everything, names = frozenset(units.added), list(units.added)
    cost = [
        max(0.0, float((damage.nll[units.name(everything - {unit})] - damage.reference_LI).sum())) for unit in names
    ]
    options = (Option("low", 0, 0, 0), Option("high", 0, 0, 0))
    nbytes_NK = np.array([[0, units.added[unit]] for unit in names], dtype=np.int64)
    costs_NK = np.array([[each, 0.0] for each in cost])
    weights_N = np.maximum(1, nbytes_NK[:, 1])
    found = solve(Instance(tuple(names), options, weights_N, nbytes_NK, costs_NK), budget - units.base).choice_N
    return frozenset(unit for unit, level in zip(names, found, strict=True) if level)
