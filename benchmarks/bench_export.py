"""Every export format on one random model: bytes against the promise, throughput, memory, time to load.

python benchmarks/bench_export.py [--width 1024] [--blocks 8]  ->  a table, and benchmarks/results/export.json

A Llama of random 16-bit weights is compressed by rounding to three plans (all at the smallest option, options in
turn, all at the largest) and each is exported. Columns, each measured in a process of its own, once:

    ratio        bytes on disk over bytes promised before
    MB/s         bytes written for each second, and for each second that copying the same bytes takes (`copy MB/s`),
                 both flushed to disk
    peak / block peak memory above that at the start, over the largest block of 16-bit weights
    load s       until transformers has computed the first logits (gguf: unpacked, without adapter), and the same for
                 the unquantised model (`plain s`); gptq needs GPTQModel and is not loaded

Plans with rank are left out where a format refuses them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save as to_bytes

from bitalloc import retrieve
from bitalloc.config import Sweep
from bitalloc.errors import BitallocError
from bitalloc.experiments import Experiments
from bitalloc.export import FORMATS, export
from bitalloc.families import FAMILIES
from bitalloc.formats import bitalloc
from bitalloc.models import Checkpoint
from bitalloc.option import Option, options
from bitalloc.provenance import run_record
from bitalloc.store import Store, digest

SWEEP = Sweep(quantizers=["rtn"], bits=[2, 3, 4], group_sizes=[128], ranks=[0, 16], factor_bits=16, keep_matrices=False)
IDS = torch.arange(16)[None]


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `work` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def build(folder: Path, width: int, blocks: int) -> None:
    """A random model, and the native checkpoints of three plans."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    inner = 3 * width
    shape = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks, "vocab_size": 8192}
    config = LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "source", max_shard_size="64MB")
    inventory = retrieve.inventory("random", folder / "source", FAMILIES["llama"])
    store, moments = Store(folder / "store"), []
    for row in inventory[inventory["claimed"]].drop_duplicates("site").itertuples():
        key = digest(row.columns)
        store.put(key, {}, to_bytes({"H_II": torch.eye(row.columns)}))
        moments.append({"site": row.site, "key": key, "digest": key})
    experiments = Experiments(
        checkpoint=Checkpoint(folder / "source", FAMILIES["llama"]),
        inventory=inventory,
        moments=pd.DataFrame(moments),
        store=store,
        sweep=SWEEP,
        device=torch.device("cpu"),
    )
    offered = options(SWEEP)
    for name, chosen in (("smallest", offered[:1]), ("mixed", offered), ("largest", offered[-1:])):
        bitalloc.save(
            folder / "models" / name,
            source=experiments.checkpoint,
            inventory=inventory,
            plan=plan(experiments, chosen),
            matrix=experiments.matrix,
            sweep=SWEEP,
            extra={},
        )


def plan(experiments: Experiments, offered: list[Option]) -> pd.DataFrame:
    rows = []
    for place, (layer, row) in enumerate(experiments.layers.items()):
        option = offered[place % len(offered)]
        chosen = {name: getattr(option, name) for name in ("quantizer", "bits", "group_size", "rank")}
        nbytes = option.nbytes(row["rows"], row["columns"])
        rows.append({"layer": layer, "block": row["block"], "role": row["role"], **chosen, "nbytes": nbytes})
    return pd.DataFrame(rows).assign(cost_nats_per_token=0.0)


def write(source: Path, target: Path, name: str) -> dict[str, float]:
    bitalloc.Reader(source)  # imports are no part of it
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    row = export(source, target, name=name).iloc[0]
    seconds = time.perf_counter() - start
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return {"nbytes": int(row["nbytes"]), "promised": int(row["predicted_nbytes"]), "seconds": seconds, "grown": grown}


def copy(source: Path, target: Path) -> float:
    """Seconds to copy a folder's files and flush them."""
    start = time.perf_counter()
    target.mkdir()
    for path in [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]:
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


def load(folder: Path, file: str | None = None) -> float:
    """Seconds until a model of `transformers`, with its adapter if there is one, has computed logits."""
    import peft
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, gguf_file=file)
    with torch.inference_mode():
        model(IDS)
        if (folder / "adapter").is_dir():
            peft.PeftModel.from_pretrained(model, folder / "adapter")(IDS)
    return time.perf_counter() - start


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=8)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="bitalloc-export-") as temporary:
        folder = Path(temporary)
        apart(build, folder, given.width, given.blocks)
        block = 2 * given.width * (4 * given.width + 3 * 3 * given.width)
        plain_s = apart(load, folder / "source")
        columns = ("ratio", "MB/s", "copy MB/s", "peak / block", "load s", "plain s")
        print(f"{'format':>12}{'plan':>10}{'MB':>8}" + "".join(f"{column:>14}" for column in columns), flush=True)
        for name, source in itertools.product(FORMATS, sorted((folder / "models").iterdir())):
            try:
                FORMATS[name].refuse(bitalloc.Reader(source))
            except BitallocError:
                continue
            target = folder / name / (f"{source.name}.gguf" if name == "gguf" else source.name)
            target.parent.mkdir(exist_ok=True)
            made = apart(write, source, target, name)
            copy_s = apart(copy, target, folder / "copy")
            shutil.rmtree(folder / "copy")
            where = (target.parent, target.name) if name == "gguf" else (target,)
            load_s = float("nan") if name == "gptq" else apart(load, *where)
            values = (
                made["nbytes"] / made["promised"],
                made["nbytes"] / made["seconds"] / 1e6,
                made["nbytes"] / copy_s / 1e6,
                made["grown"] / block,
                load_s,
                plain_s,
            )
            print(
                f"{name:>12}{source.name:>10}{made['nbytes'] / 1e6:8.1f}"
                + "".join(f"{value:14.4g}" for value in values),
                flush=True,
            )
            rows.append(
                {"format": name, "plan": source.name, **made, **dict(zip(columns, map(_known, values), strict=True))}
            )
    path = Path(__file__).parent / "results/export.json"
    record = run_record("torch", "transformers", "compressed-tensors", "peft")
    path.write_text(json.dumps({"record": record, **vars(given), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
