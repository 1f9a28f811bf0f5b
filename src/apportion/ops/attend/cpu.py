"""Attention over chosen keys on the CPU, compiled by numba: keys are read where they lie, nothing is gathered.

A list is cut into parts, so that one row of a small model keeps every thread busy; each part has a softmax of its own,
and whoever has the last part of a list joins them by their maxima and sums. The cuts depend on the list's length alone:
so does every result. Torch's own threads do it, see `apportion.ops.team`.
"""

import math
from typing import no_type_check

import numba
import numpy as np
import torch
from numba import carray  # type: ignore[attr-defined]
from torch import Tensor

from apportion.ops.attend import composed
from apportion.ops.attend.vector import dot, mix_rows
from apportion.ops.numbers import exp_below, float_of, prefetch, readable
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

_AHEAD = 16  # entries of a list that are asked for before their turn: scattered keys come late otherwise
_PART = 256  # entries of a list that a thread takes at a time: few enough that 2 threads share what 3 heads read
# Reassociation as in ``csr.cpu``: the order of a sum depends on its length and the machine alone.
_FAST = {"reassoc", "contract", "nsz"}
_EVERYTHING = 2**40  # a size for memory whose end a kernel does not ask for

# What a kernel is told, after the number of the next task (see `run_on_team`).
(
    _LISTS, _PARTS, _HEADS, _WIDTH, _VALUE_WIDTH, _CHOSEN, _PART_SIZE, _NEW, _ROWS, _ROWS_OF_GROUP,
    _QUERIES, _INDICES, _KEPT, _KEYS, _KEY_BATCH, _KEY_GROUP, _KEY_STEP,
    _VALUES, _VALUE_BATCH, _VALUE_GROUP, _VALUE_STEP, _SCALING, _SOFTCAP, _PARTIAL, _DONE, _OUT,
) = range(1, 27)  # fmt: skip


@numba.njit(cache=True)
@no_type_check
def products(queries, keys, key_start, key_step, places, size, scores):
    """``scores[head, entry]``: products of the queries with the keys at so many places."""
    width = queries.shape[1]
    line = 64 // keys.itemsize
    asked = queries.reshape(-1)
    for entry in range(size):
        if entry + _AHEAD < size:
            ahead = key_start + places[entry + _AHEAD] * key_step
            for j in range(0, width, line):
                prefetch(keys, ahead + j)
        start = key_start + places[entry] * key_step
        for head in range(queries.shape[0]):
            scores[head, entry] = dot(asked, head * width, keys, start, width)


@numba.njit(fastmath=_FAST, cache=True)
@no_type_check
def weigh(scores, size, scaling, softcap, most, sums):
    """Turn the products of a part into weights, in place: their maxima and sums."""
    for head in range(scores.shape[0]):
        of_head = scores[head, :size]
        if softcap > 0:
            for entry in range(size):
                of_head[entry] = softcap * np.float32(math.tanh(of_head[entry] * scaling / softcap))
        else:
            for entry in range(size):
                of_head[entry] *= scaling
        high = np.float32(-np.inf)
        for entry in range(size):
            high = max(high, of_head[entry])
        total = np.float32(0.0)
        for entry in range(size):
            weight = exp_below(of_head[entry] - high)
            of_head[entry] = weight
            total += weight
        most[head], sums[head] = high, total


@numba.njit(cache=True)
@no_type_check
def mix(scores, size, places, values, value_start, value_step, mixed):
    """``mixed[head]``: the values at so many places by their weights."""
    heads, width = mixed.shape
    weights, out = scores.reshape(-1), mixed.reshape(-1)
    for head in range(heads):
        first = head * scores.shape[1]
        mix_rows(weights, first, size, places, 0, values, value_start, value_step, _AHEAD, out, head * width, width)


@numba.njit(cache=True)
@no_type_check
def _join(most, sums, mixed, out):
    """One head's parts as one softmax; zeros where no part has anything."""
    high = most.max()
    total = np.float32(0.0)
    out[:] = 0
    for part in range(most.shape[0]):
        if sums[part] > 0:
            factor = np.float32(math.exp(most[part] - high))
            total += factor * sums[part]
            for j in range(out.shape[0]):
                out[j] += factor * mixed[part, j]
    if total > 0:
        for j in range(out.shape[0]):
            out[j] /= total


@numba.njit(cache=True)
@no_type_check
def partial_results(address, lists, parts, heads, width):
    """Maxima and sums [lists, parts, heads] and unscaled mixes [.., width] of all parts, in one piece of memory."""
    count = lists * parts * heads
    most = carray(pointer_to(address), (lists, parts, heads), np.float32)
    sums = carray(pointer_to(address + 4 * count), (lists, parts, heads), np.float32)
    return most, sums, carray(pointer_to(address + 8 * count), (lists, parts, heads, width), np.float32)


