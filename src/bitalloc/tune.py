"""Tune: the codes of a plan learned, block by block and then through the whole model -> TUNED.

The map (options, bytes) of a plan is kept; what is rounded is learned on calibrate windows from where GPTQ left it. A
block learns to give, from what the tuned blocks before it put out, what the original gives on its own inputs: signed
gradient descent on rounding and scales (SignRound, Cheng et al. 2023). The polish then follows the KL to the original
model's predictions through all blocks at once, and a little of the NLL of the text itself. Of all iterates the best on
windows held out from training is kept, the start among them; of the tuned and the swept plan the one of lower KL on the
select split is shipped.

One block with its gradients is in memory at a time, hidden states lie in scratch files, each finished block is a shard
of the store. The polish needs the whole model with gradients, and begins anew when it is killed.

Axes: N windows, T tokens, D hidden width, V vocabulary; W_OI a matrix of O outputs and I inputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.func import functional_call

from bitalloc.config import Tune
from bitalloc.errors import BitallocError
from bitalloc.experiments import Experiments
from bitalloc.models import load_model, read_config, set_weight, total_memory, working_dtype
from bitalloc.option import PASS_THROUGH, Option, from_row
from bitalloc.progress import Progress
from bitalloc.provenance import source_digest
from bitalloc.quant import CompressedMatrix
from bitalloc.quant.learned import Learned, descend
from bitalloc.store import JSON, digest
from bitalloc.stream import Scratch, Stream, scratch
from bitalloc.suites.scoring import Head, Windows, compare, hidden
from bitalloc.tables import TUNED, TUNED_OPTIONS

BLOCK, POLISH, SELECT = "block", "polish", "select"
POLISH_NBYTES = 38  # a learned weight: it, its gradient, Adam's two, the best so far, and what backward needs of it
LOGITS = 2**25  # entries of [N, T, V] that are in memory at once


def tune(
    *,
    name: str,
    plan: pd.DataFrame,
    tokens: pd.DataFrame,
    inventory: pd.DataFrame,
    experiments: Experiments,
    settings: Tune,
    seed: int,
    remote_code: bool = False,
) -> pd.DataFrame:
    """Learn the codes of a PLAN frame: a TUNED frame; the tensors go to the store.

    Raises `BitallocError` when there are no windows to learn on or to judge by, for a model too large for the polish,
    and for scores that are not finite.
    """
    run = _Run(name, plan, tokens, inventory, experiments, settings, seed, remote_code)
    if settings.polish:
        run.require_memory()  # before hours of blocks
    rows = run.blocks()
    if settings.polish:
        rows.append(run.polish(rows))
    rows.append(run.judge(rows))
    return pd.DataFrame(rows)[TUNED.names]


def options(
    *,
    sweep: pd.DataFrame,
    tokens: pd.DataFrame,
    inventory: pd.DataFrame,
    experiments: Experiments,
    settings: Tune,
    seed: int,
) -> pd.DataFrame:
    """TUNED_OPTIONS: `settings.sample` pairs of a block and an option of SWEEP, all matrices of the block at it."""
    place = ["quantizer", "bits", "group_size", "rank"]
    cheap = sweep[sweep["quantizer"] != PASS_THROUGH].groupby(["block", *place], sort=True)["rel_error"].mean()
    draw = np.random.default_rng([seed, *b"options"]).permutation(len(cheap))[: settings.sample]
    drawn = cheap.iloc[np.sort(draw)].reset_index()
    matrices = inventory.loc[inventory["claimed"] & (inventory["block"] >= 0), ["layer", "block"]]
    progress = Progress("tune options", len(drawn) * settings.iterations, unit="steps")
    runs, rows = {}, []
    for option in drawn[place].drop_duplicates().to_dict("records"):
        plan = matrices.assign(**option)
        runs[tuple(option.values())] = run = _Run("", plan, tokens, inventory, experiments, settings, seed, False)
        run.progress = progress
    ids, batch = run.ids_NT, settings.batch
    with scratch(experiments.store.root / "scratch" / digest([run.identity, "options"])) as folder:
        original, stream = Scratch(folder, len(ids.split(batch))), Stream(experiments.checkpoint, experiments.device)
        stream.enter(ids.split(batch), into=original)
        stream.enter([ids[:size] for size in range(1, batch + 1)])
        for block in range(int(drawn["block"].max()) + 1):
            with stream.filled(block):
                work = _Block(stream, block, original, original, batch)
                work.carry(original, {})
                for row in drawn[drawn["block"] == block].to_dict("records"):
                    run = runs[tuple(row[name] for name in place)]
                    swept = [experiments.shard(layer, run.options[layer]) for layer in run.layers[block]]
                    key = digest({**run.identity, "alone": block, "swept": swept})
                    record = run._once(key, lambda run=run, work=work: (run._block(work)[0], None))
                    before, after = record["loss_before"], record["loss_after"]
                    errors = {"block_error_swept": before, "block_error_learned": min(before, after)}
                    rows.append({**row, **errors, "key": key})
            original.drop(block)
    return pd.DataFrame(rows)[TUNED_OPTIONS.names]


class Tuned:
    """The matrices of a tuned plan: learned ones from the store, all others as they were swept."""

    def __init__(self, experiments: Experiments, plan: pd.DataFrame, rows: Iterable[Mapping[str, Any]]) -> None:
        """`rows` of TUNED: of what was kept later rows stand before earlier ones; nothing was if `select` says so."""
        self.experiments, self.store = experiments, experiments.store
        self.block = plan.set_index("layer")["block"].to_dict()
        self.keys: dict[int, str] = {}
        for row in rows:
            if row["part"] == SELECT and not row["kept"]:
                self.keys = {}
            elif row["kept"] and row["part"] == POLISH:
                self.keys = dict.fromkeys(self.block.values(), row["key"])
            elif row["kept"] and row["part"] == BLOCK:
                self.keys[row["block"]] = row["key"]

    def shard(self, layer: str, option: Option) -> str:
        """The shard that holds the matrix."""
        return self._key(layer, option) or self.experiments.shard(layer, option)

    def matrix(self, layer: str, option: Option) -> CompressedMatrix:
        """The matrix; raises `BitallocError` when its shard is lost."""
        key = self._key(layer, option)
        if key is None:
            return self.experiments.matrix(layer, option)
        path = self.store.tensors(key) if self.store.get(key) is not None else None
        if path is None:
            raise BitallocError(
                f"the tuned codes of {layer} are missing from {self.store.root} or damaged; delete the tables of tune "
                "and rerun"
            )
        found = {tensor: value for tensor, value in load_file(path).items() if tensor.startswith(f"{layer}:")}
        row = self.experiments.layers[layer]
        tensors = {tensor.removeprefix(f"{layer}:"): value for tensor, value in found.items()}
        return CompressedMatrix.from_tensors(option, row["rows"], row["columns"], tensors)

    def _key(self, layer: str, option: Option) -> str | None:
        learnable = option.quantizer != PASS_THROUGH and self.block[layer] >= 0
        return self.keys.get(self.block[layer]) if learnable else None


def _serialised(learned: Mapping[str, Learned]) -> bytes:
    parts = {layer: matrix.compressed().tensors() for layer, matrix in learned.items()}
    return save({f"{layer}:{name}": tensor for layer, tensors in parts.items() for name, tensor in tensors.items()})


class _Block:
    """One block as a regression: what its weights make of the tuned stream, against what the original put out."""

    def __init__(self, stream: Stream, block: int, original: Scratch, tuned: Scratch, batch: int) -> None:
        self.stream, self.block, self.original, self.tuned, self.batch = stream, block, original, tuned, batch
        self.prefix = f"{stream.family.blocks}.{block}."

    def named(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W_OI by layer, as the block's own parameters."""
        dtype, turned = working_dtype(self.stream.device), self.stream.family.turned
        return {
            f"{layer.removeprefix(self.prefix)}.weight": (W_OI.T if turned(layer) else W_OI).to(dtype)
            for layer, W_OI in weights.items()
        }

    @torch.no_grad()
    def carry(self, states: Scratch, weights: Mapping[str, Tensor]) -> None:
        """Take a stream to the next block."""
        for batch in range(states.batches):
            states.write(self.block + 1, batch, self.stream.run(self.block, states.read(self.block, batch), weights))

    def errors(self, windows: Sequence[int], states: Scratch, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """||Y - Y*||_F^2 and ||Y*||_F^2 of these windows, Y* what the original block put out on the original stream."""
        out = self.stream.run(self.block, self._read(states, windows, self.block), weights).float()
        aim = self._read(self.original, windows, self.block + 1).float()
        return (out - aim).square().sum(), aim.square().sum()

    @torch.no_grad()
    def error(self, windows: Sequence[int], weights: Mapping[str, Tensor]) -> float:
        """Relative error of the block's output on the tuned stream, an energy ratio."""
        parts = [self.errors(turn, self.tuned, weights) for turn in _turns(windows, self.batch)]
        error, energy = (float(sum(part)) for part in zip(*parts, strict=True))
        return error / energy

    def _read(self, states: Scratch, windows: Sequence[int], block: int) -> Tensor:
        places = [divmod(window, self.batch) for window in windows]
        found = [states.read(block, batch, slice(row, row + 1)) for batch, row in places]
        return torch.cat(found).to(self.stream.device)


def _turns(windows: Sequence[int], size: int) -> Iterator[list[int]]:
    """
    >>> list(_turns(range(5), 2))
    [[0, 1], [2, 3], [4]]
    """
    for start in range(0, len(windows), size):
        yield list(windows[start : start + size])


class _Run:
    """One plan on its way: windows, keys and, while something is missing, streams and model."""

    def __init__(  # noqa: PLR0917 - as `tune` got them
        self,
        name: str,
        plan: pd.DataFrame,
        tokens: pd.DataFrame,
        inventory: pd.DataFrame,
        experiments: Experiments,
        settings: Tune,
        seed: int,
        remote_code: bool,
    ) -> None:
        self.name, self.experiments, self.settings, self.seed = name, experiments, settings, seed
        self.store, self.device, self.remote_code = experiments.store, experiments.device, remote_code
        self.checkpoint, self.plan, self.tokens, self.inventory = experiments.checkpoint, plan, tokens, inventory
        self.options = {row["layer"]: from_row(row, experiments.sweep) for row in plan.to_dict("records")}
        self.layers: dict[int, list[str]] = {}
        for layer, block in zip(plan["layer"], plan["block"], strict=True):
            self.layers.setdefault(int(block), []).append(layer)
        self.tables = self.layers.pop(-1, [])
        chosen = tokens[tokens["split"] == "calibrate"]
        if len(chosen) < 2:
            raise BitallocError("codes are learned on the split calibrate: set retrieve.calibrate_windows to 2 or more")
        # some to learn on, some to judge the iterates by: which, the seed says
        order = np.random.default_rng([seed, *b"windows"]).permutation(len(chosen))[: max(2, settings.windows)]
        self.ids_NT = torch.from_numpy(np.stack(chosen["tokens"].to_list()).astype(np.int64))[order]
        held = min(len(order) - 1, max(1, round(settings.holdout * len(order))))
        self.held, self.train = list(range(held)), list(range(held, len(order)))
        self.identity = {
            "stage": "tune",
            "weights": digest(sorted(zip(inventory["tensor"], inventory["digest"], strict=True))),
            "config": digest(read_config(self.checkpoint.path)),
            "tokens": digest(self.ids_NT.tolist()),
            "tables": [experiments.shard(layer, self.options[layer]) for layer in self.tables],
            "settings": settings.model_dump(
                exclude={"sample", *(name for name in Tune.model_fields if "polish" in name)}
            ),
            "seed": seed,
            "dtype": str(working_dtype(self.device)),
            "code": source_digest("bitalloc.tune"),
        }
        self.keys: dict[int, str] = {}
        self.last = digest(self.identity)  # the key of what has been done so far
        for block, layers in sorted(self.layers.items()):
            swept = [experiments.shard(layer, self.options[layer]) for layer in layers]
            self.keys[block] = self.last = digest({"upstream": self.last, "block": block, "swept": swept})
        total = len(self.keys) * settings.iterations + settings.polish
        self.progress = Progress("tune", total, unit="steps")
        self.progress.note = name

    def _learns(self, layer: str) -> bool:
        return self.options[layer].quantizer != PASS_THROUGH

    def _swept(self, layer: str) -> CompressedMatrix:
        return self.experiments.matrix(layer, self.options[layer])

    def _tuned(self, rows: Iterable[Mapping[str, Any]]) -> Callable[[str], CompressedMatrix]:
        tuned = Tuned(self.experiments, self.plan, rows)
        return lambda layer: tuned.matrix(layer, self.options[layer])

    def _learned(self, layer: str, matrix: CompressedMatrix, **how: Any) -> Learned:
        return Learned(matrix, self.checkpoint.weight(layer).to(self.device), **how)

    def _row(self, part: str, block: int, record: JSON, key: str) -> dict[str, Any]:
        return {"plan": self.name, "part": part, "block": block, **record, "key": key}

    def _once(self, key: str, compute: Callable[[], tuple[JSON, bytes | None]]) -> JSON:
        """The record under `key`, computed by one process."""
        record = self.store.get(key)
        if record is None:
            with self.store.lock(key, f"[tune] another process tunes {self.name}; waiting for it"):
                record = self.store.get(key)
                if record is None:
                    start = time.perf_counter()
                    found, tensors = compute()
                    record = {**found, "wall_s": time.perf_counter() - start}
                    self.store.put(key, record, tensors)
        return record

    # ---- block by block
    def blocks(self) -> list[dict[str, Any]]:
        """A row for each block."""
        records = {block: self.store.get(key) for block, key in self.keys.items()}
        missing = [block for block, record in records.items() if record is None]
        self.progress.advance(self.settings.iterations * (len(records) - len(missing)), cached=True)
        if missing:
            with (
                self.store.lock(digest(self.last), f"[tune] another process tunes {self.name}; waiting for it"),
                scratch(self.store.root / "scratch" / self.last) as folder,
            ):
                batches = self.ids_NT.split(self.settings.batch)
                original, tuned = (Scratch(folder / name, len(batches)) for name in ("original", "tuned"))
                first = max((b for b in range(missing[0] + 1) if original.has(b) and tuned.has(b)), default=-1)
                stream = Stream(self.checkpoint, self.device)
                if first < 0:
                    stream.enter(batches, into=original)
                    tables = {layer: self._swept(layer).dequantize() for layer in self.tables}
                    stream.enter(batches, into=tuned, tables=tables)
                stream.enter([self.ids_NT[:size] for size in range(1, self.settings.batch + 1)])
                for block in range(max(first, 0), missing[-1] + 1):
                    with stream.filled(block):
                        work = _Block(stream, block, original, tuned, self.settings.batch)
                        work.carry(original, {})
                        if records[block] is None:
                            records[block] = self._once(self.keys[block], lambda work=work: self._block(work))
                        found = self._tuned([self._row(BLOCK, block, records[block], self.keys[block])])
                        work.carry(tuned, work.named(self._weights(block, found)))
                    original.drop(block)
                    tuned.drop(block)
        return [self._row(BLOCK, block, records[block], key) for block, key in self.keys.items()]

    def _weights(self, block: int, matrix: Callable[[str], CompressedMatrix]) -> dict[str, Tensor]:
        return {layer: matrix(layer).dequantize().to(self.device) for layer in self.layers[block]}

    def _block(self, work: _Block) -> tuple[JSON, bytes | None]:
        """Learn one block: its record and, where something was gained, the shard."""
        settings, weights = self.settings, self._weights(work.block, self._swept)
        learned = {
            layer: self._learned(layer, self._swept(layer), nearest=settings.start == "nearest")
            for layer in self.layers[work.block]
            if self._learns(layer)
        }
        given = work.tuned if settings.inputs == "tuned" else work.original

        def now() -> dict[str, Tensor]:
            return work.named(weights | {layer: matrix.weight() for layer, matrix in learned.items()})

        def loss(windows: Sequence[int]) -> Tensor:
            error, energy = work.errors(windows, given, now())
            return error / energy

        before = work.error(self.held, work.named(weights))
        if not math.isfinite(before):
            raise BitallocError(f"block {work.block} of plan {self.name} puts out NaN or Inf; rerun its sweep")
        step, after = descend(
            learned,
            settings.learn,
            loss=loss,
            held=torch.no_grad()(lambda: work.error(self.held, now())),
            train=self.train,
            steps=settings.iterations,
            rate=settings.rate,
            batch=settings.batch,
            optimizer=settings.optimizer,
            seed=[self.seed, work.block],
            advance=self.progress.advance,
        )
        return self._outcome(before, after, step, learned)

    def _outcome(
        self, before: float, after: float, step: int, learned: Mapping[str, Learned]
    ) -> tuple[JSON, bytes | None]:
        kept = after < before
        record = {"step": step, "loss_before": before, "loss_after": after, "kept": kept}
        return {**record, "note": "" if kept else "no iterate was better"}, _serialised(learned) if kept else None

    # ---- the whole model
    @cached_property
    def model(self) -> Any:
        model = load_model(self.checkpoint.path, device=self.device, remote_code=self.remote_code)
        return model.requires_grad_(False)

    def _put_on(self, matrix: Callable[[str], CompressedMatrix] | None) -> Head:
        """Give the model the weights of a plan, or its own; returns its head."""
        for layer in self.options:
            W_OI = self.checkpoint.weight(layer) if matrix is None else matrix(layer).dequantize()
            set_weight(self.model, self.checkpoint.family, layer, W_OI)
        return Head(self.model).fixed()

    def require_memory(self) -> None:
        """Raise `BitallocError` where the polish cannot fit: the model, and `POLISH_NBYTES` for each learned weight."""
        learned = {layer for layers in self.layers.values() for layer in layers if self._learns(layer)}
        sizes = self.inventory["rows"] * self.inventory["columns"]
        need = int(sizes.sum()) * working_dtype(self.device).itemsize
        need += int(sizes[self.inventory["layer"].isin(learned)].sum()) * POLISH_NBYTES
        there = total_memory(self.device)
        if need > there:
            raise BitallocError(
                f"the polish of this model takes some {need / 1e9:.0f} GB, {self.device.type} has {there / 1e9:.0f}: "
                "set tune.polish to 0; codes are then learned block by block alone, one block in memory at a time"
            )

    def polish(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The row of the descent through all blocks at once, from what their rows have kept."""
        settings = {name: value for name, value in self.settings.model_dump().items() if name.startswith("polish")}
        self.last = key = digest({"upstream": self.last, POLISH: settings})
        return self._row(POLISH, -1, self._once(key, lambda: self._polish(rows)), key)

    def _polish(self, rows: Sequence[Mapping[str, Any]]) -> tuple[JSON, bytes | None]:
        settings, matrix = self.settings, self._tuned(rows)
        head = self._put_on(None)
        with torch.no_grad():
            reference = [self._states(ids.to(self.device), {}).cpu() for ids in self.ids_NT.split(1)]
        own = self._put_on(matrix)
        learned = {
            layer: self._learned(layer, matrix(layer))
            for layers in self.layers.values()
            for layer in layers
            if self._learns(layer)
        }
        turned = self.checkpoint.family.turned

        def scores(windows: Sequence[int]) -> Tensor:
            """KL, and NLL of the text: nats a token, [2], means over each window, summed over these windows."""
            weights = {layer: learned[layer].weight() for layer in learned}
            named = {f"{layer}.weight": W_OI.T if turned(layer) else W_OI for layer, W_OI in weights.items()}
            ids_NT = self.ids_NT[windows].to(self.device)
            h_NTD = self._states(ids_NT, named)[:, :-1].float()
            r_NTD = torch.cat([reference[window] for window in windows])[:, :-1].to(self.device).float()
            log_q, log_p = own.logits(h_NTD).log_softmax(-1), head.logits(r_NTD).log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1).sum()
            return torch.stack([kl, -log_q.gather(-1, ids_NT[:, 1:, None])[..., 0].mean(1).sum()])

        # logits of a large vocabulary take more memory than the model
        size = max(1, LOGITS // (self.ids_NT.shape[1] * len(head.weight_VD)))

        @torch.no_grad()
        def held() -> Tensor:
            return torch.stack([scores(turn) for turn in _turns(self.held, size)]).sum(0) / len(self.held)

        start = held()
        # w of the NLL costs some w^2 of KL wherever it starts: by sqrt(KL) the same share of it at every budget
        weight = torch.stack([torch.ones_like(start[0]), settings.polish_truth * start[0].sqrt()])

        def loss(windows: Sequence[int]) -> None:
            for turn in _turns(windows, size):
                (scores(turn) @ weight / len(windows)).backward()

        step, after = descend(
            learned,
            settings.polish_learn,
            loss=loss,
            held=lambda: float(start[0] + (held() - start) @ weight),
            train=self.train,
            steps=settings.polish,
            rate=settings.polish_rate,
            batch=settings.batch,
            optimizer=settings.polish_optimizer,
            seed=[self.seed, *POLISH.encode()],
            advance=self.progress.advance,
        )
        return self._outcome(float(start[0]), after, step, learned)

    def _states(self, ids_NT: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What the head reads, with `weights` in the place of the model's own."""
        body, dtype = self.model.base_model, working_dtype(self.device)
        prefix = f"{self.model.base_model_prefix}."
        named = {name.removeprefix(prefix): weight.to(dtype) for name, weight in weights.items()}
        return functional_call(body, named, kwargs={"input_ids": ids_NT, "use_cache": False}).last_hidden_state

    # ---- never worse
    def judge(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The row that says which is shipped: KL on the select split of the swept and of the tuned plan."""
        chosen = self.tokens[self.tokens["split"] == SELECT]
        key = digest({"upstream": self.last, SELECT: digest([list(map(int, ids)) for ids in chosen["tokens"]])})
        return self._row(SELECT, -1, self._once(key, lambda: self._judge(rows, chosen)), key)

    @torch.inference_mode()
    def _judge(self, rows: Sequence[Mapping[str, Any]], chosen: pd.DataFrame) -> tuple[JSON, None]:
        windows = Windows(chosen, batch=self.settings.batch, device=self.device)
        head = self._put_on(None)
        reference = [hidden(self.model, batch).cpu() for batch in windows.batches]
        corpus_N = chosen["corpus"].to_numpy()

        def kl(matrix: Callable[[str], CompressedMatrix]) -> float:
            own, found = self._put_on(matrix), np.zeros(len(chosen))
            for batch, reference_ND in zip(windows.batches, reference, strict=True):
                scores = compare(own, batch, hidden(self.model, batch), reference_ND, head)["kl"].cpu()
                for owner, kl_T in batch.parted(scores):
                    found[owner] = kl_T.mean().item()
            return float(pd.Series(found).groupby(corpus_N).mean().mean())

        before, after = kl(self._swept), kl(self._tuned(rows))
        if not (math.isfinite(before) and math.isfinite(after)):
            raise BitallocError(f"plan {self.name} makes the model's scores NaN or Inf; rerun its sweep")
        kept = after < before
        note = "" if kept else "not better on the select split: the swept codes are shipped"
        return {"step": 0, "loss_before": before, "loss_after": after, "kept": kept, "note": note}, None
