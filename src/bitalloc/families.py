"""Model families: which matrices a plan may touch, which input each of them reads, and what stays as it is.

Pure data, no torch: the workflow plans its jobs from this before a checkpoint is there. Scope is total:
every weight of a checkpoint is claimed by a role or excluded by a pattern with a reason, and anything
else raises. Matrices that read the same input share one site, hence one moment matrix.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field

from bitalloc.errors import BitallocError, nearest


@dataclass(frozen=True)
class Role:
    """A matrix that every block has. `path` is relative to the block; `site` names the input it reads."""

    name: str
    path: str
    site: str
    kind: str  # attention or mlp


@dataclass(frozen=True)
class Family:
    """One architecture of `transformers`. `blocks` is the module path of the list of blocks."""

    name: str
    blocks: str
    roles: tuple[Role, ...]
    excluded: tuple[tuple[str, str, str], ...]  # (pattern of tensor names, kind, reason)
    transposed: bool = False  # weights stored as [in, out] (GPT-2's Conv1D)
    tied: bool = False  # the head is the embedding where config.json does not say
    architectures: tuple[str, ...] = field(default=())

    def layer(self, block: int, role: Role) -> str:
        """Module path of a matrix, e.g. `model.layers.3.mlp.up_proj`."""
        return f"{self.blocks}.{block}.{role.path}"

    def turned(self, layer: str) -> bool:
        """The weight of this layer is stored as [in, out]; embedding and head never are."""
        return self.transposed and layer.startswith(f"{self.blocks}.")

    def sites(self) -> dict[str, tuple[Role, ...]]:
        """Site -> the roles that read it, in the order of computation."""
        sites: dict[str, tuple[Role, ...]] = {}
        for role in self.roles:
            sites[role.site] = (*sites.get(role.site, ()), role)
        return sites

    def claim(self, tensor: str) -> tuple[Role | None, int | None, str, str]:
        """(role, block, kind, reason) of a tensor name; role is None for what is excluded, with the reason.

        >>> FAMILIES["llama"].claim("model.layers.2.mlp.up_proj.weight")[0].name
        'up_proj'
        >>> FAMILIES["llama"].claim("model.embed_tokens.weight")[2:]
        ('embedding', 'kept at 16 bits')
        """
        if tensor.startswith(f"{self.blocks}."):
            block, _, rest = tensor.removeprefix(f"{self.blocks}.").partition(".")
            for role in self.roles:
                if rest == f"{role.path}.weight":
                    return role, int(block), role.kind, ""
        for pattern, kind, reason in self.excluded:
            if fnmatch.fnmatchcase(tensor, pattern):
                return None, None, kind, reason
        raise BitallocError(
            f"family {self.name!r} neither claims nor excludes the tensor {tensor!r}; "
            "add it to bitalloc/families.py, as a role or with the reason why it stays"
        )


def _roles(kind: str, site: str, prefix: str, names: str) -> tuple[Role, ...]:
    return tuple(Role(name, f"{prefix}.{name}", site, kind) for name in names.split())


_KEPT = "kept at 16 bits"
_SMALL = "a vector: nothing to gain"
_GATED = (
    *_roles("attention", "attn_in", "self_attn", "q_proj k_proj v_proj"),
    *_roles("attention", "attn_out", "self_attn", "o_proj"),
    *_roles("mlp", "mlp_in", "mlp", "gate_proj up_proj"),
    *_roles("mlp", "mlp_out", "mlp", "down_proj"),
)
_GATED_EXCLUDED = (
    ("model.embed_tokens.weight", "embedding", _KEPT),
    ("lm_head.weight", "head", _KEPT),
    ("*norm.weight", "norm", _SMALL),
    ("*.bias", "bias", _SMALL),
    ("*.rotary_emb.inv_freq", "buffer", "recomputed, not stored"),
)

# roles of one block that servers merge into one matrix, which then has one scheme
FUSED = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("qwen2", "model.layers", _GATED, _GATED_EXCLUDED, architectures=("Qwen2ForCausalLM",)),
        Family("llama", "model.layers", _GATED, _GATED_EXCLUDED, architectures=("LlamaForCausalLM",)),
        Family("mistral", "model.layers", _GATED, _GATED_EXCLUDED, architectures=("MistralForCausalLM",)),
        Family(
            "phi",
            "model.layers",
            # attention and MLP of Phi read the same normalised input
            (
                *_roles("attention", "block_in", "self_attn", "q_proj k_proj v_proj"),
                *_roles("attention", "attn_out", "self_attn", "dense"),
                *_roles("mlp", "block_in", "mlp", "fc1"),
                *_roles("mlp", "mlp_out", "mlp", "fc2"),
            ),
            _GATED_EXCLUDED,
            architectures=("PhiForCausalLM",),
        ),
        Family(
            "opt",
            "model.decoder.layers",
            (
                *_roles("attention", "attn_in", "self_attn", "q_proj k_proj v_proj"),
                *_roles("attention", "attn_out", "self_attn", "out_proj"),
                Role("fc1", "fc1", "mlp_in", "mlp"),
                Role("fc2", "fc2", "mlp_out", "mlp"),
            ),
            (
                ("model.decoder.embed_*.weight", "embedding", _KEPT),
                ("model.decoder.project_*.weight", "embedding", _KEPT),
                ("lm_head.weight", "head", _KEPT),
                ("*layer_norm.weight", "norm", _SMALL),
                ("*.bias", "bias", _SMALL),
            ),
            tied=True,
            architectures=("OPTForCausalLM",),
        ),
        Family(
            "gpt2",
            "transformer.h",
            (
                *_roles("attention", "attn_in", "attn", "c_attn"),
                *_roles("attention", "attn_out", "attn", "c_proj"),
                Role("mlp_c_fc", "mlp.c_fc", "mlp_in", "mlp"),
                Role("mlp_c_proj", "mlp.c_proj", "mlp_out", "mlp"),
            ),
            (
                ("transformer.wte.weight", "embedding", _KEPT),
                ("transformer.wpe.weight", "embedding", _KEPT),
                ("lm_head.weight", "head", _KEPT),
                ("*ln_?.weight", "norm", _SMALL),
                # older checkpoints hold the causal mask under these names
                ("*.attn.bias", "buffer", "recomputed, not stored"),
                ("*.attn.masked_bias", "buffer", "recomputed, not stored"),
                ("*.bias", "bias", _SMALL),
            ),
            transposed=True,
            tied=True,
            architectures=("GPT2LMHeadModel",),
        ),
        Family(
            "mamba2",
            "backbone.layers",
            (
                *_roles("mixer", "mixer_in", "mixer", "in_proj"),
                *_roles("mixer", "mixer_out", "mixer", "out_proj"),
            ),
            (
                ("backbone.embeddings.weight", "embedding", _KEPT),
                ("lm_head.weight", "head", _KEPT),
                ("*.conv1d.weight", "filter", "a filter of a few taps a channel: nothing to gain"),
                ("*norm.weight", "norm", _SMALL),
                ("*norm_f.weight", "norm", _SMALL),
                ("*.mixer.A_log", "bias", _SMALL),
                ("*.mixer.D", "bias", _SMALL),
                ("*.mixer.dt_bias", "bias", _SMALL),
                ("*.bias", "bias", _SMALL),
            ),
            architectures=("Mamba2ForCausalLM",),
        ),
    )
}


def family(name: str) -> Family:
    """The family of that name; raises `BitallocError` with the nearest valid name."""
    if name not in FAMILIES:
        raise BitallocError(f"unknown model family {name!r}: {nearest(name, FAMILIES)}")
    return FAMILIES[name]
