"""Techniques of rounding: a study and bits a weight -> a plan with its matrices. Prototypes, of the library's parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
import yaml
from comparison import Evaluation
from project import ROOT, subject
from safetensors.torch import save, save_file
from torch import Tensor

from bitalloc import allocate, config, retrieve
from bitalloc.calibrate import calibrate
from bitalloc.errors import BitallocError
from bitalloc.experiments import Experiments
from bitalloc.families import FAMILIES
from bitalloc.lowrank import decompose
from bitalloc.models import Checkpoint, load_model, pick_device, set_weight
from bitalloc.option import Option, from_row, options
from bitalloc.quant import CompressedMatrix, Factor
from bitalloc.quant import block as column_loop
from bitalloc.quant.hadamard import Rotation
from bitalloc.sensitivity import sensitivity
from bitalloc.store import Store, digest
from bitalloc.strategies.optimal import optimal
from bitalloc.tune import Tuned, tune

WINDOWS = {"window": 256, "calibrate_windows": 64, "select_windows": 16, "report_windows": 24}
SWEEP = {"bits": [2, 3, 4], "group_sizes": [32, 64, 128], "ranks": [0]}
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)
Matrices = Mapping[str, CompressedMatrix]


class Study:
    """A model, its windows and its moments: what all techniques share."""

    def __init__(self, path: Path, settings: config.Config, family: str, tokens: pd.DataFrame, folder: Path) -> None:
        self.path, self.settings, self.tokens, self.folder = path, settings, tokens, folder
        self.name = folder.name.rpartition("-")[0]
        self.device, self.store = pick_device(settings.device), Store(folder / "store")
        self.checkpoint = Checkpoint(path, FAMILIES[family])
        self.inventory = retrieve.inventory(path.name, path, FAMILIES[family])
        self.layers = list(self.inventory.loc[self.inventory["claimed"], "layer"])
        self.calibrated = tokens[tokens["split"] == "calibrate"]

    @classmethod
    def of(cls, model: str, corpora: Sequence[str], work: Path) -> Study:
        """A model of the sheet by its name, or a folder; `corpora`, where given, in the place of its own."""
        whole = subject(model)
        splits = {split: list(corpora) for split in ("calibrate", "select", "report")} if corpora else {}
        read = {**whole.row["settings"].get("retrieve", {}), **WINDOWS, **splits}
        row = whole.row | {"settings": {**whole.row["settings"], "retrieve": read, "sweep": SWEEP, "tune": {}}}
        default = yaml.safe_load((ROOT / "config/config.yaml").read_text())
        settings = config.parse(default | {"models": {whole.name: row}}).for_model(whole.name)
        folder = work / f"{whole.name}-{whole.content[:8]}"
        return cls(whole.path, settings, row["family"], retrieve.tokens(settings, whole.path), folder)

    @cached_property
    def evaluation(self) -> Evaluation:
        return Evaluation(self.path, self.tokens, layers=self.layers, device=self.settings.device)

    @cached_property
    def moments(self) -> pd.DataFrame:
        return self.measured(self.calibrated)

    def measured(self, windows: pd.DataFrame) -> pd.DataFrame:
        """MOMENTS of these windows of the calibrate split."""
        given = {"path": self.path, "family": self.checkpoint.family, "inventory": self.inventory}
        how = {"settings": self.settings.calibrate, "store": self.store, "device": self.device}
        return calibrate(tokens=windows, **given, **how)

    def experiments(self, moments: pd.DataFrame | None = None, **sweep: Any) -> Experiments:
        """Of this model, with these settings of the sweep in the place of the default's."""
        return Experiments(
            checkpoint=self.checkpoint,
            inventory=self.inventory,
            moments=self.moments if moments is None else moments,
            store=self.store,
            sweep=self.settings.sweep.model_copy(update=sweep),
            device=self.device,
        )

    @cached_property
    def coefficients(self) -> pd.DataFrame:
        """SENSITIVITY: what a unit of relative error of a matrix costs in KL."""
        return sensitivity(experiments=self.experiments(), tokens=self.tokens, settings=self.settings.sensitivity)

    def plan(self, bpw: float, **sweep: Any) -> pd.DataFrame:
        """Rows of SWEEP, one for each matrix: the least cost of what `sweep` offers, in that many bits a weight."""
        experiments = self.experiments(**sweep)
        costs = experiments.rows(self.layers, options(experiments.sweep))
        settings = self.settings.model_copy(update={"sweep": experiments.sweep})
        instance = allocate.build(costs, self.coefficients, self.inventory, settings)
        choice = optimal(instance, int(bpw * instance.weights_N.sum() / 8))
        chosen = {layer: instance.options[k] for layer, k in zip(instance.layers, choice, strict=True)}
        rows = costs.to_dict("records")
        return costs[[chosen[row["layer"]] == from_row(row, experiments.sweep) for row in rows]]

    def scores(self, weights: Mapping[str, Tensor]) -> pd.DataFrame:
        """Of each report window, with these W_OI."""
        turned, file = self.checkpoint.family.turned, self.folder / "weights.safetensors"
        save_file({layer: (W.T if turned(layer) else W).contiguous() for layer, W in weights.items()}, file)
        return self.evaluation.scores(file)


