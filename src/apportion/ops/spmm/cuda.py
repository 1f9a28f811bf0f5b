"""Products with packed matrices on CUDA, compiled by Triton: load as sparse, compute as dense.

Flash-LLM scatters packed words into a dense tile of shared memory and multiplies by that. Triton leaves shared memory
to its compiler, so the tile is made by looking up instead: a bit's rank among the bits of its row says which packed
value is its own, and a row's values lie side by side, so that the look-ups of a row fall into few cache lines. Products
are tensor-core products of the dense tile, zeros and all; what is saved is memory traffic.

Columns may be split among programs (split-K): each counts the bits before its share, and partial sums in float32 are
added in a fixed order. Right under Triton's interpreter; **speed is unmeasured**.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from apportion.ops.spmm import reference
from apportion.ops.triton_support import on_device_of

WORD = 64
_ROWS = 64  # of a program
_PROGRAMS = 256  # so many at least keep a GPU busy; columns are split until there are


@triton.jit
@no_type_check
def _ones(word):
    """How many bits of a word are 1: sums in fields of 2, 4 and 8 bits, then all bytes."""
    word = word - ((word >> 1) & 0x5555555555555555)
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F
    word = word + (word >> 8)
    word = word + (word >> 16)
    word = word + (word >> 32)
    return word & 0x7F


@triton.jit
@no_type_check
def _bitmap(
    x,
    bits,
    starts,
    values,
    out,
    count,
    rows,
    columns,
    words,
    share,
    NUMBER: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wanted = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    split = tl.program_id(2)
    is_row, is_wanted = row < rows, wanted < count
    place = tl.arange(0, 64)
    base = tl.load(starts + row, mask=is_row, other=0)
    first, last = split * share, min(words, (split + 1) * share)
    for word in range(first):
        base += _ones(tl.load(bits + row.to(tl.int64) * words + word, mask=is_row, other=0))
    total = tl.zeros((ROWS, COUNT), tl.float32)
    for word in range(first, last):
        mask = tl.load(bits + row.to(tl.int64) * words + word, mask=is_row, other=0)
        # The sign bit is a bit like any other: whatever the shift drags along is cut off.
        bit = ((mask[:, None] >> place[None, :].to(tl.int64)) & 1).to(tl.int32)
        rank = tl.cumsum(bit, axis=1) - bit
        weight = tl.load(values + base[:, None] + rank, mask=bit != 0, other=0).to(NUMBER)
        column = word * 64 + place
        source = tl.load(
            x + wanted[None, :].to(tl.int64) * columns + column[:, None],
            mask=is_wanted[None, :] & (column < columns)[:, None],
            other=0,
        ).to(NUMBER)
        total = tl.dot(weight, source, total, input_precision="ieee")
        base += tl.sum(bit, axis=1)
    target = out + (split * count + wanted[None, :]).to(tl.int64) * rows + row[:, None]
    tl.store(target, total, mask=is_row[:, None] & is_wanted[None, :])


@triton.jit
@no_type_check
def _blocks(
    x,
    starts,
    columns,
    blocks,
    out,
    count,
    groups,
    width_of_x,
    NUMBER: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
):
    group = tl.program_id(0)
    wanted = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    is_wanted = wanted < count
    height, width = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    total = tl.zeros((HEIGHT, COUNT), tl.float32)
    first, last = tl.load(starts + group), tl.load(starts + group + 1)
    for block in range(first, last):
        inside = height[:, None] * WIDTH + width[None, :]
        weight = tl.load(blocks + block * HEIGHT * WIDTH + inside).to(NUMBER)
        column = tl.load(columns + block) * WIDTH + width
        source = tl.load(
            x + wanted[None, :].to(tl.int64) * width_of_x + column[:, None], mask=is_wanted[None, :], other=0
        ).to(NUMBER)
        total = tl.dot(weight, source, total, input_precision="ieee")
    target = out + wanted[None, :].to(tl.int64) * (groups * HEIGHT) + group * HEIGHT + height[:, None]
    tl.store(target, total, mask=is_wanted[None, :])


def bitmap_matmul(x: Tensor, bits: Tensor, starts: Tensor, values: Tensor, splits: int | None = None) -> Tensor:
    """``x @ W.T`` in the type of ``x``; see ``apportion.ops.spmm.bitmap_matmul``.

    Args:
        x: [count, columns].
        bits: of a bitmap.
        starts: of a bitmap.
        values: of a bitmap.
        splits: programs that share the columns of a row; by default as many as keep the GPU busy.
    """
    count, rows, words = x.shape[0], bits.shape[0], bits.shape[1]
    if 0 in (count, rows, words):
        return x.new_zeros(count, rows)
    wide = _power(count)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(count, wide))
    if splits is None:
        splits = min(8, triton.cdiv(_PROGRAMS, grid[0] * grid[1]))
    share = triton.cdiv(words, max(1, min(splits, words)))
    splits = triton.cdiv(words, share)
    out = torch.empty(splits, count, rows, device=x.device, dtype=torch.float32)
    held = values if values.numel() else values.new_zeros(1)
    with on_device_of(x):
        _bitmap[(*grid, splits)](
            x.contiguous(),
            bits,
            starts,
            held,
            out,
            count,
            rows,
            x.shape[1],
            words,
            share,
            NUMBER=_number(x, values),
            ROWS=_ROWS,
            COUNT=wide,
        )
    return out.sum(0).to(x.dtype) if splits > 1 else out[0].to(x.dtype)


def block_matmul(x: Tensor, starts: Tensor, columns: Tensor, blocks: Tensor) -> Tensor:
    """``x @ W.T`` in the type of ``x``; see ``apportion.ops.spmm.block_matmul``.

    Sides of blocks that are no powers of two from 16 on are left to the definition.
    """
    _, height, width = blocks.shape
    count, groups = x.shape[0], starts.shape[0] - 1
    if any(size < 16 or size & (size - 1) for size in (height, width)):
        return reference.block_matmul(x, starts, columns, blocks)
    if 0 in (count, groups, blocks.numel()):
        return x.new_zeros(count, groups * height)
    out = torch.empty(count, groups * height, device=x.device, dtype=torch.float32)
    wide = _power(count)
    with on_device_of(x):
        _blocks[(groups, triton.cdiv(count, wide))](
            x.contiguous(),
            starts,
            columns,
            blocks,
            out,
            count,
            groups,
            x.shape[1],
            NUMBER=_number(x, blocks),
            HEIGHT=height,
            WIDTH=width,
            COUNT=wide,
        )
    return out.to(x.dtype)


def _number(x: Tensor, values: Tensor) -> tl.dtype:
    """What is multiplied: the type of both, or float32, so that neither is rounded to the other's.

    Triton's interpreter multiplies bfloat16 as if they were whole numbers, so that it gets float32.
    """
    half = x.dtype == values.dtype == torch.bfloat16 and not triton.knobs.runtime.interpret
    return tl.bfloat16 if half else tl.float32


def _power(count: int) -> int:
    """Columns of a program: tensor cores want 16 at least."""
    power: int = triton.next_power_of_2(count)
    return max(16, min(64, power))
