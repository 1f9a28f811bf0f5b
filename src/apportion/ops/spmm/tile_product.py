"""Products with `tiles.Tiles` on the CPU, and what a layer works out once to take them without delay.

A layer of a small model multiplies for a few microseconds, so what Python does around that counts as much: each
`TileProduct` has its kernel's arguments filled in, and a call sets what differs. One thread owns 16 rows of the result,
so sums have one order whatever the threads.
"""

import ctypes
from collections.abc import Mapping
from typing import no_type_check

import numba
import numpy as np
import torch
from numba import carray  # type: ignore[attr-defined]
from torch import Tensor

from apportion.ops.numbers import number, stored
from apportion.ops.processor import native_bfloat16
from apportion.ops.spmm.tile_vector import AT_ONCE, tile_sums
from apportion.ops.spmm.tiles import COLUMNS, ROWS, STRIDE, Tiles
from apportion.ops.team import Arguments, address_of, pointer_to, start, take_task

WAYS = ("tiles", "panels")
_PANEL_BYTES = 2**22  # of a panel made dense: smaller ones stay nearer, but make the library's products slow
_ALONE = 2000  # steps times columns below which other threads would start too late to be of help
_MANY, _NATIVE = 64, 16  # columns from which on panels are faster, also where the processor multiplies bfloat16

# What a kernel is told, after the number of the next task (see `apportion.ops.team`).
_COUNT, _PER_TASK, _X, _OUT, _FIRST, _ROWS, _STEP, _TILES = range(1, 9)
_VALUES, _PLACES, _ENTRIES, _COUNTS, _FOURS, _LANES, _STARTS = range(9, 16)
_BIAS = 16


@numba.njit(cache=True)
@no_type_check
def _multiply_rows(told, values):
    rows, count, step, tiles = told[_ROWS], told[_COUNT], told[_STEP], told[_TILES]
    down = (rows + ROWS - 1) // ROWS
    starts = carray(pointer_to(told[_STARTS]), 2 * (down + 1), np.int64)
    places = carray(pointer_to(told[_PLACES]), told[_ENTRIES], np.uint8)
    counts = carray(pointer_to(told[_COUNTS]), starts[2 * down + 1], np.uint8)
    fours = carray(pointer_to(told[_FOURS]), down * tiles, np.uint8)
    lanes = carray(pointer_to(told[_LANES]), down * tiles * ROWS, np.uint8)
    x = carray(pointer_to(told[_X]), count * step, np.float32)
    out = carray(pointer_to(told[_OUT]), count * rows, np.float32)
    bias = carray(pointer_to(told[_BIAS]), rows, np.float32)
    sums = np.empty(AT_ONCE * ROWS, np.float32)
    task = take_task(told)
    while task * told[_PER_TASK] < down:
        for group in range(task * told[_PER_TASK], min(down, (task + 1) * told[_PER_TASK])):
            at, first, row = starts[2 * group], starts[2 * group + 1], group * ROWS
            here, done = min(ROWS, rows - row), 0
            while done < count:
                left = count - done
                now = 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1
                source = done * step
                tile_sums(
                    values, at, places, counts, first, fours, lanes, group * tiles, tiles, x, source, step, sums, now
                )
                for j in range(now):
                    target = (done + j) * rows + row
                    for lane in range(here):
                        out[target + lane] = sums[ROWS * j + lane]
                    if told[_BIAS] != 0:
                        for lane in range(here):
                            out[target + lane] += bias[row + lane]
                done += now
        task = take_task(told)


@numba.njit(cache=True)
@no_type_check
def _dense_rows(told, values, out):
    """Some rows of tiles, from `_FIRST` on, made dense one below the other."""
    down, tiles, first = told[_ROWS], told[_TILES], told[_FIRST]
    starts = carray(pointer_to(told[_STARTS]), 2 * (first + down + 1), np.int64)
    places = carray(pointer_to(told[_PLACES]), told[_ENTRIES], np.uint8)
    counts = carray(pointer_to(told[_COUNTS]), starts[2 * (first + down) + 1], np.uint8)
    fours = carray(pointer_to(told[_FOURS]), (first + down) * tiles, np.uint8)
    lanes = carray(pointer_to(told[_LANES]), (first + down) * tiles * ROWS, np.uint8)
    width = tiles * COLUMNS
    rows_of = np.empty(ROWS, np.int64)
    task = take_task(told)
    while task < down:
        at, step = starts[2 * (first + task)], starts[2 * (first + task) + 1]
        out[task * ROWS * width : (task + 1) * ROWS * width] = 0
        for tile in range(tiles):
            each = (first + task) * tiles + tile
            for row in range(ROWS):
                rows_of[lanes[each * ROWS + row]] = (task * ROWS + row) * width + tile * COLUMNS
            for _ in range(STRIDE * fours[each]):
                for lane in range(counts[step]):
                    place = rows_of[lane] + places[at + lane]
                    out[place] = stored(number(values[at + lane]), out[place])
                at += counts[step]
                step += 1
        task = take_task(told)


@no_type_check
def _multiply_float32(told):
    _multiply_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.float32))


@no_type_check
def _multiply_bfloat16(told):
    _multiply_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.uint16))


@no_type_check
def _dense_float32(told):
    out = carray(pointer_to(told[_OUT]), told[_ROWS] * ROWS * told[_TILES] * COLUMNS, np.float32)
    _dense_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.float32), out)


@no_type_check
def _dense_bfloat16(told):
    out = carray(pointer_to(told[_OUT]), told[_ROWS] * ROWS * told[_TILES] * COLUMNS, np.uint16)
    _dense_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.uint16), out)


