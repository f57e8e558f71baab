"""Local copies of the data sets of tasks: their original forms, or the hub's own rows."""

from __future__ import annotations

import bz2
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bitalloc import config
from bitalloc.errors import BitallocError

Rows = list[dict[str, Any]]


def local(name: str, task: config.Task) -> Path | None:
    """Where the local copy lies: what `data` names, else the folder of the task in BITALLOC_DATA, else None."""
    place = config.expand(task.data or f"${{BITALLOC_DATA}}/{kind(name)}")
    if place and Path(place).exists():
        return Path(place)
    if task.data:
        raise BitallocError(
            f"evaluate.tasks.{name}: no such data: {task.data}" + ("" if place else " (its variable is not set)")
        )
    return None


def kind(name: str) -> str:
    """The data set of a task: subjects of MMLU share one."""
    return "mmlu" if name.startswith("mmlu") else name


def read(name: str, source: Path) -> dict[str, Rows]:
    """Split -> rows as the hub has them, from a local copy in the original form or of the hub's own rows.

    Raises `BitallocError` with the file, and the line where there is one.
    """
    if kind(name) == "mmlu" and not _rows(source, "test"):
        splits = _mmlu(source, name.removeprefix("mmlu_"))
    elif name == "hellaswag" and (found := [source] if source.is_file() else sorted(source.glob("*val*.txt*"))):
        splits = {"validation": _hellaswag(found[0])}
    elif name == "piqa" and (source / "valid.jsonl").is_file():
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
