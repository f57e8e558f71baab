"""Tasks of lm-eval: its prompts, targets and metrics; its data sets or local copies of them.

Prompts are rendered and answers are judged by lm-eval from its own task definitions. Ours is the scoring between the
two: what prompts have in common (the examples of a subject, the context of four endings) is computed once, and every
finished batch of items is a shard. lm-eval is an optional extra, imported where it is used.

Legend: B sequences of a batch, T tokens, N scored positions. A pair is the tokens of a context and a continuation.
"""

from __future__ import annotations

import bz2
import copy
import csv
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bitalloc import config
from bitalloc.cost import Work
from bitalloc.errors import BitallocError, nearest
from bitalloc.progress import Progress
from bitalloc.provenance import source_digest
from bitalloc.store import JSON, digest
from bitalloc.suites.scoring import Batch, Head, Memory, Reading, Responses, Scored, compare, total
from bitalloc.suites.subsets import order

FEWSHOT = {"mmlu": 5}  # examples that are customary where lm-eval's definition has none
FOLDERS = {
    "mmlu": "mmlu/default",
    "hellaswag": "hellaswag",
    "piqa": "piqa",
    "gsm8k": "gsm8k",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "winogrande": "winogrande",
    "lambada_openai": "lambada",
    "lambada_standard": "lambada",
}
SHARD = 64  # items whose answers are kept at once
SAMPLED = 16  # items of a task whose tokens are counted, for the estimate
SHARED = 16  # tokens that prompts must have in common before these are computed apart
WORTH = 128  # tokens that a pass over what prompts have in common must save
SLACK = 8  # tokens that a stem may be computed again for each continuation, so that stems of other lengths join a batch
SEED = 1234  # lm-eval's own, of the examples in a prompt

Pair = tuple[list[int], list[int]]
Rows = list[dict[str, Any]]


def responses(scored: Scored) -> Responses:
    """Per item and lm-eval metric that is a mean over items: its value, named `<metric>,<filter>`.

    A subject is a task; all subjects together are the task `mmlu`, resampled by subject. Items that failed are
    left out and counted in the protocol.
    """
    return scored.harness(scored.memory, scored.head, scored.limit)


def version() -> str:
    """lm-eval's version; raises `BitallocError` when it is not installed."""
    if util.find_spec("lm_eval") is None:
        raise BitallocError("suite downstream needs lm-eval: pip install 'bitalloc[downstream]'")
    return f"lm-eval {metadata.version('lm_eval')}"


# ---- data --------------------------------------------------------------------------------------------
def local(name: str, task: config.Task) -> Path | None:
    """Where the local copy lies: what `data` names, else the folder of the task in BITALLOC_DATA, else None."""
    kind = _kind(name)
    place = config.expand(task.data or f"${{BITALLOC_DATA}}/{kind}")
    if place and Path(place).exists():
        return Path(place)
    if task.data:
        raise BitallocError(
            f"evaluate.tasks.{name}: no such data: {task.data}" + ("" if place else " (its variable is not set)")
        )
    return None


def _kind(name: str) -> str:
    return "mmlu" if name.startswith("mmlu") else name


def read(name: str, source: Path) -> dict[str, Rows]:
    """Split -> rows as the hub has them, from a local copy in the original form or of the hub's own rows.

    Raises `BitallocError` with the file, and the line where there is one.
    """
    kind = _kind(name)
    if kind == "mmlu" and not _rows(source, "test"):
        splits = _mmlu(source, name.removeprefix("mmlu_"))
    elif kind == "hellaswag" and (found := [source] if source.is_file() else sorted(source.glob("*val*.txt*"))):
        splits = {"validation": _hellaswag(found[0])}
    elif kind == "piqa" and (source / "valid.jsonl").is_file():
        splits = {
            split: _piqa(source / f"{stem}.jsonl", source / f"{stem}-labels.lst")
            for split, stem in (("train", "train"), ("validation", "valid"))
            if (source / f"{stem}.jsonl").is_file()
        }
    else:
        splits = {split: _rows(source, split) for split in ("train", "validation", "test", "dev")}
    if not any(splits.values()):
        raise BitallocError(
            f"task {name}: {source} holds neither the original form nor train, validation or test .jsonl or .parquet"
        )
    return splits


