"""Selection on the CPU without sorting everything, compiled by numba.

Rows and columns keep a small heap each; the best of all are found by a cut estimated from a sample, whose few
survivors are ranked exactly. All are exact, with the reference's order of ties.

``encode.cpu`` calls ``offer`` and ``keep_best`` from its kernels. Numba's cache does not see that: who changes them
must touch that file too (or delete ``__pycache__``), or old code goes on running.
"""

import math
from collections.abc import Iterator
from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from apportion.ops.numbers import bits_of, float_of
from apportion.ops.processor import has_expand
from apportion.ops.select.reference import Places
from apportion.ops.select.vector import reaching_by_compress
from apportion.ops.threads import matching_threads
from apportion.ops.vectors import LANES

_COLUMN_TILE = 64  # columns scanned together: whole cache lines of every row, and few enough heaps to stay in cache
_SAMPLE = 65_536  # scores looked at to estimate the cut; the estimate is off by about 1 % of the winners at 1 % density
_LARGE_HEAP = 32  # winners of a row from which on a cut and a digit at a time beat keeping a heap
_ROW_SAMPLE = 512  # scores of a row looked at to estimate its cut


@numba.njit(cache=True, inline="always")
@no_type_check
def _worse(value, place, other_value, other_place):
    """Whether the first entry loses to the second: lower score, or the same score further along."""
    return value < other_value or (value == other_value and place > other_place)


@numba.njit(cache=True)
@no_type_check
def _sift_down(values, places, size):
    """Restore the heap whose root (the worst winner) was replaced."""
    parent = 0
    value, place = values[0], places[0]
    while True:
        child = 2 * parent + 1
        if child >= size:
            break
        if child + 1 < size and _worse(values[child + 1], places[child + 1], values[child], places[child]):
            child += 1
        if not _worse(values[child], places[child], value, place):
            break
        values[parent], places[parent] = values[child], places[child]
        parent = child
    values[parent], places[parent] = value, place


@numba.njit(cache=True)
@no_type_check
def offer(values, places, size, capacity, value, place):
    """Offer an entry to a heap of winners; entries come in tie order, so an equal newcomer always loses."""
    if size < capacity:
        child = size
        while child > 0:
            parent = (child - 1) // 2
            if not _worse(value, place, values[parent], places[parent]):
                break
            values[child], places[child] = values[parent], places[parent]
            child = parent
        values[child], places[child] = value, place
        return size + 1
    if value > values[0]:
        values[0], places[0] = value, place
        _sift_down(values, places, size)
    return size


@numba.njit(cache=True)
@no_type_check
def row_by_heap(scores, winners):
    """The best places of one row, ascending."""
    count = winners.shape[0]
    values = np.empty(count, scores.dtype)
    places = np.empty(count, np.int64)
    size = 0
    for column in range(scores.shape[0]):
        value = scores[column]
        if size < count or value > values[0]:
            size = offer(values, places, size, count, value, column)
    places.sort()
    winners[:] = places


@numba.njit(parallel=True, cache=True)
@no_type_check
def _rows(scores, winners):
    for row in numba.prange(scores.shape[0]):
        row_by_heap(scores[row], winners[row])


@numba.njit(cache=True, inline="always")
@no_type_check
def _sortable(value):
    """An unsigned integer in the order of the float32s, in which minus zero equals zero."""
    bits = bits_of(value + np.float32(0.0))
    return bits ^ (np.uint32(0xFFFFFFFF) if bits >> np.uint32(31) else np.uint32(0x80000000))


@numba.njit(cache=True)
@no_type_check
def _last_winner(keys, count):
    """The ``count`` largest key, and how many of its equals are among them: digit by digit, the highest first."""
    found, left = np.uint32(0), count
    histogram = np.empty(256, np.int64)
    for shift in range(24, -8, -8):
        histogram[:] = 0
        for key in keys:
            # Two shifts, since one by all bits is undefined.
            if (key >> np.uint32(shift)) >> np.uint32(8) == found:
                histogram[(key >> np.uint32(shift)) & np.uint32(255)] += 1
        digit = 255
        while histogram[digit] < left:
            left -= histogram[digit]
            digit -= 1
        found = np.uint32(found << np.uint32(8) | np.uint32(digit))
    return found, left


@numba.njit(cache=True)
@no_type_check
def _reaching_by_loop(scores, cut, places):
    """List the places whose score reaches the cut, without a branch; how many there are."""
    found = 0
    for column in range(scores.shape[0]):
        places[found] = column
        found += scores[column] >= cut
    return found


_reaching = reaching_by_compress if has_expand() else _reaching_by_loop


