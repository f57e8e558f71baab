"""Codes as a little-endian bitstream: code i of a row takes bits i*b .. i*b+b-1, each row padded to a byte."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, n] below 2^bits -> bytes [rows, ceil(n * bits / 8)].

    >>> [f"{byte:08b}" for byte in pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 3)[0].tolist()]
    ['11010001', '00000000']
    """
    rows, n = codes.shape
    # eight codes fill exactly `bits` bytes
    octets = torch.nn.functional.pad(codes, (0, -n % 8)).view(rows, -1, 8)
    words = torch.zeros(octets.shape[:2], dtype=torch.int64)
    for place in range(8):
        words |= octets[:, :, place].long() << (bits * place)
    packed = torch.stack([(words >> (8 * byte)) & 255 for byte in range(bits)], dim=2).to(torch.uint8)
    return packed.view(rows, -1)[:, : -(-n * bits // 8)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`: bytes [rows, ceil(n * bits / 8)] -> uint8 codes [rows, n]."""
    rows, length = packed.shape
    octets = torch.nn.functional.pad(packed, (0, -length % bits)).view(rows, -1, bits)
    words = octets.new_zeros(octets.shape[:2], dtype=torch.int64)
    for byte in range(bits):
        words |= octets[:, :, byte].long() << (8 * byte)
    codes = torch.stack([(words >> (bits * place)) & (2**bits - 1) for place in range(8)], dim=2).to(torch.uint8)
    return codes.view(rows, -1)[:, :n].contiguous()
