"""Attention over chunks on the CPU, compiled by numba: chunks' keys are rebuilt into a thread's own few kilobytes.

A list is cut into parts as in ``attend.cpu``, whose kernels multiply, mix and join; numba's cache does not see when
they change: who changes them must touch this file too (or delete ``__pycache__``). The cuts depend on numbers of chunks
and of exact keys alone: so does every result.
"""

import math
from typing import no_type_check

import numba
import numpy as np
import torch
from torch import Tensor

from apportion.ops.attend.cpu import _mix, _products, join_all
from apportion.ops.chunk_attend import reference
from apportion.ops.numbers import flat, number, prefetch, readable
from apportion.ops.threads import matching_threads

_PART = 64  # tokens of chunks that a thread takes at a time: their rebuilt keys stay in the first-level cache
_EXACT = 256  # exact keys that a thread takes at a time
_AT_ONCE = 4  # factors: a key is loaded and stored once for so many
# Reassociation as in ``csr.cpu``: the order of a sum depends on its length and the machine alone.
_FAST = {"reassoc", "contract", "nsz"}


@numba.njit(fastmath=_FAST, cache=True)
@no_type_check
def _rebuild(factors, start, basis, key):
    """``key = factors[start:] @ basis``, of basis [rank, width]."""
    rank, width = basis.shape
    key[:] = 0
    whole = rank // 4 * 4
    for first in range(0, whole, 4):
        f0, f1 = number(factors[start + first]), number(factors[start + first + 1])
        f2, f3 = number(factors[start + first + 2]), number(factors[start + first + 3])
        b0, b1, b2, b3 = basis[first], basis[first + 1], basis[first + 2], basis[first + 3]
        for j in range(width):
            key[j] += f0 * b0[j] + f1 * b1[j] + f2 * b2[j] + f3 * b3[j]
    for place in range(whole, rank):
        factor, row = number(factors[start + place]), basis[place]
        for j in range(width):
            key[j] += factor * row[j]


@numba.njit(fastmath=_FAST, cache=True)
@no_type_check
def _turn(key, cos, cos_start, sin, sin_start, half):
    """Rotate a key, in place."""
    for j in range(half):
        c, s = number(cos[cos_start + j]), number(sin[sin_start + j])
        one, two = key[j], key[j + half]
        key[j], key[j + half] = one * c - two * s, two * c + one * s


@numba.njit(fastmath=_FAST, cache=True)
@no_type_check
def _rebuilt_products(
    queries, factors, factor_start, factor_step, basis, cos, cos_start, cos_step, sin, sin_start, sin_step, half,
    places, scaling, softcap, scores,
):  # fmt: skip
    """Scores of tokens whose keys are rebuilt."""
    key = np.empty(queries.shape[1], np.float32)
    line = 64 // factors.itemsize
    for entry in range(places.shape[0]):
        if entry + 8 < places.shape[0]:
            ahead = factor_start + places[entry + 8] * factor_step
            for j in range(0, basis.shape[0], line):
                prefetch(factors, ahead + j)
        token = places[entry]
        _rebuild(factors, factor_start + token * factor_step, basis, key)
        _turn(key, cos, cos_start + token * cos_step, sin, sin_start + token * sin_step, half)
        for head in range(queries.shape[0]):
            total = np.float32(0.0)
            for j in range(key.shape[0]):
                total += queries[head, j] * key[j]
            total *= scaling
            if softcap > 0:
                total = softcap * math.tanh(total / softcap)
            scores[head, entry] = total


