"""Products with packed matrices equal those with the dense, masked matrix, in every way there is to take them."""

import pytest
import torch
from torch import Tensor

from apportion.ops import team
from apportion.ops.spmm import bitmap_matmul, block_matmul, cpu, csr_narrow_matmul, reference
from apportion.ops.spmm.formats import Bitmap, Blocks, NarrowCSR

SHAPES = [(1, 1), (5, 7), (33, 130), (64, 64), (20, 576)]
COUNTS = [1, 2, 3, 4, 7, 8, 13, 16, 17, 33, 70]
DTYPES = [torch.float32, torch.bfloat16]


def masked(shape: tuple[int, int], sparsity: float, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=draw) * (torch.rand(shape, generator=draw) >= sparsity)).to(dtype)


def inputs(count: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(2)).to(dtype)


def bitmap_of(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = Bitmap.pack(weight)
    return found.words(), found.starts(), found.values


def csr_of(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = NarrowCSR.pack(weight)
    return found.starts.long(), found.columns, found.values


def blocks_of(weight: Tensor, height: int = 4, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    found = Blocks.pack(weight, height, width)
    return found.starts.long(), found.columns.long(), found.blocks


def check(found: Tensor, x: Tensor, weight: Tensor) -> None:
    exact = x.double() @ weight.double().T
    assert found.dtype == x.dtype
    # In bfloat16 only the result is rounded: sums are taken in float32.
    tolerance = 2e-5 if x.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance * 4)


@pytest.fixture(params=["vectors", "loops"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Once with what the processor has, once as on one without AVX-512."""
    if request.param == "loops":
        monkeypatch.setattr(cpu, "has_expand", lambda: False)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_equal_the_dense_ones(shape, sparsity, dtype, instructions):
    weight = masked(shape, sparsity, dtype)
    bitmap, csr, blocks = bitmap_of(weight), csr_of(weight), blocks_of(weight)
    for count in COUNTS:
        x = inputs(count, shape[1], DTYPES[count % 2])
        for way in (*cpu.WAYS, None):
            check(bitmap_matmul(x, *bitmap, way), x, weight)
        check(csr_narrow_matmul(x, *csr), x, weight)
        wide = torch.nn.functional.pad(x, (0, -shape[1] % 8))
        check(block_matmul(wide, *blocks)[:, : shape[0]], x, weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_types_take_the_definition(dtype):
    weight, x = masked((9, 20), 0.5).to(dtype), inputs(3, 20).to(dtype)
    tolerance = {torch.float64: 1e-12, torch.float16: 1e-2}[dtype]
    exact = x.double() @ weight.double().T
    wide = torch.nn.functional.pad(x, (0, 4))
    for found in (
        bitmap_matmul(x, *bitmap_of(weight)),
        csr_narrow_matmul(x, *csr_of(weight)),
        block_matmul(wide, *blocks_of(weight))[:, :9],
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


def test_the_definition_is_the_dense_product():
    weight, x = masked((9, 20), 0.5), inputs(3, 20)
    wanted = x @ weight.T
    torch.testing.assert_close(reference.bitmap_matmul(x, *bitmap_of(weight)), wanted)
    torch.testing.assert_close(reference.csr_narrow_matmul(x, *csr_of(weight)), wanted)
    wide = torch.nn.functional.pad(x, (0, 4))
    torch.testing.assert_close(reference.block_matmul(wide, *blocks_of(weight))[:, :9], wanted)


@pytest.mark.parametrize("way", cpu.WAYS)
def test_a_bfloat16_weight_is_not_rounded_to_the_input_nor_a_float32_one(way):
    weight = torch.full((3, 64), 1 + 2**-20)
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    assert bool((bitmap_matmul(x, *bitmap_of(weight), way).float() == 64).all())
    alternating = x.clone()
    alternating[:, ::2] = -1
    weight[:, ::2] = 1
    found = bitmap_matmul(alternating, *bitmap_of(weight), way)
    assert torch.allclose(found.float(), torch.full((2, 3), 32 * 2.0**-20))


@pytest.mark.parametrize("way", cpu.WAYS)
def test_nan_and_infinite_weights_reach_the_result(way):
    weight = masked((4, 70), 0.5)
    weight[1, 3], weight[2, 69] = torch.nan, torch.inf
    for count in (1, 5, 16):
        found = bitmap_matmul(inputs(count, 70).abs() + 1, *bitmap_of(weight), way)
        assert bool(found[:, 1].isnan().all())
        assert bool((found[:, 2] == torch.inf).all())
        assert bool(found[:, [0, 3]].isfinite().all())


def test_a_row_does_not_depend_on_the_others():
    weight, x = masked((40, 200), 0.8), inputs(16, 200)
    for way in ("expand", "nonzeros"):
        together = bitmap_matmul(x, *bitmap_of(weight), way)
        for rows in ([0, 7], [39]):
            assert torch.equal(bitmap_matmul(x, *bitmap_of(weight[rows]), way), together[:, rows])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_number_of_threads_finds_the_same_bits(threads):
    weight, x = masked((300, 200), 0.8), inputs(4, 200)
    before = torch.get_num_threads()
    wanted = [bitmap_matmul(x, *bitmap_of(weight), way) for way in cpu.WAYS[:2]]
    try:
        torch.set_num_threads(threads)
        found = [bitmap_matmul(x, *bitmap_of(weight), way) for way in cpu.WAYS[:2]]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*each) for each in zip(found, wanted, strict=True))


def test_without_the_threads_of_torch_one_thread_does_it_all(monkeypatch):
    monkeypatch.setattr(team, "_parallel", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    weight, x = masked((30, 200), 0.8), inputs(4, 200)
    check(bitmap_matmul(x, *bitmap_of(weight)), x, weight)


def test_empty_matrices_and_inputs():
    for rows, columns, count in ((0, 5, 2), (5, 0, 2), (5, 70, 0)):
        weight, x = torch.zeros(rows, columns), torch.zeros(count, columns)
        for way in cpu.WAYS:
            assert torch.equal(bitmap_matmul(x, *bitmap_of(weight), way), torch.zeros(count, rows))
        assert torch.equal(csr_narrow_matmul(x, *csr_of(weight)), torch.zeros(count, rows))


def test_columns_beyond_16_bits():
    weight = torch.zeros(3, 70_000)
    weight[0, 69_999], weight[2, 1] = 2, 3
    packed = csr_of(weight)
    assert packed[1].dtype == torch.int32
    x = inputs(2, 70_000)
    check(csr_narrow_matmul(x, *packed), x, weight)


def test_the_usual_way_goes_from_few_columns_to_many(monkeypatch):
    monkeypatch.setattr(cpu, "has_expand", lambda: True)
    assert [cpu.way_for(count, 0.2) for count in (1, 4, 16, 64)] == ["expand"] * 2 + ["nonzeros"] * 2
    assert [cpu.way_for(count, 0.5) for count in (1, 8, 16, 64)] == ["expand", "expand", "nonzeros", "panels"]
    assert cpu.way_for(512, 0.5) == "panels"
    monkeypatch.setattr(cpu, "native_bfloat16", lambda: ("amx_bf16",))
    assert cpu.way_for(64, 0.2, half=True) == "panels"
    monkeypatch.setattr(cpu, "has_expand", lambda: False)
    assert cpu.way_for(1, 0.2) == "nonzeros"


def test_torch_can_trace_the_ops():
    weight, x = masked((9, 24), 0.5), inputs(3, 24)
    for op, packed in ((bitmap_matmul, bitmap_of), (csr_narrow_matmul, csr_of), (block_matmul, blocks_of)):
        torch.library.opcheck(op, (x, *packed(weight)), test_utils=("test_schema", "test_faketensor"))


def test_parts_that_do_not_belong_together_are_refused():
    weight, x = masked((9, 130), 0.5), inputs(3, 130)
    bits, starts, values = bitmap_of(weight)
    for given, message in (
        ((inputs(3, 192 + 1), bits, starts, values), "x has 193 columns"),
        ((x, bits, starts.int(), values), r"starts is torch\.int32"),
        ((x, bits, starts[:-1], values), r"int64 \[10\] for 9 rows"),
        ((x, bits.int(), starts, values), r"bits is torch\.int32"),
        ((x, bits, starts, values.repeat(2)[::2]), "in one piece"),
        ((x, bits, starts, values, "fast"), "way 'fast'"),
    ):
        with pytest.raises(ValueError, match=message):
            bitmap_matmul(*given)
    starts, columns, values = csr_of(weight)
    with pytest.raises(ValueError, match=r"columns is torch\.int64"):
        csr_narrow_matmul(x, starts, columns.long(), values)
    with pytest.raises(ValueError, match="one for each"):
        csr_narrow_matmul(x, starts, columns, values[:-1].clone())
    starts, columns, blocks = blocks_of(weight)
    with pytest.raises(ValueError, match="do not belong together"):
        block_matmul(x, starts, columns, blocks)
