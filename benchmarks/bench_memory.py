"""Peak memory of each stage on a checkpoint of the shapes of a 7B, every stage in a process of its own.

python benchmarks/bench_memory.py [--blocks 28] [--directory D] [--limit 8GB]  ->  a table, and
benchmarks/results/memory.json

Random bfloat16 weights in the shapes of Qwen2-7B go through retrieve, calibrate, the sweep of the first and the
last block and the compression of these two: `main` of the workflow's scripts, with the settings of qwen2_7b in
the model sheet but for the texts, which are fewer and shorter, and the number of options. Each stage runs under
RLIMIT_DATA: memory that it may write, touched or not, fails to be had beyond the limit. Columns:

    allocated   peak of VmData, what the limit is held against (sampled every 20 ms, as the next)
    anonymous   peak of RssAnon: resident, and no copy of a file
    resident    ru_maxrss: with pages of mapped files, which the kernel takes back when memory is short
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bitalloc import config
from bitalloc.config import Config, parse_bytes
from bitalloc.errors import BitallocError
from bitalloc.provenance import run_record

ROOT = Path(__file__).parents[1]
MODEL = "qwen2_7b"
SHAPES: dict[str, dict[str, int]] = {
    MODEL: {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "small": {  # for the test
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    },
}
STAGES = ("write", "retrieve", "calibrate", "sweep", "compress")


# ---- stages, each in a process of its own ------------------------------------------------------------
def write(folder: Path, shape: dict[str, int], blocks: int) -> None:
    """A seeded checkpoint, a shard for each block, the embedding and the head; one shard in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config

    width, inner, vocabulary = (shape[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    narrow = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    matrices = {
        **{f"self_attn.{name}_proj": rows for name, rows in (("q", width), ("k", narrow), ("v", narrow))},
        "self_attn.o_proj": width,
        **{"mlp.gate_proj": inner, "mlp.up_proj": inner, "mlp.down_proj": width},
    }
    draw = torch.Generator().manual_seed(0)

    def random(*sides: int, scale: float = 0.02) -> torch.Tensor:
        return torch.empty(sides, dtype=torch.bfloat16).normal_(0, scale, generator=draw)

    folder.mkdir(parents=True, exist_ok=True)
    made = Qwen2Config(
        **shape, num_hidden_layers=blocks, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["Qwen2ForCausalLM"], bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    made.to_json_file(folder / "config.json")
    shutil.copyfile(ROOT / "resources/tiny/tokenizer.json", folder / "tokenizer.json")
    where: dict[str, str] = {}

    def put(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(tensors, file))

    ones = torch.ones(width, dtype=torch.bfloat16)
    for block in range(blocks):
        tensors = {f"{norm}_layernorm.weight": ones.clone() for norm in ("input", "post_attention")}
        for name, rows in matrices.items():
            columns = inner if name == "mlp.down_proj" else width
            tensors[f"{name}.weight"] = random(rows, columns, scale=columns**-0.5)
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                tensors[f"{name}.bias"] = random(rows)
        put(f"block-{block:03d}.safetensors", {f"model.layers.{block}.{name}": t for name, t in tensors.items()})
    put("embedding.safetensors", {"model.embed_tokens.weight": random(vocabulary, width)})
    put("head.safetensors", {"model.norm.weight": ones, "lm_head.weight": random(vocabulary, width)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def settings_of(arguments: argparse.Namespace) -> Config:
    """Those of qwen2_7b, with the world's text for all splits and the options of this run."""
    base = config.load(ROOT / "config/config.yaml", ROOT / "config/models.yaml").for_model(MODEL)
    retrieve = {split: ["world"] for split in ("calibrate", "select", "report")} | {
        "window": arguments.window,
        "calibrate_windows": arguments.windows,
        "select_windows": 1,
        "report_windows": 1,
    }
    over = {
        "device": "cpu",
        "store": str(arguments.directory / "results/store"),
        "retrieve": base.retrieve.model_dump() | retrieve,
        "sweep": base.sweep.model_dump() | {"bits": arguments.bits, "ranks": arguments.ranks},
    }
    return config.parse(base.model_dump(mode="json") | over)


def script(name: str) -> Any:
    """`main` of one of the workflow's scripts."""
    return runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))["main"]


def stage(name: str, arguments: argparse.Namespace) -> None:
    """One stage, in this process; its tables lie in `results/` below the directory."""
    import torch

    torch.set_num_threads(arguments.threads)
    folder, results, settings = (
        arguments.directory / "checkpoint",
        arguments.directory / "results",
        settings_of(arguments),
    )
    tables = {name: results / f"{name}.parquet" for name in ("inventory", "tokens", "items", "moments")}
    checkpoint, ends = results / "checkpoint.json", sorted({0, arguments.blocks - 1})
    files = {"checkpoint": checkpoint, **tables}
    results.mkdir(parents=True, exist_ok=True)
    if name == "write":
        write(folder, SHAPES[arguments.shape], arguments.blocks)
    elif name == "retrieve":
        sheet = config.Model(path=str(folder), family="qwen2", blocks=arguments.blocks)
        found = {"path_to_checkpoint": checkpoint, "path_to_inventory": tables["inventory"]}
        script("retrieve_model")(name=MODEL, sheet=sheet, **found)
        texts = {"path_to_tokens": tables["tokens"], "path_to_items": tables["items"]}
        script("retrieve_corpora")(path_to_checkpoint=checkpoint, settings=settings, **texts)
    elif name == "calibrate":
        script("calibrate")(inputs=files, settings=settings, path_to_moments=tables["moments"])
    elif name == "sweep":
        for block in ends:
            unit, path = f"block-{block:03d}", results / f"sweep-{block}.parquet"
            script("sweep")(unit=unit, inputs=files, settings=settings, path_to_errors=path)
    else:
        compress(ends, settings, results, checkpoint, tables)


def compress(blocks: list[int], settings: Config, results: Path, checkpoint: Path, tables: dict[str, Path]) -> None:
    """The model without the other blocks, every matrix at the dearest option."""
    from bitalloc.option import options
    from bitalloc.tables import INVENTORY, PLAN

    whole = INVENTORY.read(tables["inventory"])
    part = whole[whole["block"].isin([-1, *blocks])]
    option = options(settings.sweep)[-1]
    plan = part.loc[part["claimed"], ["layer", "block", "role", "rows", "columns"]]
    plan["nbytes"] = [option.nbytes(*sides) for sides in zip(plan.pop("rows"), plan.pop("columns"), strict=True)]
    chosen = {name: getattr(option, name) for name in ("quantizer", "bits", "group_size", "rank")}
    INVENTORY.write(part, results / "part.parquet")
    PLAN.write(plan.assign(**chosen, cost_nats_per_token=0.0), results / "plans/dearest.parquet")
    inputs = {"folder": results / "plans", "checkpoint": checkpoint, "moments": tables["moments"]}
    script("compress")(
        plan="dearest",
        inputs={**inputs, "inventory": results / "part.parquet"},
        settings=settings,
        results=results,
        path_to_table=results / "checkpoints.parquet",
    )


# ---- measuring ---------------------------------------------------------------------------------------
def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a stage in a process of its own: peaks in bytes, seconds, bytes that it left on disk."""
    before, start = on_disk(arguments.directory), time.perf_counter()
    command = [sys.executable, __file__, *arguments.given, "--stage", name, "--directory", str(arguments.directory)]
    # other pools of Arrow reserve a gigabyte of addresses and leave it untouched, which the limit counts
    process = subprocess.Popen(command, env=os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"})
    peaks = {"VmData": 0, "RssAnon": 0}
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        said = Path(f"/proc/{process.pid}/status").read_text()
        for field, peak in peaks.items():
            found = re.search(rf"{field}:\s+(\d+) kB", said)
            peaks[field] = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)  # it is reaped already
    return {
        "stage": name,
        "finished": process.returncode == 0,
        "allocated": peaks["VmData"],
        "anonymous": peaks["RssAnon"],
        "resident": usage.ru_maxrss * 1024,
        "wall_s": time.perf_counter() - start,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "disk": on_disk(arguments.directory) - before,
    }


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def needed(shape: dict[str, int], blocks: int) -> dict[str, int]:
    """Bytes on disk: the checkpoint, the moments, and the compressed part."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    narrow = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    block, ends = 2 * (2 * width * (width + narrow) + 3 * width * inner), 4 * width * shape["vocab_size"]
    moments = sum(2 * dim * (dim + 512) for dim in (width, width, width, inner))  # half, and panels on the diagonal
    return {"checkpoint": blocks * block + ends, "moments": blocks * moments, "compressed": block + ends}


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--directory", type=Path, help="where files go and stay; a temporary folder by default")
    parser.add_argument("--limit", default="8GB", help="bytes that a stage may allocate")
    parser.add_argument("--shape", choices=SHAPES, default=MODEL)
    parser.add_argument("--window", type=int, default=128, help="tokens of a calibrate window")
    parser.add_argument("--windows", type=int, default=4, help="calibrate windows")
    parser.add_argument("--bits", type=int, nargs="+", default=[3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 128])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=STAGES, nargs="+", default=STAGES, help="stages; --directory has the others'")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results/memory.json")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    return parser.parse_args(given, argparse.Namespace(given=given))


def main() -> None:
    arguments = parse(sys.argv[1:])
    if arguments.stage:
        resource.setrlimit(resource.RLIMIT_DATA, (parse_bytes(arguments.limit),) * 2)
        stage(arguments.stage, arguments)
    elif arguments.directory:
        run(arguments)
    else:
        with tempfile.TemporaryDirectory(prefix="bitalloc-memory-") as temporary:
            arguments.directory = Path(temporary)
            run(arguments)


def run(arguments: argparse.Namespace) -> None:
    parts = needed(SHAPES[arguments.shape], arguments.blocks)
    arguments.directory.mkdir(parents=True, exist_ok=True)
    missing = sum(parts.values()) - on_disk(arguments.directory) - shutil.disk_usage(arguments.directory).free
    said = ", ".join(f"{name} {nbytes / 1e9:.1f} GB" for name, nbytes in parts.items())
    print(f"{arguments.shape}, {arguments.blocks} blocks, in {arguments.directory}: {said}", flush=True)
    if missing > 0:
        raise BitallocError(f"{missing / 1e9:.1f} GB of disk are missing; give a --directory with more, or --blocks")
    columns = ("allocated", "anonymous", "resident", "disk")
    print(f"{'stage':<10}" + "".join(f"{name:>12}" for name in columns) + "   (GB)  wall s   CPU s", flush=True)
    rows = []
    for name in arguments.only:
        rows.append(row := measure(name, arguments))
        sizes = "".join(f"{row[column] / 1e9:12.2f}" for column in columns)
        note = "" if row["finished"] else "   FAILED"
        print(f"{name:<10}{sizes}{row['wall_s']:15.0f}{row['cpu_s']:8.0f}{note}", flush=True)
    told = {
        name: getattr(arguments, name) for name in ("shape", "blocks", "limit", "window", "windows", "bits", "ranks")
    }
    told |= {"threads": arguments.threads, "rows": rows}
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.write_text(json.dumps({"record": run_record("torch", "safetensors"), **told}, indent=1) + "\n")
    if over := [row["stage"] for row in rows if not row["finished"]]:
        raise BitallocError(f"{', '.join(over)} did not finish within {arguments.limit}")


if __name__ == "__main__":
    try:
        main()
    except BitallocError as error:
        sys.exit(f"error: {error}")
