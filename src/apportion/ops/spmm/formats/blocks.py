"""Blocks of a matrix that are not all zeros, row of blocks by row of blocks (BSR)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from apportion.errors import InputError
from apportion.ops.spmm.formats.checks import check_starts, check_weight, split, starts_of, taken, tiles_of


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix [rows, columns]; see ``apportion.ops.spmm.formats`` for what formats share.

    Rows and columns are filled up with zeros to whole blocks.

    Attributes:
        shape: of the matrix.
        starts: int32 [rows of blocks + 1], where each row's blocks begin, and where the last one's end.
        columns: int32 [blocks], the column of blocks of each.
        blocks: [blocks, height, width].
    """

    name: ClassVar[str] = "block"
    shape: tuple[int, int]
    starts: Tensor
    columns: Tensor
    blocks: Tensor

    @classmethod
    def pack(cls, weight: Tensor, height: int = 16, width: int = 16) -> "Blocks":
        """Write a matrix down.

        Args:
            weight: the matrix.
            height: rows of a block.
            width: columns of a block.

        Raises:
            InputError: not a matrix of floating-point numbers, or a block without a place.
        """
        weight = check_weight(weight)
        if height < 1 or width < 1:
            raise InputError(f"height={height}, width={width}: a block has at least one place")
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        tiles = tiles_of(padded, height, width)
        kept = (tiles != 0).flatten(2).any(-1)
        chosen = kept.nonzero()[:, 1].int()
        return cls((rows, columns), starts_of(kept.sum(1), torch.int32), chosen, tiles[kept] + 0.0)

    @classmethod
    def restore(cls, shape: tuple[int, int], tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "Blocks":
        """Read what `tensors` and `settings` gave.

        Raises:
            InputError: a tensor or a setting is missing or has another shape, or an index leads astray.
        """
        rows, columns = shape
        height, width = settings.get("height"), settings.get("width")
        if not isinstance(height, int) or not isinstance(width, int) or min(height, width) < 1:
            raise InputError("the packed weight does not say the height and width of its blocks: the file is damaged")
        starts = taken(tensors, "starts", (torch.int32,), (-(-rows // height) + 1,))
        count = int(starts[-1])
        places = taken(tensors, "columns", (torch.int32,), (count,))
        check_starts(starts, count)
        if count and not 0 <= int(places.min()) <= int(places.max()) < -(-columns // width):
            raise InputError("the packed weight has a block outside of the matrix: the file is damaged")
        return cls((rows, columns), starts, places, taken(tensors, "blocks", (), (count, height, width)))

    @staticmethod
    def formula(shape: tuple[int, int], blocks: int, height: int, width: int, size: int) -> int:
        """Bytes with so many blocks of values of so many bytes."""
        return (-(-shape[0] // height) + 1) * 4 + blocks * (height * width * size + 4)

    @staticmethod
    def count(weight: Tensor, height: int = 16, width: int = 16) -> int:
        """How many blocks a matrix has that are not all zeros."""
        kept = torch.nn.functional.pad(weight != 0, (0, -weight.shape[1] % width, 0, -weight.shape[0] % height))
        return int(split(split(kept, 1, (-1, width)).any(-1), 0, (-1, height)).any(1).sum())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.starts.nbytes + self.columns.nbytes + self.blocks.nbytes

    def unpack(self) -> Tensor:
        """The matrix."""
        rows, columns = self.shape
        _, height, width = self.blocks.shape
        down, across = self.starts.numel() - 1, -(-columns // width)
        tiles = torch.zeros(down, across, height, width, dtype=self.blocks.dtype, device=self.blocks.device)
        tiles[torch.repeat_interleave(self.starts.long().diff()), self.columns.long()] = self.blocks
        return tiles.transpose(1, 2).flatten(2).flatten(0, 1)[:rows, :columns].contiguous()

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds."""
        return {"starts": self.starts, "columns": self.columns, "blocks": self.blocks}

    def settings(self) -> dict[str, int]:
        """What a manifest holds beside shape and type."""
        return {"height": self.blocks.shape[1], "width": self.blocks.shape[2]}
