"""What every format asks of a weight, and of what it is restored from."""

from collections.abc import Mapping

import torch
from torch import Tensor

from apportion.errors import InputError


def check_weight(weight: Tensor) -> Tensor:
    """The weight, detached and in one piece.

    Raises:
        InputError: it is not a matrix, or not of floating-point numbers.
    """
    if weight.dim() != 2:
        raise InputError(
            f"weight has shape {tuple(weight.shape)}: only matrices are packed; flatten a convolution to "
            "[out, in * height * width]"
        )
    if not weight.is_floating_point():
        raise InputError(f"weight is of {weight.dtype}: only floating-point weights are packed")
    return weight.detach().contiguous()


def taken(tensors: Mapping[str, Tensor], name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> Tensor:
    """A tensor of a file, checked.

    Raises:
        InputError: it is missing, or of another type or shape.
    """
    if name not in tensors:
        raise InputError(f"the packed weight lacks {name!r}: the file is damaged")
    found = tensors[name]
    if (dtypes and found.dtype not in dtypes) or tuple(found.shape) != shape:
        raise InputError(
            f"{name!r} of the packed weight is {found.dtype} {tuple(found.shape)} where {shape} was expected: the file "
            "is damaged"
        )
    return found


def split(tensor: Tensor, dim: int, sizes: tuple[int, int]) -> Tensor:
    """A dimension as two."""
    found: Tensor = tensor.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return found


def tiles_of(matrix: Tensor, height: int, width: int) -> Tensor:
    """A matrix of whole tiles: [rows of tiles, columns of tiles, height, width]."""
    return split(split(matrix, 1, (-1, width)), 0, (-1, height)).transpose(1, 2)


def starts_of(counts: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """Where each row begins, and where the last one ends, from the rows' counts."""
    starts = torch.zeros(counts.numel() + 1, dtype=dtype, device=counts.device)
    torch.cumsum(counts, 0, out=starts[1:])
    return starts


def check_starts(starts: Tensor, entries: int) -> None:
    """Check that row starts never go back and end at the last entry.

    Raises:
        InputError: they do not.
    """
    if int(starts[0]) != 0 or int(starts[-1]) != entries or bool((starts.diff() < 0).any()):
        raise InputError(f"the starts of the packed weight do not lead from 0 to {entries}: the file is damaged")
