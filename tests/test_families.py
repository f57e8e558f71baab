from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitalloc.errors import BitallocError
from bitalloc.families import FAMILIES, family
from bitalloc.models import Checkpoint
from tests.random_models import BLOCKS, CONFIGS, VOCABULARY, build, save

EVERY = pytest.mark.parametrize("name", list(FAMILIES))


def test_every_family_is_tested() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@EVERY
def test_every_tensor_is_claimed_or_excluded(name: str, tmp_path: Path) -> None:
    known = FAMILIES[name]
    claims = {tensor: known.claim(tensor) for tensor in Checkpoint(save(name, tmp_path), known).names}
    claimed = {tensor.removesuffix(".weight") for tensor, claim in claims.items() if claim[0] is not None}
    assert claimed == {known.layer(block, role) for block in range(BLOCKS) for role in known.roles}
    for role, block, kind, reason in claims.values():
        assert (role is None) == (block is None) == bool(reason)
        assert kind in {"attention", "mlp", "mixer", "filter", "embedding", "head", "norm", "bias", "buffer"}


@EVERY
def test_only_vectors_embeddings_and_heads_are_excluded(name: str) -> None:
    """No matrix of a block escapes: what is excluded there has one dimension, or is a filter of a few taps."""
    for tensor, parameter in build(name).named_parameters():
        role, _, kind, _ = FAMILIES[name].claim(tensor)
        assert role is not None or parameter.dim() == 1 or kind in {"embedding", "head", "filter"}, tensor


@EVERY
def test_sites_are_the_inputs_that_matrices_really_read(name: str) -> None:
    """Matrices share a site exactly when they are given the same tensor."""
    known, model, read = FAMILIES[name], build(name), {}
    for role in known.roles:
        layer = model.get_submodule(known.layer(1, role))
        layer.register_forward_pre_hook(lambda _, args, role=role: read.__setitem__(role, args[0].reshape(-1)))
    with torch.no_grad():
        model(torch.randint(0, VOCABULARY, (2, 12)), use_cache=False)
    assert set(read) == set(known.roles)
    for first in known.roles:
        for second in known.roles:
            assert torch.equal(read[first], read[second]) == (first.site == second.site), (first.name, second.name)


@EVERY
def test_roles_in_the_order_of_computation(name: str) -> None:
    known, model, order = FAMILIES[name], build(name), []
    for role in known.roles:
        model.get_submodule(known.layer(0, role)).register_forward_pre_hook(
            lambda *_, role=role: order.append(role.site)
        )
    with torch.no_grad():
        model(torch.randint(0, VOCABULARY, (1, 4)), use_cache=False)
    assert list(dict.fromkeys(order)) == list(known.sites())


@EVERY
def test_orientation_architecture_and_tie_are_those_of_transformers(name: str) -> None:
    known, model = FAMILIES[name], build(name)
    assert known.architectures == (type(model).__name__,)
    assert type(CONFIGS[name])().tie_word_embeddings == known.tied
    for role in known.roles:
        layer = model.get_submodule(known.layer(0, role))
        assert (type(layer).__name__ == "Conv1D") == known.transposed


@EVERY
def test_unclaimed_tensor_raises(name: str) -> None:
    known = FAMILIES[name]
    with pytest.raises(BitallocError, match=r"neither claims nor excludes the tensor .*router"):
        known.claim(f"{known.blocks}.0.mlp.router.weight")


@pytest.mark.parametrize(
    ("name", "tensor", "kind"),
    [
        ("gpt2", "transformer.h.0.attn.bias", "buffer"),
        ("gpt2", "transformer.h.0.attn.masked_bias", "buffer"),
        ("gpt2", "transformer.h.0.attn.c_attn.bias", "bias"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", "buffer"),
        ("opt", "model.decoder.project_in.weight", "embedding"),
        ("phi", "lm_head.bias", "bias"),
    ],
)
def test_what_older_checkpoints_hold_is_known(name: str, tensor: str, kind: str) -> None:
    assert FAMILIES[name].claim(tensor)[2] == kind


def test_unknown_family_names_the_nearest() -> None:
    with pytest.raises(BitallocError, match="did you mean 'mistral'"):
        family("mistrall")
