"""Attention over chunks on the CPU, compiled by numba: chunks' keys are rebuilt into a thread's own few kilobytes.

A list is cut into parts as in ``attend.cpu``, whose loops multiply, mix and join; numba's cache does not see when
they change: who changes them must touch this file too (or delete ``__pycache__``). The cuts depend on numbers of chunks
and of exact keys alone: so does every result.
"""

from typing import no_type_check

import numba
import numpy as np
import torch
from numba import carray  # type: ignore[attr-defined]
from torch import Tensor

from apportion.ops.attend.cpu import join_list, mix, partial_results, products, weigh
from apportion.ops.chunk_attend import reference
from apportion.ops.chunk_attend.vector import rebuild_rows
from apportion.ops.numbers import float_of, number, prefetch, readable
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

_PART = 64  # tokens of chunks that a thread takes at a time: their rebuilt keys stay in the first-level cache
_EXACT = 256  # exact keys that a thread takes at a time
_EVERYTHING = 2**40  # a size for memory whose end a kernel does not ask for

# What a kernel is told, after the number of the next task (see `run_on_team`). A table is five numbers: how many
# tokens, where it begins, and how far the next row of the batch, head and token are.
(
    _LISTS, _GROUPS, _HEADS, _WIDTH, _VALUE_WIDTH, _QUERIES, _CHUNKS, _CHOSEN, _SIZE, _PART_SIZE, _EXACT_SIZE,
    _BASIS, _BASIS_BATCH, _RANK, _COS, _COS_BATCH, _COS_STEP, _SIN, _SIN_BATCH, _SIN_STEP, _HALF,
    _SCALING, _SOFTCAP, _PARTIAL, _DONE, _OUT, _TABLES,
) = range(1, 28)  # fmt: skip
_OF_TABLE = 5
_ITEM = {torch.float32: 4, torch.bfloat16: 2}


@numba.njit(cache=True)
@no_type_check
def _turn(key, cos, cos_start, sin, sin_start, half):
    """Rotate a key, in place."""
    one, two = key[:half], key[half : 2 * half]
    cos, sin = cos[cos_start : cos_start + half], sin[sin_start : sin_start + half]
    for j in range(half):
        c, s = number(cos[j]), number(sin[j])
        first, second = one[j], two[j]
        one[j] = first * c - second * s
        two[j] = second * c + first * s


@numba.njit(cache=True)
@no_type_check
def _rebuild(told, factors, angles, batch, group, start, step, places, size, keys):
    """The first ``size`` rows of ``keys``: those of tokens, rebuilt and rotated."""
    rank, width = told[_RANK], told[_WIDTH]
    line = 64 // factors.itemsize
    for entry in range(size):
        ahead = start + places[entry] * step
        for j in range(0, rank, line):
            prefetch(factors, ahead + j)
    basis = carray(pointer_to(told[_BASIS]), _EVERYTHING, np.float32)
    first = batch * told[_BASIS_BATCH] + group * rank * width
    rebuild_rows(factors, start, step, places, size, basis, first, rank, width, keys.reshape(-1))
    cos = carray(pointer_to(told[_COS]), _EVERYTHING, angles)
    sin = carray(pointer_to(told[_SIN]), _EVERYTHING, angles)
    for entry in range(size):
        cos_start = batch * told[_COS_BATCH] + places[entry] * told[_COS_STEP]
        sin_start = batch * told[_SIN_BATCH] + places[entry] * told[_SIN_STEP]
        _turn(keys[entry], cos, cos_start, sin, sin_start, told[_HALF])


