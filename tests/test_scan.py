"""The scan by matrix products: equal to that of transformers, forwards and backwards, whatever is asked of it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitalloc import scan
from tests import random_models

CPU = torch.device("cpu")


def inputs(seed: int, *, length: int, groups: int = 1, wide: float = 1.0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"x": (2, length, 4, 6), "dt": (2, length, 4), "B": (2, length, groups, 5), "C": (2, length, groups, 5)}
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    tensors["dt"] = tensors["dt"] * wide
    tensors["A"] = -16 * torch.rand(4, generator=draw)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    length=st.integers(1, 40),
    chunk=st.integers(1, 24),
    groups=st.sampled_from([1, 2, 4]),
    wide=st.sampled_from([0.1, 1.0, 4.0]),
    start=st.booleans(),
    skip=st.booleans(),
    bias=st.booleans(),
    limit=st.sampled_from([(0.0, float("inf")), (0.05, 0.5)]),
)
def test_values_states_and_gradients_are_those_of_transformers(
    *, seed, length, chunk, groups, wide, start, skip, bias, limit
):
    tensors = inputs(seed, length=length, groups=groups, wide=wide)
    draw = torch.Generator().manual_seed(seed + 1)
    how = {
        "D": torch.randn(4, generator=draw) if skip else None,
        "dt_bias": torch.randn(4, generator=draw) if bias else None,
        "initial_states": torch.randn(2, 4, 6, 5, generator=draw) if start else None,
        "dt_softplus": True,
        "dt_limit": limit,
        "return_final_states": True,
    }
    weights = [torch.randn(shape, generator=draw) for shape in ((2, length, 4, 6), (2, 4, 6, 5))]

    def run(function):
        results = function(*(tensors[name] for name in ("x", "dt", "A", "B", "C")), chunk_size=chunk, **how)
        loss = sum((result * weight).sum() for result, weight in zip(results, weights, strict=True))
        return [*results, *torch.autograd.grad(loss, list(tensors.values()))]

    names = ["y", "state", *tensors]
    for name, found, expected in zip(names, run(scan.scan), run(scan.shipped()), strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        # the gradient of A is a sum over all tokens, whose terms cancel
        limit = 1e-4 if name == "A" else 1e-5
        assert apart(found, expected) < limit or (found - expected).abs().max() < 1e-5


def test_it_is_the_recurrence():
    tensors = {name: tensor.detach() for name, tensor in inputs(0, length=11, groups=2).items()}
    dt, state, outputs = tensors["dt"].abs(), torch.zeros(2, 4, 6, 5), []
    for t in range(11):
        B, C = (tensors[name][:, t].repeat_interleave(2, dim=1) for name in "BC")
        state = state * (dt[:, t] * tensors["A"]).exp()[..., None, None]
        state = state + (dt[:, t, :, None] * tensors["x"][:, t])[..., None] * B[:, :, None]
        outputs.append((state * C[:, :, None]).sum(-1))
    found, last = scan.scan(tensors["x"], dt, *(tensors[n] for n in "ABC"), chunk_size=4, return_final_states=True)
    assert apart(found, torch.stack(outputs, 1)) < 1e-6 and apart(last, state) < 1e-6


def test_what_is_held_does_not_grow_with_the_length():
    """The largest tensor that an operation makes, beyond those as long as the input."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                self.numbers = max(self.numbers, made.numel())
            return made

    def largest(length: int) -> int:
        tensors = inputs(0, length=length)
        with torch.no_grad(), Largest() as mode:
            scan.scan(*(tensors[name] for name in ("x", "dt", "A", "B", "C")), chunk_size=8)
        return mode.numbers

    assert largest(512) == 2 * 512 * 4 * 6  # x itself


def test_a_model_gives_the_same_by_either_scan_and_says_which():
    model = random_models.build("mamba2")
    ids = torch.randint(0, 60, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with scan.matrix_scan():
            assert scan.scan_path(CPU) == "matrix"
            matrix = model(ids).logits
        with scan.matrix_scan(False):
            assert scan.scan_path(CPU) == "transformers"
            library = model(ids).logits
    assert apart(matrix, library) < 1e-5
