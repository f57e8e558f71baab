"""`transformers` runs native checkpoints without unpacking them, and fails on what it would make up."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from bitalloc.config import Sweep
from bitalloc.errors import BitallocError
from bitalloc.families import FAMILIES
from bitalloc.formats import bitalloc, packed
from bitalloc.formats.layout import matrix_tensors
from bitalloc.option import Option, from_row
from bitalloc.quant import CompressedMatrix
from tests import random_models
from tests.formats.test_bitalloc import IDS, save
from tests.small import CPU, Small, small

OPTIONS = [Option("rtn", bits, 16, rank) for bits, rank in ((2, 0), (3, 2), (4, 1), (8, 3), (3, 0))]
OPTIONS.append(Option("none", 16, 0, 0))
INNER = {"gpt2": "n_inner", "opt": "ffn_dim"}
WEIGHTS = "model.safetensors"


def made(folder: Path, family: str = "llama", options: list[Option] = OPTIONS, **sweep: object) -> Small:
    """A checkpoint in `folder`/packed of a model whose last matrix has an odd number of inputs."""
    settings = Sweep(quantizers=["rtn"], bits=[2, 3, 4, 5, 6, 8, 16], group_sizes=[16], ranks=[0, 1, 2, 3], **sweep)
    config = deepcopy(random_models.CONFIGS[family])
    setattr(config, INNER.get(family, "intermediate_size"), 45)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(random_models.CONFIGS, family, config)
        bench = small(family, folder, dtype=torch.bfloat16 if sweep else torch.float16, sweep=settings)
    save(bench, folder / "packed", bench.plan(options))
    return bench


def refused(folder: Path) -> list[Path]:
    """Checkpoints that transformers must not load where nobody has imported this package.

    8 bits everywhere is where shapes could fit by chance: a byte a weight.
    """
    folders = []
    for name, family, options in (
        ("a", "llama", OPTIONS), ("b", "llama", [Option("rtn", 8, 16, 0)]), ("c", "gpt2", OPTIONS),
        ("d", "gpt2", OPTIONS[-1:]),
    ):  # fmt: skip
        made(folder / name, family, options)
        loaded(folder / name / "packed").save_pretrained(folder / name / "again")
        folders += [folder / name / "packed", folder / name / "again"]
    return folders


def loaded(folder: Path, dtype: torch.dtype = torch.float32, **how: object) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits.float()


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    owners = [(path, module) for path, module in model.named_modules() if isinstance(module, packed.Packed)]
    return {f"{path}.{name}": tensor for path, owner in owners for name, tensor in owner.named_buffers()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Equal names, types and bytes."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@pytest.mark.parametrize(
    ("family", "sweep"),
    [(family, {}) for family in FAMILIES]
    + list(product(("llama", "gpt2"), ({"symmetric": True}, {"factor_bits": 16}))),
)
def test_a_checkpoint_runs_packed_and_is_saved_as_it_was(family: str, sweep: dict, tmp_path: Path) -> None:
    bench, folder = made(tmp_path, family, **sweep), tmp_path / "packed"
    model, reference = loaded(folder), bitalloc.load_model(folder, device=CPU)
    expected = logits(reference)
    assert float((logits(model) - expected).norm() / expected.norm()) < 1e-5
    tokens = [m.generate(IDS[:1], max_new_tokens=4, do_sample=False) for m in (model, reference)]
    assert torch.equal(*tokens) and tokens[0].shape == (1, 16)
    # that was a forward: nothing dense may be left
    plan, matrix = bitalloc.load(folder)
    stored: dict[str, torch.Tensor] = {}
    for row in plan.to_dict("records"):
        option, compressed = from_row(row, bench.experiments.sweep), matrix(row["layer"])
        module = model.get_submodule(row["layer"])
        held = list(module.buffers()) + [p for name, p in module.named_parameters() if name != "bias"]
        assert not any(isinstance(value, torch.Tensor) for value in vars(module).values())
        assert sum(t.nbytes for t in held) == option.nbytes(compressed.rows, compressed.columns) == compressed.nbytes
        assert torch.equal(module.dequantize(), compressed.dequantize())
        stored |= {f"{row['layer']}.{name}": tensor for name, tensor in compressed.tensors().items()}
    assert same(buffers(model), stored)

    model.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again")
    assert same(again.state_dict(), model.state_dict()) and same(buffers(again), stored)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    "cast", [lambda folder: loaded(folder, torch.bfloat16), lambda folder: loaded(folder).to(torch.bfloat16)]
)
def test_another_type_of_model_leaves_the_stored_tensors_as_they_are(cast: Callable, tmp_path: Path) -> None:
    made(tmp_path, "phi")
    exact, model = loaded(tmp_path / "packed"), cast(tmp_path / "packed")
    assert same(buffers(model), buffers(exact))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.allclose(logits(model), logits(exact), rtol=0.1, atol=0.1 * float(logits(exact).std()))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_devices_are_placed_by_accelerate(device_map: object, tmp_path: Path) -> None:
    made(tmp_path, "gpt2")
    model = loaded(tmp_path / "packed", device_map=device_map)
    assert torch.allclose(logits(model).cpu(), logits(loaded(tmp_path / "packed")), atol=1e-4)


@pytest.mark.parametrize(
    ("bits", "symmetric", "factor_bits"), [*product((2, 3, 4, 5, 6, 8), (True, False), (8, 16)), (16, False, 8)]
)
def test_rows_are_unpacked_a_block_at_a_time(
    bits: int, symmetric: bool, factor_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither rows nor inputs fill bytes, groups or blocks."""
    rows, columns, rank = 37, 101, 3
    draw = torch.Generator().manual_seed(bits)
    if bits == 16:
        option = Option("none", 16, 0, 0)
        matrix = CompressedMatrix(option, rows, columns, weight_OI=torch.randn(rows, columns, generator=draw).half())
    else:
        option = Option("rtn", bits, 16, rank, factor_bits, symmetric)
        groups = -(-columns // 16)

        def codes(*shape: int) -> torch.Tensor:
            return torch.randint(0, 2**bits, shape, generator=draw, dtype=torch.uint8)

        def factor(*shape: int) -> torch.Tensor:
            entries = torch.randint(-127, 128, shape, generator=draw)
            return entries.char() if factor_bits == 8 else entries.half() / 64

        scales = [torch.rand(rank, generator=draw).half() for _ in range(2)] if factor_bits == 8 else [None, None]
        matrix = CompressedMatrix(
            option, rows, columns, codes(rows, columns), torch.rand(rows, groups, generator=draw).half(),
            None if symmetric else codes(rows, groups), factor(rows, rank), factor(rank, columns), *scales,
        )  # fmt: skip
    module = packed.Packed(
        option,
        rows,
        columns,
        matrix_tensors("x", rows, columns, option),
        nn.Parameter(torch.ones(rows), requires_grad=False),
    )
    assert {name: (t.dtype, t.shape) for name, t in module.named_buffers()} == {
        name: (t.dtype, t.shape) for name, t in matrix.tensors().items()
    }
    module._buffers.update(matrix.tensors())
    monkeypatch.setattr(packed, "AT_ONCE", 1)
    blocks = list(module._quantised())
    assert [len(block) for block in blocks] == [8, 8, 8, 8, 5]
    assert torch.equal(module.dequantize(), matrix.dequantize())
    x = torch.randn(2, 4, columns, generator=draw)
    expected = x @ matrix.dequantize().T + 1
    assert float((module(x) - expected).norm() / expected.norm()) < 1e-5
    assert module.to("meta")(x.to("meta")).shape == (2, 4, rows)  # nothing is tied to the CPU


# ---- what must fail ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    made(folder, "opt")
    return folder / "packed"


LAYER = "model.decoder.layers.1.self_attn.k_proj"


def without(name: str) -> Callable[[dict], object]:
    return lambda tensors: tensors.pop(name)


def become(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], object]:
    return lambda tensors: tensors.update({name: change(tensors.get(name))})


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        *[(without(name), name) for name in (f"{LAYER}.weight", f"{LAYER}.scale", f"{LAYER}.zero", f"{LAYER}.bias")],
        (without("model.decoder.layers.2.final_layer_norm.weight"), "model.decoder.layers.2.final_layer_norm.weight"),
        (without("model.decoder.embed_tokens.weight"), "model.decoder.embed_tokens.weight"),
        (become(f"{LAYER}.scale", torch.Tensor.float), f"{LAYER}.scale"),
        (become(f"{LAYER}.weight", lambda t: t[:-1].clone()), f"{LAYER}.weight"),
        (become(f"{LAYER}.bias", lambda t: t[:-1].clone()), f"{LAYER}.bias"),
        (become(f"{LAYER}.L", lambda t: t[:, :1].clone()), f"{LAYER}.L"),
        (become(f"{LAYER}.more", lambda _: torch.zeros(1)), f"{LAYER}.more"),
    ],
)
def test_tensors_that_are_missing_or_do_not_fit_are_not_made_up(
    harm: Callable, name: str, checkpoint: Path, tmp_path: Path
) -> None:
    loaded(checkpoint).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    harm(tensors)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(
        BitallocError, match=rf"^{name} in .* is missing or not what config.json says \(1 tensors\); "
    ) as e:
        loaded(tmp_path)
    assert "\n" not in str(e.value)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_native_checkpoint_is_verified_by_its_manifest(tmp_path: Path) -> None:
    made(tmp_path)
    flip(tmp_path / "packed/block-00001.safetensors")
    with pytest.raises(BitallocError, match=r"block-00001.safetensors is missing, truncated or damaged"):
        loaded(tmp_path / "packed")


def test_another_promise_and_another_head_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    loaded(checkpoint).save_pretrained(tmp_path)
    with pytest.raises(BitallocError, match=r"OPTModel has no .*; load it by AutoModelForCausalLM"):
        AutoModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layers"][LAYER] = "rtn-5b-g16-r0"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitallocError, match=rf"^{LAYER}.*not what config.json says \(6 tensors\)"):
        loaded(tmp_path)
