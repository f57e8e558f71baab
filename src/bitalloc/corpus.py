"""Texts and their token windows, in splits that share no text.

A corpus names sources that are tried in order: the synthetic world, docstrings of the standard library,
a local file, a file of a dataset on the Hugging Face hub. The first that can be had is used. Arrays carry
their axes: T tokens, N windows.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from bitalloc.config import Config, Corpus, expand
from bitalloc.errors import BitallocError, nearest
from bitalloc.world import World, docstrings, documents

SPLITS = ("calibrate", "select", "report")
HUB_TIMEOUT_S = 5
MADE_UP = 64  # words that a tokenizer has at least that was not made from config.json alone
HUB_REASONS = {
    "LocalEntryNotFoundError": "not in the cache, and the hub cannot be reached",
    "GatedRepoError": "gated: accept its licence on the hub, then log in",
    "RepositoryNotFoundError": "no such repository, or one that needs a login",
    "RevisionNotFoundError": "no such revision",
}


class UnavailableError(Exception):
    """A source cannot be had here; the message says why in a few words."""


# ---- sources -----------------------------------------------------------------------------------------
def hub(repo: str, *, revision: str, files: list[str], kind: str = "model") -> Path:
    """Folder of a snapshot on the hub with the files that match; raises `UnavailableError` with the kind of failure.

    The hub client's own environment holds (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN); no token is ever shown.
    """
    import httpx

    # fails in a second without a network, where hf_hub_download retries for half a minute
    from huggingface_hub import snapshot_download

    try:
        where = {"repo_type": kind, "revision": revision, "allow_patterns": files}
        return Path(snapshot_download(repo, etag_timeout=HUB_TIMEOUT_S, **where))
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise UnavailableError(HUB_REASONS.get(type(error).__name__, type(error).__name__)) from None


def world_documents(*, seed: int, split: str) -> Iterator[str]:
    """An endless stream of documents of the synthetic world, another one for each split and seed."""
    for chunk in itertools.count():
        draw = random.Random(f"world {seed} {split} {chunk}").getrandbits(48)
        for kind, document in documents(World(), count=128, seed=draw, texts=[""]):
            if kind != "docstring":
                yield document


def find(source: str) -> Path:
    """The file that a source names, here or on the hub; raises `UnavailableError`."""
    return _hub_file(source) if source.startswith("hub:") else _local_file(source)


def _hub_file(source: str) -> Path:
    match = re.fullmatch(r"hub:([^@]+)@([^/]+)/(.+)", source)
    if not match:
        raise BitallocError(f"cannot read the source {source!r}; write hub:<dataset>@<revision>/<file>")
    file = hub(match[1], revision=match[2], files=[match[3]], kind="dataset") / match[3]
    if not file.is_file():
        raise UnavailableError("no such file in the dataset")
    return file


def _local_file(source: str) -> Path:
    path = expand(source)
    if path is None:
        raise UnavailableError("an environment variable is not set")
    if not Path(path).is_file():
        raise UnavailableError("no such file")
    return Path(path)


def read_records(file: Path, field: str = "text") -> list[str]:
    """Texts of a .txt or .raw file (one), .json (list of strings), .jsonl, .json.gz or .parquet (column `field`)."""
    try:
        if file.suffix == ".parquet":
            records = pq.read_table(file, columns=[field])[field].to_pylist()
        elif file.suffix == ".json":
            records = json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix in {".jsonl", ".gz"}:
            whole = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            records = [json.loads(line)[field] for line in whole.decode().split("\n") if line.strip()]
        elif file.suffix in {".txt", ".raw"}:
            records = [file.read_text(encoding="utf-8")]
        else:
            raise BitallocError(f"cannot tell how to read {file}; give .txt, .raw, .json, .jsonl, .json.gz or .parquet")
    except (OSError, EOFError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:100]
        raise BitallocError(f"{file} does not hold texts as {file.suffix} files should ({reason})") from None
    if not isinstance(records, list) or not all(isinstance(record, str) for record in records):
        raise BitallocError(f"{file} does not hold texts: a list of strings, or the field `{field}`, is expected")
    return records


def texts(name: str, corpus: Corpus, *, seed: int, splits: list[str]) -> list[tuple[list[str], Iterable[str]]]:
    """Texts of the first source that can be had: (the splits that share them, texts).

    The world (endless) and docstrings come split; a file (a list) is shared by all `splits`. Raises
    `BitallocError` when no source can be had: one line with all that was tried.
    """
    tried = []
    for source in corpus.sources:
        if source == "world":
            return [([split], world_documents(seed=seed, split=split)) for split in splits]
        if source == "docstrings":
            return [([split], docstrings()[split]) for split in splits]
        try:
            return [(splits, read_records(find(source), corpus.field))]
        except UnavailableError as reason:
            tried.append(f"{source} ({reason})")
    raise BitallocError(
        f"corpus {name}: tried {', '.join(tried)}; point to a copy: "
        f"--config 'corpora={{{name}: {{sources: [/your/file.txt]}}}}'"
    )


# ---- tokens ------------------------------------------------------------------------------------------
def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder; raises `BitallocError` when it has none."""
    file = Path(path) / "tokenizer.json"
    try:
        if file.is_file():
            return Tokenizer.from_file(str(file))
        from transformers import AutoTokenizer

        made = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True).backend_tokenizer
        if made.get_vocab_size() < MADE_UP:
            raise ValueError("transformers makes up one without words")
        return made
    except Exception as error:  # noqa: BLE001 - tokenizers raises bare Exception, transformers many kinds
        reason = " ".join(str(error).split())[:100]
        raise BitallocError(f"no tokenizer in {path} ({reason}); put its tokenizer.json beside config.json") from None


