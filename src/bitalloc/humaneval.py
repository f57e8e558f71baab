"""HumanEval: what a plan writes for each problem -> SAMPLES. Nothing is executed here; `execute` does that, apart.

Problems and tests: Chen et al. 2021, arXiv:2107.03374. Prompts, stop sequences and length are those of the task
`humaneval` of lm-eval 0.4.13: zero-shot, greedy. Batches of problems are shards.

Legend: B prompts of a batch, T tokens of the longest of them.
"""

from __future__ import annotations

import ast
import gzip
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bitalloc import config
from bitalloc.corpus import UnavailableError, find
from bitalloc.errors import BitallocError
from bitalloc.formats import bitalloc as checkpoints
from bitalloc.models import Checkpoint, context_length, load_model, read_config, set_weight
from bitalloc.progress import Progress
from bitalloc.provenance import source_digest
from bitalloc.store import JSON, Store, digest, file_digest

UNTIL = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
LOOK_BACK = 16  # tokens in which a stop sequence is looked for; each covers at least one character of it
FIELDS = ("task_id", "prompt", "entry_point", "test")


# ---- problems ----------------------------------------------------------------------------------------
def problems(sources: Sequence[str]) -> pd.DataFrame:
    """`FIELDS` of every problem, from the first source that can be had. Raises `BitallocError` otherwise."""
    tried = []
    for source in sources:
        try:
            return _read(find(source))
        except UnavailableError as reason:
            tried.append(f"{source} ({reason})")
    raise BitallocError(
        f"HumanEval: tried {', '.join(tried)}; point to a copy: "
        "--config 'humaneval={sources: [/your/HumanEval.jsonl.gz]}'"
    )


def _read(file: Path) -> pd.DataFrame:
    try:
        if file.suffix == ".parquet":
            rows = pq.read_table(file, columns=list(FIELDS)).to_pylist()
        else:
            data = file.read_bytes()
            text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        frame = pd.DataFrame([[row[field] for field in FIELDS] for row in rows], columns=list(FIELDS))
        if not all(isinstance(cell, str) for row in frame.to_numpy() for cell in row):
            raise ValueError("a field is no text")
        for cell in (*frame["prompt"], *frame["test"]):
            ast.parse(cell)
    except (OSError, EOFError, ValueError, KeyError, TypeError, SyntaxError, pa.ArrowException) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise BitallocError(f"{file} does not hold HumanEval, a line a problem with {FIELDS} ({reason})") from None
    if frame.empty or frame["task_id"].duplicated().any():
        raise BitallocError(f"{file} holds no problem, or one twice; fetch HumanEval again")
    return frame


# ---- completions -------------------------------------------------------------------------------------
def generate(
    *,
    plan: str,
    folder: Path | None,
    checkpoint: Checkpoint,
    inventory: pd.DataFrame,
    settings: config.HumanEval,
    store: Store,
    device: torch.device,
) -> pd.DataFrame:
    """SAMPLES of one plan, whose native checkpoint lies in `folder`; None: the unquantised model.

    Problems go through in batches of like length; a batch writes no more than its longest prompt leaves room for in the
    context. A prompt that fills the context is `unfit`, not an error.
    """
    frame = problems(settings.sources)
    writer = Writer(folder=folder, checkpoint=checkpoint, inventory=inventory, settings=settings, device=device)
    prompts = [writer.tokens(text) for text in frame["prompt"]]
    progress = Progress(f"humaneval {plan}", len(frame), unit="problems")
    written: dict[int, JSON] = {}
    for batch in _batches(prompts, settings.batch):
        key = digest({"stage": "humaneval", "writer": writer.fingerprint, "prompts": [prompts[i] for i in batch]})
        record = store.get(key)
        cached = record is not None
        if not cached:
            record = {"completions": writer.complete([prompts[i] for i in batch])}
            store.put(key, record)
        written |= dict(zip(batch, record["completions"], strict=True))
        progress.advance(len(batch), cached=cached)
    rows = pd.DataFrame([written[i] for i in range(len(frame))])
    return frame.assign(plan=plan, prompt_tokens=list(map(len, prompts))).join(rows)


def _batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Places of prompts, the longest first: what runs out of memory does so at once."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


