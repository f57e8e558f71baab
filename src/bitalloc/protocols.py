"""Whole texts as the three conventions of perplexity read them; their numbers do not compare with each other.

`gptq`: Frantar et al. 2023 (arXiv 2210.17323) and the papers after it: the documents joined by the corpus's
separator (two newlines; lines of WikiText, one space in C4), cut into windows of the model's context, 2,048
tokens at most, that do not overlap; all tokens but the first of a window are scored, a last short one is dropped.
C4 is read so with `evaluate.documents` 1100 and `evaluate.tokens` 524288.

`lm-eval`: EleutherAI's lm-evaluation-harness, rolling log-likelihood (task `wikitext`): every document on its own,
every token scored once, in pieces of the model's context; the first piece begins with the prefix token, a later
one with the token before it, the last one reaches back to a full context. Words and bytes are those of the
document as it was before detokenisation.

`llama.cpp`: llama-perplexity: chunks of 512 tokens, whose first one is replaced by bos where the tokenizer puts
one; the last 255 tokens of a chunk are scored; a last short chunk is dropped.

The tokenizer's own template decides about bos. T tokens of a text.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd
from tokenizers import Tokenizer

from bitalloc import corpus
from bitalloc.config import Config
from bitalloc.errors import BitallocError, nearest
from bitalloc.models import context_length, read_config
from bitalloc.tables import READINGS

CONTEXT = 2048  # of gptq at most, and where a model does not say its own
CHUNK = 512  # of llama.cpp


# ---- texts -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Text:
    """A corpus as each of the protocols gets it."""

    joined: str  # gptq
    joint: str  # how that was joined, in words
    file: str  # llama.cpp
    documents: list[tuple[str, str]]  # lm-eval: what is scored, and what its words and bytes are counted in


def plain(records: list[str], separator: str) -> Text:
    """A text of documents; with an empty separator they are pieces of one."""
    documents = records if separator else ["".join(records)]
    joined = separator.join(documents)
    return Text(
        joined, f"documents joined by {separator!r}", joined, [(text, text) for text in documents if text.strip()]
    )


def wikitext(records: list[str], articles: int | None = None) -> Text:
    """WikiText, as one file or as its lines (the hub leaves blank ones empty), the first `articles` of it.

    >>> text = wikitext([" = One = \\n \\n Words , of one . \\n \\n = Two = \\n = = Part = = \\n"])
    >>> [scored for scored, _ in text.documents]
    [' = One =\\n\\nWords, of one.\\n', ' = Two =\\n== Part ==\\n']
    >>> text.joined
    ' = One = \\n\\n\\n\\n\\n Words , of one . \\n\\n\\n\\n\\n = Two = \\n\\n\\n = = Part = = \\n'
    """
    lines = list(io.StringIO("".join(record or " \n" for record in records)))  # ends lines at \n alone
    number = accumulate(map(_is_title, lines))  # of the article that a line belongs to, from 1
    pages = ["".join(line for _, line in part) for _, part in groupby(zip(number, lines, strict=True), itemgetter(0))]
    pages = [page for page in pages if page.strip()]
    # articles are joined by newlines, so that all but the last lack their own
    documents = [page.removesuffix("\n") for page in pages[:-1]] + pages[-1:]
    lines = list(io.StringIO("".join(pages[:articles])))
    rows = [line if line.strip() else "" for line in lines]
    joint = "lines, blank ones empty, joined by '\\n\\n'"
    return Text("\n\n".join(rows), joint, "".join(lines), [(detokenise(page), page) for page in documents[:articles]])


def _is_title(line: str) -> bool:
    line = line.strip()
    return line.startswith("= ") and line.endswith(" =") and not line.startswith("= =")


def detokenise(text: str) -> str:
    """WikiText as English is written, by the rules of lm-eval's task `wikitext`, quirks included.

    >>> detokenise('He said : " yes " , the 2 @,@ 000 ( or so ) dogs \\' bones')
    'He said: "yes", the 2,000 (or so) dogs\\' bones'
    """
    text = text.replace("s '", "s'")
    for sign in "-,.":
        text = text.replace(f" @{sign}@ ", sign)
    for sign in ":;.!?,":
        text = text.replace(f" {sign} ", f"{sign} ")
    for left, right in ("()", "[]", "{}", '""', "''"):
        text = re.sub(rf"\{left}\s*([^\{right}]*?)\s*\{right}", rf"{left}\1{right}", text)
    for level in (4, 3, 2):
        text = text.replace(" ".join("=" * level), "=" * level)
    for old, new in ((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        text = text.replace(old, new)
    return text


# ---- windows -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Window:
    """A sequence whose last `scored` tokens are scored, counted for `document`; bytes and words behind them.

    The document of `lm-eval` has its bytes and words in its first window; elsewhere a window is its own document.
    """

    document: int
    tokens: list[int]
    scored: int
    nbytes: int
    words: int = 0


@dataclass(frozen=True)
class Reader:
    """A model's way to read: its tokenizer, the prefix token of lm-eval, its context, and how far to read."""

    tokenizer: Tokenizer
    prefix: int
    longest: int | None
    tokens: int | None = None

    @cached_property
    def bos(self) -> int | None:
        """What the tokenizer's template puts first."""
        return next(iter(self.tokenizer.encode("").ids), None)

    def ids(self, text: str) -> list[int]:
        """As lm-eval encodes a document: one that begins with the prefix token gets no other."""
        begun = text.startswith(self.tokenizer.id_to_token(self.prefix))
        return self.tokenizer.encode(text, add_special_tokens=not begun).ids

    def stream(self, text: str) -> tuple[list[int], np.ndarray]:
        """Ids and nbytes_T of a whole text, as far as is to be read."""
        encoding = self.tokenizer.encode(text)
        return encoding.ids[: self.tokens], corpus.token_nbytes(text, [end for _, end in encoding.offsets])[
            : self.tokens
        ]


def gptq(text: Text, reader: Reader) -> Iterator[Window]:
    ids, nbytes_T = reader.stream(text.joined)
    length = gptq_length(reader.longest)
    for index, start in enumerate(range(0, len(ids) - length + 1, length)):
        span = slice(start, start + length)
        yield Window(index, ids[span], length - 1, int(nbytes_T[span][1:].sum()))


def gptq_length(longest: int | None) -> int:
    return min(CONTEXT, longest or CONTEXT)


def lm_eval(text: Text, reader: Reader) -> Iterator[Window]:
    longest, read = reader.longest or CONTEXT, 0
    for document, (scored, counted) in enumerate(text.documents):
        ids = reader.ids(scored)
        if document and reader.tokens is not None and read + len(ids) > reader.tokens:
            return  # documents are read whole or not at all
        read += len(ids)
        begun = [reader.prefix, *ids]
        nbytes, words = len(counted.encode()), len(re.split(r"\s+", counted))
        for start in range(0, len(ids), longest):
            end = min(start + longest, len(ids))
            whose = (nbytes, words) if start == 0 else (0, 0)
            yield Window(document, begun[max(0, end - longest) : end + 1], end - start, *whose)


def llama_cpp(text: Text, reader: Reader) -> Iterator[Window]:
    if reader.longest is not None and reader.longest < CHUNK:
        raise BitallocError(
            f"llama.cpp reads {CHUNK} tokens at a time, the model takes {reader.longest}; "
            "take it out of evaluate.protocols"
        )
    ids, nbytes_T = reader.stream(text.file)
    if len(ids) < 2 * CHUNK:
        return  # as llama-perplexity, which wants two chunks
    scored = CHUNK - 1 - CHUNK // 2
    for index, start in enumerate(range(0, len(ids) - CHUNK + 1, CHUNK)):
        chunk = ids[start : start + CHUNK]
        if reader.bos is not None:
            chunk[0] = reader.bos
        yield Window(index, chunk, scored, int(nbytes_T[start : start + CHUNK][-scored:].sum()))


PROTOCOLS: dict[str, Callable[[Text, Reader], Iterator[Window]]] = {
    "gptq": gptq,
    "lm-eval": lm_eval,
    "llama.cpp": llama_cpp,
}


def described(protocol: str, text: Text, reader: Reader) -> str:
    """What the protocol does with this model, for every number to bear."""
    bos = "" if reader.bos is None else "bos once, at the start; "
    longest = reader.longest or CONTEXT
    return {
        "gptq": f"gptq: {text.joint}; {bos}non-overlapping windows of {gptq_length(reader.longest)} tokens, "
        "all but the first scored",
        "lm-eval": f"lm-eval: rolling log-likelihood of each document; prefix token {reader.prefix}; "
        f"pieces of {longest} tokens, all scored",
        "llama.cpp": f"llama.cpp: {'no bos' if reader.bos is None else 'bos at the start of every chunk'}; chunks of "
        f"{CHUNK} tokens, the last {CHUNK - 1 - CHUNK // 2} scored",
    }[protocol]


# ---- readings ----------------------------------------------------------------------------------------
def readings(config: Config, path: Path) -> pd.DataFrame:
    """Every text of `evaluate.texts` as every one of `evaluate.protocols` reads it: a READINGS frame.

    Raises `BitallocError` for a text that has no end, is too short, or has tokens that the model in `path` has not.
    """
    settings, raw = config.evaluate, read_config(path)
    rows: list[dict] = []
    for name in settings.texts if settings.protocols else []:
        tokenizer = corpus.load_tokenizer(path)
        reader = Reader(tokenizer, prefix_token(path, tokenizer), context_length(raw), settings.tokens)
        text, extent = _text(config, name)
        for protocol in settings.protocols:
            windows = list(PROTOCOLS[protocol](text, reader))
            if not windows:
                raise BitallocError(
                    f"corpus {name} is too short for the protocol {protocol}: give a longer text, raise "
                    "evaluate.documents or evaluate.tokens, or take one of the two out of evaluate"
                )
            corpus.check_vocabulary(max(max(window.tokens) for window in windows), raw.get("vocab_size"))
            place = {"protocol": protocol, "corpus": name, "how": f"{described(protocol, text, reader)}; {extent}"}
            rows += [{**place, "window": index, **vars(window)} for index, window in enumerate(windows)]
    return pd.DataFrame(rows, columns=READINGS.names)


def _text(config: Config, name: str) -> tuple[Text, str]:
    """A corpus for the protocols; in words how far it is read, and what else of the workflow has seen it."""
    if name not in config.corpora:
        raise BitallocError(f"unknown corpus {name!r} in evaluate.texts: {nearest(name, config.corpora)}")
    source, most = config.corpora[name], config.evaluate.documents
    found = corpus.texts(name, source, seed=config.seed, splits=list(corpus.SPLITS))
    records = found[-1][1]
    if most is None and not isinstance(records, list):
        raise BitallocError(f"corpus {name} has no end: set evaluate.documents, or take it out of evaluate.texts")
    if source.kind == "wikitext":
        text = wikitext(list(records), most)
    else:
        text = plain(list(islice(records, most if source.separator else None)), source.separator)
    limits = {"documents": most, "tokens": config.evaluate.tokens}
    extent = [f"at most {limit} {unit}" for unit, limit in limits.items() if limit is not None] or ["whole text"]
    steps = {"calibrate": config.retrieve.calibrate, "select": config.retrieve.select}
    seen = [step for step, names in steps.items() if name in names and len(found) == 1]
    return text, ", ".join(extent) + (f"; windows of it also serve {' and '.join(seen)}" if seen else "")


def prefix_token(path: Path, tokenizer: Tokenizer) -> int:
    """What lm-eval puts before a document: the tokenizer's bos, or its eos; config.json's where it has neither."""
    file, raw = Path(path) / "tokenizer_config.json", read_config(path)
    says = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for kind in ("bos_token", "eos_token"):
        token = says.get(kind)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and (index := tokenizer.token_to_id(token)) is not None:
            return index
    for kind in ("bos_token_id", "eos_token_id"):
        if isinstance(raw.get(kind), int):
            return raw[kind]
    raise BitallocError(f"neither tokenizer_config.json nor config.json in {path} names a bos or eos token; add one")
