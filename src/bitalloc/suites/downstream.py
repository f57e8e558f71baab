"""Tasks of lm-eval: its prompts, targets and metrics; its data sets or local copies of them.

Prompts are rendered and answers are judged by lm-eval from its own task definitions. Ours is the scoring between the
two (`suites.prefixes`), and every finished batch of items is a shard. lm-eval is an optional extra, imported where it
is used.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import logging
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from typing import Any

import pandas as pd

from bitalloc import config
from bitalloc.cost import Work
from bitalloc.errors import BitallocError, nearest
from bitalloc.progress import Progress
from bitalloc.provenance import source_digest
from bitalloc.store import JSON, digest
from bitalloc.suites.copies import Rows, kind, local, read
from bitalloc.suites.prefixes import SHARED, loglikelihoods
from bitalloc.suites.scoring import Head, Memory, Responses, Scored
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
SEED = 1234  # lm-eval's own, of the examples in a prompt


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
    known = all(kind(name) in FOLDERS for name in tasks)
    places = {"include_path": sorted({str(root / FOLDERS[kind(name)]) for name in tasks})} if known else {}
    with _quiet():
        manager = TaskManager(include_defaults=not known, **places)  # listing all takes ten seconds
    ours = {entry.name for entry in manager.task_index.values() if str(root / FOLDERS["mmlu"]) in str(entry.yaml_path)}
    subjects = sorted(ours.intersection(manager.all_subtasks))
    names = [name for name in manager.all_subtasks if kind(name) != "mmlu"] + [*subjects, "mmlu"]
    if unknown := [name for name in tasks if name not in names]:
        raise BitallocError(f"unknown task {unknown[0]!r} in evaluate.tasks: {nearest(unknown[0], names)}")
    members = {name: subjects if name == "mmlu" else [name] for name in tasks}
    return {name: [_task(manager, member, name, tasks[name]) for member in members[name]] for name in tasks}


def _task(manager: Any, name: str, parent: str, settings: config.Task) -> Any:
    source = local(name, settings)
    if source is None:
        print(f"task {name}: no local copy, asking the hub", file=sys.stderr, flush=True)
    fewshot = FEWSHOT.get(kind(name)) if settings.fewshot is None else settings.fewshot
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
            f"task {name}: tried ${{BITALLOC_DATA}}/{kind(name)} (no such folder) and the hub ({reason}); "
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
        for filter_ in item[0].filtered_resps:
            found = task.process_results(doc, [request.filtered_resps[filter_] for request in item])
            rows += [
                {**place, "metric": f"{metric},{filter_}", "value": float(value), "weight": 1.0, "chance": chance}
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