class Writer:
    """A model that continues prompts; its weights are loaded when the first batch is not in the store."""

    def __init__(
        self,
        *,
        folder: Path | None,
        checkpoint: Checkpoint,
        inventory: pd.DataFrame,
        settings: config.HumanEval,
        device: torch.device,
    ) -> None:
        self.folder, self.checkpoint, self.inventory = folder, checkpoint, inventory
        self.settings, self.device = settings, device
        self.config = read_config(checkpoint.path)
        self.context = context_length(self.config)

    @cached_property
    def fingerprint(self) -> str:
        """Everything but the prompts that a completion depends on."""
        weights = checkpoints.source_identity(self.inventory)
        if self.folder is not None:
            weights = checkpoints.checkpoint_digest(self.folder)
        small = {file.name: file_digest(file) for file in sorted(self.checkpoint.path.glob("*.json"))}
        settings = [self.settings.max_new_tokens, UNTIL, self.device.type]
        return digest([source_digest("bitalloc.humaneval"), weights, small, settings])

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        path = self.checkpoint.path
        try:
            return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise BitallocError(f"no tokenizer in {path}: {str(error).splitlines()[0]}") from None

    @cached_property
    def model(self) -> Any:
        """The unquantised model with the plan's matrices in their places, unpacked: every token reads them all."""
        model = load_model(self.checkpoint.path, device=self.device)
        if self.folder is not None:
            frame, matrix = checkpoints.load(self.folder, inventory=self.inventory)
            for layer in frame["layer"]:
                set_weight(model, self.checkpoint.family, layer, matrix(layer).dequantize())
        return model

    @cached_property
    def pad(self) -> int:
        """What fills a batch, and a row that has ended; a token that the model has no row for cannot."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None and token < self.config.get("vocab_size", token + 1):
                return token
        raise BitallocError(
            f"the tokenizer of {self.checkpoint.path} has neither pad nor eos token, and batches are padded; "
            "set pad_token in its tokenizer_config.json"
        )

    @cached_property
    def ends(self) -> list[int]:
        """Tokens that end a text."""
        stated = self.model.generation_config.eos_token_id
        stated = self.tokenizer.eos_token_id if stated is None else stated
        return stated if isinstance(stated, list) else [] if stated is None else [stated]

    def tokens(self, text: str) -> list[int]:
        """Ids of a prompt, with the special tokens that the tokenizer puts before a text."""
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        vocabulary = self.config.get("vocab_size")
        if not ids or (vocabulary is not None and max(ids) >= vocabulary):
            raise BitallocError(
                f"the tokenizer of {self.checkpoint.path} gives no token, or one beyond the model's {vocabulary}; "
                "put the model's own tokenizer.json beside config.json"
            )
        return ids

    def complete(self, prompts: Sequence[list[int]]) -> list[dict[str, Any]]:
        """completion, completion_tokens, truncated and unfit of every prompt."""
        fits = [self.context is None or len(ids) < self.context for ids in prompts]
        new = iter(self._greedy([ids for ids, fit in zip(prompts, fits, strict=True) if fit]))
        nothing = {"completion": "", "completion_tokens": 0, "truncated": False, "unfit": True}
        return [self._cut(ids, next(new)) if fit else nothing for ids, fit in zip(prompts, fits, strict=True)]

    @torch.inference_mode()
    def _greedy(self, prompts: list[list[int]]) -> list[list[int]]:
        """New tokens of every prompt, filled up with `pad` where a row ends before others."""
        from transformers import GenerationConfig, StoppingCriteriaList

        if not prompts:
            return []
        model, ends, longest, most = self.model, self.ends, max(map(len, prompts)), self.settings.max_new_tokens
        model.generation_config = GenerationConfig(eos_token_id=ends or None)  # a checkpoint's own may sample
        padding = [longest - len(ids) for ids in prompts]
        ids_BT = torch.tensor([[self.pad] * left + ids for left, ids in zip(padding, prompts, strict=True)])
        mask_BT = torch.tensor([[0] * left + [1] * (longest - left) for left in padding])
        new_BT = model.generate(
            ids_BT.to(self.device),
            attention_mask=mask_BT.to(self.device),
            do_sample=False,
            max_new_tokens=most if self.context is None else min(most, self.context - longest),
            pad_token_id=self.pad,
            stopping_criteria=StoppingCriteriaList([self._stops(longest)]),
        )[:, longest:]
        return new_BT.tolist()

    def _stops(self, start: int) -> Any:
        """A criterion of `transformers`: which rows hold a stop sequence among their latest new tokens."""

        def stops(ids_BT: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            texts = self.tokenizer.batch_decode(ids_BT[:, max(start, ids_BT.shape[1] - LOOK_BACK) :])
            return torch.tensor([any(stop in text for stop in UNTIL) for text in texts], device=ids_BT.device)

        return stops

    def _cut(self, prompt: list[int], new: list[int]) -> dict[str, Any]:
        """The text of a row up to its first stop sequence or end token."""
        length = next((place for place, token in enumerate(new) if token in (*self.ends, self.pad)), len(new))
        text = self._text(prompt, new[:length])
        stops = [text.find(stop) for stop in UNTIL if stop in text]
        return {
            "completion": text[: min(stops, default=None)],
            "completion_tokens": length,
            "truncated": length == len(new) and not stops,
            "unfit": False,
        }

    def _text(self, prompt: list[int], new: list[int]) -> str:
        """What `new` adds to the prompt: by itself, some tokenizers drop the first space, which is code here."""
        before, after, alone = (
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (prompt, prompt + new, new)
        )
        return after.removeprefix(before) if after.startswith(before) else alone
