"""Scores of all tokens from a short label of each: a few channels of its key, or the mean of a chunk of keys.

Labels lie in memory by themselves, so that scoring reads it in order and far less of it than the keys take. Every op
takes any strides; the CPU is fastest where the tokens of a channel lie side by side, *planar*: keep labels (and codes,
and ranges) as [batch, rows, channels, tokens] and pass ``.transpose(-1, -2)``.
Without gradient: scores only say what is read.
"""

import torch
from torch import Tensor

from apportion.errors import InputError
from apportion.ops.direct import runs_directly
from apportion.ops.label_scores import reference
from apportion.ops.triton_support import triton_is_missing

__all__ = ["BITS", "label_scores", "pack_channels_into", "pack_labels", "packed_label_scores", "unpack_labels"]

BITS = (2, 4, 8)


@torch.library.custom_op("apportion::label_scores", mutates_args=())
def label_scores(queries: Tensor, labels: Tensor) -> Tensor:
    """Products of every query with the labels of all tokens.

    Args:
        queries: [batch, heads, new, channels].
        labels: [batch, rows, tokens, channels]; rows are heads, or groups whose ``heads / rows`` heads share labels.

    Returns:
        [batch, heads, new, tokens] in float32; in float64 where an operand is.
    """
    return reference.label_scores(queries, labels)


@torch.library.custom_op("apportion::packed_label_scores", mutates_args=())
def packed_label_scores(queries: Tensor, codes: Tensor, ranges: Tensor, bits: int) -> Tensor:
    """Products of every query with packed labels, which are never unpacked in memory.

    Args:
        queries: [batch, heads, new, channels]; not quantised.
        codes: of `pack_labels`, [batch, rows, tokens, packed].
        ranges: of `pack_labels`, [batch, rows, tokens, 2].
        bits: of a code: 2, 4 or 8.

    Returns:
        [batch, heads, new, tokens] in float32; in float64 where the queries are.
    """
    return reference.packed_label_scores(queries, codes, ranges, bits)


@label_scores.register_kernel("cpu")
def _(queries: Tensor, labels: Tensor) -> Tensor:
    from apportion.ops.label_scores import cpu

    return cpu.label_scores(queries, labels)


@packed_label_scores.register_kernel("cpu")
def _(queries: Tensor, codes: Tensor, ranges: Tensor, bits: int) -> Tensor:
    from apportion.ops.label_scores import cpu

    return cpu.packed_label_scores(queries, codes, ranges, bits)


@label_scores.register_kernel("cuda")
def _(queries: Tensor, labels: Tensor) -> Tensor:
    if triton_is_missing():
        return reference.label_scores(queries, labels)
    from apportion.ops.label_scores import cuda

    return cuda.label_scores(queries, labels)


@packed_label_scores.register_kernel("cuda")
def _(queries: Tensor, codes: Tensor, ranges: Tensor, bits: int) -> Tensor:
    if triton_is_missing():
        return reference.packed_label_scores(queries, codes, ranges, bits)
    from apportion.ops.label_scores import cuda

    return cuda.packed_label_scores(queries, codes, ranges, bits)


def pack_labels(labels: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Labels in a few bits a channel, each between the smallest and the largest channel of its own token.

    A channel is off by at most ``(max - min) / (2**bits - 1) / 2`` and float32 rounding. Tokens are packed each by
    itself, so that codes and ranges can be appended token by token.

    Args:
        labels: [batch, rows, tokens, channels], finite.
        bits: 2, 4 or 8.

    Returns:
        Codes, uint8 [batch, rows, tokens, ceil(channels * bits / 8)], and ranges, float32 [batch, rows, tokens, 2]: the
        minimum of each label and the step between its codes.

    Raises:
        InputError: other bits.
    """
    if bits not in BITS:
        raise InputError(f"bits={bits}: labels are packed in {', '.join(map(str, BITS))} bits; keep 16 unpacked")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        from apportion.ops.label_scores import cpu

        return cpu.pack_labels(labels, bits)
    return reference.pack_labels(labels, bits)


def pack_channels_into(vectors: Tensor, places: Tensor, bits: int, codes: Tensor, ranges: Tensor, token: int) -> None:
    """`pack_labels` of one token, whose label is some numbers of its vectors, written to where labels are kept.

    Args:
        vectors: [batch, heads, 1, width].
        places: int64 [rows * channels]; the label of row ``r`` is the numbers ``places[r * channels:][:channels]`` of a
            token's vectors side by side.
        bits: see `pack_labels`.
        codes: uint8 [batch, rows, packed, tokens], planar, of any strides; those of the token are written over.
        ranges: float32 [batch, rows, 2, tokens], likewise.
        token: which.
    """
    if bits in BITS and vectors.dtype == torch.float32 and runs_directly(vectors, places, codes, ranges):
        from apportion.ops.label_scores import cpu

        cpu.pack_channels_into(vectors, places, bits, codes, ranges, token)
        return
    reference.pack_channels_into(vectors, places, bits, codes, ranges, token)


def unpack_labels(codes: Tensor, ranges: Tensor, bits: int, channels: int) -> Tensor:
    """What packed labels stand for: float32 [batch, rows, tokens, channels]."""
    return reference.unpack_labels(codes, ranges, bits, channels)


@label_scores.register_fake
def _(queries: Tensor, labels: Tensor) -> Tensor:
    return queries.new_empty(*queries.shape[:3], labels.shape[2], dtype=reference.sum_type(queries, labels))


@packed_label_scores.register_fake
def _(queries: Tensor, codes: Tensor, ranges: Tensor, bits: int) -> Tensor:
    return queries.new_empty(*queries.shape[:3], codes.shape[2], dtype=reference.sum_type(queries, ranges))
