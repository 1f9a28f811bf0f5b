"""The three sparse products, spelled out: what every backend must equal."""

from jaxtyping import Float, Int64
from torch import Tensor, repeat_interleave


def row_of_each_entry(crow_indices: Int64[Tensor, "rows_plus_1"]) -> Int64[Tensor, "entries"]:
    """Expand CSR row pointers to the row of every entry."""
    return repeat_interleave(crow_indices.diff())


def csr_matmul(
    crow_indices: Int64[Tensor, "rows_plus_1"],
    col_indices: Int64[Tensor, "entries"],
    values: Float[Tensor, "entries"],
    dense: Float[Tensor, "columns d"],
) -> Float[Tensor, "rows d"]:
    """``S @ dense``, where the sparse ``S`` holds ``values`` at the given places."""
    rows = row_of_each_entry(crow_indices)
    out = dense.new_zeros(crow_indices.numel() - 1, dense.shape[1])
    return out.index_add_(0, rows, values.unsqueeze(1) * dense[col_indices])


def csr_transposed_matmul(
    crow_indices: Int64[Tensor, "rows_plus_1"],
    col_indices: Int64[Tensor, "entries"],
    values: Float[Tensor, "entries"],
    dense: Float[Tensor, "rows d"],
    columns: int,
) -> Float[Tensor, "columns d"]:
    """``S.T @ dense``."""
    rows = row_of_each_entry(crow_indices)
    out = dense.new_zeros(columns, dense.shape[1])
    return out.index_add_(0, col_indices, values.unsqueeze(1) * dense[rows])


def csr_sampled_product(
    crow_indices: Int64[Tensor, "rows_plus_1"],
    col_indices: Int64[Tensor, "entries"],
    left: Float[Tensor, "rows d"],
    right: Float[Tensor, "columns d"],
) -> Float[Tensor, "entries"]:
    """``left @ right.T``, only at the given places."""
    rows = row_of_each_entry(crow_indices)
    return (left[rows] * right[col_indices]).sum(dim=1)