class Made:
    """A plan and its matrices as a technique made them. To `tune` it is the experiments that the plan was swept by."""

    def __init__(
        self, study: Study, plan: pd.DataFrame, experiments: Experiments | None = None, matrices: Matrices | None = None
    ) -> None:
        """`matrices`: None for those of the experiments, which are the study's own where None."""
        self.study, self.plan, self.experiments = study, plan, experiments or study.experiments()
        self.options = {row["layer"]: from_row(row, self.experiments.sweep) for row in plan.to_dict("records")}
        self.matrices = matrices or {layer: self.experiments.matrix(layer, o) for layer, o in self.options.items()}
        self.rotations: dict[str, Rotation] = {}  # of inputs, at run time

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experiments, name)

    def matrix(self, layer: str, _: Option) -> CompressedMatrix:
        return self.matrices[layer]

    @cache  # noqa: B019 - no longer than the row that it is of
    def shard(self, layer: str, _: Option) -> str:
        return digest(save(self.matrices[layer].tensors()).hex())

    def swept(self) -> dict[str, Tensor]:
        """What_OI by layer."""
        found = {layer: matrix.dequantize() for layer, matrix in self.matrices.items()}
        return found | {layer: rotation.inverse(found[layer]) for layer, rotation in self.rotations.items()}

    def learned(self, *, seed: int = 0, **settings: Any) -> dict[str, Tensor]:
        """What_OI by layer after `tune`, with these settings in the place of its defaults."""
        given = {"plan": self.plan, "tokens": self.study.tokens, "inventory": self.study.inventory}
        how = {"settings": config.Tune(**settings), "seed": seed}
        frame = tune(name="", experiments=self, **given, **how)  # type: ignore[arg-type] - stands in for them
        tuned = Tuned(self, self.plan, frame.to_dict("records"))  # type: ignore[arg-type]
        return {layer: tuned.matrix(layer, option).dequantize() for layer, option in self.options.items()}


# ---- techniques --------------------------------------------------------------------------------------
def setting(study: Study, bpw: float, **sweep: Any) -> Made:
    """The default's map under other settings of the sweep."""
    return Made(study, study.plan(bpw), study.experiments(**sweep))


def offer(study: Study, bpw: float, **sweep: Any) -> Made:
    """Other options, allocated anew."""
    return Made(study, study.plan(bpw, **sweep), study.experiments(**sweep))


def nearest(study: Study, bpw: float) -> Made:
    """Rounded to nearest on scales searched as before: no error feedback."""
    return Made(study, study.plan(bpw).assign(quantizer="rtn"))


def clipped(study: Study, bpw: float, *, most: Sequence[float]) -> Made:
    """Ranges of a group searched down to this share of the full one; of several shares the one of least error, by
    matrix.
    """
    plan, experiments, tried = study.plan(bpw), study.experiments(), []
    for share in most:
        searched = tuple(shrink for shrink in column_loop.SHRINKS if shrink >= share)
        # the compiled loop has the search built in
        with patch.multiple(column_loop, SHRINKS=searched, _compiled=lambda _: column_loop.plain):
            tried.append(under(plan, experiments, lambda row: experiments.H(row["site"])))
    choice = least(plan, tried, experiments)
    return Made(study, plan, matrices={layer: tried[k][layer] for layer, k in choice.items()})


def by_matrix(study: Study, bpw: float) -> Made:
    """Damping and order of each matrix as they are best where moments of every other calibrate window quantise and
    those of the others judge; then quantised by the moments of all.
    """
    plan, odd = study.plan(bpw), study.calibrated.groupby("corpus").cumcount() % 2 == 1
    half, judge = (study.measured(study.calibrated[part]) for part in (~odd, odd))
    how = [{"damping": damping, "act_order": order} for damping, order in product(DAMPINGS, (True, False))]
    tried = [Made(study, plan, study.experiments(half, **each)).matrices for each in how]
    choice = least(plan, tried, study.experiments(judge))
    whole = [setting(study, bpw, **each).matrices for each in how]
    return Made(study, plan, matrices={layer: whole[k][layer] for layer, k in choice.items()})


def least(plan: pd.DataFrame, tried: Sequence[Matrices], judge: Experiments) -> dict[str, int]:
    """Layer -> which one has the least tr(E H E^T), E = W - What, by the moments H of `judge`."""
    found = {}
    for layer, site in zip(plan["layer"], plan["site"], strict=True):
        W_OI, H_II = judge.checkpoint.weight(layer), judge.H(site)
        E = [W_OI - matrices[layer].dequantize() for matrices in tried]
        found[layer] = int(np.argmin([float(((E_OI @ H_II) * E_OI).sum()) for E_OI in E]))
    return found