@numba.njit(cache=True)
@no_type_check
def _attend_chunks(told, number_type):
    """Every part of every list: of chunks, then of the two tables of exact keys."""
    heads, width, size, chosen = told[_HEADS], told[_WIDTH], told[_SIZE], told[_CHOSEN]
    of_chunks = (chosen * size + told[_PART_SIZE] - 1) // told[_PART_SIZE]
    of_first = (told[_TABLES + 2 * _OF_TABLE] + told[_EXACT_SIZE] - 1) // told[_EXACT_SIZE]
    parts = of_chunks + of_first + (told[_TABLES + 4 * _OF_TABLE] + told[_EXACT_SIZE] - 1) // told[_EXACT_SIZE]
    most, sums, mixed = partial_results(told[_PARTIAL], told[_LISTS], parts, heads, told[_VALUE_WIDTH])
    scaling, softcap = float_of(np.int32(told[_SCALING])), float_of(np.int32(told[_SOFTCAP]))
    longest = max(told[_PART_SIZE], told[_EXACT_SIZE])
    scores, places = np.empty((heads, longest), np.float32), np.empty(longest, np.int64)
    rebuilt, in_order = np.empty((told[_PART_SIZE], width), np.float32), np.arange(longest)
    task = take_task(told)
    while task < told[_LISTS] * parts:
        item, part = task // parts, task % parts
        batch, group = item // told[_GROUPS], item % told[_GROUPS]
        table, first, most_entries, total = _TABLES, part * told[_PART_SIZE], told[_PART_SIZE], chosen * size
        if part >= of_chunks + of_first:
            table += 4 * _OF_TABLE
            first = (part - of_chunks - of_first) * told[_EXACT_SIZE]
        elif part >= of_chunks:
            table += 2 * _OF_TABLE
            first = (part - of_chunks) * told[_EXACT_SIZE]
        if part >= of_chunks:
            most_entries, total = told[_EXACT_SIZE], told[table]
        entries = min(most_entries, total - first)
        chunks = carray(pointer_to(told[_CHUNKS] + 8 * item * chosen), chosen, np.int64)
        for entry in range(entries):
            at = first + entry
            places[entry] = chunks[at // size] * size + at % size if part < of_chunks else at
        queries = carray(pointer_to(told[_QUERIES] + 4 * item * heads * width), (heads, width), np.float32)
        keys = carray(pointer_to(told[table + 1]), _EVERYTHING, number_type)
        start, step = batch * told[table + 2] + group * told[table + 3], told[table + 4]
        if part < of_chunks and told[_RANK] > 0:
            _rebuild(told, keys, number_type, batch, group, start, step, places, entries, rebuilt)
            products(queries, rebuilt.reshape(-1), 0, width, in_order, entries, scores)
        else:
            products(queries, keys, start, step, places, entries, scores)
        weigh(scores, entries, scaling, softcap, most[item, part], sums[item, part])
        table += _OF_TABLE
        values = carray(pointer_to(told[table + 1]), _EVERYTHING, number_type)
        start = batch * told[table + 2] + group * told[table + 3]
        mix(scores, entries, places, values, start, told[table + 4], mixed[item, part])
        if is_last(told[_DONE] + 8 * item, parts):
            of_list = heads * told[_VALUE_WIDTH]
            out = carray(pointer_to(told[_OUT] + 4 * item * of_list), (heads, told[_VALUE_WIDTH]), np.float32)
            join_list(most[item], sums[item], mixed[item], out)
        task = take_task(told)


@no_type_check
def _float32(told):
    _attend_chunks(told, np.float32)


@no_type_check
def _bfloat16(told):
    _attend_chunks(told, np.uint16)


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
    angles = [] if cos is None or sin is None else [cos, sin]
    known = {each.dtype for each in (keys, values, *angles, *exact_keys, *exact_values)}
    if (
        len(exact_keys) > 2
        or len(known) > 1
        or not known | {queries.dtype} <= {torch.float32, torch.bfloat16}
        or 0 in (queries.numel(), values.numel())
    ):
        return reference.attend_chunks(
            queries, chunks, size, keys, basis, cos, sin, values, exact_keys, exact_values, scaling, softcap
        )
    exact = [each.shape[2] for each in exact_keys] + [0] * (2 - len(exact_keys))
    value_width, lists, group = values.shape[-1], batch * groups, heads // groups
    parts = -(-chosen * size // _PART) + sum(-(-each // _EXACT) for each in exact)
    tables = [keys, values]
    for pair in zip(exact_keys, exact_values, strict=True):
        tables += pair
    tables, angles = [readable(each) for each in tables], [readable(each) for each in angles]
    basis = None if basis is None else floats(basis)
    asked, chunks = floats(queries), chunks.contiguous()
    out = torch.empty(batch, heads, value_width, dtype=torch.float32)
    run_on_team(
        address_of(_float32 if values.dtype == torch.float32 else _bfloat16),
        *(lists, groups, group, width, value_width, asked.data_ptr(), chunks.data_ptr(), chosen, size, _PART, _EXACT),
        *((0, 0, 0) if basis is None else (basis.data_ptr(), _batch_step(basis), basis.shape[2])),
        *[each for table in angles for each in (table.data_ptr(), _batch_step(table), table.stride(1))],
        *((0,) * 7 if not angles else (angles[0].shape[-1],)),
        *(as_bits(scaling), as_bits(softcap or 0.0)),
        *(scratch(lists * parts * group * (2 + value_width)).data_ptr(), counters(lists).data_ptr(), out.data_ptr()),
        *[each for table in tables for each in (table.shape[-2], table.data_ptr(), *_steps(table))],
    )
    return out if queries.dtype == torch.float32 else out.to(queries.dtype)


def _steps(table: Tensor) -> tuple[int, int, int]:
    """How far apart rows of the batch, heads and tokens are; factors are one table for all heads."""
    steps = table.stride()
    return (steps[0], 0, steps[1]) if len(steps) == 3 else (steps[0], steps[1], steps[2])


def _batch_step(table: Tensor) -> int:
    """How far apart rows of the batch are; 0 where there is one for all."""
    return 0 if table.shape[0] == 1 else table.stride(0)
