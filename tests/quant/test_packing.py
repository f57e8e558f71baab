import torch
from hypothesis import given
from hypothesis import strategies as st

from bitalloc.quant.packing import pack, unpack


@given(rows=st.integers(1, 5), n=st.integers(1, 70), bits=st.sampled_from([1, 2, 3, 4, 5, 8]), seed=st.integers(0, 99))
def test_round_trip_is_exact_and_takes_whole_bytes_a_row(rows, n, bits, seed):
    codes = torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-n * bits // 8))
    assert torch.equal(unpack(packed, bits, n), codes)


@given(codes=st.lists(st.integers(0, 7), min_size=1, max_size=40))
def test_the_stream_is_little_endian(codes):
    number = sum(code << (3 * place) for place, code in enumerate(codes))
    packed = pack(torch.tensor([codes], dtype=torch.uint8), 3)[0].tolist()
    assert bytes(packed) == number.to_bytes(-(-len(codes) * 3 // 8), "little")


def test_bits_beyond_the_last_code_are_zero():
    assert pack(torch.full((2, 3), 7, dtype=torch.uint8), 3)[:, 1].tolist() == [1, 1]
