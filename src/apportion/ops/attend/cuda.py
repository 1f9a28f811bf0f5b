"""Attention over chosen keys on CUDA, compiled by Triton: keys are read where they lie, a program for a part of a list.

Each part has a softmax of its own, and torch joins the parts by their maxima and sums; the cuts depend on the list's
length alone. Sums are taken in float32; float64 is left to torch's own operations. Right under Triton's interpreter;
**speed is unmeasured**.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from apportion.ops.attend import composed
from apportion.ops.triton_support import on_device_of

_PART = 512  # entries of a list that a program takes: enough programs for a GPU from a few thousand tokens on
_ENTRIES = 16  # that it has in flight at once


@triton.jit
@no_type_check
def _attend(
    queries,
    keys,
    values,
    indices,
    kept,
    most,
    sums,
    mixed,
    scaling,
    softcap,
    rows,
    new,
    chosen,
    group,
    width,
    value_width,
    lists_of_group,
    part_size,
    key_batch,
    key_group,
    key_token,
    value_batch,
    value_group,
    value_token,
    SOFTCAP: tl.constexpr,
    HEADS: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
):
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, key_head = item // (rows * new), item // new % rows // lists_of_group
    heads, within, out_within = tl.arange(0, HEADS), tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    is_head = heads < group
    query = tl.load(
        queries + (item * group + heads[:, None]) * width + within[None, :],
        mask=is_head[:, None] & (within < width)[None, :],
        other=0,
    ).to(tl.float32)
    high = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    mix = tl.zeros([HEADS, VALUE_WIDTH], tl.float32)
    last = tl.minimum(chosen, (part + 1) * part_size)
    for first in range(part * part_size, last, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        is_kept = tl.load(kept + item * chosen + entries, mask=entries < last, other=0) != 0
        token = tl.load(indices + item * chosen + entries, mask=is_kept, other=0)
        key = tl.load(
            keys + batch * key_batch + key_head * key_group + token[:, None] * key_token + within[None, :],
            mask=is_kept[:, None] & (within < width)[None, :],
            other=0,
        ).to(tl.float32)
        scores = tl.sum(query[:, None, :] * key[None, :, :], axis=2) * scaling
        if SOFTCAP:
            scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))
        scores = tl.where(is_kept[None, :], scores, float("-inf"))
        higher = tl.maximum(high, tl.max(scores, axis=1))
        # Nothing kept so far: any finite number will do, since all weights are zero.
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - finite[:, None])
        fade = tl.exp(high - finite)
        value = tl.load(
            values + batch * value_batch + key_head * value_group + token[:, None] * value_token + out_within[None, :],
            mask=is_kept[:, None] & (out_within < value_width)[None, :],
            other=0,
        ).to(tl.float32)
        total = total * fade + tl.sum(weights, axis=1)
        mix = mix * fade[:, None] + tl.sum(weights[:, :, None] * value[None, :, :], axis=1)
        high = higher
    place = (item * tl.num_programs(1) + part) * group + heads
    tl.store(most + place, high, mask=is_head)
    tl.store(sums + place, total, mask=is_head)
    tl.store(
        mixed + place[:, None] * value_width + out_within[None, :],
        mix,
        mask=is_head[:, None] & (out_within < value_width)[None, :],
    )


def attend_selected(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    kept: Tensor,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """See ``apportion.ops.attend.attend_selected``."""
    if queries.dtype == torch.float64:
        return composed.attend_selected(queries, keys, values, indices, kept, scaling, softcap)
    batch, heads, new, width = queries.shape
    rows, chosen, value_width = indices.shape[1], indices.shape[-1], values.shape[-1]
    group, groups = heads // rows, keys.shape[1]
    if 0 in (batch * heads * new, chosen, value_width):
        return queries.new_zeros(batch, heads, new, value_width)
    # [batch, rows, new, heads of the row, width]
    packed = queries.reshape(batch, rows, group, new, width).transpose(2, 3).contiguous()
    keys, values = (each if each.stride(-1) == 1 else each.contiguous() for each in (keys, values))
    lists, parts = batch * rows * new, triton.cdiv(chosen, _PART)
    most = torch.empty(lists, parts, group, device=queries.device, dtype=torch.float32)
    sums = torch.empty_like(most)
    mixed = torch.empty(lists, parts, group, value_width, device=queries.device, dtype=torch.float32)
    with on_device_of(queries):
        _attend[(lists, parts)](
            packed,
            keys,
            values,
            indices.contiguous(),
            kept.to(torch.uint8).contiguous(),
            most,
            sums,
            mixed,
            scaling,
            softcap or 1.0,
            rows,
            new,
            chosen,
            group,
            width,
            value_width,
            rows // groups,
            _PART,
            *keys.stride()[:3],
            *values.stride()[:3],
            SOFTCAP=softcap is not None,
            HEADS=triton.next_power_of_2(group),
            ENTRIES=_ENTRIES,
            WIDTH=triton.next_power_of_2(max(width, 1)),
            VALUE_WIDTH=triton.next_power_of_2(value_width),
        )
    out = _joined(most, sums, mixed).view(batch, rows, new, group, value_width)
    return out.transpose(2, 3).reshape(batch, heads, new, value_width).to(queries.dtype)


def _joined(most: Tensor, sums: Tensor, mixed: Tensor) -> Tensor:
    """The parts of every list as one softmax; zeros where no part has anything."""
    factors = (most - most.amax(1, keepdim=True)).exp().nan_to_num(0.0)
    total = (factors * sums).sum(1)
    joined = (factors[..., None] * mixed).sum(1)
    return torch.where(total[..., None] > 0, joined / total[..., None], 0.0)