@numba.njit(cache=True)
@no_type_check
def row_by_cut(scores, stride, winners):
    """As ``row_by_heap``, for many winners: candidates by a cut that a sample suggests, then the last of them."""
    count, columns = winners.shape[0], scores.shape[0]
    sampled = (columns + stride - 1) // stride
    expected = count / stride
    rank = int(expected + 3 * np.sqrt(expected) + 3)
    places = np.empty(columns + LANES, np.int32)
    found = 0
    if rank < sampled:
        sample = np.empty(sampled, np.uint32)
        for place in range(sampled):
            sample[place] = _sortable(scores[place * stride])
        key, _ = _last_winner(sample, rank)
        cut = float_of(key ^ (np.uint32(0x80000000) if key >> np.uint32(31) else np.uint32(0xFFFFFFFF)))
        found = _reaching(scores, cut, places)
    if found < count:
        found = _reaching(scores, np.float32(-np.inf), places)
    keys = np.empty(found, np.uint32)
    for place in range(found):
        keys[place] = _sortable(scores[places[place]])
    last, ties = _last_winner(keys, count)
    written = 0
    for place in range(found):
        if keys[place] > last or (keys[place] == last and ties > 0):
            ties -= keys[place] == last
            winners[written] = places[place]
            written += 1


@numba.njit(parallel=True, cache=True)
@no_type_check
def _rows_by_cut(scores, stride, winners):
    for row in numba.prange(scores.shape[0]):
        row_by_cut(scores[row], stride, winners[row])


