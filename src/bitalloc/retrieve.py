"""Retrieve: the checkpoint and what is in it, token windows and items. W_OI has O outputs and I inputs."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer

from bitalloc import corpus
from bitalloc.config import Config, Model, expand
from bitalloc.corpus import UnavailableError, hub, load_tokenizer
from bitalloc.errors import BitallocError, nearest
from bitalloc.families import Family
from bitalloc.models import Checkpoint, check_config, context_length, read_config
from bitalloc.world import Item, World

FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "README.md"]


def resolve(name: str, model: Model) -> tuple[Path, str]:
    """Folder of the checkpoint and its revision (`local` for a folder of the user's), checked against the sheet.

    The local path comes first, then the Hugging Face hub with its own cache and environment (HF_HOME,
    HF_HUB_OFFLINE, HF_TOKEN). Raises `BitallocError` with all that was tried.
    """
    tried = []
    if model.path is not None:
        folder = expand(model.path)
        if folder is not None and Path(folder).is_dir():
            check_config(name, Path(folder), model)
            return Path(folder), "local"
        tried.append(f"{model.path} ({'an environment variable is not set' if folder is None else 'no such folder'})")
    if model.hub is not None:
        try:
            folder = hub(model.hub, revision=model.revision, files=FILES)
        except UnavailableError as reason:
            tried.append(f"{model.hub}@{model.revision} on the hub ({reason})")
        else:
            check_config(name, folder, model)
            return folder, folder.name
    raise BitallocError(
        f"model {name}: tried {', '.join(tried)}; point to a copy: --config 'models={{{name}: {{path: /your/copy}}}}'"
    )


# ---- inventory ---------------------------------------------------------------------------------------
def inventory(name: str, path: Path, family: Family) -> pd.DataFrame:
    """Every tensor of the checkpoint, claimed matrices in the order of computation first: an INVENTORY frame.

    Reads every byte once, a tensor at a time. Raises `BitallocError` for NaN or Inf in a claimed matrix,
    a tensor that the family does not know, and a block or a matrix that is missing.
    """
    checkpoint = Checkpoint(path, family)
    tied_head = read_config(path).get("tie_word_embeddings", family.tied)
    rows = []
    for tensor in checkpoint.names:
        role, block, kind, reason = family.claim(tensor)
        stored = checkpoint.tensor(tensor)
        layer = tensor.rpartition(".")[0]
        if role is not None:
            outputs, inputs = checkpoint.weight(layer).shape
        else:
            outputs, inputs = (len(stored), stored[0].numel()) if stored.dim() else (1, 1)
        rows.append(
            {
                "model": name,
                "tensor": tensor,
                "layer": layer,
                "block": _block(tensor, family) if block is None else block,
                "role": role.name if role else "",
                "kind": kind,
                "site": f"{block}.{role.site}" if role else "",
                "rows": outputs,
                "columns": inputs,
                "dtype": str(stored.dtype).removeprefix("torch."),
                "nbytes": stored.nbytes,
                "tied": False,
                "claimed": role is not None,
                "reason": reason,
                "file": checkpoint.file(tensor),
                "digest": hashlib.sha256(stored.flatten().view(torch.uint8).numpy()).hexdigest(),
            }
        )
        del stored  # before the next one comes: the embedding and the head may be neighbours
    embeddings = {row["digest"] for row in rows if row["kind"] == "embedding"}
    for row in rows:
        # a head that differs from the embedding is a head of its own, whatever config.json says
        row["tied"] = bool(tied_head and row["kind"] == "head" and row["digest"] in embeddings)
    order = {role.name: index for index, role in enumerate(family.roles)}
    rows.sort(key=lambda row: (not row["claimed"], row["block"], order.get(row["role"], -1), row["tensor"]))
    _check_complete(rows, path, family)
    return pd.DataFrame(rows)


def _block(tensor: str, family: Family) -> int:
    """Block that an excluded tensor lies in; -1 outside the blocks."""
    inside = tensor.startswith(f"{family.blocks}.")
    return int(tensor.removeprefix(f"{family.blocks}.").partition(".")[0]) if inside else -1


def _check_complete(rows: list[dict], path: Path, family: Family) -> None:
    raw = read_config(path)
    blocks = raw.get("num_hidden_layers", raw.get("n_layer"))
    there = {row["layer"] for row in rows if row["claimed"]}
    for block in range(blocks):
        for role in family.roles:
            if family.layer(block, role) not in there:
                raise BitallocError(f"checkpoint {path} lacks {family.layer(block, role)}.weight; fetch it again")


# ---- texts and items ---------------------------------------------------------------------------------
def tokens(config: Config, path: Path) -> pd.DataFrame:
    """Token windows of the splits calibrate, select and report: a TOKENS frame."""
    raw = read_config(path)
    return corpus.windows(
        config,
        load_tokenizer(path),
        bos=raw.get("bos_token_id"),
        vocabulary=raw.get("vocab_size"),
        longest=context_length(raw),
    )


def items(config: Config, path: Path) -> pd.DataFrame:
    """The synthetic world's questions that `retrieve.items` asks for: an ITEMS frame, empty without any.

    `facts` yields two tasks, those in a form seen in training and `facts_held_out`. Prompts begin with the
    bos token as documents do in training. Chance is one over the choices; for generated digits 10^-digits.
    """
    columns = ["task", "item", "group", "prompt", "choices", "answer", "chance"]
    if not config.retrieve.items:
        return pd.DataFrame(columns=columns)
    world, tokenizer, raw = World(), load_tokenizer(path), read_config(path)
    make = {"facts": world.fact_items, "sums": world.sum_items, "keys": world.key_items, "passkey": world.passkey_items}
    rows: list[dict] = []
    for task, count in config.retrieve.items.items():
        if task not in make:
            raise BitallocError(f"retrieve.items: unknown task {task!r}: {nearest(task, make)}")
        for item in make[task](random.Random(f"items {task} {config.seed}"), count):
            rows.append(_tokenised(item, tokenizer, raw))
    frame = pd.DataFrame(rows)
    frame["item"] = frame.groupby("task").cumcount()
    return frame[columns]


def _tokenised(item: Item, tokenizer: Tokenizer, raw: dict) -> dict:
    prompt, *choices = (
        encoding.ids for encoding in tokenizer.encode_batch([item.prompt, *item.choices], add_special_tokens=False)
    )
    if raw.get("bos_token_id") is not None:
        prompt = [raw["bos_token_id"], *prompt]
    longest, takes = len(prompt) + max(map(len, choices)), context_length(raw)
    if takes is not None and longest > takes:
        raise BitallocError(
            f"an item of {item.task} takes {longest} tokens, the model {takes}; leave {item.task} out of retrieve.items"
        )
    return {
        "task": item.task,
        "group": item.group,
        "prompt": prompt,
        "choices": choices,
        "answer": item.answer,
        "chance": 1 / len(choices) if len(choices) > 1 else 10.0 ** -len(item.choices[0]),
    }