@numba.njit(parallel=True, fastmath=_FAST, cache=True)
@no_type_check
def _attend_chunks(
    queries, chunks, size, rebuilt, keys, key_steps, basis, cos, cos_steps, sin, sin_steps, half, values, value_steps,
    first_keys, first_steps, first_values, first_value_steps, second_keys, second_steps, second_values,
    second_value_steps, exact, part_size, exact_part, scaling, softcap, most, sums, mixed,
):  # fmt: skip
    """Every part of every list: of chunks, then of the two tables of exact keys."""
    groups, chosen = chunks.shape[1:]
    of_chunks = (chosen * size + part_size - 1) // part_size
    of_first = (exact[0] + exact_part - 1) // exact_part
    parts = most.shape[1]
    for task in numba.prange(most.shape[0] * parts):
        item, part = task // parts, task % parts
        batch, group = item // groups, item % groups
        asked = queries[item]
        if part < of_chunks:
            start, stop = part * part_size, min(chosen * size, (part + 1) * part_size)
            places = np.empty(stop - start, np.int64)
            for entry in range(start, stop):
                places[entry - start] = chunks[batch, group, entry // size] * size + entry % size
            scores = np.empty((asked.shape[0], stop - start), np.float32)
            if rebuilt:
                _rebuilt_products(
                    asked, keys, batch * key_steps[0], key_steps[1], basis[batch % basis.shape[0], group],
                    cos, batch * cos_steps[0], cos_steps[1], sin, batch * sin_steps[0], sin_steps[1], half,
                    places, scaling, softcap, scores,
                )  # fmt: skip
            else:
                kept = np.ones(stop - start, np.bool_)
                _products(
                    asked, keys, batch * key_steps[0] + group * key_steps[1], key_steps[2], places, kept, scaling,
                    softcap, scores, places,
                )  # fmt: skip
            _mix(
                scores, stop - start, places, values, batch * value_steps[0] + group * value_steps[1], value_steps[2],
                most[item, part], sums[item, part], mixed[item, part],
            )  # fmt: skip
        elif part < of_chunks + of_first:
            _exact_part(
                asked, first_keys, first_steps, first_values, first_value_steps, batch, group,
                (part - of_chunks) * exact_part, exact[0], exact_part, scaling, softcap,
                most[item, part], sums[item, part], mixed[item, part],
            )  # fmt: skip
        else:
            _exact_part(
                asked, second_keys, second_steps, second_values, second_value_steps, batch, group,
                (part - of_chunks - of_first) * exact_part, exact[1], exact_part, scaling, softcap,
                most[item, part], sums[item, part], mixed[item, part],
            )  # fmt: skip


@numba.njit(fastmath=_FAST, cache=True)
@no_type_check
def _exact_part(
    asked, keys, key_steps, values, value_steps, batch, group, first, total, most_entries, scaling, softcap, most, sums,
    mixed,
):  # fmt: skip
    """A part of consecutive exact keys."""
    size = min(most_entries, total - first)
    places = np.arange(first, first + size)
    scores = np.empty((asked.shape[0], size), np.float32)
    _products(
        asked, keys, batch * key_steps[0] + group * key_steps[1], key_steps[2], places, np.ones(size, np.bool_),
        scaling, softcap, scores, places,
    )  # fmt: skip
    _mix(
        scores, size, places, values, batch * value_steps[0] + group * value_steps[1], value_steps[2], most, sums, mixed
    )


def attend_chunks(
    queries: Tensor,
    chunks: Tensor,
    size: int,
    keys: Tensor,
    basis: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    values: Tensor,
    exact_keys: list[Tensor],
    exact_values: list[Tensor],
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """See ``apportion.ops.chunk_attend.attend_chunks``."""
    batch, heads, width = queries.shape
    groups, chosen = chunks.shape[1:]
    known = {each.dtype for each in (queries, keys, values, *exact_keys, *exact_values)}
    if len(exact_keys) > 2 or not known <= {torch.float32, torch.bfloat16} or 0 in (queries.numel(), values.numel()):
        return reference.attend_chunks(
            queries, chunks, size, keys, basis, cos, sin, values, exact_keys, exact_values, scaling, softcap
        )
    nothing = values[:, :, :0]
    pairs = [(readable(key), readable(value)) for key, value in zip(exact_keys, exact_values, strict=True)]
    pairs += [(nothing, nothing)] * (2 - len(pairs))
    exact = (pairs[0][0].shape[2], pairs[1][0].shape[2])
    keys, values = readable(keys), readable(values)
    rebuilt = basis is not None
    if basis is None:
        basis = torch.empty(1, groups, 0, width)
    if cos is None or sin is None:
        cos = sin = torch.empty(1, 1, 0)
    angles = [(readable(each), 0 if len(each) == 1 else each.stride(0)) for each in (cos, sin)]
    value_width = values.shape[-1]
    parts = -(-chosen * size // _PART) + sum(-(-each // _EXACT) for each in exact)
    lists, group = batch * groups, heads // groups
    asked = queries.detach().float().reshape(lists, group, width).contiguous()
    most, sums = np.empty((lists, parts, group), np.float32), np.empty((lists, parts, group), np.float32)
    mixed = np.empty((lists, parts, group, value_width), np.float32)
    out = torch.empty(lists, group, value_width)
    with matching_threads():
        _attend_chunks(
            asked.numpy(),
            chunks.contiguous().numpy(),
            size,
            rebuilt,
            flat(keys),
            (*keys.stride()[:-1], 0)[:3],
            basis.detach().float().contiguous().numpy(),
            *(each for table, first in angles for each in (flat(table), (first, table.stride(1)))),
            cos.shape[-1],
            flat(values),
            values.stride()[:3],
            *(each for pair in pairs for table in pair for each in (flat(table), table.stride()[:3])),
            exact,
            _PART,
            _EXACT,
            np.float32(scaling),
            np.float32(softcap or 0.0),
            most,
            sums,
            mixed,
        )
        join_all(most, sums, mixed, out.numpy())
    return out.view(batch, heads, value_width).to(queries.dtype)
