"""Scoring tokens by their labels on the CPU, compiled by numba: a tile of tokens at a time, one vector lane a token.

Lanes want the tokens of a channel side by side, *planar*. Labels that are stored so (memory [.., channels, tokens]) are
read as they lie; others are transposed a tile at a time, which takes several times as long as scoring them. Planar or
not, the sums are the same.
"""

from typing import no_type_check

import numba
import numpy as np
import torch
from numba import carray  # type: ignore[attr-defined]
from torch import Tensor

from apportion.ops.label_scores import reference
from apportion.ops.label_scores.vector import score_codes
from apportion.ops.numbers import flat, number
from apportion.ops.team import address_of, pointer_to, run_on_team, take_task
from apportion.ops.threads import matching_threads

_TILE = 512  # tokens scored together: their scores stay in the first-level cache, their labels in the second
_FEW = 8192  # channels of labels that one thread packs sooner than several are woken
_AT_ONCE = 4  # channels: a score is loaded and stored once for so many
# Reassociation as in ``csr.cpu``: the order of a sum depends on its length and the machine alone.
_FAST = {"reassoc", "contract", "nsz"}


@numba.njit(cache=True)
@no_type_check
def _planar(stored, start, size, steps, planes):
    """A tile's planes with their tokens side by side: memory, where the first begins, how far the next is."""
    if steps[2] == 1:
        return stored, start, steps[3]
    own = np.empty(planes * size, stored.dtype)
    for token in range(size):
        at = start + token * steps[2]
        label = stored[at : at + (planes - 1) * steps[3] + 1]
        for plane in range(planes):
            own[plane * size + token] = label[plane * steps[3]]
    return own, 0, size


@numba.njit(fastmath=_FAST, cache=True)
@no_type_check
def _score(query, memory, start, step, channels, scores):
    """Sums over channels of what is planar; the query has zeros beyond the last one."""
    size = scores.shape[0]
    scores[:] = 0
    for channel in range(0, channels, _AT_ONCE):
        q0, q1, q2, q3 = query[channel], query[channel + 1], query[channel + 2], query[channel + 3]
        at0, at1 = start + channel * step, start + min(channel + 1, channels - 1) * step
        at2, at3 = start + min(channel + 2, channels - 1) * step, start + min(channel + 3, channels - 1) * step
        l0, l1 = memory[at0 : at0 + size], memory[at1 : at1 + size]
        l2, l3 = memory[at2 : at2 + size], memory[at3 : at3 + size]
        for token in range(size):
            scores[token] += (
                q0 * number(l0[token]) + q1 * number(l1[token]) + q2 * number(l2[token]) + q3 * number(l3[token])
            )


@numba.njit(cache=True)
@no_type_check
def score_plain(queries, channels, labels, start, steps, out, to, out_step, size):
    """Products of queries with a tile of ``size`` labels: query ``i``'s from ``out[to + i * out_step]`` on."""
    memory, at, step = _planar(labels, start, size, steps, channels)
    for query in range(queries.shape[0]):
        first = to + query * out_step
        _score(queries[query], memory, at, step, channels, out[first : first + size])


@numba.njit(cache=True)
@no_type_check
def score_packed(
    queries, channels, codes, start, steps, ranges, range_start, range_steps, bits, out, to, out_step, size
):  # fmt: skip
    """The same by codes: ``minimum * sum of the query + step * sum of query times code``."""
    planes = (channels * bits + 7) // 8
    memory, at, step = _planar(codes, start, size, steps, planes)
    bounds, lows, range_step = _planar(ranges, range_start, size, range_steps, 2)
    for query in range(queries.shape[0]):
        asked = queries[query]
        score_codes(
            asked,
            asked.sum(), planes, bits, memory, at, step, bounds, lows, lows + range_step, size, out,
            to + query * out_step,
        )  # fmt: skip


@numba.njit(parallel=True, cache=True)
@no_type_check
def _label_scores(queries, channels, labels, steps, rows, tile, tokens, out):
    """``out[row, query, token]``, in one dimension: products of the queries of a row with its labels."""
    tiles = (tokens + tile - 1) // tile
    for task in numba.prange(queries.shape[0] * tiles):
        row, first = task // tiles, task % tiles * tile
        start = row // rows * steps[0] + row % rows * steps[1] + first * steps[2]
        to, size = row * queries.shape[1] * tokens + first, min(tile, tokens - first)
        score_plain(queries[row], channels, labels, start, steps, out, to, tokens, size)