@numba.njit(cache=True)
@no_type_check
def best_of_row(scores, winners):
    """The best places of one row of float32, ascending, whichever way is faster."""
    if winners.shape[0] < _LARGE_HEAP:
        row_by_heap(scores, winners)
    else:
        row_by_cut(scores, max(1, scores.shape[0] // _ROW_SAMPLE), winners)


@numba.njit(parallel=True, cache=True)
@no_type_check
def _columns(scores, starts, places):
    """Fill ``places[starts[i]:starts[i + 1]]`` with the winning rows of column ``i``, in order."""
    rows, columns = scores.shape
    for tile in numba.prange((columns + _COLUMN_TILE - 1) // _COLUMN_TILE):
        first = tile * _COLUMN_TILE
        last = min(first + _COLUMN_TILE, columns)
        values = np.empty(starts[last] - starts[first], scores.dtype)
        sizes = np.zeros(last - first, np.int64)
        for row in range(rows):
            for column in range(first, last):
                start, stop = starts[column], starts[column + 1]
                size = sizes[column - first]
                if start == stop:
                    continue
                value = scores[row, column]
                offset = start - starts[first]
                if size < stop - start or value > values[offset]:
                    sizes[column - first] = offer(values[offset:], places[start:stop], size, stop - start, value, row)
        for column in range(first, last):
            places[starts[column] : starts[column + 1]].sort()


@numba.njit(cache=True)
@no_type_check
def _columns_to_rows(starts, places, crow):
    """Turn winners listed by column into CSR order; columns are walked in order, so each row's come out sorted."""
    for place in range(places.shape[0]):
        crow[places[place] + 1] += 1
    for row in range(crow.shape[0] - 1):
        crow[row + 1] += crow[row]
    cursor = crow[:-1].copy()
    col = np.empty(places.shape[0], np.int64)
    for column in range(starts.shape[0] - 1):
        for place in range(starts[column], starts[column + 1]):
            row = places[place]
            col[cursor[row]] = column
            cursor[row] += 1
    return col


@numba.njit(parallel=True, cache=True)
@no_type_check
def _count_reaching(scores, cut, counts):
    for row in numba.prange(scores.shape[0]):
        found = 0
        for column in range(scores.shape[1]):
            found += scores[row, column] >= cut
        counts[row] = found


@numba.njit(parallel=True, cache=True)
@no_type_check
def _gather_reaching(scores, cut, crow, col, values):
    for row in numba.prange(scores.shape[0]):
        place = crow[row]
        for column in range(scores.shape[1]):
            value = scores[row, column]
            if value >= cut:
                col[place] = column
                values[place] = value
                place += 1


@numba.njit(cache=True)
@no_type_check
def keep_best(crow, col, values, last_winner, count):
    """Drop what lies below the last winner's score, and of its equals those that come too late; what is left."""
    above = 0
    for entry in range(values.shape[0]):
        above += values[entry] > last_winner
    equals_left = count - above
    kept_crow = np.zeros_like(crow)
    kept_col = np.empty(count, np.int64)
    kept_values = np.empty(count, values.dtype)
    kept = 0
    for row in range(crow.shape[0] - 1):
        for entry in range(crow[row], crow[row + 1]):
            if values[entry] == last_winner:
                if equals_left == 0:
                    continue
                equals_left -= 1
            elif values[entry] < last_winner:
                continue
            kept_col[kept] = col[entry]
            kept_values[kept] = values[entry]
            kept += 1
        kept_crow[row + 1] = kept
    return kept_crow, kept_col, kept_values


@numba.njit(parallel=True, cache=True)
@no_type_check
def _count_above(scores, limits, counts):
    for row in numba.prange(scores.shape[0]):
        found = 0
        for column in range(scores.shape[1]):
            found += scores[row, column] > limits[column]
        counts[row] = found


@numba.njit(parallel=True, cache=True)
@no_type_check
def _gather_above(scores, limits, crow, col):
    for row in numba.prange(scores.shape[0]):
        place = crow[row]
        for column in range(scores.shape[1]):
            if scores[row, column] > limits[column]:
                col[place] = column
                place += 1


def select_rows(scores: Float[Tensor, "rows columns"], count: int) -> Places:
    """The ``count`` best of each row: one pass with a heap of ``count``, or a cut where that is a large heap."""
    rows, columns = scores.shape
    winners = torch.empty(rows, count, dtype=torch.int64)
    if winners.numel():
        array = _comparable(scores)
        with matching_threads():
            if count < _LARGE_HEAP or array.dtype != np.float32:
                _rows(array, winners.numpy())
            else:
                _rows_by_cut(array, max(1, columns // _ROW_SAMPLE), winners.numpy())
    return torch.arange(rows + 1) * count, winners.view(-1)


def select_columns(scores: Float[Tensor, "rows columns"], quotas: Int64[Tensor, "columns"]) -> Places:
    """The ``quotas[i]`` best of each column ``i``: one pass with a heap a column, then a transposition."""
    starts = torch.zeros(quotas.numel() + 1, dtype=torch.int64)
    torch.cumsum(quotas, dim=0, out=starts[1:])
    places = torch.empty(int(starts[-1]), dtype=torch.int64)
    crow = torch.zeros(scores.shape[0] + 1, dtype=torch.int64)
    with matching_threads():
        if places.numel():
            _columns(_comparable(scores), starts.numpy(), places.numpy())
        col = _columns_to_rows(starts.numpy(), places.numpy(), crow.numpy())
    return crow, torch.from_numpy(col)


def select_total(scores: Float[Tensor, "rows columns"], count: int) -> Places:
    """The ``count`` best of all: a cut from a sample, verified to leave enough, then an exact ranking of the rest."""
    rows = scores.shape[0]
    if count == 0:
        return torch.zeros(rows + 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    array = _comparable(scores)
    counts = np.empty(rows, np.int64)
    with matching_threads():
        for cut in _cuts(array, count):
            _count_reaching(array, cut, counts)
            if counts.sum() >= count:
                break
        crow = np.zeros(rows + 1, np.int64)
        np.cumsum(counts, out=crow[1:])
        col = np.empty(crow[-1], np.int64)
        values = np.empty(crow[-1], array.dtype)
        _gather_reaching(array, cut, crow, col, values)
        last_winner = np.partition(values, values.size - count)[values.size - count]
        kept_crow, kept_col, _ = keep_best(crow, col, values, last_winner, count)
    return torch.from_numpy(kept_crow), torch.from_numpy(kept_col)


def select_above(scores: Float[Tensor, "rows columns"], limits: Float[Tensor, "columns"]) -> Places:
    """Every entry strictly above its column's limit: count, then fill."""
    array, limits_ = _comparable(scores), _comparable(limits)
    counts = np.empty(scores.shape[0], np.int64)
    crow = np.zeros(scores.shape[0] + 1, np.int64)
    with matching_threads():
        _count_above(array, limits_, counts)
        np.cumsum(counts, out=crow[1:])
        col = np.empty(crow[-1], np.int64)
        _gather_above(array, limits_, crow, col)
    return torch.from_numpy(crow), torch.from_numpy(col)


def _cuts(array: np.ndarray, count: int) -> Iterator[np.floating]:
    """Cuts to try, from tight to one that everything reaches."""
    flat = array.reshape(-1)
    sample = flat[:: _sample_stride(*array.shape)]
    rank = count / flat.size * sample.size
    for margin in (4.0, 16.0):  # in standard deviations of the sampled rank
        place = int(rank + margin * np.sqrt(rank) + margin)
        if place < sample.size:
            from_below = sample.size - 1 - place
            yield np.partition(sample, from_below)[from_below]
    yield flat.dtype.type(-np.inf)


def _sample_stride(rows: int, columns: int) -> int:
    """How far apart sampled scores lie; without a common divisor with the columns, so that all of them are visited."""
    stride = max(1, rows * columns // _SAMPLE)
    while math.gcd(stride, columns) > 1:
        stride += 1
    return stride


def _comparable(scores: Tensor) -> np.ndarray:
    """Contiguous floats of a type numba compares; widening keeps every order and every tie."""
    wide = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    return wide.detach().contiguous().numpy()
