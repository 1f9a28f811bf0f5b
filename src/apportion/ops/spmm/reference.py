"""What products with packed matrices are: the dense product with the matrix unpacked."""

import torch
from torch import Tensor

from apportion.ops.spmm.tiles import Tiles


def unpack_bitmap(bits: Tensor, values: Tensor, columns: int) -> Tensor:
    """The matrix [rows, columns] of words of a bitmap and its values."""
    places = torch.arange(64, device=bits.device)
    mask = ((bits.unsqueeze(-1) >> places) & 1).flatten(1).bool()
    out = values.new_zeros(mask.shape)
    out[mask] = values
    return out[:, :columns]


def bitmap_matmul(x: Tensor, bits: Tensor, starts: Tensor, values: Tensor, way: str | None = None) -> Tensor:
    """``x @ W.T``; ``starts`` and ``way`` only help to be fast."""
    return _product(x, unpack_bitmap(bits, values, x.shape[1]))


def csr_narrow_matmul(x: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """``x @ W.T``."""
    weight = values.new_zeros(starts.shape[0] - 1, x.shape[1])
    weight[torch.repeat_interleave(starts.diff()), columns.long()] = values
    return _product(x, weight)


def block_matmul(x: Tensor, starts: Tensor, columns: Tensor, blocks: Tensor) -> Tensor:
    """``x @ W.T``, block by block; ``x`` is as wide as whole blocks."""
    _, height, width = blocks.shape
    weight = blocks.new_zeros(starts.shape[0] - 1, x.shape[1] // width, height, width)
    weight[torch.repeat_interleave(starts.diff()), columns.long()] = blocks
    return _product(x, weight.transpose(1, 2).flatten(2).flatten(0, 1))


def tiles_matmul(x: Tensor, tiles: Tiles) -> Tensor:
    """``x @ W.T``."""
    return _product(x, tiles.unpack())


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """In the wider of float32 and both types, so that weights are not rounded to the type of ``x``."""
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return (x.to(wide) @ weight.to(wide).T).to(x.dtype)
