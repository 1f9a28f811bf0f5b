"""Tiled-CSL, the format of Flash-LLM (Xia et al. 2023, arXiv 2309.10285), read from its published code.

A matrix is cut into tiles of 128 x 64. A nonzero is one 32-bit word: its 16-bit value in the low half, its location in
the tile in the high half. The location's column is swizzled, ``column XOR ((row % 8) << 3)``, which spares the paper's
kernel bank conflicts when it reads the tile; the order of the words of a tile spares it those when it writes the tile:
words are dealt out so that 32 threads at a time write to as many different banks as can be. No kernel of ours reads it
(they read bitmaps, which are smaller up to 15/16 zeros); it is here to be compared with.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from apportion.errors import InputError
from apportion.ops.spmm.formats.checks import check_weight, split, tiles_of

TILE_ROWS, TILE_COLUMNS = 128, 64
CAPACITY = 4096
"""Words of a tile that the paper's kernel can hold: 128 threads with 32 registers each, half of the tile."""
BANKS = LANES = 32
_VECTOR = 4


@dataclass(frozen=True, eq=False)
class TiledCSL:
    """A matrix [rows, columns] with values of 16 bits.

    Rows and columns are filled up with zeros to whole tiles (the paper's code refuses those that are not).

    Attributes:
        shape: of the matrix.
        words: int32 [words], tile after tile, row of tiles by row of tiles; each tile is filled up to a multiple of 4
            with zeros at locations that it does not use.
        offsets: int32 [tiles + 2], where each tile begins, in vectors of 4 words; the last tile, an empty one, lets the
            paper's kernel always ask for the next.
        dtype: of the values.
    """

    name: ClassVar[str] = "tiled_csl"
    shape: tuple[int, int]
    words: Tensor
    offsets: Tensor
    dtype: torch.dtype

    @classmethod
    def pack(cls, weight: Tensor) -> "TiledCSL":
        """Write a matrix down, tile by tile, in Python: for small matrices.

        Raises:
            InputError: not a matrix of 16-bit floating-point numbers; a tile with more values than the paper's kernel
                holds, whatever the matrix has as a whole (their kernel computes something else then).
        """
        weight = check_weight(weight)
        if weight.dtype not in (torch.float16, torch.bfloat16):
            raise InputError(f"weight is of {weight.dtype}: Tiled-CSL holds float16 or bfloat16")
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight + 0.0, (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS)).cpu()
        tiles = tiles_of(padded, TILE_ROWS, TILE_COLUMNS)
        across = tiles.shape[1]
        packed = []
        for place, tile in enumerate(tiles.contiguous().view(torch.int16).flatten(0, 1).numpy().view(np.uint16)):
            count = np.count_nonzero(tile)
            if count > CAPACITY:
                row, column = place // across * TILE_ROWS, place % across * TILE_COLUMNS
                raise InputError(
                    f"the tile at row {row}, column {column} has {count} values of {TILE_ROWS * TILE_COLUMNS}: "
                    f"Tiled-CSL holds {CAPACITY}; pack the matrix as a bitmap"
                )
            packed.append(_words_of(tile))
        sizes = [len(each) // _VECTOR for each in packed] + [0]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        words = np.concatenate([*packed, np.zeros(0, np.uint32)]).astype(np.uint32).view(np.int32)
        return cls((rows, columns), torch.from_numpy(words), torch.from_numpy(offsets), weight.dtype)

    @staticmethod
    def formula(shape: tuple[int, int], words: int) -> int:
        """Bytes with so many words, those that fill tiles up included."""
        tiles = -(-shape[0] // TILE_ROWS) * -(-shape[1] // TILE_COLUMNS)
        return 4 * words + 4 * (tiles + 2)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.words.nbytes + self.offsets.nbytes

    def unpack(self) -> Tensor:
        """The matrix."""
        rows, columns = self.shape
        down, across = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
        words = self.words.numpy().view(np.uint32)
        counts = np.diff(self.offsets.numpy()[:-1]) * _VECTOR
        row, column = row_and_column(words >> 16)
        tiles = np.zeros((down * across, TILE_ROWS, TILE_COLUMNS), np.uint16)
        tile = np.repeat(np.arange(down * across), counts)
        real = (words & 0xFFFF) != 0
        tiles[tile[real], row[real], column[real]] = (words & 0xFFFF)[real]
        matrix = split(torch.from_numpy(tiles.view(np.int16)).view(self.dtype), 0, (down, across))
        return matrix.transpose(1, 2).flatten(2).flatten(0, 1)[:rows, :columns].contiguous()


def location(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Where a place of a tile lies in the paper's shared memory."""
    found: np.ndarray = row * TILE_COLUMNS + (column ^ ((row % 8) << 3))
    return found


def row_and_column(location: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place of a tile that lies at a location."""
    row, swizzled = location // TILE_COLUMNS, location % TILE_COLUMNS
    return row, swizzled ^ ((row % 8) << 3)


def bank_of(location: np.ndarray) -> np.ndarray:
    """The bank of shared memory, 4 bytes wide, that a location of 2 bytes falls into."""
    found: np.ndarray = location % TILE_COLUMNS // 2 % BANKS
    return found


def _words_of(tile: np.ndarray) -> np.ndarray:
    """The words of a tile, in the order in which 32 threads at a time meet as few banks twice as can be."""
    row, column = np.nonzero(tile)
    places = location(row, column).astype(np.uint32)
    words = places << 16 | tile[row, column].astype(np.uint32)
    banks: list[list[int]] = [[] for _ in range(BANKS)]
    for word, bank in zip(words.tolist(), bank_of(places).tolist(), strict=True):
        banks[bank].append(word)
    free = _free_places(tile)
    for _ in range(-len(words) % _VECTOR):
        emptiest = min((bank for bank in range(BANKS) if free[bank]), key=lambda bank: len(banks[bank]))
        banks[emptiest].append(free[emptiest].pop() << 16)
    return _dealt(banks)


def _free_places(tile: np.ndarray) -> list[list[int]]:
    """Locations, by bank, that are zero: what fills a tile up may point there without harm."""
    row, column = np.nonzero(tile == 0)
    places = location(row, column)
    return [places[bank_of(places) == bank][: _VECTOR - 1].tolist() for bank in range(BANKS)]


def _dealt(banks: list[list[int]]) -> np.ndarray:
    """A thread holds 4 words side by side and writes one at a time, together with the 31 others of its warp."""
    total = sum(map(len, banks))
    out = np.empty(total, np.uint32)
    for chunk in range(0, total, LANES * _VECTOR):
        lanes = min(LANES, (total - chunk) // _VECTOR)
        for turn in range(_VECTOR):
            used = [0] * BANKS
            for lane in range(lanes):
                # The fullest of those that the fewest lanes of this turn write to.
                filled = [bank for bank in range(BANKS) if banks[bank]]
                bank = min(filled, key=lambda each: (used[each], -len(banks[each])))
                used[bank] += 1
                out[chunk + lane * _VECTOR + turn] = banks[bank].pop()
    return out
