"""The three sparse products on the CPU, compiled by numba; one thread owns each output row, so sums have one order.

No kernel makes an ``entries x d`` array: every product walks the entries and accumulates where the result lives.
"""

from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from apportion.ops.threads import matching_threads

# Reassociation lets LLVM keep several partial sums in vector registers. The order it picks depends only on d and the
# machine, not on the batch, so a row's result is the same alone and in company.
_FAST = {"reassoc", "contract", "nsz"}


@numba.njit(parallel=True, fastmath=_FAST, cache=True)
@no_type_check
def _matmul(crow, col, values, dense, out):
    for row in numba.prange(out.shape[0]):
        for entry in range(crow[row], crow[row + 1]):
            value = values[entry]
            source = dense[col[entry]]
            for j in range(out.shape[1]):
                out[row, j] += value * source[j]


@numba.njit(cache=True)
@no_type_check
def transpose(crow, col, columns):
    """CSR to CSC: column pointers, and for each entry in column order its row and its place in the CSR arrays."""
    pointers = np.zeros(columns + 1, np.int64)
    for entry in range(col.shape[0]):
        pointers[col[entry] + 1] += 1
    for column in range(columns):
        pointers[column + 1] += pointers[column]
    cursor = pointers[:-1].copy()
    rows = np.empty(col.shape[0], np.int64)
    places = np.empty(col.shape[0], np.int64)
    for row in range(crow.shape[0] - 1):
        for entry in range(crow[row], crow[row + 1]):
            place = cursor[col[entry]]
            cursor[col[entry]] += 1
            rows[place] = row
            places[place] = entry
    return pointers, rows, places


@numba.njit(parallel=True, fastmath=_FAST, cache=True)
@no_type_check
def _transposed_matmul(pointers, rows, places, values, dense, out):
    for column in numba.prange(out.shape[0]):
        for place in range(pointers[column], pointers[column + 1]):
            value = values[places[place]]
            source = dense[rows[place]]
            for j in range(out.shape[1]):
                out[column, j] += value * source[j]


@numba.njit(parallel=True, fastmath=_FAST, cache=True)
@no_type_check
def _sampled_product(crow, col, left, right, out):
    for row in numba.prange(left.shape[0]):
        ours = left[row]
        for entry in range(crow[row], crow[row + 1]):
            theirs = right[col[entry]]
            total = out.dtype.type(0)
            for j in range(ours.shape[0]):
                total += ours[j] * theirs[j]
            out[entry] = total


def csr_matmul(
    crow_indices: Int64[Tensor, "rows_plus_1"],
    col_indices: Int64[Tensor, "entries"],
    values: Float[Tensor, "entries"],
    dense: Float[Tensor, "columns d"],
) -> Float[Tensor, "rows d"]:
    """``S @ dense`` row by row."""
    values_, dense_ = _computable(values), _computable(dense)
    out = torch.zeros(crow_indices.numel() - 1, dense.shape[1], dtype=dense_.dtype)
    with matching_threads():
        _matmul(_array(crow_indices), _array(col_indices), values_.numpy(), dense_.numpy(), out.numpy())
    return out.to(dense.dtype)


def csr_transposed_matmul(
    crow_indices: Int64[Tensor, "rows_plus_1"],
    col_indices: Int64[Tensor, "entries"],
    values: Float[Tensor, "entries"],
    dense: Float[Tensor, "rows d"],
    columns: int,
) -> Float[Tensor, "columns d"]:
    """``S.T @ dense`` column by column, after one transposition of the places."""
    values_, dense_ = _computable(values), _computable(dense)
    out = torch.zeros(columns, dense.shape[1], dtype=dense_.dtype)
    with matching_threads():
        pointers, rows, places = transpose(_array(crow_indices), _array(col_indices), columns)
        _transposed_matmul(pointers, rows, places, values_.numpy(), dense_.numpy(), out.numpy())
    return out.to(dense.dtype)


def csr_sampled_product(
    crow_indices: Int64[Tensor, "rows_plus_1"],
    col_indices: Int64[Tensor, "entries"],
    left: Float[Tensor, "rows d"],
    right: Float[Tensor, "columns d"],
) -> Float[Tensor, "entries"]:
    """``left @ right.T`` at the given places; bit-identical for a row whatever the other rows are."""
    left_, right_ = _computable(left), _computable(right)
    out = torch.empty(col_indices.numel(), dtype=left_.dtype)
    with matching_threads():
        _sampled_product(_array(crow_indices), _array(col_indices), left_.numpy(), right_.numpy(), out.numpy())
    return out.to(left.dtype)


def _computable(tensor: Tensor) -> Tensor:
    """Contiguous, and float32 where the type is narrower: numba knows neither bfloat16 nor half sums."""
    wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    return wide.detach().contiguous()


def _array(indices: Tensor) -> np.ndarray:
    return indices.contiguous().numpy()
