"""Triton's kernels of packed products equal the dense ones; without a GPU, under Triton's interpreter."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (`pip install 'apportion[gpu]'`) to run the CUDA kernels")

from apportion.ops.spmm import cuda
from apportion.ops.spmm.formats import Bitmap, Blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def short_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows have several programs, and an end within one."""
    monkeypatch.setattr(cuda, "_ROWS", 16)


def case(rows: int, columns: int, sparsity: float, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    weight = torch.randn(rows, columns, generator=draw) * (torch.rand(rows, columns, generator=draw) >= sparsity)
    return weight.to(dtype), torch.randn(count, columns, generator=draw)


def bitmap_of(weight: Tensor) -> list[Tensor]:
    found = Bitmap.pack(weight)
    return [each.to(DEVICE) for each in (found.words(), found.starts(), found.values)]


def check(found: Tensor, x: Tensor, weight: Tensor) -> None:
    tolerance = 2e-5 if x.dtype == torch.float32 else 2**-8
    assert found.dtype == x.dtype
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(found.double().cpu(), exact, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(
    ("rows", "columns", "sparsity", "count"),
    [(5, 7, 0.5, 1), (33, 130, 0.8, 3), (16, 64, 0.0, 17), (20, 192, 1.0, 2), (17, 200, 0.5, 33), (18, 66, 0.9, 8)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bitmap(rows, columns, sparsity, count, dtype):
    weight, x = case(rows, columns, sparsity, count, dtype)
    for given in (x, x.bfloat16()):
        check(cuda.bitmap_matmul(given.to(DEVICE), *bitmap_of(weight), 1), given, weight)


@pytest.mark.parametrize("splits", [2, 3, 9])
def test_split_columns_find_the_same_and_always_the_same(splits):
    weight, x = case(20, 300, 0.6, 4, torch.float32)
    weight[3, 63], weight[4, 64:128] = 1, 1  # a sign bit, and a whole word
    packed = bitmap_of(weight)
    found = cuda.bitmap_matmul(x.to(DEVICE), *packed, splits)
    check(found, x, weight)
    assert torch.equal(cuda.bitmap_matmul(x.to(DEVICE), *packed, splits), found)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # of the interpreter's numpy
def test_nan_and_infinite_weights_reach_the_result():
    weight, x = case(4, 70, 0.5, 2, torch.float32)
    weight[1, 3], weight[2, 69] = torch.nan, torch.inf
    found = cuda.bitmap_matmul((x.abs() + 1).to(DEVICE), *bitmap_of(weight), 2).cpu()
    assert bool(found[:, 1].isnan().all())
    assert bool((found[:, 2] == torch.inf).all())
    assert bool(found[:, [0, 3]].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 16), (8, 4)])
def test_blocks(height, width, dtype):
    weight, x = case(64, 96, 0.0, 5, dtype)
    tiles = weight.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    tiles *= (torch.arange(tiles.shape[0])[:, None] + torch.arange(tiles.shape[2]) * 2)[:, None, :, None] % 3 == 0
    weight = tiles.flatten(2).flatten(0, 1)
    found = Blocks.pack(weight, height, width)
    assert 0 < found.blocks.numel() < weight.numel()
    packed = [each.to(DEVICE) for each in (found.starts.long(), found.columns.long(), found.blocks)]
    check(cuda.block_matmul(x.to(DEVICE), *packed), x, weight)


def test_empty_matrices_and_inputs():
    for rows, columns, count in ((0, 5, 2), (5, 70, 0)):
        weight, x = case(rows, columns, 0.5, count, torch.float32)
        assert cuda.bitmap_matmul(x.to(DEVICE), *bitmap_of(weight)).shape == (count, rows)
