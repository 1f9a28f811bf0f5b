"""Choosing keys on the CPU in one go: a list's tokens are scored a tile at a time, and whoever scores the last selects.

Scores, and with them ties, are those of the ops themselves, whose loops are called here on torch's own threads
(`apportion.ops.team`). Numba's cache does not see changes of ``label_scores.cpu`` and ``select.cpu``: who changes them
must touch this file too (or delete ``__pycache__``).
"""

import math
from typing import no_type_check

import numba
import numpy as np
import torch
from numba import carray  # type: ignore[attr-defined]
from torch import Tensor

from apportion.ops.key_choice import reference
from apportion.ops.label_scores.cpu import pack_label, score_packed, score_plain
from apportion.ops.numbers import exp_below, float_of
from apportion.ops.select.cpu import best_of_row
from apportion.ops.team import (
    address_of,
    as_bits,
    counters,
    floats,
    is_last,
    pointer_to,
    run_on_team,
    scratch,
    take_task,
)

_TILE = 2048  # tokens that a thread scores at a time: their scores stay in the first-level cache, labels in the second
_TILE_OF_CHUNKS = 512  # their means are wider

# What a kernel is told, after the number of the next task (see `run_on_team`).
(
    _LISTS, _HEADS, _TOKENS, _COUNT, _TILES_OF, _CHANNELS, _QUERIES, _SCORES, _DONE, _WINNERS,
    _ROWS, _HEADS_OF_ROW, _LABELS, _BATCH_STEP, _ROW_STEP, _TOKEN_STEP, _CHANNEL_STEP,
    _RANGES, _RANGE_BATCH_STEP, _RANGE_ROW_STEP, _RANGE_TOKEN_STEP, _RANGE_STEP,
    _BITS, _MEAN, _SINKS, _RECENT, _CANDIDATES, _SCALING, _SOFTCAP, _PLACES, _ALL_HEADS, _WIDTH,
) = range(1, 33)  # fmt: skip
_EVERYTHING = 2**40  # a size for memory whose end a kernel does not ask for


