"""Whole numbers of a few bits, several to a byte."""

import torch
from jaxtyping import UInt8
from torch import Tensor


def pack_codes(codes: UInt8[Tensor, "*batch count"], bits: int) -> UInt8[Tensor, "*batch bytes"]:
    """Several codes in a byte, the first in its lowest bits; the last byte is filled up with zeros.

    Args:
        codes: below ``2**bits``.
        bits: 2, 4 or 8.
    """
    each = 8 // bits
    size = -(-codes.shape[-1] // each)
    codes = torch.nn.functional.pad(codes, (0, size * each - codes.shape[-1])).view(*codes.shape[:-1], size, each)
    return (codes << _shifts(bits, codes.device)).sum(-1, dtype=torch.uint8)


def unpack_codes(packed: UInt8[Tensor, "*batch bytes"], bits: int, count: int) -> UInt8[Tensor, "*batch count"]:
    """The first ``count`` codes of each row of bytes."""
    every: Tensor = (packed[..., None] >> _shifts(bits, packed.device)) & (2**bits - 1)
    return every.flatten(-2)[..., :count]


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
