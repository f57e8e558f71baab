"""Checkpoints and models: the only place that knows file layouts, tensor names, orientation and devices.

Shapes live in names: W_OI is a matrix of O outputs and I inputs (y = W x), H_II the second moment of x.
A model larger than memory is worked on as a skeleton without weights (`skeleton`), whose modules are
filled from the checkpoint one at a time (`materialise`) and emptied again (`drop`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from bitalloc import scan
from bitalloc.errors import BitallocError
from bitalloc.families import Family, family
from bitalloc.store import Store

if TYPE_CHECKING:  # scores depend on this module, and must outlive a new setting
    from bitalloc.config import Model

INDEX = "model.safetensors.index.json"
PANEL = 512  # rows of H_II
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def _settle() -> None:
    """Call every elementwise function of the maths library once, on one number.

    The first call chooses the code. Where several threads make it at once, one of them may get the code of low accuracy
    and compute its share of the tensor with errors of 1e-4: cos and sin of the positions, say, once in some hundred
    processes on a busy machine (pytorch issue 188792; docs/LOG.md).
    """
    names = (
        "acos asin atan ceil cos cosh erf erfc erfinv exp expm1 floor lgamma log log10 log1p log2 round rsqrt sigmoid"
    )
    for dtype in (torch.float32, torch.float64):
        half = torch.full((1,), 0.5, dtype=dtype)
        for name in f"{names} sin sinh sqrt tan tanh trunc".split():
            getattr(torch, name)(half)


_settle()  # every process that has a checkpoint or experiments imports this module before it computes


class Checkpoint:
    """Lazy reader of a folder of safetensors, one file or several with an index.

    Names are those of today's `transformers`: where a checkpoint leaves out the prefix of the base model
    (`h.0.ln_1.weight`, `decoder.layers.0.fc1.weight`), it is put in front. A tied head is usually absent.
    """

    def __init__(self, path: Path, family: Family) -> None:
        """Read the headers of all files. Raises `BitallocError` for a folder that cannot be used."""
        self.path, self.family = Path(path), family
        if not self.path.is_dir():
            raise BitallocError(f"checkpoint folder {path} does not exist; correct `path` in the model sheet")
        indexed = self._index()
        self._files = {file: _open(self.path / file) for file in sorted(set(indexed.values())) or self._whole()}
        self._where: dict[str, tuple[str, str]] = {}
        for file, handle in self._files.items():
            for stored in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                self._where[self._full_name(stored)] = (file, stored)
        for stored, file in indexed.items():
            if self._where.get(self._full_name(stored), ("",))[0] != file:
                raise BitallocError(
                    f"{self.path / INDEX} promises {stored!r} in {file}, which lacks it; fetch both again"
                )
        self.names = sorted(self._where)

    def _index(self) -> dict[str, str]:
        """Tensor -> file as the index has it; empty for a checkpoint of one file."""
        index = self.path / INDEX
        if (self.path / "model.safetensors").is_file() or not index.is_file():
            return {}
        try:
            indexed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError):
            raise BitallocError(f"{index} is not an index of safetensors files; fetch it again") from None
        for file in sorted(set(indexed.values())):
            if not (self.path / file).is_file():
                raise BitallocError(f"{index} names {file}, which is missing from the folder; fetch it")
        return indexed

    def _whole(self) -> list[str]:
        files = sorted(file.name for file in self.path.iterdir() if file.is_file())
        whole = (
            ["model.safetensors"] if "model.safetensors" in files else [f for f in files if f.endswith(".safetensors")]
        )
        if len(whole) == 1:
            return whole
        if whole:
            raise BitallocError(f"{self.path} holds several .safetensors files but no {INDEX}; fetch the index")
        pickles = [file for file in files if file.endswith(PICKLES)]
        found = f"only pickle files ({pickles[0]}), which can run code," if pickles else "no .safetensors file"
        raise BitallocError(f"{self.path} holds {found}; convert the weights to model.safetensors")

    def _full_name(self, stored: str) -> str:
        prefix = f"{self.family.blocks.partition('.')[0]}."
        return stored if stored.startswith((prefix, "lm_head.")) else prefix + stored

    def file(self, name: str) -> str:
        """File that holds the tensor, relative to the folder."""
        return self._where[name][0]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored."""
        if name not in self._where:
            raise BitallocError(f"checkpoint {self.path} has no tensor {name!r}; is it complete and of this family?")
        file, stored = self._where[name]
        return self._files[file].get_tensor(stored)

    def weight(self, layer: str) -> torch.Tensor:
        """W_OI of a claimed matrix, float32, contiguous. Raises `BitallocError` on NaN and Inf."""
        W_OI = _oriented(self.tensor(f"{layer}.weight"), self.family, layer).float().contiguous()
        if not W_OI.isfinite().all():
            raise BitallocError(f"tensor {layer}.weight of {self.path} holds NaN or Inf; fetch the checkpoint again")
        return W_OI