@no_type_check
def _widened_bfloat16(told):
    out = carray(pointer_to(told[_OUT]), told[_ROWS] * ROWS * told[_TILES] * COLUMNS, np.float32)
    _dense_rows(told, carray(pointer_to(told[_VALUES]), told[_ENTRIES], np.uint16), out)


class TileProduct:
    """``x @ W.T + bias`` with one `Tiles` of float32 or bfloat16 in the CPU's memory.

    It holds addresses: `serves` says whether they are still those of given tensors.
    """

    def __init__(self, tiles: Tiles, bias: Tensor | None = None) -> None:
        """Work out what is the same in every call.

        Args:
            tiles: whose parts belong together and lie in one piece.
            bias: float32 [rows], in one piece.
        """
        self.rows, self.columns = tiles.shape
        self.dtype = tiles.values.dtype
        self._tensors = (tiles.values, tiles.places, tiles.counts, tiles.fours, tiles.lanes, tiles.starts, bias)
        self._address, self._bias = tiles.values.data_ptr(), bias
        # Kept alive: a tensor that was given other memory meanwhile must not leave an address of nothing.
        self._memory = [each.untyped_storage() for each in self._tensors if each is not None]
        self._down, self._across = -(-self.rows // ROWS), -(-self.columns // COLUMNS)
        self._steps = tiles.counts.numel()
        self._multiply = address_of(_multiply_bfloat16 if self.dtype == torch.bfloat16 else _multiply_float32)
        # Each call takes one, so that threads of Python share none.
        self._spare: list[tuple[ctypes.Array[ctypes.c_int64], int]] = []

    def serves(self, held: Mapping[str, Tensor | None]) -> bool:
        """Whether these, by name, are the tensors it was made of, and have not been moved to other memory."""
        values, places, counts, fours, lanes, starts, bias = self._tensors
        return (
            held["values"] is values
            and held["places"] is places
            and held["counts"] is counts
            and held["fours"] is fours
            and held["lanes"] is lanes
            and held["starts"] is starts
            and held["bias"] is bias
            # Tensors that are shared with another process move all together: one tells, and looking at each takes
            # longer where they are in no cache.
            and values.data_ptr() == self._address
        )

    def __call__(self, x: Tensor, way: str | None = None) -> Tensor:
        """The product.

        Args:
            x: float32 [..., columns] in one piece on the CPU, at least one column.
            way: ``tiles``, ``panels`` or what is usually faster.

        Returns:
            float32 [..., rows].
        """
        *batch, _ = x.shape
        count = x.numel() // self.columns
        if way == "panels" or (way is None and count > _MANY):
            return self._by_panels(x.view(count, self.columns)).view(*batch, self.rows)
        if self.columns % COLUMNS:
            x = torch.nn.functional.pad(x, (0, -self.columns % COLUMNS))
        out = x.new_empty(*batch, self.rows)
        threads = torch.get_num_threads() if self._steps * count > _ALONE else 1
        try:
            block = self._spare.pop()
        except IndexError:
            block = self._block()
        told = block[0]
        told[0] = 0
        told[_COUNT] = count
        # One long stretch for each: that is how processors foresee what memory is read next.
        told[_PER_TASK] = -(-self._down // threads)
        told[_X] = x.data_ptr()
        told[_OUT] = out.data_ptr()
        start(self._multiply, block[1], threads)
        self._spare.append(block)
        return out

    def half(self, x: Tensor, way: str | None = None) -> Tensor:
        """The product in bfloat16: sums are taken in float32.

        Args:
            x: bfloat16 [..., columns], at least one column.
            way: as above.

        Returns:
            bfloat16 [..., rows].
        """
        native = self.dtype == torch.bfloat16 and bool(native_bfloat16())
        if way == "panels" or (way is None and x.numel() > self.columns * (_NATIVE if native else _MANY)):
            return self._by_panels(x.reshape(-1, self.columns)).view(*x.shape[:-1], self.rows)
        return self(x.float().contiguous(), "tiles").to(x.dtype)

    def _by_panels(self, x: Tensor) -> Tensor:
        width = self._across * COLUMNS
        # Weights are never rounded to the type of x: the product is that of this matrix.
        exact = x if self.dtype == x.dtype else x.float()
        out = x.new_empty(x.shape[0], self.rows)
        groups = max(1, min(self._down, _PANEL_BYTES // (width * exact.element_size() * ROWS)))
        panel = torch.empty(groups * ROWS, width, dtype=exact.dtype)
        padded = torch.nn.functional.pad(exact, (0, width - self.columns)) if width > self.columns else exact
        kernel = _dense_float32 if self.dtype == torch.float32 else _widened_bfloat16
        if exact.dtype == torch.bfloat16:
            kernel = _dense_bfloat16
        for first in range(0, self._down, groups):
            told, address = self._block()
            told[_FIRST], told[_ROWS], told[_OUT] = first, min(groups, self._down - first), panel.data_ptr()
            start(address_of(kernel), address, torch.get_num_threads())
            rows = slice(first * ROWS, min(self.rows, (first + groups) * ROWS))
            out[:, rows] = padded @ panel[: rows.stop - rows.start].T
        return out if self._bias is None else out.add_(self._bias)

    def _block(self) -> tuple[ctypes.Array[ctypes.c_int64], int]:
        values, *_, bias = self._tensors
        told = Arguments(0)
        told[_ROWS], told[_STEP], told[_TILES] = self.rows, self._across * COLUMNS, self._across
        told[_ENTRIES], told[_BIAS] = values.numel(), 0 if bias is None else bias.data_ptr()
        for place, each in zip((_VALUES, _PLACES, _COUNTS, _FOURS, _LANES, _STARTS), self._tensors, strict=False):
            assert each is not None
            told[place] = each.data_ptr()
        return told, ctypes.addressof(told)
