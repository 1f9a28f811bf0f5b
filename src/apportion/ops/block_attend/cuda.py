"""Attention over kept blocks on CUDA, compiled by Triton: no score leaves the chip.

One program owns a block of queries of one head. It walks the list of its kept blocks of keys, and carries the running
maximum, sum and mix of an exact softmax, so that time and traffic are proportional to the blocks kept. Blocks whose
``size`` is no power of two (or below the 16 that tensor cores need) are filled up with masked places.

Products of float32 operands are taken in float32 throughout (no TF32), all others with float32 sums. Right under
Triton's interpreter; **speed is unmeasured**, and so are the numbers of warps.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from apportion.ops.triton_support import on_device_of

_SMALLEST = 16  # the least side of a product


@triton.jit
@no_type_check
def _attend(
    queries,
    keys,
    values,
    pointers,
    lists,
    real,
    out,
    heads,
    groups,
    new,
    tokens,
    query_blocks,
    size,
    width,
    value_width,
    scaling,
    softcap,
    CAPPED: tl.constexpr,
    PADDED: tl.constexpr,
    OPERAND: tl.constexpr,
    SUM: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
):
    """One block of queries of one head, over the blocks ``lists[pointers[i] : pointers[i + 1]]``."""
    place = tl.program_id(0).to(tl.int64)
    block = place % query_blocks
    head = place // query_blocks
    row = head // heads
    group = row * groups + head % heads // (heads // groups)

    within = tl.arange(0, SIZE)
    query = block * size + within
    is_query = (within < size) & (query < new)
    own = tokens - new + query
    of_width, of_value = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    is_width, is_value = of_width < width, of_value < value_width
    asking = tl.load(
        queries + (head * new + query)[:, None] * width + of_width[None, :],
        mask=is_query[:, None] & is_width[None, :],
        other=0.0,
    ).to(OPERAND)

    largest = tl.full([SIZE], -float("inf"), SUM)
    total = tl.zeros([SIZE], SUM)
    mixed = tl.zeros([SIZE, VALUE_WIDTH], SUM)
    end = tl.load(pointers + place + 1)
    for entry in range(tl.load(pointers + place), end):
        slot = tl.load(lists + entry) * size + within
        is_slot = (within < size) & (slot < tokens)
        if PADDED:
            is_slot = is_slot & (tl.load(real + row * tokens + slot, mask=is_slot, other=0) != 0)
        at = group * tokens + slot
        theirs = tl.load(
            keys + at[None, :] * width + of_width[:, None], mask=is_slot[None, :] & is_width[:, None], other=0.0
        )
        score = tl.dot(asking, theirs.to(OPERAND), input_precision="ieee", out_dtype=SUM) * scaling
        if CAPPED:
            # tanh by exponentials of negative numbers only, which cannot overflow.
            shrunk = tl.exp(-2.0 * tl.abs(score / softcap))
            size_of = softcap * (1.0 - shrunk) / (1.0 + shrunk)
            score = tl.where(score < 0, -size_of, size_of)
        seen = is_slot[None, :] & (slot[None, :] <= own[:, None])
        score = tl.where(seen, score, -float("inf"))
        now_largest = tl.maximum(largest, tl.max(score, axis=1))
        # While nothing was seen the maximum is -inf, and its difference to itself no number.
        base = tl.where(now_largest == -float("inf"), 0.0, now_largest)
        weight = tl.exp(score - base[:, None])
        shrink = tl.exp(largest - base)
        of_slot = tl.load(
            values + at[:, None] * value_width + of_value[None, :],
            mask=is_slot[:, None] & is_value[None, :],
            other=0.0,
        ).to(OPERAND)
        mixed = mixed * shrink[:, None]
        mixed += tl.dot(weight.to(OPERAND), of_slot, input_precision="ieee", out_dtype=SUM)
        total = total * shrink + tl.sum(weight, axis=1)
        largest = now_largest
    result = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out + (head * new + query)[:, None] * value_width + of_value[None, :],
        result.to(out.dtype.element_ty),
        mask=is_query[:, None] & is_value[None, :],
    )


def block_attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    size: int,
    scaling: float,
    softcap: float | None,
    real: Tensor | None,
) -> Tensor:
    """See ``apportion.ops.block_attend``."""
    batch, heads, new, width = queries.shape
    groups, tokens, value_width = keys.shape[1], keys.shape[2], values.shape[3]
    last = (torch.arange(0, new, size, device=kept.device) + tokens - new + size - 1).clamp(max=tokens - 1)
    kept = kept & (torch.arange(0, tokens, size, device=kept.device) <= last[:, None])
    pointers = torch.zeros(kept[..., 0].numel() + 1, dtype=torch.int64, device=kept.device)
    torch.cumsum(kept.sum(-1).flatten(), dim=0, out=pointers[1:])
    lists = kept.nonzero()[:, 3].contiguous()
    out = values.new_empty(batch, heads, new, value_width)
    padding = pointers if real is None else real.to(torch.int8).contiguous()
    with on_device_of(queries):
        _attend[(pointers.numel() - 1,)](
            queries.contiguous(),
            keys.contiguous(),
            values.contiguous(),
            pointers,
            lists,
            padding,
            out,
            heads,
            groups,
            new,
            tokens,
            kept.shape[2],
            size,
            width,
            value_width,
            scaling,
            1.0 if softcap is None else softcap,
            CAPPED=softcap is not None,
            PADDED=real is not None,
            OPERAND=_operand_type(queries.dtype),
            SUM=tl.float64 if queries.dtype == torch.float64 else tl.float32,
            SIZE=_side(size),
            WIDTH=_side(width),
            VALUE_WIDTH=_side(value_width),
            num_warps=4 if _side(size) <= 64 else 8,
        )
    return out


def _side(length: int) -> int:
    return max(_SMALLEST, 1 << (length - 1).bit_length())


def _operand_type(dtype: torch.dtype) -> tl.dtype:
    # Triton's interpreter multiplies the bits of bfloat16 numbers instead of the numbers (seen in 3.9.0). Products of
    # theirs are exact in float32, so widening them first is the same.
    if dtype == torch.bfloat16 and not triton.knobs.runtime.interpret:
        return tl.bfloat16
    if dtype == torch.float16:
        return tl.float16
    return tl.float64 if dtype == torch.float64 else tl.float32
