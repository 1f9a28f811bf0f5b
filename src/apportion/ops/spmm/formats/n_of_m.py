"""At most N values in each M consecutive places of a row: N values and N places of a few bits for each M."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from apportion.errors import InputError
from apportion.ops.spmm.formats.checks import check_weight, split, taken

PATTERNS = ((1, 16), (1, 8), (2, 16), (1, 4), (2, 8), (4, 16), (2, 4), (4, 8))
"""(keep, of) that `NOfM.pattern` looks for, the sparsest first."""


@dataclass(frozen=True, eq=False)
class NOfM:
    """A matrix [rows, columns]; see ``apportion.ops.spmm.formats`` for what formats share.

    Rows are filled up with zeros to whole groups. A group with fewer values than it may have is filled up with zeros at
    places that it does not use.

    Attributes:
        shape: of the matrix.
        keep: values of a group.
        of: places of a group, at least 2 and at most 256.
        values: [rows, groups of a row, keep], by ascending place.
        places: uint8 [rows, ceil(groups of a row * keep * bits / 8)]: the places within their groups, in
            ``bits = ceil(log2(of))`` bits each, in the order of the values; the first in the lowest bits of a byte, its
            lowest bit first.
    """

    name: ClassVar[str] = "nm"
    shape: tuple[int, int]
    keep: int
    of: int
    values: Tensor
    places: Tensor

    @classmethod
    def pattern(cls, weight: Tensor) -> tuple[int, int] | None:
        """The sparsest of `PATTERNS` that a matrix keeps to, if there is one."""
        kept = check_weight(weight) != 0
        if not kept.numel():
            return None

        def fits(rows: Tensor, keep: int, of: int) -> bool:
            return int(_groups(rows.to(torch.uint8), of).sum(-1).max()) <= keep

        # A few rows say no to most.
        likely = [each for each in PATTERNS if fits(kept[:16], *each)]
        return next((each for each in likely if fits(kept, *each)), None)

    @classmethod
    def pack(cls, weight: Tensor, keep: int | None = None, of: int | None = None) -> "NOfM":
        """Write a matrix down.

        Args:
            weight: the matrix.
            keep: values that a group may have; with ``of``, what `pattern` finds where they are not given.
            of: places of a group.

        Raises:
            InputError: not a matrix of floating-point numbers; a pattern that makes no sense; a group with more values.
        """
        weight = check_weight(weight)
        if keep is None or of is None:
            found = cls.pattern(weight)
            if found is None:
                known = ", ".join(f"{keep}:{of}" for keep, of in PATTERNS)
                raise InputError(f"weight keeps to none of {known}: pack it as a bitmap")
            keep, of = found
        _check_pattern(keep, of)
        groups = _groups(weight, of)
        kept = groups != 0
        most = int(kept.sum(-1).max()) if kept.numel() else 0
        if most > keep:
            raise InputError(f"weight has a group of {of} with {most} values: {keep}:{of} allows {keep}")
        # Stable: the values first and then the free places, both from left to right.
        order = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[..., :keep].sort(dim=-1).values
        values = groups.gather(-1, order)
        return cls((weight.shape[0], weight.shape[1]), keep, of, values + 0.0, _to_bits(order.flatten(1), _bits(of)))

    @classmethod
    def restore(cls, shape: tuple[int, int], tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "NOfM":
        """Read what `tensors` and `settings` gave.

        Raises:
            InputError: a tensor or a setting is missing or has another shape.
        """
        rows, columns = shape
        keep, of = settings.get("keep"), settings.get("of")
        if not isinstance(keep, int) or not isinstance(of, int):
            raise InputError("the packed weight does not say its keep and of: the file is damaged")
        _check_pattern(keep, of)
        groups = -(-columns // of)
        values = taken(tensors, "values", (), (rows, groups, keep))
        places = taken(tensors, "places", (torch.uint8,), (rows, -(-groups * keep * _bits(of) // 8)))
        found = cls((rows, columns), keep, of, values, places)
        if bool((found._places() >= of).any()):
            raise InputError(f"the packed weight has a place outside of its group of {of}: the file is damaged")
        return found

    @staticmethod
    def formula(shape: tuple[int, int], keep: int, of: int, size: int) -> int:
        """Bytes with values of so many bytes; how many of them are zero makes no difference."""
        groups = -(-shape[1] // of)
        return shape[0] * (groups * keep * size + -(-groups * keep * _bits(of) // 8))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.values.nbytes + self.places.nbytes

    def unpack(self) -> Tensor:
        """The matrix."""
        rows, groups = self.values.shape[:2]
        out = torch.zeros(rows, groups, self.of, dtype=self.values.dtype, device=self.values.device)
        return out.scatter_(-1, self._places(), self.values).flatten(1)[:, : self.shape[1]].contiguous()

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds."""
        return {"values": self.values, "places": self.places}

    def settings(self) -> dict[str, int]:
        """What a manifest holds beside shape and type."""
        return {"keep": self.keep, "of": self.of}

    def _places(self) -> Tensor:
        rows, groups = self.values.shape[:2]
        return _from_bits(self.places, _bits(self.of), groups * self.keep).view(rows, groups, self.keep)


def _check_pattern(keep: int, of: int) -> None:
    if not (2 <= of <= 256 and 1 <= keep <= of):
        raise InputError(f"keep={keep}, of={of}: at least one and at most all of 2 to 256 places")


def _groups(matrix: Tensor, of: int) -> Tensor:
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % of))
    return split(padded, 1, (-(-matrix.shape[1] // of), of))


def _bits(of: int) -> int:
    return (of - 1).bit_length()


def _to_bits(codes: Tensor, bits: int) -> Tensor:
    """Numbers of a few bits, row by row, side by side in bytes."""
    stream = ((codes.unsqueeze(-1) >> torch.arange(bits, device=codes.device)) & 1).flatten(1)
    octets = split(torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8)), 1, (-1, 8))
    return (octets << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def _from_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    stream = ((packed.long().unsqueeze(-1) >> torch.arange(8, device=packed.device)) & 1).flatten(1)
    codes = split(stream[:, : count * bits], 1, (count, bits))
    return (codes << torch.arange(bits, device=packed.device)).sum(-1)
