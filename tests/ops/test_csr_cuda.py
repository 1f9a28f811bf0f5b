"""The Triton kernels of the sparse products equal their definition; without a GPU, under Triton's interpreter."""

import warnings

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (`pip install 'apportion[gpu]'`) to run the CUDA kernels")

from apportion.ops import csr_matmul, csr_sampled_product, csr_transposed_matmul, triton_support
from apportion.ops.csr import cuda, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Unit roundoffs of the result, with room for sums in another order.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

SHAPES = {
    "ordinary": (7, 11, 5, 0.4),
    "one winner": (1, 1, 1, 1.0),
    "a row longer than a block, a width past one": (2, 19, 517, 1.0),
    "one column": (19, 1, 3, 0.5),
    "nothing won": (5, 6, 7, 0.0),
    "no rows": (0, 6, 7, 0.5),
    "width zero": (3, 4, 0, 0.5),
}


def places(rows: int, columns: int, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random CSR places; with a share between 0 and 1 some rows and columns stay empty."""
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share
    if 0 < share < 1 and rows > 2:
        mask[1] = False
        mask[:, 3:5] = False
    crow = torch.zeros(rows + 1, dtype=torch.int64)
    crow[1:] = mask.sum(dim=1).cumsum(0)
    return crow.to(DEVICE), mask.nonzero()[:, 1].contiguous().to(DEVICE)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    wide = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return wide.to(dtype).to(DEVICE)


def close(actual: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Equal to the float64 result up to the rounding of ``dtype``, relative to the size of the numbers summed."""
    assert actual.dtype == dtype
    assert actual.shape == wanted.shape
    torch.testing.assert_close(actual.double(), wanted, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


def all_three_are_right(crow: Tensor, col: Tensor, columns: int, width: int, dtype: torch.dtype, seed: int = 0) -> None:
    values = numbers(col.numel(), dtype=dtype, seed=seed)
    left, right = numbers(crow.numel() - 1, width, dtype=dtype, seed=seed + 1), numbers(columns, width, dtype=dtype)
    wide_values, wide_left, wide_right = values.double(), left.double(), right.double()
    close(cuda.csr_matmul(crow, col, values, right), reference.csr_matmul(crow, col, wide_values, wide_right), dtype)
    close(
        cuda.csr_transposed_matmul(crow, col, values, left, columns),
        reference.csr_transposed_matmul(crow, col, wide_values, wide_left, columns),
        dtype,
    )
    close(
        cuda.csr_sampled_product(crow, col, left, right),
        reference.csr_sampled_product(crow, col, wide_left, wide_right),
        dtype,
    )


@pytest.mark.parametrize(("rows", "columns", "width", "share"), SHAPES.values(), ids=SHAPES.keys())
def test_the_kernels_equal_their_definitions_on_every_shape(rows: int, columns: int, width: int, share: float) -> None:
    all_three_are_right(*places(rows, columns, share), columns, width, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_kernels_equal_their_definitions_in_every_type(dtype: torch.dtype, seed: int) -> None:
    all_three_are_right(*places(9, 13, 0.4, seed), 13, 10, dtype, seed)


def test_narrow_types_are_summed_in_float32() -> None:
    # In bfloat16 the sum of ones stops growing at 256.
    crow, col = torch.tensor([0, 600], device=DEVICE), torch.arange(600, device=DEVICE)
    ones = torch.ones(600, 1, dtype=torch.bfloat16, device=DEVICE)
    assert cuda.csr_matmul(crow, col, ones[:, 0], ones).item() == 600
    column = torch.arange(601, device=DEVICE), torch.zeros(600, dtype=torch.int64, device=DEVICE)
    assert cuda.csr_transposed_matmul(*column, ones[:, 0], ones, 1).item() == 600
    one_place = torch.tensor([0, 1], device=DEVICE), torch.tensor([0], device=DEVICE)
    assert cuda.csr_sampled_product(*one_place, ones.T, ones.T).item() == 600


def test_strided_inputs_give_the_same_bits() -> None:
    crow, col = places(6, 9, 0.4)
    values = numbers(2 * col.numel())[::2]
    left, right = numbers(4, 6).T, numbers(9, 8, seed=2)[:, ::2]
    spread_crow = torch.stack([crow, crow], dim=1)[:, 0]
    spread_col = torch.stack([col, col], dim=1)[:, 0]
    plain = values.contiguous(), left.contiguous(), right.contiguous()
    assert cuda.csr_matmul(spread_crow, spread_col, values, right).equal(cuda.csr_matmul(crow, col, plain[0], plain[2]))
    assert cuda.csr_transposed_matmul(spread_crow, spread_col, values, left, 9).equal(
        cuda.csr_transposed_matmul(crow, col, plain[0], plain[1], 9)
    )
    assert cuda.csr_sampled_product(spread_crow, spread_col, left, right).equal(
        cuda.csr_sampled_product(crow, col, plain[1], plain[2])
    )


def test_a_row_is_the_same_bits_alone_and_in_company() -> None:
    width, columns = 193, 21
    crow, col = places(5, columns, 0.6)
    values = numbers(col.numel())
    left, right = numbers(5, width), numbers(columns, width, seed=2)
    together = cuda.csr_matmul(crow, col, values, right), cuda.csr_sampled_product(crow, col, left, right)
    for row in range(5):
        first, last = int(crow[row]), int(crow[row + 1])
        alone = torch.tensor([0, last - first], device=DEVICE)
        mine = col[first:last]
        assert cuda.csr_matmul(alone, mine, values[first:last], right).equal(together[0][row : row + 1])
        assert cuda.csr_sampled_product(alone, mine, left[row : row + 1], right).equal(together[1][first:last])


def test_entries_by_column_keep_the_order_of_their_rows() -> None:
    crow, col = places(9, 13, 0.5)
    pointers, rows, places_in_csr = cuda.by_column(crow, col, 13)
    row_of_each = reference.row_of_each_entry(crow)
    for column in range(13):
        mine = slice(int(pointers[column]), int(pointers[column + 1]))
        assert rows[mine].equal(row_of_each[col == column])
        assert places_in_csr[mine].equal((col == column).nonzero()[:, 0])


def test_without_triton_cuda_tensors_get_the_reference_and_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support.importlib.util, "find_spec", lambda name: None)
    triton_support.triton_is_missing.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="triton is not installed"):
            assert triton_support.triton_is_missing()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert triton_support.triton_is_missing()
    finally:
        triton_support.triton_is_missing.cache_clear()
    monkeypatch.undo()
    assert not triton_support.triton_is_missing()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_ops_use_the_kernels_on_cuda_tensors() -> None:
    crow, col = places(40, 60, 0.2)
    values = numbers(col.numel()).requires_grad_()
    left, right = numbers(40, 33).requires_grad_(), numbers(60, 33, seed=2).requires_grad_()
    assert csr_matmul(crow, col, values, right).equal(cuda.csr_matmul(crow, col, values.detach(), right.detach()))
    torch.library.opcheck(csr_matmul, (crow, col, values, right))
    torch.library.opcheck(csr_transposed_matmul, (crow, col, values, left, 60))
    torch.library.opcheck(csr_sampled_product, (crow, col, left, right))
