"""Options: bytes are exact and grow with what they buy."""

from hypothesis import given
from hypothesis import strategies as st

from bitalloc.config import Sweep
from bitalloc.option import Option, from_row, options

SHAPES = st.tuples(st.integers(1, 300), st.integers(1, 300))


@given(SHAPES, st.sampled_from([16, 64, 128]), st.integers(0, 8), st.sampled_from([8, 16]), st.booleans())
def test_more_bits_more_rank_never_cost_fewer_bytes(shape, group_size, rank, factor_bits, symmetric):
    def nbytes(bits, rank):
        return Option("gptq", bits, group_size, rank, factor_bits, symmetric).nbytes(*shape)

    sizes = [nbytes(bits, rank) for bits in (2, 3, 4, 5, 6, 8)]
    assert sizes == sorted(sizes)
    assert nbytes(3, rank + 1) > nbytes(3, rank)


@given(SHAPES)
def test_symmetric_saves_exactly_the_zeros(shape):
    rows, columns = shape
    zeros = -(-rows * -(-columns // 64) * 4 // 8)
    both = (Option("rtn", 4, 64, 0, symmetric=s).nbytes(rows, columns) for s in (False, True))
    assert next(both) - next(both) == zeros


def test_rows_of_tables_give_the_option_back():
    sweep = Sweep(bits=[2, 4, 16], group_sizes=[32, 64], ranks=[0, 4], factor_bits=16)
    found = options(sweep)
    assert len(found) == len(set(found)) == 2 * 2 * 2 + 1
    for option in found:
        assert from_row(vars(option), sweep) == option
