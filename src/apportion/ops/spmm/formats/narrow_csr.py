"""CSR with column numbers of 16 bits, where torch's own has 64: what is smallest when hardly anything is left."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from apportion.errors import InputError
from apportion.ops.spmm.formats.checks import check_starts, check_weight, starts_of, taken

_NARROW = 2**16
_MOST = 2**31


@dataclass(frozen=True, eq=False)
class NarrowCSR:
    """A matrix [rows, columns]; see ``apportion.ops.spmm.formats`` for what formats share.

    Attributes:
        shape: of the matrix.
        starts: int32 [rows + 1], where each row's values begin, and where the last one's end.
        columns: uint16 [nnz], int32 above 65,536 columns.
        values: [nnz], from left to right, row after row.
    """

    name: ClassVar[str] = "csr"
    shape: tuple[int, int]
    starts: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def pack(cls, weight: Tensor) -> "NarrowCSR":
        """Write a matrix down.

        Raises:
            InputError: not a matrix of floating-point numbers, or with 2**31 values or more.
        """
        weight = check_weight(weight)
        kept = weight != 0
        counts = kept.sum(1)
        if int(counts.sum()) >= _MOST:
            raise InputError(f"weight has {int(counts.sum()):,} values: csr has 32 bits for them, pack it as a bitmap")
        columns = kept.nonzero()[:, 1].to(_index_type(weight.shape[1]))
        return cls((weight.shape[0], weight.shape[1]), starts_of(counts, torch.int32), columns, weight[kept])

    @classmethod
    def restore(cls, shape: tuple[int, int], tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "NarrowCSR":
        """Read what `tensors` gave.

        Raises:
            InputError: a tensor is missing or has another shape, or an index leads astray.
        """
        rows, columns = shape
        starts = taken(tensors, "starts", (torch.int32,), (rows + 1,))
        count = int(starts[-1])
        places = taken(tensors, "columns", (_index_type(columns),), (count,))
        check_starts(starts, count)
        if count and not 0 <= int(places.int().min()) <= int(places.int().max()) < columns:
            raise InputError(f"the packed weight has a column outside of 0..{columns - 1}: the file is damaged")
        return cls((rows, columns), starts, places, taken(tensors, "values", (), (count,)))

    @staticmethod
    def formula(shape: tuple[int, int], nonzeros: int, size: int) -> int:
        """Bytes with so many values of so many bytes."""
        return (shape[0] + 1) * 4 + nonzeros * (size + (2 if shape[1] <= _NARROW else 4))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.starts.nbytes + self.columns.nbytes + self.values.nbytes

    def unpack(self) -> Tensor:
        """The matrix."""
        out = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        rows = torch.repeat_interleave(self.starts.long().diff())
        out[rows, self.columns.long()] = self.values
        return out

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds."""
        return {"starts": self.starts, "columns": self.columns, "values": self.values}

    def settings(self) -> dict[str, int]:
        """What a manifest holds beside shape and type."""
        return {}


def _index_type(columns: int) -> torch.dtype:
    return torch.uint16 if columns <= _NARROW else torch.int32
