"""An Allocation is a sparse matrix: every view of it tells the same story, and gradients pass through its values."""

import pytest
import torch
from torch import Tensor

from apportion.allocate import Allocation, MutualChoice

SCORES = torch.tensor(
    [[0.5, -2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 4.0, -0.5, 2.0]],
    dtype=torch.float64,
)
# Row 1 has no entry; row 0 has one of value zero, row 2 a negative one.
WON = torch.tensor([[True, False, True, True], [False, False, False, False], [False, True, True, False]])


def allocation_of(scores: Tensor, won: Tensor) -> Allocation:
    crow = torch.zeros(won.shape[0] + 1, dtype=torch.int64)
    crow[1:] = won.sum(dim=1).cumsum(0)
    return Allocation(crow, won.nonzero()[:, 1].contiguous(), scores[won], (won.shape[0], won.shape[1]))


@pytest.fixture
def allocation() -> Allocation:
    return allocation_of(SCORES, WON)


@pytest.fixture
def nothing() -> Allocation:
    return allocation_of(SCORES[:0], WON[:0])


def test_to_dense_has_the_values_where_they_won_and_zero_elsewhere(allocation: Allocation) -> None:
    assert allocation.to_dense().equal(torch.where(WON, SCORES, 0.0))


def test_rows_columns_and_counts_agree_with_the_dense_form(allocation: Allocation) -> None:
    assert allocation.nnz == 5
    assert allocation.device == SCORES.device
    assert torch.stack([allocation.row_indices(), allocation.col_indices], dim=1).equal(WON.nonzero())
    assert allocation.winners_per_row().equal(WON.sum(dim=1))
    assert allocation.winners_per_column().equal(WON.sum(dim=0))


def test_active_leaves_out_what_is_not_positive(allocation: Allocation) -> None:
    assert allocation.active().to_dense().equal(torch.where(WON & (SCORES > 0), SCORES, 0.0))
    assert allocation.active().winners_per_row().equal((WON & (SCORES > 0)).sum(dim=1))


@pytest.mark.parametrize("kept", [[True] * 5, [False] * 5, [False, True, True, False, True]])
def test_keep_drops_the_other_entries(allocation: Allocation, kept: list[bool]) -> None:
    won = torch.zeros_like(WON)
    won[WON] = torch.tensor(kept)
    smaller = allocation.keep(torch.tensor(kept))
    assert smaller.crow_indices.dtype == torch.int64
    assert smaller.to_dense().equal(torch.where(won, SCORES, 0.0))
    assert smaller.shape == allocation.shape


def test_with_values_changes_values_only(allocation: Allocation) -> None:
    doubled = allocation.with_values(allocation.values * 2)
    assert doubled.to_dense().equal(2 * allocation.to_dense())


def test_with_values_wants_one_value_an_entry(allocation: Allocation) -> None:
    with pytest.raises(ValueError, match=r"values has shape \(3,\), but there are 5 entries"):
        allocation.with_values(torch.zeros(3, dtype=torch.float64))


def test_matmul_is_the_dense_product(allocation: Allocation) -> None:
    dense = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(allocation.matmul(dense), allocation.to_dense() @ dense)


# torch announces once a process that its own sparse CSR tensors are young.
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_to_sparse_csr_is_torchs_own_form(allocation: Allocation) -> None:
    theirs = allocation.to_sparse_csr()
    assert theirs.layout == torch.sparse_csr
    assert theirs.to_dense().equal(allocation.to_dense())
    torch._validate_sparse_csr_tensor_args(theirs.crow_indices(), theirs.col_indices(), theirs.values(), theirs.shape)


def test_an_empty_batch_has_every_view(nothing: Allocation) -> None:
    assert nothing.nnz == 0
    assert nothing.to_dense().shape == (0, 4)
    assert nothing.row_indices().shape == (0,)
    assert nothing.winners_per_row().shape == (0,)
    assert nothing.winners_per_column().tolist() == [0, 0, 0, 0]
    assert nothing.matmul(torch.ones(4, 2, dtype=torch.float64)).shape == (0, 2)
    assert nothing.active().nnz == 0


def test_gradients_pass_through_every_view() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    dense = torch.randn(4, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    rule = MutualChoice(budget=8 / 3)
    assert rule(scores).active().nnz < rule(scores).nnz
    assert torch.autograd.gradcheck(lambda s: rule(s).to_dense(), (scores,))
    assert torch.autograd.gradcheck(lambda s: rule(s).active().values, (scores,))
    assert torch.autograd.gradcheck(lambda s, d: rule(s).matmul(d), (scores, dense))


def test_losers_get_exactly_no_gradient() -> None:
    scores = SCORES.clone().requires_grad_()
    allocation = allocation_of(scores, WON)
    allocation.to_dense().square().sum().backward()
    assert scores.grad is not None
    assert scores.grad.equal(torch.where(WON, 2 * SCORES, 0.0))


def test_detach_cuts_the_gradient() -> None:
    allocation = allocation_of(SCORES.clone().requires_grad_(), WON)
    assert allocation.values.requires_grad
    assert not allocation.detach().values.requires_grad
    assert allocation.detach().to_dense().equal(allocation.to_dense())


def test_an_allocation_cannot_be_changed(allocation: Allocation) -> None:
    with pytest.raises(AttributeError):
        allocation.shape = (1, 1)  # type: ignore[misc]


def test_plus_is_the_sum_of_the_dense_forms_in_column_order() -> None:
    other = WON.roll(1, dims=0)
    scores = SCORES.flip(1)
    left, right = allocation_of(SCORES, WON), allocation_of(scores, other)
    both = left.plus(right)
    assert both.to_dense().equal(left.to_dense() + right.to_dense())
    assert torch.stack([both.row_indices(), both.col_indices], dim=1).equal((WON | other).nonzero())


def test_plus_keeps_what_cancels_and_passes_gradients(allocation: Allocation) -> None:
    values = allocation.values.clone().requires_grad_()
    difference = allocation.with_values(values).plus(allocation.with_values(-allocation.values))
    assert difference.nnz == allocation.nnz
    assert difference.values.eq(0).all()
    difference.values.sum().backward()
    assert values.grad is not None
    assert values.grad.eq(1).all()


def test_plus_of_nothing_and_of_another_shape(allocation: Allocation, nothing: Allocation) -> None:
    assert nothing.plus(nothing).shape == nothing.shape
    with pytest.raises(ValueError, match="shapes"):
        allocation.plus(nothing)
