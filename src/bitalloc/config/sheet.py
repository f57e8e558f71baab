"""The model sheet, and where texts come from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from bitalloc.config.section import Positive, Section
from bitalloc.errors import nearest
from bitalloc.families import FAMILIES


class Corpus(Section):
    """Where a corpus comes from. Sources are tried in order; environment variables expand."""

    sources: list[str] = Field(
        description="`world`, `docstrings`, a local .txt, .raw, .json, .jsonl, .json.gz or .parquet file, or "
        "hub:<dataset>@<revision>/<such a file>"
    )
    separator: str = Field(
        "\n\n", description="after each document of a model without a bos token; empty: pieces of one document"
    )
    field: str = Field("text", description="of a record of .jsonl, .json.gz or .parquet that holds its text")
    kind: Literal["documents", "wikitext"] = Field(
        "documents",
        description="wikitext: lines of WikiText, to be cut into articles by the protocols",
    )


_DATA = "${BITALLOC_DATA}"
CORPORA = {
    "world": Corpus(sources=["world"], separator="\n"),
    "docstrings": Corpus(sources=["docstrings"]),
    "tinystories": Corpus(sources=[f"{_DATA}/tinystories/tinystories_1000.json"]),
    "wikitext2": Corpus(
        sources=[
            f"{_DATA}/wikitext2/wiki.test.raw",
            "hub:Salesforce/wikitext@main/wikitext-2-raw-v1/test-00000-of-00001.parquet",
        ],
        separator="",
        kind="wikitext",
    ),
    "wikitext2_train": Corpus(
        sources=[
            f"{_DATA}/wikitext2/wikitext2_train_5k.txt",
            "hub:Salesforce/wikitext@main/wikitext-2-raw-v1/train-00000-of-00001.parquet",
        ],
        separator="",
        kind="wikitext",
    ),
    "c4": Corpus(
        sources=[f"{_DATA}/c4/validation.jsonl", "hub:allenai/c4@main/en/c4-validation.00000-of-00008.json.gz"],
        separator=" ",
    ),
    "python": Corpus(
        sources=[
            f"{_DATA}/code/python_requests.txt",
            "hub:codeparrot/codeparrot-clean-valid@main/file-000000000054.json.gz",
        ],
        field="content",
    ),
    "pile": Corpus(
        sources=[
            f"{_DATA}/pile/test.jsonl",
            "hub:NeelNanda/pile-10k@main/data/train-00000-of-00001-4746b8785c874cc7.parquet",
        ]
    ),
    "redpajama": Corpus(
        sources=[
            f"{_DATA}/redpajama/sample.jsonl",
            "hub:togethercomputer/RedPajama-Data-1T-Sample@main/cc_2023-06_sample.jsonl",
        ]
    ),
}


class Model(Section):
    """A row of the model sheet. Give a hub id with a revision, or a local directory."""

    hub: str | None = Field(None, description="Hugging Face id")
    revision: str = Field("main", description="commit, tag or branch of the hub id")
    path: str | None = Field(None, description="local directory, tried before the hub; environment variables expand")
    family: str = Field(description="architecture, see bitalloc/families.py")
    blocks: Positive = Field(description="transformer blocks; the work is planned from it before the weights are here")
    remote_code: bool = Field(False, description="never set by us: run code that ships with the checkpoint")
    settings: dict[str, Any] = Field({}, description="what departs from the configuration for this model")

    @model_validator(mode="after")
    def _complete(self) -> Model:
        if self.hub is None and self.path is None:
            raise ValueError("give `hub` (an id) or `path` (a local directory)")
        if self.family not in FAMILIES:
            raise ValueError(f"unknown family {self.family!r}: {nearest(self.family, FAMILIES)}")
        return self