@numba.njit(cache=True)
@no_type_check
def join_list(most, sums, mixed, out):
    """A list's parts as one softmax for each of its heads; out is [heads, width]."""
    for head in range(out.shape[0]):
        _join(most[:, head], sums[:, head], mixed[:, head], out[head])


@numba.njit(cache=True)
@no_type_check
def _attend(told, keys, values):
    """Every part of every list."""
    parts, heads, width, chosen, new = told[_PARTS], told[_HEADS], told[_WIDTH], told[_CHOSEN], told[_NEW]
    most, sums, mixed = partial_results(told[_PARTIAL], told[_LISTS], parts, heads, told[_VALUE_WIDTH])
    scaling, softcap = float_of(np.int32(told[_SCALING])), float_of(np.int32(told[_SOFTCAP]))
    scores, kept_places = np.empty((heads, told[_PART_SIZE]), np.float32), np.empty(told[_PART_SIZE], np.int64)
    task = take_task(told)
    while task < told[_LISTS] * parts:
        item, part = task // parts, task % parts
        row = item // new
        batch, group = row // told[_ROWS], row % told[_ROWS] // told[_ROWS_OF_GROUP]
        first = part * told[_PART_SIZE]
        size = min(told[_PART_SIZE], chosen - first)
        places = carray(pointer_to(told[_INDICES] + 8 * (item * chosen + first)), size, np.int64)
        if told[_KEPT] != 0:
            kept = carray(pointer_to(told[_KEPT] + item * chosen + first), size, np.bool_)
            left = 0
            for entry in range(size):
                kept_places[left] = places[entry]
                left += kept[entry]
            places, size = kept_places, left
        queries = carray(pointer_to(told[_QUERIES] + 4 * item * heads * width), (heads, width), np.float32)
        start = batch * told[_KEY_BATCH] + group * told[_KEY_GROUP]
        products(queries, keys, start, told[_KEY_STEP], places, size, scores)
        weigh(scores, size, scaling, softcap, most[item, part], sums[item, part])
        start = batch * told[_VALUE_BATCH] + group * told[_VALUE_GROUP]
        mix(scores, size, places, values, start, told[_VALUE_STEP], mixed[item, part])
        if is_last(told[_DONE] + 8 * item, parts):
            of_list = heads * told[_VALUE_WIDTH]
            out = carray(pointer_to(told[_OUT] + 4 * item * of_list), (heads, told[_VALUE_WIDTH]), np.float32)
            join_list(most[item], sums[item], mixed[item], out)
        task = take_task(told)


@no_type_check
def _attend_float32(told):
    keys = carray(pointer_to(told[_KEYS]), _EVERYTHING, np.float32)
    _attend(told, keys, carray(pointer_to(told[_VALUES]), _EVERYTHING, np.float32))


@no_type_check
def _attend_bfloat16(told):
    keys = carray(pointer_to(told[_KEYS]), _EVERYTHING, np.uint16)
    _attend(told, keys, carray(pointer_to(told[_VALUES]), _EVERYTHING, np.uint16))


def attend_selected(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    kept: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """See ``apportion.ops.attend.attend_selected``; ``kept`` may be None for everything."""
    if keys.dtype != values.dtype or not {queries.dtype, keys.dtype} <= {torch.float32, torch.bfloat16}:
        kept = torch.ones_like(indices, dtype=torch.bool) if kept is None else kept
        return composed.attend_selected(queries, keys, values, indices, kept, scaling, softcap)
    batch, heads, new, width = queries.shape
    rows, chosen, value_width = indices.shape[1], indices.shape[-1], values.shape[-1]
    group = heads // rows
    if 0 in (batch * heads * new, chosen, value_width):
        return queries.new_zeros(batch, heads, new, value_width)
    # [batch * rows, new, heads of the row, width]
    packed = queries
    if new > 1:
        packed = packed.reshape(batch * rows, group, new, width).transpose(1, 2)
    packed, indices, kept = floats(packed), indices.contiguous(), None if kept is None else kept.contiguous()
    keys, values = readable(keys), readable(values)
    lists, parts = batch * rows * new, -(-chosen // _PART)
    out = torch.empty(batch, heads, new, value_width, dtype=torch.float32)
    run_on_team(
        address_of(_attend_float32 if keys.dtype == torch.float32 else _attend_bfloat16),
        *(lists, parts, group, width, value_width, chosen, _PART, new, rows, rows // keys.shape[1]),
        *(packed.data_ptr(), indices.data_ptr(), 0 if kept is None else kept.data_ptr()),
        *(keys.data_ptr(), *keys.stride()[:3], values.data_ptr(), *values.stride()[:3]),
        *(as_bits(scaling), as_bits(softcap or 0.0)),
        *(scratch(lists * parts * group * (2 + value_width)).data_ptr(), counters(lists).data_ptr(), out.data_ptr()),
    )
    if new > 1:
        out = out.view(batch, rows, new, group, value_width).transpose(2, 3)
        out = out.reshape(batch, heads, new, value_width)
    return out if queries.dtype == torch.float32 else out.to(queries.dtype)
