"""Products with packed matrices on the CPU, compiled by numba and run on torch's own threads (`apportion.ops.team`).

Decoding is bound by memory: what counts is how few bytes of the weights travel. Three ways to multiply by a bitmap:

- *expand*, for few columns: Flash-LLM's "load as sparse, compute as dense" with registers for its dense tile.
  A row is expanded 16 places at a time and multiplied with every column at once; needs AVX-512.
- *nonzeros*, for up to some dozen columns: the columns of each nonzero are looked up in the mask, and each nonzero is
  multiplied with 16 columns at once.
- *panels*, for many columns: some rows at a time are made dense in a scratch that stays in the cache, for the library's
  own product. In the limit this is the dense product, with the weights unpacked on the way.

A CSR with 16-bit column numbers needs no looking up, and block-sparse rows are small dense products. One thread owns
each output row, so sums have one order whatever the threads.
"""

from typing import no_type_check

import numba
import numpy as np
import torch
from numba import carray  # type: ignore[attr-defined]
from torch import Tensor

from apportion.ops.numbers import number, stored
from apportion.ops.processor import has_expand, native_bfloat16
from apportion.ops.spmm.vector import (
    WORD,
    columns_by_compress,
    expanded_dots,
    expanded_row,
    trailing_zeros,
    wide_sum,
)
from apportion.ops.team import address_of, pointer_to, run_on_team, take_task
from apportion.ops.vectors import LANES

_FAST = {"reassoc", "contract", "nsz"}
WAYS = ("expand", "nonzeros", "panels")
_PANEL_BYTES = 2**22  # of a panel made dense: smaller ones stay nearer, but make the library's products slow

# What a kernel is told, after the number of the next task (see `run_on_team`).
_ROWS, _WORDS, _COUNT, _STEP, _PER_TASK, _STARTS, _INDEX, _VALUES, _ENTRIES, _X, _OUT, _FIRST = range(1, 13)


@numba.njit(cache=True)
@no_type_check
def _expand_rows(told, values):
    rows, words, count, step = told[_ROWS], told[_WORDS], told[_COUNT], told[_STEP]
    starts = carray(pointer_to(told[_STARTS]), rows + 1, np.int64)
    bits = carray(pointer_to(told[_INDEX]), rows * words, np.int64)
    x = carray(pointer_to(told[_X]), count * step, np.float32)
    out = carray(pointer_to(told[_OUT]), count * rows, np.float32)
    task = take_task(told)
    while task * told[_PER_TASK] < rows:
        for row in range(task * told[_PER_TASK], min(rows, (task + 1) * told[_PER_TASK])):
            done = 0
            while done < count:
                left = count - done
                now = 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1
                at, word, first, place = starts[row], row * words, done * step, row + done * rows
                expanded_dots(values, at, bits, word, words, x, first, step, out, place, rows, now)
                done += now
        task = take_task(told)


@numba.njit(cache=True)
@no_type_check
def _columns_by_loop(bits, word, words, columns):
    """As ``columns_by_compress``, for any processor."""
    found = 0
    for each in range(words):
        mask = bits[word + each]
        while mask != 0:
            columns[found] = each * WORD + trailing_zeros(mask)
            found += 1
            mask &= mask - 1
    return found


@numba.njit(cache=True, fastmath=_FAST)
@no_type_check
def _row_sums(values, at, columns, first, entries, x, count, sums, out, row, rows):
    """One row's entries times all columns of ``x``: [columns, 16 times as many as needed], or as it is for one."""
    if count == 1:
        total = np.float32(0)
        for entry in range(entries):
            total += number(values[at + entry]) * x[columns[first + entry]]
        out[row] = total
        return
    step = (count + LANES - 1) // LANES * LANES
    for done in range(0, count, LANES):
        wide_sum(values, at, columns, first, entries, x, done, step, sums)
        for j in range(min(LANES, count - done)):
            out[row + (done + j) * rows] = sums[j]


