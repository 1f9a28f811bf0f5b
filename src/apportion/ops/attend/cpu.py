"""Attention over chosen keys on the CPU, compiled by numba: keys are read where they lie, nothing is gathered.

A list is cut into parts, so that one row of a small model keeps every thread busy; each part has a softmax of its own,
and the parts are joined by their maxima and sums. The cuts depend on the list's length alone: so does every result.
"""

import math
from typing import no_type_check

import numba
import numpy as np
import torch
from torch import Tensor

from apportion.ops.attend import composed
from apportion.ops.numbers import exp_below, flat, number, prefetch, readable
from apportion.ops.threads import matching_threads

_AHEAD = 16  # entries of a list that are asked for before their turn: scattered keys come late otherwise
_PART = 256  # entries of a list that a thread takes at a time: few enough that 2 threads share what 3 heads read
_FEW = 65_536  # numbers of all parts that one thread joins sooner than several are woken
# Reassociation as in ``csr.cpu``: the order of a sum depends on its length and the machine alone.
_FAST = {"reassoc", "contract", "nsz"}


@numba.njit(fastmath=_FAST, cache=True)
@no_type_check
def _products(queries, keys, key_start, key_step, indices, kept, scaling, softcap, scores, places):
    """Scores of the kept entries of a part, packed to the front, and where they are; how many there are."""
    size, width = 0, queries.shape[1]
    line = 64 // keys.itemsize
    for entry in range(indices.shape[0]):
        if entry + _AHEAD < indices.shape[0]:
            ahead = key_start + indices[entry + _AHEAD] * key_step
            for j in range(0, width, line):
                prefetch(keys, ahead + j)
        if not kept[entry]:
            continue
        start = key_start + indices[entry] * key_step
        key = keys[start : start + width]
        for head in range(queries.shape[0]):
            total = np.float32(0.0)
            for j in range(width):
                total += queries[head, j] * number(key[j])
            total *= scaling
            if softcap > 0:
                total = softcap * math.tanh(total / softcap)
            scores[head, size] = total
        places[size] = indices[entry]
        size += 1
    return size


@numba.njit(fastmath=_FAST, cache=True)
@no_type_check
def _mix(scores, size, places, values, value_start, value_step, most, sums, mixed):
    """Turn the scores of a part into weights, and mix its values by them."""
    width = mixed.shape[1]
    for head in range(scores.shape[0]):
        high = np.float32(-np.inf)
        for entry in range(size):
            high = max(high, scores[head, entry])
        total = np.float32(0.0)
        for entry in range(size):
            weight = exp_below(scores[head, entry] - high)
            scores[head, entry] = weight
            total += weight
        most[head], sums[head] = high, total
        mixed[head] = 0
    line = 64 // values.itemsize
    for entry in range(size):
        if entry + _AHEAD < size:
            ahead = value_start + places[entry + _AHEAD] * value_step
            for j in range(0, width, line):
                prefetch(values, ahead + j)
        start = value_start + places[entry] * value_step
        value = values[start : start + width]
        for head in range(scores.shape[0]):
            weight = scores[head, entry]
            for j in range(width):
                mixed[head, j] += weight * number(value[j])


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


@numba.njit(parallel=True, fastmath=_FAST, cache=True)
@no_type_check
def _attend(
    queries, keys, key_steps, values, value_steps, indices, kept, groups, part_size, scaling, softcap, most, sums, mixed
):
    """Every part of every list: its maxima, sums and unscaled mixes [lists, parts, heads of the list, value_width]."""
    rows, new, chosen = indices.shape[1:]
    parts = most.shape[1]
    for task in numba.prange(most.shape[0] * parts):
        item, part = task // parts, task % parts
        batch, row, query = item // (rows * new), item // new % rows, item % new
        group = row // (rows // groups)
        first, last = part * part_size, min(chosen, (part + 1) * part_size)
        scores = np.empty((queries.shape[2], last - first), np.float32)
        places = np.empty(last - first, np.int64)
        size = _products(
            queries[batch * rows + row, query],
            keys,
            batch * key_steps[0] + group * key_steps[1],
            key_steps[2],
            indices[batch, row, query, first:last],
            kept[batch, row, query, first:last],
            scaling,
            softcap,
            scores,
            places,
        )
        _mix(
            scores,
            size,
            places,
            values,
            batch * value_steps[0] + group * value_steps[1],
            value_steps[2],
            most[item, part],
            sums[item, part],
            mixed[item, part],
        )


@numba.njit(parallel=True, cache=True)
@no_type_check
def _join_many(most, sums, mixed, out):
    for item in numba.prange(most.shape[0]):
        for head in range(most.shape[2]):
            _join(most[item, :, head], sums[item, :, head], mixed[item, :, head], out[item, head])


@numba.njit(cache=True)
@no_type_check
def _join_few(most, sums, mixed, out):
    for item in range(most.shape[0]):
        for head in range(most.shape[2]):
            _join(most[item, :, head], sums[item, :, head], mixed[item, :, head], out[item, head])


def join_all(most: np.ndarray, sums: np.ndarray, mixed: np.ndarray, out: np.ndarray) -> None:
    """Join the parts of every list; out is [lists, heads of the list, value_width]."""
    if mixed.size < _FEW:
        _join_few(most, sums, mixed, out)
    else:
        _join_many(most, sums, mixed, out)


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
    types = {queries.dtype, keys.dtype, values.dtype}
    if not types <= {torch.float32, torch.bfloat16}:
        return composed.attend_selected(queries, keys, values, indices, kept, scaling, softcap)
    batch, heads, new, width = queries.shape
    rows, chosen, value_width = indices.shape[1], indices.shape[-1], values.shape[-1]
    group = heads // rows
    if 0 in (batch * heads * new, chosen, value_width):
        return queries.new_zeros(batch, heads, new, value_width)
    # [batch * rows, new, heads of the row, width]
    packed = queries.detach().float().reshape(batch * rows, group, new, width).transpose(1, 2).contiguous()
    keys, values = readable(keys), readable(values)
    lists, parts = batch * rows * new, -(-chosen // _PART)
    most = np.empty((lists, parts, group), np.float32)
    sums = np.empty((lists, parts, group), np.float32)
    mixed = np.empty((lists, parts, group, value_width), np.float32)
    out = torch.empty(batch, rows, new, group, value_width)
    with matching_threads():
        _attend(
            packed.numpy(),
            flat(keys),
            keys.stride()[:3],
            flat(values),
            values.stride()[:3],
            indices.contiguous().numpy(),
            kept.contiguous().numpy(),
            keys.shape[1],
            _PART,
            np.float32(scaling),
            np.float32(softcap or 0.0),
            most,
            sums,
            mixed,
        )
        join_all(most, sums, mixed, out.view(lists, group, value_width).numpy())
    return out.transpose(2, 3).reshape(batch, heads, new, value_width).to(queries.dtype)
