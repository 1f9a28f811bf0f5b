"""Tiles hold a matrix bit for bit, and products with them equal those with the dense, masked matrix."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from apportion.ops.spmm import reference, runs_tiles, tile_product, tiles_matmul
from apportion.ops.spmm.formats import Bitmap
from apportion.ops.spmm.tile_product import TileProduct
from apportion.ops.spmm.tiles import COLUMNS, ROWS, STRIDE, Tiles

SHAPES = [(1, 1), (5, 7), (16, 32), (33, 130), (64, 64), (20, 576)]
COUNTS = [1, 2, 3, 4, 7, 8, 13, 16, 17, 70]
DTYPES = [torch.float32, torch.bfloat16]

needs_lookup = pytest.mark.skipif(not runs_tiles(torch.zeros(1)), reason="the processor has no AVX-512")


def masked(shape: tuple[int, int], sparsity: float, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=draw) * (torch.rand(shape, generator=draw) >= sparsity)).to(dtype)


def inputs(count: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(2)).to(dtype)


def check(found: Tensor, x: Tensor, weight: Tensor) -> None:
    exact = x.double() @ weight.double().T
    assert found.dtype == x.dtype
    # In bfloat16 only the result is rounded: sums are taken in float32.
    tolerance = 2e-5 if x.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance * 4)


def product(x: Tensor, weight: Tensor, way: str | None = None) -> Tensor:
    return tiles_matmul(x, **Tiles.pack(weight).tensors(), rows=weight.shape[0], way=way)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (5, 0), (0, 0)], ids=str)
def test_tiles_give_back_what_they_were_given(shape, sparsity, dtype, monkeypatch):
    weight = masked(shape, sparsity, dtype)
    found = Tiles.pack(weight)
    assert torch.equal(found.unpack(), weight)
    monkeypatch.setattr("apportion.ops.spmm.tiles._CHUNK", 1)
    in_pieces = Tiles.pack(weight)
    assert all(torch.equal(each, in_pieces.tensors()[name]) for name, each in found.tensors().items())


def test_nan_infinities_and_denormals_are_values_and_minus_zero_is_none():
    weight = torch.zeros(3, 40)
    weight[0, :5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-45, -0.0])
    found = Tiles.pack(weight)
    assert len(found.values) == 4 + ROWS
    assert torch.equal(found.unpack().view(torch.int32), (weight + 0.0).view(torch.int32))


def test_the_longest_row_of_a_tile_is_in_the_first_lane():
    weight = torch.zeros(16, 32)
    weight[3, :7], weight[8, 4] = 2, 3
    found = Tiles.pack(weight)
    assert found.fours.tolist() == [-(-7 // STRIDE)]
    assert found.counts.tolist() == [2, 1, 1, 1, 1, 1, 1, 0]
    assert found.lanes[0, [3, 8]].tolist() == [0, 1]
    assert found.places.tolist()[:8] == [0, 4, 1, 2, 3, 4, 5, 6]
    assert found.starts.tolist() == [[0, 0], [8, 8]]


def test_they_take_little_more_than_a_bitmap():
    for sparsity, most in ((0.5, 1.25), (0.8, 1.2), (0.9, 1.1)):
        weight = masked((512, 512), sparsity)
        assert Tiles.pack(weight).nbytes < most * Bitmap.pack(weight).nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_equal_the_dense_ones(shape, sparsity, dtype):
    weight = masked(shape, sparsity, dtype)
    for count in COUNTS:
        x = inputs(count, shape[1], DTYPES[count % 2])
        for way in (*tile_product.WAYS, None):
            check(product(x, weight, way), x, weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_types_take_the_definition(dtype):
    weight, x = masked((9, 20), 0.5).to(dtype), inputs(3, 20).to(dtype)
    tolerance = {torch.float64: 1e-12, torch.float16: 1e-2}[dtype]
    found = product(x, weight)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), x.double() @ weight.double().T, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(reference.tiles_matmul(x, Tiles.pack(weight)), x @ weight.T)


@pytest.mark.parametrize("way", tile_product.WAYS)
def test_a_bfloat16_weight_is_not_rounded_to_the_input_nor_a_float32_one(way):
    weight = torch.full((3, 64), 1 + 2**-20)
    weight[:, ::2] = 1
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    x[:, ::2] = -1
    assert torch.allclose(product(x, weight, way).float(), torch.full((2, 3), 32 * 2.0**-20))


@pytest.mark.parametrize("way", tile_product.WAYS)
def test_nan_and_infinite_weights_reach_the_result(way):
    weight = masked((4, 70), 0.5)
    weight[1, 3], weight[2, 69] = torch.nan, torch.inf
    for count in (1, 5, 16):
        found = product(inputs(count, 70).abs() + 1, weight, way)
        assert bool(found[:, 1].isnan().all())
        assert bool((found[:, 2] == torch.inf).all())
        assert bool(found[:, [0, 3]].isfinite().all())


@needs_lookup
def test_a_row_does_not_depend_on_the_others():
    weight, x = masked((40, 200), 0.8), inputs(16, 200)
    together = product(x, weight, "tiles")
    for rows in ([0, 7], [39]):
        assert torch.equal(product(x, weight[rows], "tiles"), together[:, rows])


@needs_lookup
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_number_of_threads_finds_the_same_bits(threads, monkeypatch):
    monkeypatch.setattr(tile_product, "_ALONE", 0)
    weight, x = masked((300, 200), 0.8), inputs(4, 200)
    before = torch.get_num_threads()
    wanted = product(x, weight, "tiles")
    try:
        torch.set_num_threads(threads)
        assert torch.equal(product(x, weight, "tiles"), wanted)
    finally:
        torch.set_num_threads(before)


def test_empty_matrices_and_inputs():
    for rows, columns, count in ((0, 5, 2), (5, 0, 2), (5, 70, 0)):
        weight, x = torch.zeros(rows, columns), torch.zeros(count, columns)
        for way in tile_product.WAYS:
            assert torch.equal(product(x, weight, way), torch.zeros(count, rows))


@needs_lookup
def test_a_bias_is_added_whatever_the_way():
    weight, x, bias = masked((20, 70), 0.8), inputs(9, 70), inputs(1, 20)[0]
    ready = TileProduct(Tiles.pack(weight), bias)
    for way in tile_product.WAYS:
        torch.testing.assert_close(ready(x, way), torch.nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
        found = ready.half(x.bfloat16(), way)
        assert found.dtype == torch.bfloat16
        wanted = torch.nn.functional.linear(x.bfloat16().float(), weight, bias)
        torch.testing.assert_close(found.float(), wanted, rtol=2**-7, atol=2**-7)
    assert ready(x.view(3, 3, 70)).shape == (3, 3, 20)
    assert ready(x[0]).shape == (20,)


def test_torch_can_trace_the_op():
    tiles, x = Tiles.pack(masked((9, 24), 0.5)), inputs(3, 24)
    parts = (tiles.values, tiles.places, tiles.counts, tiles.fours, tiles.lanes, tiles.starts)
    torch.library.opcheck(tiles_matmul, (x, *parts, 9), test_utils=("test_schema", "test_faketensor"))


def test_parts_that_do_not_belong_together_are_refused():
    tiles, x = Tiles.pack(masked((33, 130), 0.5)), inputs(3, 130)
    for changed, message in (
        (replace(tiles, starts=tiles.starts.int()), r"starts is torch\.int32"),
        (replace(tiles, fours=tiles.fours[1:].clone()), r"fours is torch\.uint8 \(14,\)"),
        (replace(tiles, places=tiles.places[1:].clone()), "places is"),
        (replace(tiles, lanes=tiles.lanes.short()), r"lanes is torch\.int16"),
        (replace(tiles, values=tiles.values.repeat(2)[::2]), "in one piece"),
    ):
        with pytest.raises(ValueError, match=message):
            tiles_matmul(x, **changed.tensors(), rows=33)
    with pytest.raises(ValueError, match="fours is"):
        tiles_matmul(inputs(3, 130 + COLUMNS), **tiles.tensors(), rows=33)
    with pytest.raises(ValueError, match="way 'fast'"):
        tiles_matmul(x, **tiles.tensors(), rows=33, way="fast")