@numba.njit(cache=True)
@no_type_check
def _nonzero_rows(told, values, loop):
    # What `loop` is not None for is left out by the compiler, as instructions that are not there must be.
    rows, words, count = told[_ROWS], told[_WORDS], told[_COUNT]
    starts = carray(pointer_to(told[_STARTS]), rows + 1, np.int64)
    bits = carray(pointer_to(told[_INDEX]), rows * words, np.int64)
    x = carray(pointer_to(told[_X]), told[_STEP], np.float32)
    out = carray(pointer_to(told[_OUT]), count * rows, np.float32)
    columns, sums = np.empty(words * WORD + LANES, np.int32), np.empty(LANES, np.float32)
    task = take_task(told)
    while task * told[_PER_TASK] < rows:
        for row in range(task * told[_PER_TASK], min(rows, (task + 1) * told[_PER_TASK])):
            if loop is None:
                entries = columns_by_compress(bits, row * words, words, columns)
            else:
                entries = _columns_by_loop(bits, row * words, words, columns)
            _row_sums(values, starts[row], columns, 0, entries, x, count, sums, out, row, rows)
        task = take_task(told)


@numba.njit(cache=True)
@no_type_check
def _csr_rows(told, values, columns):
    rows, count = told[_ROWS], told[_COUNT]
    starts = carray(pointer_to(told[_STARTS]), rows + 1, np.int64)
    x = carray(pointer_to(told[_X]), told[_STEP], np.float32)
    out = carray(pointer_to(told[_OUT]), count * rows, np.float32)
    sums = np.empty(LANES, np.float32)
    task = take_task(told)
    while task * told[_PER_TASK] < rows:
        for row in range(task * told[_PER_TASK], min(rows, (task + 1) * told[_PER_TASK])):
            first = starts[row]
            _row_sums(values, first, columns, first, starts[row + 1] - first, x, count, sums, out, row, rows)
        task = take_task(told)


@numba.njit(cache=True)
@no_type_check
def _expanded_by_loop(values, at, bits, word, words, out, place):
    out[place : place + words * WORD] = 0
    for each in range(words):
        mask = bits[word + each]
        while mask != 0:
            column = place + each * WORD + trailing_zeros(mask)
            out[column] = stored(number(values[at]), out[column])
            at += 1
            mask &= mask - 1


@numba.njit(cache=True)
@no_type_check
def _dense_rows(told, values, out, loop):
    """Rows from the first of a panel on, made dense one after the other."""
    rows, words, first = told[_ROWS], told[_WORDS], told[_FIRST]
    starts = carray(pointer_to(told[_STARTS]), first + rows + 1, np.int64)
    bits = carray(pointer_to(told[_INDEX]), (first + rows) * words, np.int64)
    task = take_task(told)
    while task * told[_PER_TASK] < rows:
        for row in range(task * told[_PER_TASK], min(rows, (task + 1) * told[_PER_TASK])):
            at, word, place = starts[first + row], (first + row) * words, row * words * WORD
            if loop is None:
                expanded_row(values, at, bits, word, words, out, place)
            else:
                _expanded_by_loop(values, at, bits, word, words, out, place)
        task = take_task(told)


@numba.njit(cache=True, fastmath=_FAST)
@no_type_check
def _block_rows(told, blocks):
    """A row of blocks times all columns of ``x`` [count, columns]: dots of the rows of each block."""
    height, width, count, step = told[_FIRST], told[_WORDS], told[_COUNT], told[_STEP]
    groups = told[_ROWS]
    starts = carray(pointer_to(told[_STARTS]), groups + 1, np.int64)
    columns = carray(pointer_to(told[_INDEX]), starts[groups], np.int64)
    x = carray(pointer_to(told[_X]), count * step, np.float32)
    out = carray(pointer_to(told[_OUT]), count * groups * height, np.float32)
    task = take_task(told)
    while task < groups:
        for j in range(count):
            for row in range(height):
                total = np.float32(0)
                for block in range(starts[task], starts[task + 1]):
                    at, source = (block * height + row) * width, j * step + columns[block] * width
                    weights, column = blocks[at : at + width], x[source : source + width]
                    for place in range(width):
                        total += number(weights[place]) * column[place]
                out[j * groups * height + task * height + row] = total
        task = take_task(told)


@no_type_check
def _expand_float32(told):
    _expand_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.float32))


@no_type_check
def _expand_bfloat16(told):
    _expand_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.uint16))


@no_type_check
def _nonzeros_float32(told):
    _nonzero_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.float32), None)


@no_type_check
def _nonzeros_bfloat16(told):
    _nonzero_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.uint16), None)


