"""What a table is, and the columns that many share."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from bitalloc.errors import BitallocError
from bitalloc.store import write_atomically

STR, INT, FLOAT, BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()
INTS, INTSS = pa.list_(pa.int32()), pa.list_(pa.list_(pa.int32()))


@dataclass(frozen=True)
class Column:
    name: str
    type: pa.DataType
    doc: str
    nullable: bool = False


@dataclass(frozen=True)
class Table:
    """A schema. `key` names the columns that identify a row; rows are kept sorted as they were given."""

    name: str
    doc: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]

    @property
    def names(self) -> list[str]:
        """Names of the columns, in order."""
        return [column.name for column in self.columns]

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in self.columns])

    def write(self, frame: pd.DataFrame, path: Path, *, verdicts: Sequence[Mapping] = ()) -> None:
        """Write `frame` atomically; raises `BitallocError` when it departs from the schema."""
        if off := sorted(set(frame.columns) ^ set(self.names)):
            raise BitallocError(f"table {self.name}: columns {off} are missing or unknown; see bitalloc/tables")
        if frame.duplicated(list(self.key)).any():
            raise BitallocError(f"table {self.name}: two rows share one key {self.key}")
        try:
            table = pa.Table.from_pandas(frame[self.names], schema=self.schema, preserve_index=False, safe=True)
            table.validate(full=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
            raise BitallocError(f"table {self.name}: {str(error).splitlines()[0]}") from None
        for column in self.columns:
            if not column.nullable and table[column.name].null_count:
                raise BitallocError(f"table {self.name}: column {column.name} has missing values")
        stamp = json.dumps(list(verdicts), sort_keys=True)
        table = table.replace_schema_metadata({"bitalloc.table": self.name, "bitalloc.verdicts": stamp})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        write_atomically(path, buffer.getvalue())

    def merge(self, parts: Sequence[Path], path: Path) -> None:
        """Write the rows of all `parts` as one table, a row that several hold once; verdicts as in the first."""
        merged = pd.concat([self.read(part) for part in parts], ignore_index=True)
        self.write(merged.drop_duplicates(list(self.key), ignore_index=True), path, verdicts=verdicts(parts[0]))

    def read(self, path: Path) -> pd.DataFrame:
        """Read the table; raises `BitallocError` when the file is absent, corrupted or another table."""
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise BitallocError(f"cannot read {path} ({reason}); delete it and rerun, it is made again") from None
        if table.schema.remove_metadata() != self.schema:
            raise BitallocError(f"{path} is not a {self.name} table of this version; delete it and rerun")
        return table.to_pandas(ignore_metadata=True)


def as_verdicts(gates: pd.DataFrame) -> list[dict]:
    """Rows of `GATES` as `Table.write` takes them; what could not be measured is null."""
    return gates.astype(object).where(gates.notna(), None).to_dict("records")


def verdicts(path: Path) -> list[dict]:
    """The gate verdicts that the table at `path` stands on (rows of `GATES`)."""
    metadata = pq.read_schema(path).metadata or {}
    return json.loads(metadata.get(b"bitalloc.verdicts", b"[]"))


MODEL = Column("model", STR, "name in the model sheet")
LAYER = Column("layer", STR, "module path of the matrix")
PLACE = (
    Column("block", INT, "index of the transformer block, from 0; -1 for embedding and head"),
    Column("role", STR, "the matrix's role in its block, e.g. q_proj; embedding or head outside"),
)
OPTION = (
    Column("quantizer", STR, "member of the quantiser family; `none` = passed through"),
    Column("bits", INT, "bits of a code; 16 = passed through"),
    Column("group_size", INT, "weights along the input that share one scale"),
    Column("rank", INT, "rank of the low-rank part, 0 = none"),
)
INTERVAL = (
    Column("value", FLOAT, "the point estimate, unit by metric", nullable=True),
    Column("lo", FLOAT, "lower end of the 95 % interval", nullable=True),
    Column("hi", FLOAT, "upper end of the 95 % interval", nullable=True),
    Column("n", INT, "units behind the value: windows, documents, items, plans; tokens where it has no interval"),
)


def estimate(name: str, doc: str) -> tuple[Column, Column, Column]:
    """A column of point estimates and those of the ends of their 95 % intervals; missing where not measured."""
    short, ends = name.removesuffix("_nats_per_token"), (("lo", "lower"), ("hi", "upper"))
    whole = Column(name, FLOAT, doc, nullable=True)
    return whole, *(
        Column(f"{short}_{end}", FLOAT, f"{word} end of its 95 % interval", nullable=True) for end, word in ends
    )
