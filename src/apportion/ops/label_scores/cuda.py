"""Scoring tokens by their labels on CUDA, compiled by Triton: a program for some tokens of a row, and all its queries.

Labels are read once for all heads that share them, and packed ones are unpacked in registers. Sums are taken in
float32; float64 is left to torch's own operations. Right under Triton's interpreter; **speed is unmeasured**.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from apportion.ops.label_scores import reference
from apportion.ops.triton_support import on_device_of

_TOKENS = 64  # of a program: with 128 channels 8,192 numbers, 64 registers of each of its 128 threads


@triton.jit
@no_type_check
def _scores(
    queries,
    labels,
    ranges,
    out,
    rows,
    tokens,
    channels,
    count,
    label_batch,
    label_row,
    label_token,
    label_channel,
    range_batch,
    range_row,
    range_token,
    range_side,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, CHANNELS)
    is_token, is_channel = token < tokens, channel < channels
    start = labels + row // rows * label_batch + row % rows * label_row
    place = channel
    if BITS < 16:
        place = channel // (8 // BITS)
    label = tl.load(
        start + token[:, None] * label_token + place[None, :] * label_channel,
        mask=is_token[:, None] & is_channel[None, :],
        other=0,
    )
    if BITS < 16:
        shift = channel % (8 // BITS) * BITS
        label = (label.to(tl.int32) >> shift[None, :]) & ((1 << BITS) - 1)
        bounds = ranges + row // rows * range_batch + row % rows * range_row + token * range_token
        low = tl.load(bounds, mask=is_token, other=0)
        step = tl.load(bounds + range_side, mask=is_token, other=0)
        number = low[:, None] + step[:, None] * label.to(tl.float32)
    else:
        number = label.to(tl.float32)
    for query in range(count):
        wanted = tl.load(queries + (row * count + query) * channels + channel, mask=is_channel, other=0)
        score = tl.sum(wanted.to(tl.float32)[None, :] * number, axis=1)
        tl.store(out + (row * count + query) * tokens + token, score, mask=is_token)


def label_scores(queries: Tensor, labels: Tensor) -> Tensor:
    """See ``apportion.ops.label_scores.label_scores``."""
    if reference.sum_type(queries, labels) == torch.float64:
        return reference.label_scores(queries, labels)
    return _scored(queries, labels, labels, 16)


def packed_label_scores(queries: Tensor, codes: Tensor, ranges: Tensor, bits: int) -> Tensor:
    """See ``apportion.ops.label_scores.packed_label_scores``."""
    if queries.dtype == torch.float64:
        return reference.packed_label_scores(queries, codes, ranges, bits)
    return _scored(queries, codes, ranges, bits)


def _scored(queries: Tensor, labels: Tensor, ranges: Tensor, bits: int) -> Tensor:
    batch, heads, new, channels = queries.shape
    rows, tokens = labels.shape[1:3]
    out = torch.zeros(batch, heads, new, tokens, device=queries.device, dtype=torch.float32)
    if 0 in (queries.numel(), labels.numel()):
        return out
    with on_device_of(queries):
        _scores[(batch * rows, triton.cdiv(tokens, _TOKENS))](
            queries.contiguous(),
            labels,
            ranges,
            out,
            rows,
            tokens,
            channels,
            heads // rows * new,
            *labels.stride(),
            *ranges.stride(),
            BITS=bits,
            TOKENS=_TOKENS,
            CHANNELS=triton.next_power_of_2(channels),
        )
    return out