@no_type_check
def _loop_nonzeros_float32(told):
    _nonzero_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.float32), True)


@no_type_check
def _loop_nonzeros_bfloat16(told):
    _nonzero_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.uint16), True)


@no_type_check
def _csr_float32_uint16(told):
    columns = carray(pointer_to(told[_INDEX]), told[_ENTRIES], np.uint16)
    _csr_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.float32), columns)


@no_type_check
def _csr_bfloat16_uint16(told):
    columns = carray(pointer_to(told[_INDEX]), told[_ENTRIES], np.uint16)
    _csr_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.uint16), columns)


@no_type_check
def _csr_float32_int32(told):
    columns = carray(pointer_to(told[_INDEX]), told[_ENTRIES], np.int32)
    _csr_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.float32), columns)


@no_type_check
def _csr_bfloat16_int32(told):
    columns = carray(pointer_to(told[_INDEX]), told[_ENTRIES], np.int32)
    _csr_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.uint16), columns)


@no_type_check
def _dense_float32(told):
    out = carray(pointer_to(told[_OUT]), told[_ROWS] * told[_WORDS] * WORD, np.float32)
    _dense_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.float32), out, None)


@no_type_check
def _dense_bfloat16(told):
    out = carray(pointer_to(told[_OUT]), told[_ROWS] * told[_WORDS] * WORD, np.uint16)
    _dense_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.uint16), out, None)


@no_type_check
def _widened_bfloat16(told):
    out = carray(pointer_to(told[_OUT]), told[_ROWS] * told[_WORDS] * WORD, np.float32)
    _dense_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.uint16), out, None)


@no_type_check
def _loop_dense_float32(told):
    out = carray(pointer_to(told[_OUT]), told[_ROWS] * told[_WORDS] * WORD, np.float32)
    _dense_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.float32), out, True)


@no_type_check
def _loop_dense_bfloat16(told):
    out = carray(pointer_to(told[_OUT]), told[_ROWS] * told[_WORDS] * WORD, np.uint16)
    _dense_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.uint16), out, True)


@no_type_check
def _loop_widened_bfloat16(told):
    out = carray(pointer_to(told[_OUT]), told[_ROWS] * told[_WORDS] * WORD, np.float32)
    _dense_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.uint16), out, True)


@no_type_check
def _blocks_float32(told):
    _block_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.float32))


@no_type_check
def _blocks_bfloat16(told):
    _block_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.uint16))


def _run(kernel: str, values: Tensor, *told: int) -> None:
    function = globals()[kernel.format("bfloat16" if values.dtype == torch.bfloat16 else "float32")]
    run_on_team(address_of(function), *told)


