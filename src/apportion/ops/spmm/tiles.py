"""A matrix that is mostly zeros as decoding on the CPU reads it: tiles of 16 rows and 32 columns.

A bitmap is the smallest, but a processor finds out where each value belongs by an instruction that takes two or three
cycles for 16 places, zeros or not. Here 16 rows are the 16 lanes of a vector, and one instruction looks up what each
lane's value is to be multiplied with: 32 inputs are two vectors, and a place among them is 5 bits. That is a cycle or
two for 16 *values*, and no sums across lanes are left to take.

Rows of a tile have unlike numbers of values. They are sorted, the longest first, so that step ``k``, which holds the
``k``-th value of every row that has one, fills the first lanes; the values of all steps follow one another without
gaps. So a value takes its own bytes and one more, and a tile 16 bytes and one for each step: at 80 % zeros 1.14 times
as much as a bitmap of float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from apportion.ops.spmm.formats.checks import check_weight

ROWS = 16
"""Rows of a tile: the lanes of a vector."""
COLUMNS = 32
"""Columns of a tile: as many as one instruction looks up among."""
STRIDE = 4
"""Steps come in fours, so that processors foresee how many a tile has; those beyond a tile's longest row are empty."""
_CHUNK = 2**18  # places that are packed at a time: more take more memory in between, and no less time


@dataclass(frozen=True, eq=False)
class Tiles:
    """A matrix [rows, columns], tile by tile: those of the first 16 rows from left to right, then the next.

    Attributes:
        shape: of the matrix.
        values: [nnz + 16], step by step and lane by lane; the last 16 are zeros, which vectors may reach into.
        places: uint8 [nnz + 16], each value's column in its tile.
        counts: uint8 [steps], how many lanes each step fills.
        fours: uint8 [tiles], how many times four steps a tile has.
        lanes: uint8 [tiles, 16], the lane that each row of a tile is in.
        starts: int64 [rows of tiles + 1, 2], where their values and their steps begin, and where the last ones' end.
    """

    shape: tuple[int, int]
    values: Tensor
    places: Tensor
    counts: Tensor
    fours: Tensor
    lanes: Tensor
    starts: Tensor

    @classmethod
    def pack(cls, weight: Tensor) -> "Tiles":
        """Write a matrix down; ``-0.0`` counts as zero.

        Raises:
            InputError: not a matrix of floating-point numbers.
        """
        weight = check_weight(weight)
        rows, columns = weight.shape
        down, across = -(-rows // ROWS), -(-columns // COLUMNS)
        step = max(1, _CHUNK // max(1, across * COLUMNS * ROWS)) * ROWS
        parts = [_pack(weight[first : first + step], across) for first in range(0, rows if across else 0, step)]
        empty = torch.zeros(0, dtype=torch.uint8, device=weight.device)
        values, places, counts, fours, lanes = (
            torch.cat([part[each] for part in parts]) if parts else empty for each in range(5)
        )
        ends = torch.zeros(down + 1, 2, dtype=torch.int64, device=weight.device)
        steps = STRIDE * fours.long().view(down, across)
        if down and across:
            # What each row of tiles holds: sums over the steps of each, wherever they begin.
            ends[1:, 1] = steps.sum(1).cumsum(0)
            before = torch.nn.functional.pad(counts.long().cumsum(0), (1, 0))
            ends[:, 0] = before[ends[:, 1]]
        tail = torch.zeros(ROWS, device=weight.device)
        return cls(
            (rows, columns),
            torch.cat([values.to(weight.dtype), tail.to(weight.dtype)]),
            torch.cat([places, tail.to(torch.uint8)]),
            counts,
            fours,
            lanes.view(down * across, ROWS),
            ends,
        )

    def unpack(self) -> Tensor:
        """The matrix."""
        rows, columns = self.shape
        down, across = -(-rows // ROWS), -(-columns // COLUMNS)
        out = torch.zeros(down * ROWS, across * COLUMNS, dtype=self.values.dtype, device=self.values.device)
        if not self.counts.numel():
            return out[:rows, :columns].contiguous()
        counts = self.counts.long()
        step = torch.repeat_interleave(counts)
        tile = torch.repeat_interleave(STRIDE * self.fours.long())[step]
        lane = torch.arange(len(step), device=step.device) - (counts.cumsum(0) - counts)[step]
        row = self.lanes.argsort(dim=1)[tile, lane] + tile // across * ROWS
        column = self.places[: len(step)].long() + tile % across * COLUMNS
        out[row, column] = self.values[: len(step)]
        return out[:rows, :columns].contiguous()

    def tensors(self) -> dict[str, Tensor]:
        """All parts, by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "shape"}

    @classmethod
    def restore(cls, shape: tuple[int, int], tensors: Mapping[str, Any]) -> "Tiles":
        """From what `tensors` gave."""
        return cls(shape, **{each.name: tensors[each.name] for each in fields(cls) if each.name != "shape"})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.nbytes for each in self.tensors().values())


def _pack(weight: Tensor, across: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values, places, counts, fours and lanes of some rows."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, across * COLUMNS - columns, 0, -rows % ROWS))
    tiles = padded.view(-1, ROWS, across, COLUMNS).transpose(1, 2).reshape(-1, ROWS, COLUMNS)
    kept = tiles != 0
    nth = kept.cumsum(2, dtype=torch.int16)
    lanes = nth[:, :, -1].argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    there = kept.flatten().nonzero().squeeze(1)
    # A place for every lane of every step there could be: reading them in order sorts the values.
    first = torch.arange(len(tiles), device=weight.device)[:, None] * (COLUMNS * ROWS) + lanes
    at = first.flatten()[there // COLUMNS] + (nth.flatten()[there].long() - 1) * ROWS
    filled = torch.zeros(kept.numel(), dtype=torch.bool, device=weight.device)
    values, places = torch.zeros_like(filled, dtype=weight.dtype), torch.zeros_like(filled, dtype=torch.uint8)
    filled[at], values[at], places[at] = True, tiles.flatten()[there], (there % COLUMNS).to(torch.uint8)
    counts = filled.view(-1, COLUMNS, ROWS).sum(2, dtype=torch.uint8)
    fours = -(-(counts > 0).sum(1) // STRIDE)
    taken = torch.arange(COLUMNS, device=weight.device) < STRIDE * fours[:, None]
    return values[filled], places[filled], counts[taken], fours.to(torch.uint8), lanes.to(torch.uint8)