def _rows(folder: Path, split: str) -> Rows:
    """Rows of <split>*.jsonl or .parquet; none where there is no such file."""
    for file in sorted(folder.glob(f"{split}*")):
        if file.suffix == ".jsonl":
            return [_json(file, number, line) for number, line in enumerate(_lines(file), 1) if line.strip()]
        if file.suffix == ".parquet":
            return _parquet(file)
    return []


def _parquet(file: Path) -> Rows:
    try:
        return pq.read_table(file).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise BitallocError(f"cannot read {file}: {str(error).splitlines()[0]}") from None


def _json(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise BitallocError(f"{file} line {number} is not a JSON object; see the task's data set on the hub")
    return row


def _lines(file: Path) -> list[str]:
    data = file.read_bytes()
    try:
        return (bz2.decompress(data) if file.suffix == ".bz2" else data).decode().removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise BitallocError(f"cannot read {file}: {error}") from None


def _mmlu(folder: Path, subject: str) -> dict[str, Rows]:
    """{dev,test}/<subject>_<split>.csv without a header: question, four choices, letter of the answer."""
    splits: dict[str, Rows] = {}
    for split in ("dev", "test"):
        file = folder / split / f"{subject}_{split}.csv"
        if not file.is_file():
            raise BitallocError(f"task mmlu_{subject}: no such file: {file}")
        splits[split] = []
        for row in csv.reader(io.StringIO("\n".join(_lines(file)))):
            if len(row) != 6 or row[5] not in set("ABCD"):
                raise BitallocError(
                    f"{file} row {len(splits[split]) + 1} is not: question, four choices, one of A B C D"
                )
            splits[split].append({"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])})
    return splits


def _hellaswag(file: Path) -> Rows:
    """Six lines an item: `activity: context`, label, four endings.

    The hub has the context in two parts, and lm-eval begins the second with a capital: a context that does not end
    with a full stop (the captions do not, the how-tos do) is parted after its last sentence.
    """
    lines, rows = _lines(file), []
    for start in range(0, len(lines), 6):
        context, label, *endings = (*lines[start : start + 6], "", "")
        activity, found, text = context.partition(": ")
        if not found or label not in set("0123") or len(endings) != 6 or not all(endings[:4]):
            raise BitallocError(f"{file} line {start + 1}: not context, label 0 to 3, four endings on six lines")
        parted = re.fullmatch(r"""(.*[.!?]["')]?) ([^.!?]+)""", text)
        parts = dict(zip(("ctx_a", "ctx_b"), parted.groups() if parted else (text, ""), strict=True))
        rows.append({"activity_label": activity, **parts, "endings": endings[:4], "label": label})
    return rows


def _piqa(items: Path, labels: Path) -> Rows:
    """A JSON object and a label a line: goal, sol1, sol2; 0 or 1."""
    if not labels.is_file():
        raise BitallocError(f"no such file: {labels}; it holds the answers of {items.name}")
    rows, answers = _rows(items.parent, items.stem), _lines(labels)
    if len(rows) != len(answers) or not set(answers) <= {"0", "1"}:
        raise BitallocError(f"{labels} does not hold 0 or 1 for each of the {len(rows)} lines of {items.name}")
    return [{**row, "label": int(answer)} for row, answer in zip(rows, answers, strict=True)]


# ---- tasks -------------------------------------------------------------------------------------------
@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and remarks of lm-eval and the hub; ours are the progress lines, and one line of an error."""
    import datasets

    for chatty in ("lm_eval", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def load(tasks: Mapping[str, config.Task]) -> dict[str, list[Any]]:
    """lm-eval's own task objects of each name, `mmlu` being its subjects, with local data where there is any.

    Raises `BitallocError` for an unknown task, data that cannot be had and data of the wrong shape.
    """
    version()
    import lm_eval
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.__file__).parent / "tasks"
    known = all(_kind(name) in FOLDERS for name in tasks)
    places = {"include_path": sorted({str(root / FOLDERS[_kind(name)]) for name in tasks})} if known else {}
    with _quiet():
        manager = TaskManager(include_defaults=not known, **places)  # listing all takes ten seconds
    ours = {entry.name for entry in manager.task_index.values() if str(root / FOLDERS["mmlu"]) in str(entry.yaml_path)}
    subjects = sorted(ours.intersection(manager.all_subtasks))
    names = [name for name in manager.all_subtasks if _kind(name) != "mmlu"] + [*subjects, "mmlu"]
    if unknown := [name for name in tasks if name not in names]:
        raise BitallocError(f"unknown task {unknown[0]!r} in evaluate.tasks: {nearest(unknown[0], names)}")
    members = {name: subjects if name == "mmlu" else [name] for name in tasks}
    return {name: [_task(manager, member, name, tasks[name]) for member in members[name]] for name in tasks}


def _task(manager: Any, name: str, parent: str, settings: config.Task) -> Any:
    source = local(name, settings)
    if source is None:
        print(f"task {name}: no local copy, asking the hub", file=sys.stderr, flush=True)
    fewshot = FEWSHOT.get(_kind(name)) if settings.fewshot is None else settings.fewshot
    over: dict[str, Any] = {} if fewshot is None else {"num_fewshot": fewshot}
    if source:
        over["custom_dataset"] = functools.partial(_dataset, read(name, source))
    try:
        with _quiet():
            (task,) = manager.load({"group": "bitalloc", "task": [{"task": name, **over}]})["tasks"].values()
            task.set_fewshot_seed(SEED)
            shots = task.get_config("num_fewshot") or 0
            if shots and not list(task.fewshot_docs() or ()):
                raise BitallocError(f"evaluate.tasks.{parent}: {source} has no examples for prompts; set fewshot: 0")
    except BitallocError:
        raise
    except ImportError as error:
        raise BitallocError(f"task {name} needs {error.name}: pip install 'bitalloc[downstream]'") from None
    except Exception as error:  # noqa: BLE001 - what a definition of lm-eval makes of foreign rows, or the hub's client
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if source:
            raise BitallocError(f"task {name}: {source} lacks what lm-eval's definition reads ({reason})") from None
        raise BitallocError(
            f"task {name}: tried ${{BITALLOC_DATA}}/{_kind(name)} (no such folder) and the hub ({reason}); "
            f"point evaluate.tasks.{parent}.data to a local copy"
        ) from None
    if getattr(task, "UNSAFE_CODE", False) or not _means(task):
        why = "has no metric that is a mean over items" if not _means(task) else "runs code that the model writes"
        raise BitallocError(f"task {name} {why}; take it out of evaluate.tasks")
    return task


def _means(task: Any) -> set[str]:
    """Metrics of a task that are means over its items: those that can be resampled."""
    from lm_eval.api.metrics import mean

    return {metric for metric, aggregation in task.aggregation().items() if aggregation is mean}


def _dataset(splits: Mapping[str, Rows], **_: Any) -> dict[str, Any]:
    from datasets import Dataset

    found = {split: Dataset.from_list(rows) for split, rows in splits.items()}
    return defaultdict(lambda: Dataset.from_list([]), found)  # a definition may name splits that it does not use


@dataclass(frozen=True)
class Part:
    """One task of lm-eval with its prompts; `ids` are the items drawn, `parent` the name in the configuration.

    `items` are the requests of each of them, `keys` their content; for one the model reads, or writes, about `tokens`.
    """

    parent: str
    name: str
    task: Any
    ids: list[int]
    settings: config.Task
    items: list[list[Any]]
    keys: list[str]
    tokens: int = 0

    @property
    def writes(self) -> bool:
        """The answers are generated."""
        return self.items[0][0].request_type == "generate_until"


# ---- scoring -----------------------------------------------------------------------------------------
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


Stem = tuple[tuple[int, ...], list[Reading]]  # what comes before the first scored position, and whose beginning it is


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


@functools.cache
def language_model() -> Any:
    """lm-eval's HFLM whose continuations are scored by `loglikelihoods`, and whose answers may time out."""
    from lm_eval.models.huggingface import HFLM

    class SharedPrefixes(HFLM):
        def __init__(self, *, head: Head | None = None, **settings: Any) -> None:
            super().__init__(**settings)
            self.head, self.timeout_s, self.truncated = head or Head(self.model), None, []

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            self.truncated = [len(context) + len(rest) > self.max_length + 1 for context, rest in pairs]
            return loglikelihoods(self.model, self.head, pairs, longest=self.max_length, rows=self.batch_size)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            room = [self.max_length - self.longest_answer(request) for request in requests]
            lengths = (len(self.tok_encode(request.args[0])) for request in requests)
            self.truncated = [length > left for length, left in zip(lengths, room, strict=True)]
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

        def longest_answer(self, request: Any) -> int:
            return int(request.args[1].get("max_gen_toks", self.max_gen_toks))

        def _model_generate(self, *args: Any, **settings: Any) -> Any:
            start = time.monotonic()
            found = super()._model_generate(*args, max_time=self.timeout_s, **settings)
            if self.timeout_s and time.monotonic() - start >= self.timeout_s:
                raise TimeoutError(f"no answer within {self.timeout_s} s")
            return found

    return SharedPrefixes


class Harness:
    """Prompts of all tasks, made once, and a model, whatever weights it has, that answers them."""

    def __init__(self, model: Any, head: Head, *, path: Path, settings: config.Evaluate, seed: int = 0) -> None:
        """`path`: the folder of the model, for its tokenizer."""
        if not settings.tasks:
            raise BitallocError("suite downstream has no tasks: set evaluate.tasks, or take it out of evaluate.suites")
        tasks, self.seed = load(settings.tasks), seed
        self.tokenizer = _tokenizer(path)
        with _quiet():
            self.lm = language_model()(head=head, pretrained=model, tokenizer=self.tokenizer, batch_size=settings.batch)
        several = [(name, task) for name in tasks for task in tasks[name]]
        progress, self.parts = Progress("downstream", len(several), unit="tasks rendered"), []
        for name, task in several:
            self.parts.append(self._part(name, task, settings.tasks[name]))
            progress.advance(note=task.config.task)
        self.identity = [
            source_digest("bitalloc.suites.downstream"),
            version(),
            hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()},
            self.lm.max_length,
        ]

    def _part(self, parent: str, task: Any, settings: config.Task) -> Part:
        """Draw the items and render their prompts."""
        name = task.config.task
        if settings.chat and not self.tokenizer.chat_template:
            raise BitallocError(f"evaluate.tasks.{parent}: the tokenizer has no chat template; set chat: false")
        source = local(parent, settings) or "the hub"
        try:
            with _quiet():
                count = len(task.eval_docs)
            ids = sorted(order([name] * count, str(self.seed))[: settings.limit or count])
            chat = {"chat_template": self.lm.apply_chat_template, "tokenizer_name": self.lm.tokenizer_name}
            with _quiet():
                task.build_all_requests(
                    samples=set(ids), apply_chat_template=settings.chat, **(chat if settings.chat else {})
                )
        except Exception as error:  # noqa: BLE001 - templates fail in many ways on rows that lack what they read
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            raise BitallocError(
                f"task {name}: the rows of {source} lack what lm-eval's definition reads ({reason})"
            ) from None
        first = task.instances[0]
        if first.request_type == "generate_until" and self.lm.longest_answer(first) >= self.lm.max_length:
            raise BitallocError(
                f"task {name}: answers of {self.lm.longest_answer(first)} tokens, but the model takes "
                f"{self.lm.max_length} in all; take it out of evaluate.tasks"
            )
        items = [list(group) for _, group in itertools.groupby(task.instances, lambda each: each.doc_id)]
        work = {"task": name, "timeout_s": settings.timeout_s}
        keys = [digest({**work, "requests": [request.arguments for request in item]}) for item in items]
        part = Part(parent, name, task, ids, settings, items, keys)
        return replace(part, tokens=self._tokens(part))

    def _tokens(self, part: Part) -> int:
        """Tokens of one item, the mean of some: contexts without what they have in common, continuations, answers."""
        items = part.items[:: -(-len(part.items) // SAMPLED)]
        contexts = [{request.args[0] for request in item} for item in items]
        if part.writes:
            longest = sum(self.lm.longest_answer(item[0]) for item in items)
            return math.ceil(longest / len(items))
        whole = [text for several in contexts for text in several]
        alike = os.path.commonprefix(whole) if len(whole) > 1 else ""  # noqa: RUF071 - of texts, not of paths
        shared = len(self.lm.tok_encode(alike))
        shared = shared if shared >= SHARED else 0
        read = sum(min(len(self.lm.tok_encode(text)), self.lm.max_length) - shared for text in whole)
        read += sum(len(self.lm.tok_encode(str(request.args[1]))) for item in items for request in item)
        return max(1, math.ceil(read / len(items)))

    def chosen(self, limit: int | None) -> dict[str, list[int]]:
        """Part -> places of the items that are asked, in order: of each task the first `limit` of `subsets.order`."""
        found: dict[str, list[int]] = {}
        for _, group in itertools.groupby(self.parts, lambda part: part.parent):
            parts = list(group)
            every = [(part.name, item) for part in parts for item in range(len(part.items))]
            found |= {part.name: [] for part in parts}
            for place in sorted(order([name for name, _ in every], str(self.seed))[:limit]):
                name, item = every[place]
                found[name].append(item)
        return found

    def place(self, part: Part) -> list[Any]:
        """Where in the memory of a plan the answers to a task lie."""
        return ["downstream", part.parent, self.identity]

    def works(self, memory: Memory, limit: int | None) -> list[Work]:
        """What a plan has to answer, and how much of it it has."""
        chosen, found = self.chosen(limit), []
        for parent, group in itertools.groupby(self.parts, lambda part: part.parent):
            parts = list(group)
            known = memory.known(self.place(parts[0]))
            asked = [(part, part.keys[item] in known) for part in parts for item in chosen[part.name]]
            tokens, stored = sum(part.tokens for part, _ in asked), sum(part.tokens for part, there in asked if there)
            found.append(Work("downstream", parent, len(asked), tokens, stored, parts[0].writes))
        return found

    def __call__(self, memory: Memory, head: Head, limit: int | None = None) -> Responses:
        """Rows of RESPONSES without `plan`, with `chance`, and task -> protocol; of each task `limit` items at most."""
        self.lm.head = head
        rows: Rows = []
        protocols: dict[str, str] = {}
        whole: dict[str, list[JSON]] = defaultdict(list)
        chosen = self.chosen(limit)
        first = 0  # place of a subject's first item in the whole
        for part, before in zip(self.parts, [None, *self.parts], strict=False):
            first = first + len(before.items) if before and before.parent == part.parent else 0
            if not chosen[part.name]:
                continue
            answers = self._answers(part, chosen[part.name], memory)
            if all("failed" in answer for answer in answers):
                raise BitallocError(f"task {part.name}: every item failed ({answers[0]['failed']})")
            whole[part.parent] += answers
            mine = _judge(part, [part.items[item] for item in chosen[part.name]], answers)
            rows += mine
            protocols[part.name] = self._protocol(part, answers, len(part.items))
            if part.name != part.parent:
                place = dict(zip(part.ids, itertools.count(first), strict=False))
                rows += [row | {"task": part.parent, "item": place[row["item"]]} for row in mine]
                several = sum(len(each.items) for each in self.parts if each.parent == part.parent)
                protocols[part.parent] = self._protocol(part, whole[part.parent], several)
        return pd.DataFrame(rows), protocols

    def _protocol(self, part: Part, answers: Sequence[JSON], several: int) -> str:
        task = part.task
        counts = {
            "items": len(answers),
            "with a prompt cut on the left": sum(answer.get("truncated", False) for answer in answers),
            "missing": sum("failed" in answer for answer in answers),
        }
        drawn = f"drawn by seed {self.seed}" if part.settings.limit or len(answers) < several else "all"
        shots = f"{task.get_config('num_fewshot') or 0}-shot{', chat template' if part.settings.chat else ''}"
        data = "local data" if local(part.parent, part.settings) else f"{task.DATASET_PATH} on the hub"
        told = ", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "items")
        return f"{version()}, version {task.VERSION}; {shots}; {data}; {told} ({drawn})"

    def _answers(self, part: Part, chosen: list[int], memory: Memory) -> list[JSON]:
        """What the model answers to each item, from the memory where it is there."""
        size = self.lm.batch_size if part.writes else SHARD
        self.lm.timeout_s = part.settings.timeout_s

        def score(missing: list[int]) -> Iterator[dict[int, JSON]]:
            for start in range(0, len(missing), size):
                some = missing[start : start + size]
                yield dict(zip(some, self._ask(part, [part.items[chosen[each]] for each in some]), strict=True))

        keys = [part.keys[item] for item in chosen]
        return memory.recall(self.place(part), keys, [part.tokens] * len(keys), score)

    def _ask(self, part: Part, items: list[list[Any]]) -> list[dict[str, Any]]:
        """The answers to each item; where a batch fails, its items one by one, and those that fail again are told."""
        requests = [request for item in items for request in item]
        try:
            answers = getattr(self.lm, requests[0].request_type)(requests, disable_tqdm=True)
            if not all(isinstance(answer, str) or math.isfinite(answer[0]) for answer in answers):
                raise ValueError("a log-likelihood is NaN or Inf")
        except BitallocError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever befalls one item, the others go on
            if len(items) > 1:
                return [answer for item in items for answer in self._ask(part, [item])]
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            print(f"task {part.name}: item {part.ids[items[0][0].doc_id]} left out ({reason})", file=sys.stderr)
            return [{"failed": reason}]
        each = iter(zip(answers, self.lm.truncated, strict=True))
        found = []
        for item in items:
            own = list(itertools.islice(each, len(item)))
            found.append({"answers": [answer for answer, _ in own], "truncated": any(cut for _, cut in own)})
        return found


def _judge(part: Part, items: list[list[Any]], answers: Sequence[JSON]) -> Rows:
    """The metrics of each item that was answered, by lm-eval's own filters and definitions."""
    task, rows, means = part.task, [], _means(part.task)
    answered = [(item, answer["answers"]) for item, answer in zip(items, answers, strict=True) if "answers" in answer]
    for item, own in answered:
        for request, answer in zip(item, own, strict=True):
            request.resps, request.filtered_resps = [tuple(answer) if isinstance(answer, list) else answer], {}
    whole, task._instances = task._instances, [request for item, _ in answered for request in item]
    task.apply_filters()
    task._instances = whole
    for item, _ in answered:
        doc = item[0].doc
        chance = 1 / len(task.doc_to_choice(doc)) if task.OUTPUT_TYPE == "multiple_choice" else 0.0
        place = {"suite": "downstream", "task": part.name, "item": part.ids[item[0].doc_id], "group": part.name}
        for kind in item[0].filtered_resps:
            found = task.process_results(doc, [request.filtered_resps[kind] for request in item])
            rows += [
                {**place, "metric": f"{metric},{kind}", "value": float(value), "weight": 1.0, "chance": chance}
                for metric, value in found.items()
                if metric in means
            ]
    return rows


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            model_max_length=10**30,  # lm-eval cuts prompts, and `Harness` counts them
        )
    except Exception as error:  # noqa: BLE001 - tokenizers raises bare Exception, transformers many kinds
        reason = " ".join(str(error).split())[:100]
        raise BitallocError(f"no tokenizer in {path} ({reason}); put its tokenizer.json beside config.json") from None
    if tokenizer.pad_token is None and tokenizer.eos_token is None and tokenizer.unk_token is None:
        raise BitallocError(
            f"the tokenizer in {path} has neither a pad nor an eos token, which batches need; "
            "name one in tokenizer_config.json"
        )
    return tokenizer
