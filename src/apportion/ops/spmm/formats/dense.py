"""The matrix as it is: what a layer is kept as that no other format makes smaller."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from apportion.ops.spmm.formats.checks import check_weight, taken


@dataclass(frozen=True, eq=False)
class Dense:
    """A matrix [rows, columns]; see ``apportion.ops.spmm.formats`` for what formats share.

    Attributes:
        values: the matrix.
    """

    name: ClassVar[str] = "dense"
    values: Tensor

    @classmethod
    def pack(cls, weight: Tensor) -> "Dense":
        """The matrix itself; here zeros keep their sign."""
        return cls(check_weight(weight))

    @classmethod
    def restore(cls, shape: tuple[int, int], tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "Dense":
        """Read what `tensors` gave."""
        return cls(taken(tensors, "values", (), tuple(shape)))

    @staticmethod
    def formula(shape: tuple[int, int], nonzeros: int, size: int) -> int:
        """Bytes of so many numbers of so many bytes, zero or not."""
        return shape[0] * shape[1] * size

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.values.nbytes

    def unpack(self) -> Tensor:
        """The matrix."""
        return self.values

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds."""
        return {"values": self.values}

    def settings(self) -> dict[str, int]:
        """What a manifest holds beside shape and type."""
        return {}
