"""The predicted size of a checkpoint is what safetensors writes, to the byte."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bitalloc.config import Sweep
from bitalloc.errors import BitallocError
from bitalloc.formats.carried import rest_nbytes
from bitalloc.formats.layout import METADATA, checkpoint_nbytes, header, layout, matrix_tensors, nbytes
from bitalloc.option import Option

TORCH = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
OPTIONS = [Option("gptq", bits, g, rank) for bits in (2, 3, 5, 8) for g in (32, 64) for rank in (0, 3, 8)]
OPTIONS.append(Option("none", 16, 0, 0))


def excluded(
    tensor: str, kind: str, shape: tuple[int, int], dtype: str, *, block: int = -1, tied: bool = False
) -> dict:
    return {
        "tensor": tensor, "layer": tensor.removesuffix(".weight"), "block": block, "kind": kind, "rows": shape[0],
        "columns": shape[1], "dtype": dtype, "tied": tied, "claimed": False,
    }  # fmt: skip


def inventory(dtype: str = "float16", blocks: int = 2) -> pd.DataFrame:
    """Matrices with inputs that fill neither bytes nor groups, a tied head, a buffer, and one tensor of each type."""
    names = "int64 float64 float32 int32 int16 int8 uint8 bool"
    rows = [
        excluded("embed.weight", "embedding", (61, 24), dtype),
        excluded("lm_head.weight", "head", (61, 24), dtype, tied=True),
        excluded("rotary", "buffer", (8, 1), "float32"),
        *[excluded(f"x.{name}", "bias", (5, 1), name) for name in names.split()],
        excluded("x.bfloat16", "norm", (3, 1), "bfloat16"),
        excluded('naïve "name"', "norm", (1, 1), "float16"),
    ]
    for block in range(blocks):
        rows.append(excluded(f"blocks.{block}.norm", "norm", (24, 1), dtype, block=block))
        for name, shape in {"q": (37, 101), "down": (24, 333)}.items():
            row = excluded(f"blocks.{block}.{name}.weight", "mlp", shape, dtype, block=block)
            rows.append(row | {"claimed": True})
    return pd.DataFrame(rows)


def plan(frame: pd.DataFrame, options: list[Option]) -> pd.DataFrame:
    layers = frame.loc[frame["claimed"], "layer"]
    rows = [
        {"layer": layer, **{name: getattr(option, name) for name in ("quantizer", "bits", "group_size", "rank")}}
        for layer, option in zip(layers, options, strict=True)
    ]
    return pd.DataFrame(rows)


def written(folder, files) -> int:
    for file, tensors in files.items():
        empty = {tensor.name: torch.zeros(tensor.shape, dtype=TORCH[tensor.dtype]) for tensor in tensors}
        save_file(empty, folder / file, metadata=METADATA)
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("sweep", [Sweep(), Sweep(symmetric=True), Sweep(factor_bits=16)])
@settings(deadline=None, max_examples=25)
@given(
    chosen=st.lists(st.sampled_from(OPTIONS), min_size=4, max_size=4), dtype=st.sampled_from(["float16", "bfloat16"])
)
def test_size_on_disk_is_exact(tmp_path_factory, sweep, chosen, dtype):
    frame, folder = inventory(dtype), tmp_path_factory.mktemp("checkpoint")
    files = layout(frame, plan(frame, chosen), sweep)
    assert written(folder, files) == nbytes(files) == checkpoint_nbytes(frame, plan(frame, chosen), sweep)


def test_tensors_are_listed_in_the_order_of_the_file(tmp_path):
    frame = inventory()
    files = layout(frame, plan(frame, OPTIONS[1:5]), Sweep())
    written(tmp_path, files)
    assert list(files) == ["block-00000.safetensors", "block-00001.safetensors", "rest.safetensors"]
    for file, tensors in files.items():
        data = (tmp_path / file).read_bytes()
        fields = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert [name for name in fields if name != "__metadata__"] == [tensor.name for tensor in tensors]
        assert data.startswith(header(tensors))


def test_tied_heads_and_buffers_are_not_stored():
    frame = inventory()
    names = {tensor.name for tensors in layout(frame, plan(frame, OPTIONS[:4]), Sweep()).values() for tensor in tensors}
    assert "embed.weight" in names and not names & {"lm_head.weight", "rotary"}
    own_head = frame.assign(tied=False)
    names = {tensor.name for tensor in layout(own_head, plan(frame, OPTIONS[:4]), Sweep())["rest.safetensors"]}
    assert "lm_head.weight" in names


@given(
    st.tuples(st.integers(1, 400), st.integers(1, 400)),
    st.builds(
        Option, st.just("gptq"), st.sampled_from([2, 3, 4, 5, 6, 8]), st.integers(1, 200), st.integers(0, 9),
        st.sampled_from([8, 16]), st.booleans(),
    ),
)  # fmt: skip
def test_tensors_of_a_matrix_take_the_bytes_of_its_option(shape, option):
    assert sum(tensor.nbytes for tensor in matrix_tensors("x", *shape, option)) == option.nbytes(*shape)


@pytest.mark.parametrize("sweep", [Sweep(), Sweep(factor_bits=16)])
def test_rest_is_an_upper_bound_and_a_close_one(sweep):
    rng = np.random.default_rng(0)
    frame = inventory(blocks=12)
    shapes = frame.loc[frame["claimed"], ["rows", "columns"]].to_numpy()
    rest = rest_nbytes(frame, OPTIONS, sweep)
    for _ in range(20):
        chosen = [OPTIONS[k] for k in rng.integers(len(OPTIONS), size=len(shapes))]
        chosen = [Option(o.quantizer, o.bits, o.group_size, o.rank, sweep.factor_bits) for o in chosen]
        matrices = sum(o.nbytes(*map(int, shape)) for o, shape in zip(chosen, shapes, strict=True))
        actual = checkpoint_nbytes(frame, plan(frame, chosen), sweep) - matrices
        assert actual <= rest <= actual + 700 * len(shapes)


def test_plan_of_another_model_is_refused():
    frame = inventory()
    other = plan(frame, OPTIONS[:4]).replace("blocks.1.q", "blocks.1.k")
    with pytest.raises(BitallocError, match=r"differ in blocks.1.k \(2 matrices\)"):
        layout(frame, other, Sweep())


def test_unknown_type_names_the_nearest():
    frame = inventory().replace({"dtype": {"int16": "flot32"}})
    with pytest.raises(BitallocError, match=r"x\.int16 has the unknown type 'flot32': did you mean 'float32'"):
        layout(frame, plan(frame, OPTIONS[:4]), Sweep())
