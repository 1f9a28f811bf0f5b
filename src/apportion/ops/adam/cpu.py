"""A step of Adam and the projection on the CPU, compiled by numba: a row is finished while it is in the cache."""

import math
from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from apportion.ops.threads import matching_threads

# Rows that a thread takes at once: it looks for the first one's gradient by bisection and then goes along with them.
_ROWS = 64


# Here LLVM may choose the order of the additions. It may not in `_adam_step`: there it would also choose which of two
# products to fuse with their sum, and it chooses differently in the process that compiles the kernel and in those that
# load it from numba's cache, so a run that is resumed would end with other bits.
@numba.njit(fastmath={"reassoc", "contract", "nsz"}, cache=True)
@no_type_check
def _dot(left, right):
    total = left.dtype.type(0)
    for j in range(left.shape[0]):
        total += left[j] * right[j]
    return total


@numba.njit(parallel=True, cache=True)
@no_type_check
def _adam_step(
    param, mean, square, grad, grad_rows, is_compact, keep1, add1, keep2, add2, rate, root2, eps, decay, unit_rows, tiny
):
    rows, width = param.shape
    zero = param.dtype.type(0)
    nothing = np.zeros(width, param.dtype)
    for block in numba.prange((rows + _ROWS - 1) // _ROWS):
        first = np.int64(block) * _ROWS
        place = np.searchsorted(grad_rows, first) if is_compact else first
        for row in range(first, min(first + _ROWS, rows)):
            p, m, v, g = param[row], mean[row], square[row], nothing
            if not is_compact or (place < grad_rows.shape[0] and grad_rows[place] == row):
                g = grad[place]
                place += 1
            for j in range(width):
                gradient = g[j] + decay * p[j]
                new_mean = keep1 * m[j] + add1 * gradient
                new_square = keep2 * v[j] + add2 * (gradient * gradient)
                # Not a number stays what it is.
                new_mean = zero if abs(new_mean) < tiny else new_mean
                new_square = zero if new_square < tiny else new_square
                value = p[j] - rate * new_mean / (math.sqrt(new_square) * root2 + eps)
                m[j], v[j], p[j] = new_mean, new_square, value
            if unit_rows:
                scale = max(math.sqrt(_dot(p, p)), param.dtype.type(1e-12))
                for j in range(width):
                    p[j] /= scale


@numba.njit(parallel=True, cache=True)
@no_type_check
def _project_rows(grad, unit, grad_rows, is_compact):
    for place in numba.prange(grad.shape[0]):
        g, u = grad[place], unit[grad_rows[place] if is_compact else np.int64(place)]
        along = _dot(g, u)
        for j in range(grad.shape[1]):
            g[j] -= along * u[j]


def adam_step_(
    param: Float[Tensor, "rows d"],
    exp_avg: Float[Tensor, "rows d"],
    exp_avg_sq: Float[Tensor, "rows d"],
    grad: Float[Tensor, "n d"],
    grad_rows: Int64[Tensor, "n"] | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    unit_rows: bool,
) -> None:
    """A thread a few rows at a time: all of a row is read once and written once."""
    # Numbers of the matrix's own type, or the loops would be computed in float64.
    numbers = (beta1, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, eps, weight_decay)
    kind = np.float64 if param.dtype == torch.float64 else np.float32
    tensors = (each.detach().numpy() for each in (param, exp_avg, exp_avg_sq, grad.contiguous()))
    with matching_threads():
        _adam_step(
            *tensors,
            _rows(grad_rows),
            grad_rows is not None,
            *(kind(each) for each in numbers),
            unit_rows,
            kind(torch.finfo(param.dtype).tiny),
        )


def project_rows_(
    grad: Float[Tensor, "n d"], unit: Float[Tensor, "rows d"], grad_rows: Int64[Tensor, "n"] | None
) -> None:
    """A row at a time, twice through the cache."""
    if grad_rows is not None and grad_rows.numel():
        _check_range(grad_rows, unit.shape[0])
    with matching_threads():
        _project_rows(
            grad.detach().numpy(), unit.detach().contiguous().numpy(), _rows(grad_rows), grad_rows is not None
        )


def _rows(grad_rows: Int64[Tensor, "n"] | None) -> np.ndarray:
    return np.empty(0, np.int64) if grad_rows is None else grad_rows.contiguous().numpy()


def _check_range(rows: Int64[Tensor, "n"], count: int) -> None:
    if int(rows.min()) < 0 or int(rows.max()) >= count:
        raise ValueError(f"grad_rows goes from {int(rows.min())} to {int(rows.max())}: there are {count} rows")
