"""The native format: a self-contained folder of packed safetensors, `bitalloc.json` and the source's small files.

`transformers` loads it once `bitalloc.formats.packed` is imported: `config.json` names the option of every matrix, an
index the file of every tensor.

`bitalloc.json` holds the plan, the options it needs, the digest of the source's tensors, what the caller adds
(verdicts, say), and size and SHA-256 of every weights file, which are verified before a tensor is used.

Legend: W_OI a matrix of O outputs and I inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import safe_open

from bitalloc import families
from bitalloc.config import Sweep
from bitalloc.errors import BitallocError
from bitalloc.formats.files import copy_small, replacing, write
from bitalloc.formats.layout import METADATA, Layout, Stored, block_file, claim, layout, matrix_tensors
from bitalloc.models import INDEX, Checkpoint, materialise, skeleton, working_dtype
from bitalloc.option import Option, from_row
from bitalloc.quant import CompressedMatrix
from bitalloc.store import canonical, digest, file_digest, write_atomically
from bitalloc.tables import PLAN

FORMAT, VERSION = "bitalloc", 2
MANIFEST = "bitalloc.json"
Matrices = Callable[[str, Option], CompressedMatrix]


def source_identity(inventory: pd.DataFrame) -> str:
    """Digest of all tensors of a checkpoint, by name and content."""
    return digest(sorted(zip(inventory["tensor"], inventory["digest"], strict=True)))


def save(
    folder: Path,
    *,
    source: Checkpoint,
    inventory: pd.DataFrame,
    plan: pd.DataFrame,
    matrix: Matrices,
    sweep: Sweep,
    extra: Mapping[str, Any],
) -> None:
    """Write the plan as a checkpoint, with one block in memory; a finished equal one is left as it is.

    Everything is written to a hidden folder beside the target, flushed and renamed at the end. Raises
    `BitallocError` when the target holds something else, and when the disk is full.
    """
    folder = Path(folder)
    files = layout(inventory, plan, sweep)
    claimed = claim(inventory, plan["layer"])
    shape = claimed[claimed["claimed"]].set_index("layer")[["rows", "columns"]]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "family": source.family.name,
        "source": source_identity(inventory),
        "options": {"factor_bits": sweep.factor_bits, "symmetric": sweep.symmetric},
        "plan": [
            {name: None if pd.isna(value) else value for name, value in row.items()}
            for row in plan.join(shape, on="layer").to_dict("records")
        ],
        "extra": dict(extra),
    }
    if folder.exists():
        _check_equal(folder, content)
        return
    with replacing(folder) as temporary:
        written = {}
        for file, tensors in files.items():
            found: dict[str, torch.Tensor] = {}
            for row in plan.to_dict("records"):
                if block_file(row["block"]) == file:
                    parts = matrix(row["layer"], from_row(row, sweep)).tensors()
                    found |= {f"{row['layer']}.{name}": tensor for name, tensor in parts.items()}
            # a head is larger than a block, so that the source's are read one at a time
            get = partial(_either, found, source)
            written[file] = write(temporary / file, tensors, get, METADATA)
        copy_small(source.path, temporary)
        _introduce(temporary, files, plan, sweep)
        write_atomically(temporary / MANIFEST, canonical({**content, "files": written}).encode())


def _introduce(folder: Path, files: Layout, plan: pd.DataFrame, sweep: Sweep) -> None:
    """Say in config.json and in the index what `transformers` needs to build the modules and find their tensors."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": FORMAT,
        "factor_bits": sweep.factor_bits,
        "symmetric": sweep.symmetric,
        "layers": {row["layer"]: from_row(row, sweep).name for row in plan.to_dict("records")},
    }
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensors in files.values() for tensor in tensors)},
        "weight_map": {tensor.name: file for file, tensors in files.items() for tensor in tensors},
    }
    for name, content in (("config.json", config), (INDEX, index)):
        write_atomically(folder / name, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def _either(made: Mapping[str, torch.Tensor], source: Checkpoint, name: str) -> torch.Tensor:
    return made[name] if name in made else source.tensor(name)


def load(
    folder: Path, *, inventory: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, Callable[[str], CompressedMatrix]]:
    """(PLAN frame, matrix of a layer) of a checkpoint; a file is verified when it is first read.

    Raises `BitallocError` when the folder is incomplete or damaged and when it was made from another model
    than that of `inventory`.
    """
    reader = Reader(folder)
    if inventory is not None and reader.manifest["source"] != source_identity(inventory):
        raise BitallocError(f"{folder} was compressed from another model; delete it and rerun, it is made again")
    plan = pd.DataFrame(list(reader.plan.values()))[PLAN.names]
    return plan.astype({"cost_nats_per_token": float}), reader.matrix


def load_model(folder: Path, *, device: torch.device) -> Any:
    """The `transformers` model of a checkpoint, dequantised weights in place, ready to evaluate.

    Needs nothing but the folder. Raises `BitallocError` as `load` does.
    """
    model = skeleton(Path(folder), device=device)
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    tied = {names[model.get_output_embeddings()]: names[model.get_input_embeddings()]}
    materialise(model, "", Reader(folder, tied), device=device, dtype=working_dtype(device))
    model.tie_weights()
    return model


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 over the names and digests of the weights files."""
    return digest({file: record["sha256"] for file, record in _manifest(folder)["files"].items()})


class Reader:
    """Tensors of a checkpoint under the names that the source had, claimed matrices dequantised.

    `tied` names the tensor that stands in for one that is not stored.
    """

    def __init__(self, folder: Path, tied: Mapping[str, str] | None = None) -> None:
        self.folder, self.manifest, self.tied = Path(folder), _manifest(folder), tied or {}
        self.family = families.family(self.manifest["family"])
        self.plan = {row["layer"]: row for row in self.manifest["plan"]}
        self.options = Sweep(**self.manifest["options"])
        self._files: dict[str, Any] = {}

    def stored(self, file: str) -> list[Stored]:
        """Every tensor of a file, as it is stored."""
        return tensors_of(self.open(file))

    def raw(self, file: str, name: str) -> torch.Tensor:
        """A tensor of a file, as it is stored."""
        return self.open(file).get_tensor(name)

    def matrix(self, layer: str) -> CompressedMatrix:
        """A claimed matrix as it is stored."""
        row = self.plan[layer]
        option, file = from_row(row, self.options), self.open(block_file(row["block"]))
        names = [stored.name for stored in matrix_tensors(layer, row["rows"], row["columns"], option)]
        tensors = {name.removeprefix(f"{layer}."): file.get_tensor(name) for name in names}
        return CompressedMatrix.from_tensors(option, row["rows"], row["columns"], tensors)

    def untouched(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensors outside the plan: name -> (type as safetensors writes it, shape), in the order of the files."""
        parts = {
            stored.name
            for layer, row in self.plan.items()
            for stored in matrix_tensors(layer, row["rows"], row["columns"], from_row(row, self.options))
        }
        whole = [stored for file in self.manifest["files"] for stored in self.stored(file)]
        return {stored.name: (stored.dtype, stored.shape) for stored in whole if stored.name not in parts}

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor in the source's orientation."""
        layer = name.removesuffix(".weight")
        if layer in self.plan:
            W_OI = self.matrix(layer).dequantize()
            return W_OI.T if self.family.turned(layer) else W_OI
        for file in (block_file(-1), *self.manifest["files"]):
            if name in (handle := self.open(file)).keys():  # noqa: SIM118
                return handle.get_tensor(name)
        if name in self.tied:
            return self.tensor(self.tied[name])
        raise BitallocError(f"{self.folder} has no tensor {name!r}; delete it and rerun, it is made again")

    def open(self, file: str) -> Any:
        """The safetensors handle of a weights file, which is verified first."""
        if file not in self._files:
            path, record = self.folder / file, self.manifest["files"].get(file)
            if record is None or not path.is_file() or file_digest(path) != record["sha256"]:
                raise BitallocError(f"{path} is missing, truncated or damaged; delete the folder and rerun")
            self._files[file] = safe_open(path, framework="pt", backend="pread")
        return self._files[file]


def tensors_of(handle: Any) -> list[Stored]:
    """What an open safetensors file holds."""
    slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
    return [Stored(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()]


def _manifest(folder: Path) -> dict[str, Any]:
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if (manifest["format"], manifest["version"]) == (FORMAT, VERSION):
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise BitallocError(f"{path} is missing, damaged or of another version; delete the folder and rerun")


def _check_equal(folder: Path, content: Mapping[str, Any]) -> None:
    """Raise unless `folder` holds exactly what would be written there."""
    manifest = _manifest(folder)
    if canonical({**content, "files": manifest["files"]}) != canonical(manifest):
        raise BitallocError(f"{folder} holds another plan or model; delete it or write elsewhere")
    reader = Reader(folder)
    for file in manifest["files"]:
        reader.open(file)