@numba.njit(parallel=True, cache=True)
@no_type_check
def _packed_label_scores(queries, channels, codes, steps, ranges, range_steps, bits, rows, tile, tokens, out):
    """The same by codes."""
    tiles = (tokens + tile - 1) // tile
    for task in numba.prange(queries.shape[0] * tiles):
        row, first = task // tiles, task % tiles * tile
        start = row // rows * steps[0] + row % rows * steps[1] + first * steps[2]
        range_start = row // rows * range_steps[0] + row % rows * range_steps[1] + first * range_steps[2]
        to, size = row * queries.shape[1] * tokens + first, min(tile, tokens - first)
        score_packed(
            queries[row], channels, codes, start, steps, ranges, range_start, range_steps, bits, out, to, tokens, size
        )


@numba.njit(cache=True)
@no_type_check
def pack_label(label, bits, codes):
    """The codes of one label into zeroed bytes; its minimum and step. In the arithmetic of the reference."""
    top, least = np.float32(2**bits - 1), np.float32(np.finfo(np.float32).tiny)
    low, high = label.min(), label.max()
    step = high / top - low / top
    in_byte = 8 // bits
    for channel in range(label.shape[0]):
        code = np.rint((label[channel] - low) / max(step, least))
        code = np.uint8(min(max(code, np.float32(0.0)), top))
        codes[channel // in_byte] |= code << np.uint8(channel % in_byte * bits)
    return low, step


@numba.njit(parallel=True, cache=True)
@no_type_check
def _pack_many(labels, bits, codes, ranges):
    for label in numba.prange(labels.shape[0]):
        codes[label] = 0
        ranges[label, 0], ranges[label, 1] = pack_label(labels[label], bits, codes[label])


@numba.njit(cache=True)
@no_type_check
def _pack_few(labels, bits, codes, ranges):
    for label in range(labels.shape[0]):
        codes[label] = 0
        ranges[label, 0], ranges[label, 1] = pack_label(labels[label], bits, codes[label])


def pack_labels(labels: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """See ``apportion.ops.label_scores.pack_labels``."""
    if labels.numel() == 0:
        return reference.pack_labels(labels, bits)
    wide = labels.detach().float().contiguous()
    channels = wide.shape[-1]
    codes = torch.empty(*wide.shape[:-1], -(-channels * bits // 8), dtype=torch.uint8)
    ranges = torch.empty(*wide.shape[:-1], 2, dtype=torch.float32)
    given = (wide.view(-1, channels).numpy(), bits, codes.view(-1, codes.shape[-1]).numpy(), ranges.view(-1, 2).numpy())
    if wide.numel() < _FEW:
        _pack_few(*given)
    else:
        with matching_threads():
            _pack_many(*given)
    return codes, ranges


# What `_pack_channels` is told, after the number of the next task (see `run_on_team`).
(
    _LABELS, _ROWS, _CHANNELS, _BITS, _VECTORS, _WIDTH, _BATCH_STEP, _HEAD_STEP, _PLACES,
    _CODES, _CODE_BATCH, _CODE_ROW, _CODE_STEP, _RANGES, _RANGE_BATCH, _RANGE_ROW, _RANGE_STEP,
) = range(1, 18)  # fmt: skip
_EVERYTHING = 2**40  # a size for memory whose end a kernel does not ask for


@no_type_check
def _pack_channels(told):
    """Every label of one token: few numbers, but so far apart in memory that two threads wait half as long for it."""
    channels, bits, width = told[_CHANNELS], told[_BITS], told[_WIDTH]
    vectors = carray(pointer_to(told[_VECTORS]), _EVERYTHING, np.float32)
    places = carray(pointer_to(told[_PLACES]), told[_ROWS] * channels, np.int64)
    codes = carray(pointer_to(told[_CODES]), _EVERYTHING, np.uint8)
    ranges = carray(pointer_to(told[_RANGES]), _EVERYTHING, np.float32)
    label, own = np.empty(channels, np.float32), np.empty((channels * bits + 7) // 8, np.uint8)
    each = take_task(told)
    while each < told[_LABELS]:
        batch, row = each // told[_ROWS], each % told[_ROWS]
        for channel in range(channels):
            place = places[row * channels + channel]
            label[channel] = vectors[batch * told[_BATCH_STEP] + place // width * told[_HEAD_STEP] + place % width]
        own[:] = 0
        low, step = pack_label(label, bits, own)
        at = batch * told[_CODE_BATCH] + row * told[_CODE_ROW]
        for plane in range(own.shape[0]):
            codes[at + plane * told[_CODE_STEP]] = own[plane]
        at = batch * told[_RANGE_BATCH] + row * told[_RANGE_ROW]
        ranges[at], ranges[at + told[_RANGE_STEP]] = low, step
        each = take_task(told)


def pack_channels_into(vectors: Tensor, places: Tensor, bits: int, codes: Tensor, ranges: Tensor, token: int) -> None:
    """See ``apportion.ops.label_scores.pack_channels_into``."""
    batch, _, _, width = vectors.shape
    rows, labels = codes.shape[1], places.shape[0] // max(1, codes.shape[1])
    if vectors.stride(3) != 1 and width > 1:
        vectors = vectors.contiguous()
    batch_step, head_step = vectors.stride()[:2]
    code_batch, code_row, code_step, code_token = codes.stride()
    range_batch, range_row, range_step, range_token = ranges.stride()
    run_on_team(
        address_of(_pack_channels),
        *(batch * rows, rows, labels, bits, vectors.data_ptr(), width, batch_step, head_step, places.data_ptr()),
        *(codes.data_ptr() + token * code_token, code_batch, code_row, code_step),
        *(ranges.data_ptr() + 4 * token * range_token, range_batch, range_row, range_step),
    )


def label_scores(queries: Tensor, labels: Tensor) -> Tensor:
    """See ``apportion.ops.label_scores.label_scores``."""
    batch, heads, new, channels = queries.shape
    rows, tokens = labels.shape[1:3]
    planar = labels.stride(2) == 1
    if torch.float64 in (queries.dtype, labels.dtype) or 0 in (queries.numel(), labels.numel()):
        return reference.label_scores(queries, labels)
    if labels.dtype == torch.float32 and not planar:
        # Nothing to transpose: the library's product reads labels as they are.
        shared = queries.float().reshape(batch, rows, -1, channels) @ labels.transpose(-1, -2)
        return shared.view(batch, heads, new, tokens)
    if labels.dtype not in (torch.float32, torch.bfloat16):
        labels = labels.float()
    wanted = _padded(queries, rows)
    out = torch.empty(batch * rows, wanted.shape[1], tokens, dtype=torch.float32)
    with matching_threads():
        _label_scores(
            wanted.numpy(), channels, flat(labels), labels.stride(), rows, _TILE, tokens, out.view(-1).numpy()
        )
    return out.view(batch, heads, new, tokens)


def packed_label_scores(queries: Tensor, codes: Tensor, ranges: Tensor, bits: int) -> Tensor:
    """See ``apportion.ops.label_scores.packed_label_scores``."""
    batch, heads, new, channels = queries.shape
    rows, tokens = codes.shape[1:3]
    if queries.dtype == torch.float64 or 0 in (queries.numel(), codes.numel()):
        return reference.packed_label_scores(queries, codes, ranges, bits)
    wanted = _padded(queries, rows)
    out = torch.empty(batch * rows, wanted.shape[1], tokens, dtype=torch.float32)
    with matching_threads():
        _packed_label_scores(
            wanted.numpy(),
            channels,
            flat(codes),
            codes.stride(),
            flat(ranges),
            ranges.stride(),
            bits,
            rows,
            _TILE,
            tokens,
            out.view(-1).numpy(),
        )
    return out.view(batch, heads, new, tokens)


def _padded(queries: Tensor, rows: int) -> Tensor:
    """The queries of each row of labels, with zeros up to a multiple of what is taken at once."""
    batch, heads, new, channels = queries.shape
    shared = queries.detach().float().reshape(batch * rows, heads // rows * new, channels)
    missing = -channels % _AT_ONCE
    return torch.nn.functional.pad(shared, (0, missing)) if missing else shared.contiguous()
