"""What scoring tokens by their labels is, in plain torch: unpack, widen, multiply."""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from apportion.ops.packing import pack_codes, unpack_codes


def label_scores(
    queries: Float[Tensor, "batch heads new channels"], labels: Float[Tensor, "batch rows tokens channels"]
) -> Float[Tensor, "batch heads new tokens"]:
    """Products of every query with the labels of its row, in float32, or in float64 where an operand is."""
    wide = sum_type(queries, labels)
    heads, rows = queries.shape[1], labels.shape[1]
    of_head = labels.to(wide).repeat_interleave(heads // rows, dim=1)
    return queries.to(wide) @ of_head.transpose(-1, -2)


def packed_label_scores(
    queries: Float[Tensor, "batch heads new channels"],
    codes: UInt8[Tensor, "batch rows tokens packed"],
    ranges: Float[Tensor, "batch rows tokens 2"],
    bits: int,
) -> Float[Tensor, "batch heads new tokens"]:
    """The same by packed labels: as if they were unpacked first."""
    return label_scores(queries, unpack_labels(codes, ranges, bits, queries.shape[-1]))


def pack_labels(
    labels: Float[Tensor, "batch rows tokens channels"], bits: int
) -> tuple[UInt8[Tensor, "batch rows tokens packed"], Float[Tensor, "batch rows tokens 2"]]:
    """Codes, the first channel in the lowest bits of the first byte, and minimum and step of each label."""
    wide = labels.float()
    if wide.shape[-1] == 0:
        return wide.new_zeros(wide.shape, dtype=torch.uint8), wide.new_zeros(*wide.shape[:-1], 2)
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    # Divided before the difference is taken, which might overflow.
    step = high / (2**bits - 1) - low / (2**bits - 1)
    # A constant label has no step: its codes are 0, and its minimum says everything.
    codes = ((wide - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(0, 2**bits - 1)
    return pack_codes(codes.to(torch.uint8), bits), torch.cat([low, step], dim=-1)


def unpack_labels(
    codes: UInt8[Tensor, "batch rows tokens packed"],
    ranges: Float[Tensor, "batch rows tokens 2"],
    bits: int,
    channels: int,
) -> Float[Tensor, "batch rows tokens channels"]:
    """Labels again: minimum + step * code."""
    each = unpack_codes(codes, bits, channels)
    labels: Tensor = ranges[..., :1] + ranges[..., 1:] * each.to(ranges.dtype)
    return labels


def sum_type(*operands: Tensor) -> torch.dtype:
    """The type in which products are summed."""
    return torch.float64 if any(each.dtype == torch.float64 for each in operands) else torch.float32


def pack_channels_into(
    vectors: Float[Tensor, "batch heads 1 width"],
    places: Int[Tensor, " all_channels"],
    bits: int,
    codes: UInt8[Tensor, "batch rows packed tokens"],
    ranges: Float[Tensor, "batch rows 2 tokens"],
    token: int,
) -> None:
    """See ``apportion.ops.label_scores.pack_channels_into``."""
    picked = vectors.detach().flatten(1).index_select(1, places)
    newest = pack_labels(picked.view(len(vectors), codes.shape[1], 1, -1), bits)
    for room, packed in zip((codes, ranges), newest, strict=True):
        room[..., token] = packed[:, :, 0]
