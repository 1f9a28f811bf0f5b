"""Low-rank keys on CUDA, compiled by Triton: gather, product and rotation in one kernel, a program for a few tokens.

A key's coordinate and the one that it turns together with are two products of the same factors. Sums are taken in
float32; float64 is left to torch's own operations. Right under Triton's interpreter; **speed is unmeasured**.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from apportion.ops.low_rank_keys import reference
from apportion.ops.triton_support import on_device_of

_TOKENS = 32  # of a program
_RANK = 32  # of the rank that it multiplies at a time
_WIDTH = 64  # of a key's width that it owns, at most


@triton.jit
@no_type_check
def _keys(
    factors,
    basis,
    tokens,
    cos,
    sin,
    out,
    groups,
    kept,
    rank,
    width,
    half,
    factor_batch,
    factor_token,
    factor_rank,
    basis_batch,
    cos_batch,
    cos_token,
    cos_half,
    sin_batch,
    sin_token,
    sin_half,
    OPERAND: tl.constexpr,
    ROTATED: tl.constexpr,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    batch, group = item // groups, item % groups
    place = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    is_place, is_column = place < kept, column < width
    token = tl.load(tokens + item * kept + place, mask=is_place, other=0)
    partner = tl.where(column < half, column + half, tl.where(column < 2 * half, column - half, column))
    key = tl.zeros([TOKENS, WIDTH], tl.float32)
    other = tl.zeros([TOKENS, WIDTH], tl.float32)
    start = basis + batch * basis_batch + group * rank * width
    for first in range(0, rank, RANK):
        ranks = first + tl.arange(0, RANK)
        is_rank = ranks < rank
        factor = tl.load(
            factors + batch * factor_batch + token[:, None] * factor_token + ranks[None, :] * factor_rank,
            mask=is_place[:, None] & is_rank[None, :],
            other=0,
        ).to(OPERAND)
        is_entry = is_rank[:, None] & is_column[None, :]
        own = tl.load(start + ranks[:, None] * width + column[None, :], mask=is_entry, other=0)
        key += tl.dot(factor, own.to(OPERAND), input_precision="ieee")
        if ROTATED:
            turned = tl.load(start + ranks[:, None] * width + partner[None, :], mask=is_entry, other=0)
            other += tl.dot(factor, turned.to(OPERAND), input_precision="ieee")
    if ROTATED:
        angle = tl.where(column < half, column, column - half)
        has_angle = is_place[:, None] & (column < 2 * half)[None, :]
        c = tl.load(
            cos + batch * cos_batch + token[:, None] * cos_token + angle[None, :] * cos_half, mask=has_angle, other=0
        )
        s = tl.load(
            sin + batch * sin_batch + token[:, None] * sin_token + angle[None, :] * sin_half, mask=has_angle, other=0
        )
        sign = tl.where(column < half, -1.0, 1.0)
        turned_by = tl.where(has_angle, c.to(tl.float32), 1.0)
        key = key * turned_by + sign[None, :] * other * s.to(tl.float32)
    tl.store(
        out + (item * kept + place[:, None]) * width + column[None, :],
        key.to(out.dtype.element_ty),
        mask=is_place[:, None] & is_column[None, :],
    )


def low_rank_keys(factors: Tensor, basis: Tensor, tokens: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """See ``apportion.ops.low_rank_keys.low_rank_keys``."""
    batch, groups, kept = tokens.shape
    rank, width = basis.shape[-2:]
    if factors.dtype == torch.float64 or 0 in (factors.numel(), basis.numel(), tokens.numel()):
        return reference.low_rank_keys(factors, basis, tokens, cos, sin)
    out = factors.new_empty(batch, groups, kept, width)
    rotated = cos is not None and sin is not None
    if cos is None or sin is None:
        cos = sin = factors[:, :, :0]
    half = cos.shape[-1]
    basis = basis.contiguous()
    part = max(16, min(_WIDTH, triton.next_power_of_2(width)))
    with on_device_of(factors):
        _keys[(batch * groups, triton.cdiv(kept, _TOKENS), triton.cdiv(width, part))](
            factors,
            basis,
            tokens.contiguous(),
            cos,
            sin,
            out,
            groups,
            kept,
            rank,
            width,
            half,
            *factors.stride(),
            basis.stride(0) if basis.shape[0] > 1 else 0,
            *cos.expand(batch, -1, -1).stride(),
            *sin.expand(batch, -1, -1).stride(),
            OPERAND=_operand_type(factors.dtype),
            ROTATED=rotated,
            TOKENS=_TOKENS,
            RANK=_RANK,
            WIDTH=part,
        )
    return out


def _operand_type(dtype: torch.dtype) -> tl.dtype:
    """The type in which factors are multiplied."""
    # Triton's interpreter multiplies the bits of bfloat16 numbers instead of the numbers, see ``encode.cuda``.
    if dtype == torch.bfloat16 and not triton.knobs.runtime.interpret:
        return tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32