def token_nbytes(text: str, ends: list[int]) -> np.ndarray:
    """UTF-8 bytes that each token covers, from the character at which it ends; they sum to the text.

    What a tokenizer skips counts with the token after it, a character split over tokens with its first.

    >>> token_nbytes("né!", [1, 2, 2, 3]).tolist()  # n, two halves of é, !
    [1, 2, 0, 1]
    """
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    before = np.concatenate([[0], np.cumsum(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF), dtype=np.int64)])
    ends_T = np.maximum.accumulate(np.array(ends, dtype=np.int64))
    ends_T[-1:] = len(text)
    return np.diff(before[ends_T], prepend=0)


def stream(
    tokenizer: Tokenizer, records: Iterable[str], *, separator: str, bos: int | None, needed: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """ids_T and nbytes_T of documents one after the other, until `needed` tokens are there (None: all).

    An empty separator says that the records are pieces of one document. Each document starts with `bos`
    as in training; a model without one gets the separator after each document instead.
    """
    if not separator:
        records = ["".join(records)]
    ids: list[np.ndarray] = [np.zeros(0, np.int64)]
    sizes: list[np.ndarray] = [np.zeros(0, np.int64)]
    count, documents = 0, iter(records)
    while batch := list(itertools.islice(documents, 64)):
        batch = [text if bos is not None else text + separator for text in batch]
        for text, encoding in zip(batch, tokenizer.encode_batch(batch, add_special_tokens=False), strict=True):
            start = [] if bos is None else [bos]
            ids.append(np.array(start + encoding.ids, dtype=np.int64))
            sizes.append(
                np.concatenate(
                    [np.zeros(len(start), np.int64), token_nbytes(text, [end for _, end in encoding.offsets])]
                )
            )
            count += len(ids[-1])
        if needed is not None and count >= needed:
            break
    return np.concatenate(ids), np.concatenate(sizes)


def check_vocabulary(largest: int, vocabulary: int | None) -> None:
    """Raise when a token id lies beyond the model's vocabulary."""
    if vocabulary is not None and largest >= vocabulary:
        raise BitallocError(
            f"the tokenizer gives token {largest}, config.json has {vocabulary}; "
            "put the model's own tokenizer.json beside config.json"
        )


# ---- windows -----------------------------------------------------------------------------------------
def windows(
    config: Config, tokenizer: Tokenizer, *, bos: int | None, vocabulary: int | None, longest: int | None
) -> pd.DataFrame:
    """Token windows of all corpora and splits, for a model with these properties: a TOKENS frame.

    Windows never overlap. They are a uniform sample of the text, by a seeded shuffle that also shares out
    the windows of a file among the splits that it serves. `nbytes` is what all tokens of a window but the
    first cover. Raises `BitallocError` for a text too short, a window over `longest` tokens, a token id
    beyond the `vocabulary`.
    """
    length = config.retrieve.window
    if longest is not None and length > longest:
        raise BitallocError(f"retrieve.window is {length} tokens, but the model takes {longest}; lower it")
    rows = []
    for name, wanted in _wanted(config).items():
        if name not in config.corpora:
            raise BitallocError(f"unknown corpus {name!r} in retrieve: {nearest(name, config.corpora)}")
        corpus = config.corpora[name]
        for splits, records in texts(name, corpus, seed=config.seed, splits=list(wanted)):
            counts = [wanted[split] for split in splits]
            needed = None if isinstance(records, list) else sum(counts) * length
            ids_T, nbytes_T = stream(tokenizer, records, separator=corpus.separator, bos=bos, needed=needed)
            check_vocabulary(ids_T.max(initial=0), vocabulary)
            available = len(ids_T) // length
            if available < sum(counts):
                raise BitallocError(
                    f"corpus {name}: {len(ids_T)} tokens, {sum(counts) * length} needed for {' + '.join(splits)}; "
                    f"give a longer text, or lower retrieve.window or {', '.join(f'{s}_windows' for s in splits)}"
                )
            ids_NT = ids_T[: available * length].reshape(available, length).astype(np.int32)
            nbytes_N = nbytes_T[: available * length].reshape(available, length)[:, 1:].sum(axis=1)
            shuffled = np.random.default_rng([config.seed, *name.encode()]).permutation(available)
            for split, chosen in zip(splits, np.split(shuffled, np.cumsum(counts)), strict=False):
                rows += [
                    (SPLITS.index(split), split, name, window, ids_NT[n], int(nbytes_N[n]))
                    for window, n in enumerate(np.sort(chosen))
                ]
    rows.sort(key=lambda row: row[0])
    return pd.DataFrame([row[1:] for row in rows], columns=["split", "corpus", "window", "tokens", "nbytes"])


def _wanted(config: Config) -> dict[str, dict[str, int]]:
    """Corpus -> split -> windows; those of calibrate are shared out over its corpora."""
    retrieve, wanted = config.retrieve, {}
    for index, name in enumerate(retrieve.calibrate):
        corpora = len(retrieve.calibrate)
        share = (retrieve.calibrate_windows + corpora - 1 - index) // corpora
        wanted.setdefault(name, {})["calibrate"] = share
    for name in retrieve.select:
        wanted.setdefault(name, {})["select"] = retrieve.select_windows
    for name in retrieve.report:
        wanted.setdefault(name, {})["report"] = retrieve.report_windows
    return wanted