def _per_task(rows: int) -> int:
    """Rows that a thread takes at a time: a few helpings for each, so that nobody waits long for the last."""
    return max(1, rows // (8 * torch.get_num_threads()))


def way_for(count: int, density: float, half: bool = False) -> str:
    """The way that is usually fastest for so many columns; `SparseLinear` can measure instead.

    Args:
        count: of columns.
        density: share of the places that have values.
        half: whether the values and the columns are bfloat16, which some processors multiply natively.
    """
    # Milliseconds that 2**20 vectors of 16 places took on one thread of a Xeon with AVX-512, near enough.
    took = {
        "nonzeros": 1.2 + 13.0 * density * -(-count // LANES),
        "panels": 5.0 + 0.06 * count if half and native_bfloat16() else 5.0 + 0.27 * count,
    }
    if has_expand():
        took["expand"] = 0.7 + 2.5 * density + 0.38 * count
    return min(took, key=took.__getitem__)


def bitmap_matmul(x: Tensor, bits: Tensor, starts: Tensor, values: Tensor, way: str | None = None) -> Tensor:
    """``x @ W.T`` in the type of ``x``; see ``apportion.ops.spmm.bitmap_matmul``."""
    count, rows, words = x.shape[0], bits.shape[0], bits.shape[1]
    if way is None:
        half = x.dtype == values.dtype == torch.bfloat16
        way = way_for(count, values.numel() / max(1, rows * x.shape[1]), half)
    if way == "expand" and not has_expand():
        way = "nonzeros"
    if way == "panels":
        return _by_panels(x, bits, starts, values)
    out = torch.empty(count, rows, dtype=torch.float32)
    if out.numel() == 0 or words == 0:
        return out.zero_().to(x.dtype)
    shared = (starts.data_ptr(), bits.data_ptr(), values.data_ptr(), values.numel())
    padded = _padded(x if x.dtype == torch.float32 else x.float(), words * WORD)
    if way == "expand":
        if values.dtype == torch.bfloat16:
            padded = padded.view(count, -1, LANES, 2).transpose(2, 3)
            padded = padded.contiguous()
        told = (rows, words, count, words * WORD, _per_task(rows), *shared, padded.data_ptr(), out.data_ptr())
        _run("_expand_{}", values, *told)
    else:
        columns = _columns(padded)
        told = (rows, words, count, columns.numel(), _per_task(rows), *shared, columns.data_ptr(), out.data_ptr())
        _run("_nonzeros_{}" if has_expand() else "_loop_nonzeros_{}", values, *told)
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def csr_narrow_matmul(x: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """``x @ W.T`` in the type of ``x``; see ``apportion.ops.spmm.csr_narrow_matmul``."""
    count, rows = x.shape[0], starts.shape[0] - 1
    out = torch.zeros(count, rows, dtype=torch.float32)
    if out.numel() and values.numel():
        source = _columns(x.float())
        index = "uint16" if columns.dtype == torch.uint16 else "int32"
        told = (starts.data_ptr(), columns.data_ptr(), values.data_ptr(), values.numel(), source.data_ptr())
        _run(f"_csr_{{}}_{index}", values, rows, 0, count, source.numel(), _per_task(rows), *told, out.data_ptr())
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def block_matmul(x: Tensor, starts: Tensor, columns: Tensor, blocks: Tensor) -> Tensor:
    """``x @ W.T`` in the type of ``x``; see ``apportion.ops.spmm.block_matmul``."""
    _, height, width = blocks.shape
    count, groups = x.shape[0], starts.shape[0] - 1
    out = torch.zeros(count, groups * height, dtype=torch.float32)
    if out.numel() and blocks.numel():
        source = x.float().contiguous()
        told = (starts.data_ptr(), columns.data_ptr(), blocks.data_ptr(), blocks.numel(), source.data_ptr())
        _run("_blocks_{}", blocks, groups, width, count, source.shape[1], 1, *told, out.data_ptr(), height)
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def unpack_bitmap(bits: Tensor, starts: Tensor, values: Tensor, first: int, rows: int, out: Tensor) -> None:
    """Make some rows dense: ``out`` [at least rows, 64 for each word], in the type of the values or in float32."""
    words = bits.shape[1]
    if rows == 0 or words == 0:
        return
    shared = (starts.data_ptr(), bits.data_ptr(), values.data_ptr(), values.numel())
    kernel = "_dense_{}" if out.dtype == values.dtype else "_widened_{}"
    kernel = kernel if has_expand() else f"_loop{kernel}"
    _run(kernel, values, rows, words, 0, 0, _per_task(rows), *shared, 0, out.data_ptr(), first)


def _by_panels(x: Tensor, bits: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    count, rows, words = x.shape[0], bits.shape[0], bits.shape[1]
    columns = words * WORD
    # Weights are never rounded to the type of x: the product is that of this matrix.
    exact = x if values.dtype == x.dtype else x.float()
    out = x.new_zeros(count, rows)
    if out.numel() == 0 or words == 0:
        return out
    height = min(rows, max(WORD, _PANEL_BYTES // (columns * exact.element_size())))
    scratch = torch.empty(height, columns, dtype=exact.dtype)
    padded = _padded(exact, columns)
    for first in range(0, rows, height):
        now = min(height, rows - first)
        unpack_bitmap(bits, starts, values, first, now, scratch)
        out[:, first : first + now] = padded @ scratch[:now].T
    return out


def _padded(x: Tensor, columns: int) -> Tensor:
    missing = columns - x.shape[1]
    return torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()


def _columns(x: Tensor) -> Tensor:
    """``x`` [count, columns] as the kernels for nonzeros read it: transposed, filled up to whole vectors."""
    if x.shape[0] == 1:
        return x.contiguous()
    missing = -x.shape[0] % LANES
    return (torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x).t().contiguous()
