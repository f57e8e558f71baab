"""Tasks and perplexity, scored by bitalloc and by lm-eval's own HFLM: same model, requests, batch size, process.

python benchmarks/bench_evaluate.py [--items 32] [--batch 4]  ->  a table, and benchmarks/results/evaluate.json

Needs BITALLOC_DATA. Two models: a random Llama of 2,048 tokens (width 256, 4 blocks) with the tokenizer of Qwen2
(151,936 logits a token), and the real stories260k of 512 tokens, which cuts most prompts of MMLU on the left. Columns:

    items/s      of ours; `lm-eval` the same of HFLM; perplexity: tokens/s, windows of 256 tokens
    ratio        of wall seconds, HFLM's over ours; `CPU ratio` of CPU seconds
    apart        ratio of wall seconds when examples are read anew for every prompt: what is left is the context that
                 choices share, and the head, which HFLM computes at every position of a prompt
    difference   largest in a log-likelihood, nats (perplexity: of a window), between the two
    off, HFLM's  largest distance of ours, and of HFLM's, from HFLM in float64: what of the difference is whose rounding
    answers      items whose most likely choice is the same
    cut          prompts cut on the left

The three take turns, `--repeats` times, and the fastest counts. Tokenising, equal in all, is left out.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from bitalloc import config
from bitalloc.corpus import load_tokenizer, read_records
from bitalloc.models import load_model
from bitalloc.progress import Progress
from bitalloc.provenance import run_record
from bitalloc.suites import Head, Windows, downstream

CPU = torch.device("cpu")
MMLU = ("abstract_algebra", "college_biology", "high_school_geography", "marketing")
WINDOW = 256
EXACT = 16  # requests of a task that are repeated in float64
HEADER = ("items/s", "lm-eval", "ratio", "CPU ratio", "apart", "difference", "off", "HFLM's", "answers", "cut")


def build(folder: Path, tokenizer: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes = {"vocab_size": 151_936, "max_position_embeddings": 2048, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**shape, **sizes, initializer_range=0.1)).save_pretrained(folder)
    for file in tokenizer.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    shutil.copyfile(tokenizer / "merges.txt", folder / "merges.txt")


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def fastest(repeats: int, **works: Callable[[], Any]) -> dict[str, tuple[Any, float, float]]:
    """The fastest run of each, in turns."""
    runs = [{name: timed(work) for name, work in works.items()} for _ in range(repeats)]
    return {name: min((run[name] for run in runs), key=lambda run: run[1]) for name in works}


def pairs(lm: Any, requests: list[Any]) -> list[tuple[Any, list[int], list[int]]]:
    """Tokens of contexts and continuations, as lm-eval cuts them."""
    return [(None, *lm._encode_pair(*request.arguments)) for request in requests]


def compare(lm: Any, head: Head, parts: list[Any], given: argparse.Namespace) -> dict[str, Any]:
    """A row of the table for the items of some tasks."""
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=given.batch)
    items = [
        (name, list(group))
        for name, part in parts
        for _, group in itertools.groupby(part.task.instances, lambda request: request.doc_id)
    ]
    batches = [pairs(lm, [r for _, item in part for r in item]) for part in chunks(items)]

    def ours(*, shared: int) -> list[tuple[float, bool]]:
        kept, downstream.SHARED = downstream.SHARED, shared
        try:
            return [
                score
                for batch in batches
                for score in downstream.loglikelihoods(
                    lm.model, head, [pair for _, *pair in batch], longest=lm.max_length, rows=given.batch
                )
            ]
        finally:
            downstream.SHARED = kept

    whole = [pair for batch in batches for pair in batch]
    runs = fastest(
        given.repeats,
        ours=lambda: ours(shared=downstream.SHARED),
        theirs=lambda: theirs._loglikelihood_tokens(whole, disable_tqdm=True),
        apart=lambda: ours(shared=10**9),
    )
    mine, other = (np.array([value for value, _ in runs[name][0]]) for name in ("ours", "theirs"))
    ends = np.cumsum([len(item) for _, item in items])[:-1]
    same = [a.argmax() == b.argmax() for a, b in zip(np.split(mine, ends), np.split(other, ends), strict=True)]
    cut = sum(len(a) + len(b) > lm.max_length + 1 for _, a, b in whole)
    return (
        row(runs, len(items))
        | exactness(lm, whole, mine, other, given)
        | {
            "answers": f"{sum(same)}/{len(same)}",
            "cut": f"{cut}/{len(whole)}",
        }
    )


def chunks(items: list[tuple[str, Any]]) -> list[list[tuple[str, Any]]]:
    """Shards, as the suite makes them: of one task, `SHARD` items at most."""
    by_task = [list(group) for _, group in itertools.groupby(items, lambda item: item[0])]
    return [part[at : at + downstream.SHARD] for part in by_task for at in range(0, len(part), downstream.SHARD)]


def row(runs: dict[str, tuple[Any, float, float]], count: int) -> dict[str, Any]:
    (_, ours_s, ours_cpu_s), (_, theirs_s, theirs_cpu_s) = runs["ours"], runs["theirs"]
    return {
        "items/s": count / ours_s,
        "lm-eval": count / theirs_s,
        "ratio": theirs_s / ours_s,
        "CPU ratio": theirs_cpu_s / ours_cpu_s,
        "apart": theirs_s / runs["apart"][1] if "apart" in runs else None,
        "seconds": {name: {"wall_s": wall, "cpu_s": cpu} for name, (_, wall, cpu) in runs.items()},
    }


def perplexity(lm: Any, head: Head, ids_NT: np.ndarray, given: argparse.Namespace) -> dict[str, Any]:
    """Windows of one corpus: `Windows.scores` against HFLM, the first token of each window its context."""
    from lm_eval.models.huggingface import HFLM

    frame = pd.DataFrame({"split": "report", "corpus": "wikitext2", "window": range(len(ids_NT)), "nbytes": 1})
    windows = Windows(frame.assign(tokens=list(ids_NT)), batch=given.batch, device=CPU)
    theirs = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=given.batch)
    requests = [(None, ids[:1], ids[1:]) for ids in ids_NT.tolist()]
    runs = fastest(
        given.repeats,
        ours=lambda: windows.scores(head, windows.hidden(lm.model)),
        theirs=lambda: theirs._loglikelihood_tokens(requests, disable_tqdm=True),
    )
    mine = -(runs["ours"][0]["nll"] * runs["ours"][0]["tokens"]).to_numpy()
    other = np.array([value for value, _ in runs["theirs"][0]])
    return row(runs, ids_NT.size - len(ids_NT)) | exactness(lm, requests, mine, other, given)


def exactness(lm: Any, requests: list[Any], mine: np.ndarray, other: np.ndarray, given: argparse.Namespace) -> dict:
    """How far ours and HFLM's log-likelihoods are from each other, and each from HFLM's in float64, nats."""
    from lm_eval.models.huggingface import HFLM

    every = max(1, len(requests) // EXACT)
    exact = HFLM(copy.deepcopy(lm.model).double(), tokenizer=lm.tokenizer, batch_size=1, softmax_dtype="float64")
    true = np.array([value for value, _ in exact._loglikelihood_tokens(requests[::every], disable_tqdm=True)])
    off = {"off": mine, "HFLM's": other}
    return {"difference": float(np.abs(mine - other).max())} | {
        name: float(np.abs(found[::every] - true).max()) for name, found in off.items()
    }


def measure(path: Path, given: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """(task, row) of one model."""
    root = Path(os.environ["BITALLOC_DATA"])
    subjects = {f"mmlu_{subject}": config.Task(limit=given.items // len(MMLU)) for subject in MMLU}
    tasks = subjects | {name: config.Task(limit=given.items) for name in ("hellaswag", "piqa")}
    model = load_model(path, device=CPU)
    head = Head(model)
    settings = config.Evaluate(tasks=tasks, batch=given.batch)
    harness = downstream.Harness(model, head, path=path, settings=settings)
    parts = {part.name: part for part in harness.parts}
    for task, names in {"MMLU": list(subjects), "HellaSwag": ["hellaswag"], "PIQA": ["piqa"]}.items():
        yield task, compare(harness.lm, head, [(name, parts[name]) for name in names], given)
    text = read_records(root / "wikitext2/wiki.test.raw")[0][: 40 * WINDOW * given.windows]
    ids = load_tokenizer(path).encode(text, add_special_tokens=False).ids[: WINDOW * given.windows]
    yield "perplexity", perplexity(harness.lm, head, np.array(ids).reshape(-1, WINDOW), given)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=32, help="items of a task; of MMLU over four subjects")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4, help="sequences a forward pass")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    if "BITALLOC_DATA" not in os.environ:
        raise SystemExit("bench_evaluate reads MMLU, HellaSwag and PIQA: set BITALLOC_DATA to a folder that has them")
    downstream.version()
    torch.set_num_threads(given.threads)
    root = Path(os.environ["BITALLOC_DATA"])
    rows = []
    with tempfile.TemporaryDirectory(prefix="bitalloc-evaluate-") as temporary:
        folder = Path(temporary)
        build(folder / "random", root / "tokenizers/qwen2")
        models = {"random Llama": folder / "random", "stories260k": root / "models/stories260K/hf"}
        print(f"{'model':>13}{'task':>12}" + "".join(f"{name:>12}" for name in HEADER), flush=True)
        progress = Progress("bench-evaluate", 4 * len(models), unit="rows")
        for name, path in models.items():
            for task, found in measure(path, given):
                rows.append({"model": name, "task": task, **found})
                cells = ["" if v is None else v if isinstance(v, str) else f"{v:.3g}" for v in map(found.get, HEADER)]
                print(f"{name:>13}{task:>12}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
                progress.advance(note=task)
    record = run_record("torch", "transformers", "lm_eval")
    path = Path(__file__).parent / "results/evaluate.json"
    path.write_text(json.dumps({"record": record, **vars(given), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