@numba.njit(cache=True)
@no_type_check
def _round(query, bits):
    """In place: what packed labels of the query would stand for, in the arithmetic of ``pack_labels``."""
    in_byte, mask = 8 // bits, np.uint8(2**bits - 1)
    codes = np.zeros((query.shape[0] * bits + 7) // 8, np.uint8)
    low, step = pack_label(query, bits, codes)
    for place in range(query.shape[0]):
        code = codes[place // in_byte] >> np.uint8(place % in_byte * bits) & mask
        query[place] = low + step * np.float32(code)


@numba.njit(cache=True)
@no_type_check
def _pick(told, head, asked):
    """A head's query, or those of its numbers that labels have."""
    channels, heads = asked.shape[0], told[_ALL_HEADS]
    if told[_PLACES] == 0:
        asked[:] = carray(pointer_to(told[_QUERIES] + 4 * head * channels), channels, np.float32)
        return
    size = heads * told[_WIDTH]
    vectors = carray(pointer_to(told[_QUERIES] + 4 * (head // heads) * size), size, np.float32)
    places = carray(pointer_to(told[_PLACES] + 8 * (head % heads) * channels), channels, np.int64)
    for channel in range(channels):
        asked[channel] = vectors[places[channel]]


@numba.njit(cache=True)
@no_type_check
def _score_tile(told, labels, packed, head, first, size, asked, out):
    """``out[token]``: products of a head with ``size`` labels from token ``first`` on; ``asked`` is written over."""
    channels, bits = told[_CHANNELS], told[_BITS]
    row = head // told[_HEADS_OF_ROW]
    batch, row = row // told[_ROWS], row % told[_ROWS]
    start = batch * told[_BATCH_STEP] + row * told[_ROW_STEP] + first * told[_TOKEN_STEP]
    steps = (told[_BATCH_STEP], told[_ROW_STEP], told[_TOKEN_STEP], told[_CHANNEL_STEP])
    _pick(told, head, asked[0, :channels])
    # What `packed` is None for is left out by the compiler.
    if packed is None:
        score_plain(asked, channels, labels, start, steps, out, 0, 0, size)
    else:
        _round(asked[0, :channels], bits)
        ranges = carray(pointer_to(told[_RANGES]), _EVERYTHING, np.float32)
        range_steps = (told[_RANGE_BATCH_STEP], told[_RANGE_ROW_STEP], told[_RANGE_TOKEN_STEP], told[_RANGE_STEP])
        range_start = batch * range_steps[0] + row * range_steps[1] + first * range_steps[2]
        score_packed(asked, channels, labels, start, steps, ranges, range_start, range_steps, bits, out, 0, 0, size)


@numba.njit(cache=True)
@no_type_check
def _choose_tokens(told, labels, packed):
    """Every tile of every list; scores are infinite where a token is in every list."""
    tokens, heads, tile, mean = told[_TOKENS], told[_HEADS], told[_TILES_OF], told[_MEAN] != 0
    tiles = (tokens + tile - 1) // tile
    asked = np.zeros((1, (told[_CHANNELS] + 3) // 4 * 4), np.float32)
    own = np.empty(tile, np.float32)
    task = take_task(told)
    while task < told[_LISTS] * tiles:
        place, first = task // tiles, task % tiles * tile
        size = min(tile, tokens - first)
        scores = carray(pointer_to(told[_SCORES] + 4 * place * tokens), tokens, np.float32)
        agreed, of_head = scores[first : first + size], own[:size]
        _score_tile(told, labels, packed, place * heads, first, size, asked, agreed)
        for head in range(1, heads):
            _score_tile(told, labels, packed, place * heads + head, first, size, asked, of_head)
            for token in range(size):
                agreed[token] = agreed[token] + of_head[token] if mean else max(agreed[token], of_head[token])
        if mean:
            for token in range(size):
                agreed[token] /= np.float32(heads)
        scores[first : min(first + size, told[_SINKS])] = np.inf
        scores[max(first, tokens - told[_RECENT]) : first + size] = np.inf
        if is_last(told[_DONE] + 8 * place, tiles):
            winners = carray(pointer_to(told[_WINNERS] + 8 * place * told[_COUNT]), told[_COUNT], np.int64)
            best_of_row(scores, winners)
        task = take_task(told)


@numba.njit(cache=True)
@no_type_check
def _want(products, candidates, scaling, softcap, wanted):
    """The largest weight of a list's heads for each chunk, softmax by head over the candidates; -1 for others."""
    heads, chunks = products.shape
    wanted[:] = -1
    for head in range(heads):
        weights = products[head]
        high = np.float32(-np.inf)
        for chunk in range(chunks):
            product = weights[chunk] * scaling
            if softcap > 0:
                product = softcap * np.float32(math.tanh(product / softcap))
            product = product if candidates[chunk] else np.float32(-np.inf)
            weights[chunk] = product
            high = max(high, product)
        total = np.float32(0.0)
        for chunk in range(chunks):
            weights[chunk] = exp_below(weights[chunk] - high)
            total += weights[chunk]
        for chunk in range(chunks):
            weight = weights[chunk] / total if candidates[chunk] else np.float32(-1.0)
            wanted[chunk] = max(wanted[chunk], weight)


@numba.njit(cache=True)
@no_type_check
def _choose_chunks(told, means):
    """Every tile of every list: the products of its heads, and at the end what they want."""
    chunks, heads, tile, channels = told[_TOKENS], told[_HEADS], told[_TILES_OF], told[_CHANNELS]
    tiles = (chunks + tile - 1) // tile
    steps = (told[_BATCH_STEP], told[_ROW_STEP], told[_TOKEN_STEP], told[_CHANNEL_STEP])
    asked = np.zeros((heads, (channels + 3) // 4 * 4), np.float32)
    task = take_task(told)
    while task < told[_LISTS] * tiles:
        place, first = task // tiles, task % tiles * tile
        asked[:, :channels] = carray(
            pointer_to(told[_QUERIES] + 4 * place * heads * channels), (heads, channels), np.float32
        )
        start = place // told[_ROWS] * steps[0] + place % told[_ROWS] * steps[1] + first * steps[2]
        # The weights that the heads agree upon come behind the products of the heads.
        every = carray(pointer_to(told[_SCORES] + 4 * place * (heads + 1) * chunks), (heads + 1) * chunks, np.float32)
        score_plain(asked, channels, means, start, steps, every, first, chunks, min(tile, chunks - first))
        if is_last(told[_DONE] + 8 * place, tiles):
            candidates = carray(pointer_to(told[_CANDIDATES] + place * chunks), chunks, np.bool_)
            scaling, softcap = float_of(np.int32(told[_SCALING])), float_of(np.int32(told[_SOFTCAP]))
            products = every.reshape(heads + 1, chunks)
            _want(products[:heads], candidates, scaling, softcap, products[heads])
            winners = carray(pointer_to(told[_WINNERS] + 8 * place * told[_COUNT]), told[_COUNT], np.int64)
            best_of_row(products[heads], winners)
        task = take_task(told)


@no_type_check
def _by_packed_labels(told):
    _choose_tokens(told, carray(pointer_to(told[_LABELS]), _EVERYTHING, np.uint8), True)


@no_type_check
def _by_labels_float32(told):
    _choose_tokens(told, carray(pointer_to(told[_LABELS]), _EVERYTHING, np.float32), None)


@no_type_check
def _by_labels_bfloat16(told):
    _choose_tokens(told, carray(pointer_to(told[_LABELS]), _EVERYTHING, np.uint16), None)


@no_type_check
def _chunks_float32(told):
    _choose_chunks(told, carray(pointer_to(told[_LABELS]), _EVERYTHING, np.float32))


@no_type_check
def _chunks_bfloat16(told):
    _choose_chunks(told, carray(pointer_to(told[_LABELS]), _EVERYTHING, np.uint16))


def choose_by_labels(
    queries: Tensor,
    labels: Tensor,
    ranges: Tensor | None,
    bits: int,
    count: int,
    sinks: int,
    recent: int,
    groups: int,
    group: str,
    places: Tensor | None = None,
) -> Tensor:
    """See ``apportion.ops.key_choice.choose_by_labels``."""
    batch, heads, width = queries.shape
    rows, tokens = labels.shape[1:3]
    channels = width if places is None else places.shape[0] // heads
    if torch.float64 in (queries.dtype, labels.dtype) or 0 in (queries.numel(), labels.numel(), count):
        queries = reference.picked(queries, places)
        return reference.choose_by_labels(queries, labels, ranges, bits, count, sinks, recent, groups, group)
    kernel = _by_packed_labels
    if ranges is None:
        labels = _as_read(labels)
        kernel = _by_labels_float32 if labels.dtype == torch.float32 else _by_labels_bfloat16
    lists = heads if group == "head" else groups
    asked, winners = floats(queries), torch.empty(batch, lists, count, dtype=torch.int64)
    run_on_team(
        address_of(kernel),
        *(batch * lists, heads // lists, tokens, count, _TILE, channels, asked.data_ptr()),
        *(scratch(batch * lists * tokens).data_ptr(), counters(batch * lists).data_ptr(), winners.data_ptr()),
        *(rows, heads // rows, labels.data_ptr(), *labels.stride()),
        *((0, 0, 0, 0, 0) if ranges is None else (ranges.data_ptr(), *ranges.stride())),
        *(bits, group == "mean", sinks, recent, 0, 0, 0),
        *(0 if places is None else places.data_ptr(), heads, width),
    )
    return winners


def choose_chunks(
    queries: Tensor, means: Tensor, candidates: Tensor, count: int, scaling: float, softcap: float | None
) -> Tensor:
    """See ``apportion.ops.key_choice.choose_chunks``."""
    batch, heads, width = queries.shape
    groups, chunks = means.shape[1:3]
    if torch.float64 in (queries.dtype, means.dtype) or 0 in (queries.numel(), means.numel(), count):
        return reference.choose_chunks(queries, means, candidates, count, scaling, softcap)
    means, candidates, asked = _as_read(means), candidates.contiguous(), floats(queries)
    lists, group = batch * groups, heads // groups
    winners = torch.empty(batch, groups, count, dtype=torch.int64)
    run_on_team(
        address_of(_chunks_float32 if means.dtype == torch.float32 else _chunks_bfloat16),
        *(lists, group, chunks, count, _TILE_OF_CHUNKS, width, asked.data_ptr()),
        *(scratch(lists * (group + 1) * chunks).data_ptr(), counters(lists).data_ptr(), winners.data_ptr()),
        *(groups, 1, means.data_ptr(), *means.stride()),
        *(0, 0, 0, 0, 0, 0, 0, 0, 0),
        *(candidates.data_ptr(), as_bits(scaling), as_bits(softcap or 0.0)),
    )
    return winners


def _as_read(table: Tensor) -> Tensor:
    """In a type that kernels read."""
    return table if table.dtype in (torch.float32, torch.bfloat16) else table.float()