def sequential(study: Study, bpw: float) -> Made:
    """Moments of each block behind the quantised blocks before it."""
    plan, experiments, matrices = study.plan(bpw), study.experiments(), {}
    model = load_model(study.path, device=study.device)
    ids_NT = torch.from_numpy(np.stack(study.calibrated["tokens"].to_list()).astype(np.int64)).to(study.device)
    for _, rows in plan.groupby("block", sort=True):
        H = second_moments(model, ids_NT, rows.drop_duplicates("site").set_index("site")["layer"].to_dict())
        made = under(rows, experiments, lambda row, H=H: H[row["site"]])
        for layer, matrix in made.items():
            set_weight(model, study.checkpoint.family, layer, matrix.dequantize())
        matrices |= made
    return Made(study, plan, matrices=matrices)


@torch.inference_mode()
def second_moments(model: Any, ids_NT: Tensor, sites: Mapping[str, str]) -> dict[str, Tensor]:
    """Site -> H_II = X^T X / T, X_TI the inputs of the layer that the site names."""
    sums: dict[str, Tensor] = {}

    def add(site: str, _: Any, inputs: tuple[Tensor, ...]) -> None:
        X_TI = inputs[0].flatten(0, -2).double()
        sums[site] = sums.get(site, 0) + X_TI.T @ X_TI

    hooks = [model.get_submodule(layer).register_forward_pre_hook(partial(add, site)) for site, layer in sites.items()]
    for ids in ids_NT.split(8):
        model.base_model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {site: (H_II / ids_NT.numel()).float() for site, H_II in sums.items()}


def rotated(study: Study, bpw: float) -> Made:
    """W R^T of every matrix quantised under R H R^T, R a randomised Hadamard matrix (QuIP, QuaRot); R x at run time."""
    plan, experiments = study.plan(bpw), study.experiments()
    turns = {layer: Rotation(experiments.layers[layer]["columns"]) for layer in plan["layer"]}
    matrices = under(plan, experiments, lambda row: turns[row["layer"]].moments(experiments.H(row["site"])), turns)
    made = Made(study, plan, matrices=matrices)
    made.rotations = turns
    return made


def under(
    plan: pd.DataFrame,
    experiments: Experiments,
    moments: Callable[[Mapping[str, Any]], Tensor],
    turns: Mapping[str, Rotation] | None = None,
) -> dict[str, CompressedMatrix]:
    """The matrices of a plan under moments H_II of one's own, of the rotated W where there are `turns`."""
    sweep, found = experiments.sweep, {}
    for row in plan.to_dict("records"):
        W_OI = experiments.checkpoint.weight(row["layer"])
        W_OI = turns[row["layer"]](W_OI) if turns else W_OI
        factor, option = Factor(moments(row), sweep.damping, name=row["site"]), from_row(row, sweep)
        [result] = decompose(W_OI, factor, [option], act_order=sweep.act_order, iterations=sweep.iterations)
        found[row["layer"]] = result.matrix
    return found


def folded(study: Study, bpw: float) -> Made:
    """The default's map on a model that computes the same, rotated where that costs nothing at run time: see `fold`."""
    path = study.folder / "folded"
    if not (path / "model.safetensors").is_file():
        fold(study.path, path)
    turned = Study(path, study.settings, study.checkpoint.family.name, study.tokens, study.folder)
    return Made(turned, study.plan(bpw))


@torch.no_grad()
def fold(source: Path, target: Path, *, seed: int = 0) -> None:
    """Write a Llama that computes the same: its residual stream rotated, and the values of each head, in weights alone.

    Exact (QuaRot, Ashkboos et al. 2024, sect. 3): an RMS norm without weights commutes with a rotation, and its weights
    go into the matrices that read it; attention mixes tokens, not entries of a value. So the inputs of q, k, v, o, gate
    and up are rotated, and of the head. That of down is not: the product in a gated MLP does not commute.
    """
    model = load_model(source, device=torch.device("cpu"))
    if model.config.model_type != "llama" or model.config.attention_bias or model.config.mlp_bias:
        raise BitallocError(f"only a Llama without biases is folded here, not {model.config.model_type}")
    body, head, model.config.tie_word_embeddings = model.model, model.lm_head, False
    head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
    R, V = Rotation(model.config.hidden_size, seed=seed), Rotation(model.config.head_dim, seed=seed + 1)

    def reads(norm: Any, *linears: Any) -> None:
        for linear in linears:
            linear.weight.copy_(R(linear.weight * norm.weight))
        norm.weight.fill_(1.0)

    body.embed_tokens.weight.copy_(R(body.embed_tokens.weight))
    for block in body.layers:
        attention, mlp = block.self_attn, block.mlp
        reads(block.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        reads(block.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        v_OI, o_OI = attention.v_proj.weight, attention.o_proj.weight
        v_OI.copy_(V(v_OI.T.unflatten(1, (-1, V.dim))).flatten(1).T)
        o_OI.copy_(V(o_OI.unflatten(1, (-1, V.dim))).flatten(1))
        for writes in (attention.o_proj, mlp.down_proj):
            writes.weight.copy_(R(writes.weight.T).T)
    reads(body.norm, head)
    model.save_pretrained(target)
