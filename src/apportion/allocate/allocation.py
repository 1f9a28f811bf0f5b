"""Who got what: a sparse matrix in CSR order whose values carry gradients."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from apportion.ops import csr_matmul


@dataclass(frozen=True, eq=False)
class Allocation:
    """The winners of an allocation, row by row.

    The names are those of ``torch.sparse_csr_tensor``. Within a row the entries are in column order.

    Attributes:
        crow_indices: where each row's entries begin and end, int64 [rows + 1].
        col_indices: which candidate won, int64 [entries].
        values: what it won with; differentiable, [entries].
        shape: (rows, columns).

    Examples:
        >>> import torch
        >>> from apportion.allocate import MutualChoice
        >>> allocation = MutualChoice(budget=1.5)(torch.tensor([[0.1, 0.9, 0.8], [0.3, 0.2, 0.7]]))
        >>> allocation.to_dense()
        tensor([[0.0000, 0.9000, 0.8000],
                [0.0000, 0.0000, 0.7000]])
    """

    crow_indices: Int64[Tensor, "rows_plus_1"]
    col_indices: Int64[Tensor, "entries"]
    values: Float[Tensor, "entries"]
    shape: tuple[int, int]

    @property
    def nnz(self) -> int:
        """How many entries there are, zeros among the values included."""
        return self.col_indices.numel()

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.values.device

    def row_indices(self) -> Int64[Tensor, "entries"]:
        """The row of every entry."""
        return torch.repeat_interleave(self.crow_indices.diff(), output_size=self.nnz)

    def winners_per_row(self) -> Int64[Tensor, "rows"]:
        """How many candidates each row got, zeros included."""
        return self.crow_indices.diff()

    def winners_per_column(self) -> Int64[Tensor, "columns"]:
        """How many rows each candidate serves, zeros included."""
        return torch.bincount(self.col_indices, minlength=self.shape[1])

    def active(self) -> "Allocation":
        """Without the entries whose value is not positive: what a rectified code really uses."""
        return self.keep(self.values > 0)

    def keep(self, mask: Bool[Tensor, "entries"]) -> "Allocation":
        """Only the entries where the boolean ``mask`` holds."""
        before = torch.zeros(self.nnz + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(mask, dim=0, out=before[1:])
        return Allocation(before[self.crow_indices], self.col_indices[mask], self.values[mask], self.shape)

    def with_values(self, values: Float[Tensor, "entries"]) -> "Allocation":
        """The same winners with other values, in the same order."""
        if values.shape != self.col_indices.shape:
            raise ValueError(f"values has shape {tuple(values.shape)}, but there are {self.nnz} entries: give one each")
        return replace(self, values=values)

    def plus(self, other: "Allocation") -> "Allocation":
        """The entrywise sum of two allocations of one shape: whoever won in either; differentiable in both.

        An entry whose values cancel stays, with the value 0.
        """
        if self.shape != other.shape:
            raise ValueError(f"allocations of shapes {self.shape} and {other.shape} cannot be added: give equal shapes")
        rows, columns = self.shape
        places = torch.cat([each.row_indices() * columns + each.col_indices for each in (self, other)])
        unique, position = torch.unique(places, return_inverse=True)
        values = torch.cat([self.values, other.values])
        row = torch.div(unique, max(columns, 1), rounding_mode="floor")
        crow = torch.searchsorted(row, torch.arange(rows + 1, device=row.device))
        summed = values.new_zeros(unique.numel()).index_add(0, position, values)
        return Allocation(crow, unique - row * columns, summed, self.shape)

    def matmul(self, dense: Float[Tensor, "columns d"], sparse_grad: bool = False) -> Float[Tensor, "rows d"]:
        """The sparse matrix times ``dense``; differentiable in both.

        ``sparse_grad``: the gradient to ``dense`` is a sparse tensor of the rows that it has been multiplied with.
        """
        product: Tensor = csr_matmul(self.crow_indices, self.col_indices, self.values, dense, sparse_grad)
        return product

    def to_dense(self) -> Float[Tensor, "rows columns"]:
        """The full matrix, zero where nobody won; differentiable."""
        flat = self.values.new_zeros(self.shape[0] * self.shape[1])
        places = self.row_indices() * self.shape[1] + self.col_indices
        return flat.scatter(0, places, self.values).view(self.shape)

    def to_sparse_csr(self) -> Tensor:
        """As a ``torch.sparse_csr_tensor``; detached."""
        return torch.sparse_csr_tensor(
            self.crow_indices, self.col_indices, self.values.detach(), self.shape, check_invariants=False
        )

    def detach(self) -> "Allocation":
        """The same winners, without gradient."""
        return replace(self, values=self.values.detach())