def open_checkpoint(where: Path) -> Checkpoint:
    """The checkpoint that retrieve found: `where` is its checkpoint.json, {"path", "family", ...}."""
    try:
        found = json.loads(Path(where).read_text(encoding="utf-8"))
        folder, name = Path(found["path"]), found["family"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BitallocError(f"{where} does not say where the checkpoint lies; delete it and rerun") from None
    return Checkpoint(folder, family(name))


def _open(path: Path) -> Any:
    try:
        # read, not mapped: mapped pages stay with the process until it holds the whole checkpoint
        return safe_open(path, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise BitallocError(f"{path} is truncated or not safetensors ({reason}); fetch it again") from None


def _oriented(stored: torch.Tensor, family: Family, layer: str) -> torch.Tensor:
    return stored.T if family.turned(layer) else stored


# ---- what the folder says of itself ------------------------------------------------------------------
def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder; raises `BitallocError` when it is absent or not JSON."""
    file = Path(path) / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise BitallocError(f"{file} {reason}; give a checkpoint folder in Hugging Face format") from None
    if not isinstance(raw, dict):
        raise BitallocError(f"{file} is not a model configuration; fetch it again")
    return raw


def context_length(raw: dict[str, Any]) -> int | None:
    """Tokens that a model of this config.json can attend to, where it says so."""
    return raw.get("max_position_embeddings", raw.get("n_positions"))


def check_config(name: str, path: Path, model: Model) -> None:
    """Raise `BitallocError` unless config.json agrees with the model sheet on the family and the blocks."""
    raw, file = read_config(path), Path(path) / "config.json"
    architectures = set(raw.get("architectures") or ())
    known = raw.get("model_type", model.family) == model.family
    if not known or (architectures and not architectures & set(family(model.family).architectures)):
        found = ", ".join([str(raw.get("model_type")), *sorted(architectures)])
        raise BitallocError(
            f"model {name}: the sheet says family {model.family!r}, {file} says {found}; "
            "correct `family` or the path in the model sheet"
        )
    blocks = raw.get("num_hidden_layers", raw.get("n_layer"))
    if blocks != model.blocks:
        raise BitallocError(
            f"model {name}: the sheet says {model.blocks} blocks, {file} says {blocks}; "
            "correct `blocks` in the model sheet"
        )


# ---- whole models ------------------------------------------------------------------------------------
def pick_device(name: str) -> torch.device:
    """`cpu`, `cuda`, or `auto`: the GPU when there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise BitallocError("device cuda: torch finds no GPU here; set `device: cpu` or `device: auto`")
    return torch.device(name)


def total_memory(device: torch.device) -> int:
    """Bytes of the GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def working_dtype(device: torch.device) -> torch.dtype:
    """The type that models run in: float32 on a CPU, bfloat16 on a GPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    for name in ("torchao", "torch.utils._pytree"):  # imported where torchao is installed, with remarks on itself
        getLogger(name).setLevel("ERROR")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_model(path: Path, *, device: torch.device, remote_code: bool = False, **how: Any) -> Any:
    """The whole `transformers` model, ready to evaluate, in the working type of the device.

    `how` goes to `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=working_dtype(device),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=remote_code,
                **how,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise BitallocError(f"transformers cannot load {path}: {str(error).splitlines()[0]}") from None
    return _scanned(model, device).to(device).eval()


def _scanned(model: Any, device: torch.device) -> Any:
    """The model; a state space scans by matrix products, the reference of transformers takes ten times as long."""
    if model.config.model_type == "mamba2":
        scan.install(device)
    return model


def get_weight(model: nn.Module, family: Family, layer: str) -> torch.Tensor:
    """A copy of W_OI, float32, on the model's device."""
    stored = model.get_submodule(layer).weight.detach()
    return _oriented(stored, family, layer).to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def set_weight(model: nn.Module, family: Family, layer: str, W_OI: torch.Tensor) -> None:
    """Overwrite a matrix in place; the model keeps its type and device."""
    target_OI = _oriented(model.get_submodule(layer).weight.detach(), family, layer)
    if target_OI.shape != W_OI.shape:
        raise ValueError(f"{layer} is {list(target_OI.shape)}, not {list(W_OI.shape)}")
    target_OI.copy_(W_OI)


# ---- models larger than memory -----------------------------------------------------------------------
def skeleton(path: Path, *, device: torch.device) -> Any:
    """The model of the folder's config.json with every parameter on the meta device; buffers are real."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with _quiet(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise BitallocError(f"transformers knows no model for {path}: {str(error).splitlines()[0]}") from None
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return _scanned(model, device).eval()


def materialise(
    module: nn.Module, prefix: str, checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype
) -> None:
    """Fill the parameters of `module`, which stands at `prefix` in the model, from the checkpoint."""
    for owner, leaf, parameter in _parameters(module):
        name = ".".join(part for part in (prefix, owner, leaf) if part)
        stored = checkpoint.tensor(name)
        if stored.shape != parameter.shape:
            expected, found = list(parameter.shape), list(stored.shape)
            raise BitallocError(f"tensor {name!r} is {found}, config.json makes it {expected}; fetch both again")
        filled = nn.Parameter(stored.to(device, dtype), requires_grad=False)
        module.get_submodule(owner)._parameters[leaf] = filled


def drop(module: nn.Module) -> None:
    """Empty the parameters of `module` again: back to the meta device."""
    for owner, leaf, parameter in _parameters(module):
        empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        module.get_submodule(owner)._parameters[leaf] = empty


def _parameters(module: nn.Module) -> list[tuple[str, str, nn.Parameter]]:
    """(path of the owner, name, parameter), a tied one as often as it occurs."""
    named = module.named_parameters(remove_duplicate=False)
    return [(*name.rpartition(".")[::2], parameter) for name, parameter in named]


# ---- moments -----------------------------------------------------------------------------------------
def panels(dim: int) -> list[slice]:
    """The rows of H_II that are summed and stored together, a panel from its first row's column on.

    What lies left of that is symmetric: a shard holds little more than half of H_II.

    >>> panels(600)
    [slice(0, 512, None), slice(512, 600, None)]
    """
    return [slice(start, min(start + PANEL, dim)) for start in range(0, dim, PANEL)]


def read_moment(store: Store, key: str) -> torch.Tensor:
    """H_II [I, I], float32, from the shard that a row of MOMENTS names."""
    path = store.tensors(key)
    if store.get(key) is None or path is None:
        store.forget()
        raise BitallocError(
            f"the moments {key[:12]} are missing from {store.root} or damaged; delete moments.parquet and rerun"
        )
    with _open(path) as shard:
        names = shard.keys()
        dim = max(shard.get_slice(name).get_shape()[1] for name in names)
        H_II = torch.empty(dim, dim)
        for name in names:
            panel = shard.get_tensor(name)
            start = dim - panel.shape[1]
            stop = start + len(panel)
            H_II[start:, start:stop] = panel.T
            H_II[start:stop, start:] = panel
    return H_II
