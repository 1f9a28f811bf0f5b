"""A packed layer computes what the pruned layer does, and is that layer again when asked."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.ops.spmm import cpu, runs_tiles, tile_product
from apportion.ops.spmm.formats import Bitmap, Dense, NOfM
from apportion.ops.spmm.tile_product import TileProduct
from apportion.ops.spmm.tiles import Tiles
from apportion.weights import crossover, semi_structured, sparse_linear
from apportion.weights.sparse_linear import RUNNABLE, SparseLinear


def pruned(rows: int = 20, columns: int = 72, sparsity: float = 0.7, bias: bool = True) -> nn.Linear:
    draw = torch.Generator().manual_seed(3)
    linear = nn.Linear(columns, rows, bias=bias).requires_grad_(False)
    weight = torch.randn(rows, columns, generator=draw)
    linear.weight.copy_(weight * (torch.rand(weight.shape, generator=draw) >= sparsity))
    return linear


def two_of_four(rows: int = 20, columns: int = 72) -> nn.Linear:
    linear = pruned(rows, columns, 0.0)
    groups = linear.weight.unflatten(1, (-1, 4))
    linear.weight.copy_((groups * torch.tensor([1, 0, 0, 1])).flatten(1))
    return linear


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", RUNNABLE)
def test_a_packed_layer_computes_what_the_dense_one_does(format, bias):
    linear = two_of_four() if format == "nm" else pruned(bias=bias)
    packed = SparseLinear.from_linear(linear, format)
    assert packed.format == format
    for shape in ((72,), (1, 72), (2, 3, 72), (0, 72), (40, 72)):
        torch.testing.assert_close(packed(some(*shape)), linear(some(*shape)), rtol=2e-5, atol=2e-5)
    back = packed.to_linear()
    assert torch.equal(back.weight, linear.weight)
    assert (back.bias is None) == (linear.bias is None)
    assert torch.equal(packed.packed().unpack(), linear.weight)
    assert packed.packed().name == format
    assert format in repr(packed)


def test_values_may_be_bfloat16_beside_float32_inputs():
    linear = pruned()
    packed = SparseLinear.from_linear(linear, "bitmap", dtype=torch.bfloat16)
    assert packed.values.dtype == torch.bfloat16
    rounded = nn.functional.linear(some(3, 72), linear.weight.bfloat16().float(), linear.bias)
    torch.testing.assert_close(packed(some(3, 72)), rounded, rtol=2e-5, atol=2e-5)
    found = packed(some(3, 72).bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), rounded, rtol=3e-2, atol=3e-2)


def test_auto_takes_the_fewest_bytes():
    assert SparseLinear.from_linear(pruned(64, 256, 0.7)).format == "bitmap"
    assert SparseLinear.from_linear(pruned(64, 256, 0.99)).format == "csr"
    assert SparseLinear.from_linear(pruned(64, 256, 0.0)).format == "bitmap", "a SparseLinear is never dense"
    one_of_four = two_of_four(64, 256)
    one_of_four.weight[:, ::4] = 0
    assert SparseLinear.from_linear(one_of_four).format == "nm"
    blocks = pruned(64, 256, 0.0)
    blocks.weight[:, 16:] = 0
    assert SparseLinear.from_linear(blocks).format == "block"


def test_it_is_smaller_in_memory():
    linear = pruned(64, 256, 0.8)
    packed = SparseLinear.from_linear(linear)
    assert packed.nbytes == (Tiles if packed._kind == "tiles" else Bitmap).pack(linear.weight).nbytes + (
        0 if packed._kind == "tiles" else 65 * 8
    )
    assert packed.nbytes < linear.weight.nbytes / 3
    assert list(packed.parameters()) == []


def test_a_gradient_reaches_what_comes_before():
    linear = pruned()
    packed = SparseLinear.from_linear(linear)
    x, y = (some(3, 72).requires_grad_() for _ in range(2))
    packed(x).square().sum().backward()
    linear(y).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, y.grad)


def test_it_moves_and_changes_type_like_any_module():
    packed = SparseLinear.from_linear(pruned()).to(torch.bfloat16)
    assert packed.values.dtype == torch.bfloat16
    assert packed.starts.dtype == torch.int64
    assert packed(some(2, 72).bfloat16()).dtype == torch.bfloat16


def test_it_can_be_saved_and_read_as_a_state():
    packed = SparseLinear.from_linear(pruned())
    other = SparseLinear.from_linear(pruned())
    other.values.zero_()
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other.weight, packed.weight)


# What is worked out once for a layer must never outlive the memory it is about


def test_a_copy_multiplies_by_its_own_weight():
    packed = SparseLinear.from_linear(pruned())
    before = packed(some(2, 72))
    # In memory, as multiprocessing hands a module to a worker.
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        copied.values.mul_(2)
        torch.testing.assert_close(copied(some(2, 72)) - packed.bias, 2 * (before - packed.bias))
        assert torch.equal(packed(some(2, 72)), before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_that_is_read_is_multiplied_by(assign):
    first, second = (SparseLinear.from_linear(each) for each in (pruned(), pruned()))
    second.values.mul_(3)
    second.bias.add_(1)
    wanted = second(some(2, 72))
    first(some(2, 72))
    first.load_state_dict(second.state_dict(), assign=assign)
    assert torch.equal(first(some(2, 72)), wanted)
    second.values.zero_()
    assert torch.equal(first(some(2, 72)), wanted) is not assign


def test_a_layer_that_changed_its_type_or_memory_is_multiplied_by():
    linear = pruned()
    packed = SparseLinear.from_linear(linear)
    x, wanted = some(2, 72), linear(some(2, 72))
    packed(x)
    torch.testing.assert_close(packed.to(torch.float64)(x.double()).float(), wanted, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(packed.to(torch.bfloat16)(x), wanted, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(packed.to(torch.float32)(x), wanted, rtol=3e-2, atol=3e-2)
    before = packed(x)
    packed.share_memory()
    assert torch.equal(packed(x), before)
    packed.values.data = packed.values * 2
    torch.testing.assert_close(packed(x) - packed.bias, 2 * (before - packed.bias))
    packed.values = packed.values / 2
    torch.testing.assert_close(packed(x), before)
    packed.bias = None
    torch.testing.assert_close(packed(x), before - SparseLinear.from_linear(linear.bfloat16()).bias.float())


def test_a_state_may_come_from_a_machine_that_reads_bitmaps(monkeypatch):
    here, there = SparseLinear.from_linear(pruned(sparsity=0.5)), pruned(sparsity=0.5)
    there.weight.mul_(2)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(sparse_linear, "runs_tiles", lambda _: False)
        bitmap = SparseLinear.from_linear(there)
        assert "bits" in bitmap.state_dict()
    here.load_state_dict(bitmap.state_dict())
    assert torch.equal(here.weight, there.weight)
    torch.testing.assert_close(here(some(3, 72)), there(some(3, 72)), rtol=2e-5, atol=2e-5)
    assert set(here.state_dict()) == set(SparseLinear.from_linear(there).state_dict())
    here.values.zero_()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(sparse_linear, "runs_tiles", lambda _: False)
        bitmap.load_state_dict(SparseLinear.from_linear(pruned(sparsity=0.5)).state_dict())
    assert torch.equal(bitmap.weight, pruned(sparsity=0.5).weight)


def test_threads_of_python_share_no_arguments():
    linear = pruned(200, 300)
    packed, inputs = SparseLinear.from_linear(linear), [some(1 + each, 300) + each for each in range(8)]
    wanted = [packed(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(packed, inputs * 20), wanted * 20, strict=True):
            assert torch.equal(found, right)


def test_inputs_need_not_lie_in_one_piece():
    linear = pruned()
    packed = SparseLinear.from_linear(linear)
    for x in (some(72, 6).T, some(6, 144)[:, ::2], some(3, 2, 72).transpose(0, 1), some(1, 72).expand(5, 72)):
        torch.testing.assert_close(packed(x), linear(x), rtol=2e-5, atol=2e-5)


def test_another_default_type_changes_nothing():
    packed = SparseLinear.from_linear(pruned())
    before = torch.get_default_dtype()
    wanted = packed(some(2, 72))
    x = some(2, 72)
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(packed(x), wanted)
    finally:
        torch.set_default_dtype(before)


def test_what_torch_compiles_takes_the_ops(monkeypatch):
    linear = pruned()
    packed = SparseLinear.from_linear(linear)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(packed(some(2, 72)), linear(some(2, 72)), rtol=2e-5, atol=2e-5)
    assert packed._made is None


# Measuring


def test_a_measured_layer_takes_the_ways_that_were_fastest(monkeypatch):
    took = {"dense": 9.0, "csr": 3.0, "nonzeros": 2.0, "panels": 4.0}
    seconds = {1: took, 4: took, 16: took | {"csr": 1.0}, 64: took | {"panels": 1.0}}
    found = crossover.Crossover(seconds)
    assert found.format == "bitmap"
    assert [found.way(count) for count in (1, 3, 16, 17, 64, 65)] == ["nonzeros"] * 3 + ["panels"] * 3
    assert found.gain() == 4.5
    assert crossover.Crossover(seconds | {1: took | {"csr": 1.0}}).format == "csr"


def test_a_measured_layer_asks_for_the_way_that_was_fastest(monkeypatch):
    took = {"dense": 9.0, "csr": 3.0, "nonzeros": 2.0, "panels": 4.0}
    seconds = {1: took, 4: took, 16: took | {"csr": 1.0}, 64: took | {"panels": 1.0}}
    found, asked = crossover.Crossover(seconds), []
    real = cpu.bitmap_matmul
    monkeypatch.setattr(cpu, "bitmap_matmul", lambda *given: asked.append(given[-1]) or real(*given))
    monkeypatch.setattr(sparse_linear, "runs_tiles", lambda _: False)
    layer = SparseLinear(Bitmap.pack(pruned().weight), None, found)
    layer(some(2, 72)), layer(some(30, 72))
    assert asked == ["nonzeros", "panels"]


@pytest.mark.skipif(not runs_tiles(torch.zeros(1)), reason="the processor has no AVX-512")
def test_a_measured_layer_in_tiles_does_so_too(monkeypatch):
    took = {"dense": 9.0, "csr": 3.0, "tiles": 2.0, "panels": 1.0}
    found, asked = crossover.Crossover({1: took, 4: took | {"tiles": 0.5}, 16: took, 64: took}), []
    real = TileProduct.__call__
    monkeypatch.setattr(TileProduct, "__call__", lambda self, x, way: asked.append(way) or real(self, x, way))
    layer = SparseLinear(Bitmap.pack(pruned().weight), None, found)
    layer(some(1, 72)), layer(some(4, 72)), layer(some(2, 72).bfloat16())
    assert asked == ["panels", "tiles", "tiles"]


def test_measuring_tries_every_way_on_this_machine(monkeypatch):
    monkeypatch.setattr(crossover, "BUDGET", 0.0)
    crossover._measured.cache_clear()
    packed = SparseLinear.from_linear(pruned(), measure=True)
    assert packed.crossover is not None
    assert set(packed.crossover.seconds) == set(crossover.COUNTS)
    bitmap = cpu.WAYS if cpu.has_expand() else cpu.WAYS[1:]
    wanted = {"dense", "csr", *(tile_product.WAYS if runs_tiles(torch.zeros(1)) else bitmap)}
    assert all(set(each) == wanted and min(each.values()) > 0 for each in packed.crossover.seconds.values())
    assert crossover.measure_crossover(pruned().weight) is packed.crossover, "once for a shape"
    assert crossover.measure_crossover(pruned().weight.half()) is None


# 2:4


def test_two_of_four_is_a_bitmap_where_no_gpu_multiplies_by_it():
    weight = two_of_four(64, 64).weight
    assert semi_structured.why_not(weight) == "not on a GPU"
    if not torch.cuda.is_available():
        return
    on_gpu = weight.half().cuda()
    assert "multiples" in (semi_structured.why_not(on_gpu[:30]) or "")
    assert "neither" in (semi_structured.why_not(on_gpu.float()) or "")
    if semi_structured.why_not(on_gpu) is None:
        x = some(64, 64).half().cuda()
        torch.testing.assert_close(
            nn.functional.linear(x, semi_structured.accelerated(on_gpu)), x @ on_gpu.T, rtol=1e-2, atol=1e-2
        )


# Bad input


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="linear is a Conv1d"):
        SparseLinear.from_linear(nn.Conv1d(2, 2, 1))
    with pytest.raises(InputError, match="format 'coo' is unknown"):
        SparseLinear.from_linear(pruned(), "coo")
    with pytest.raises(InputError, match="packed is dense"):
        SparseLinear(Dense.pack(torch.ones(2, 2)))
    with pytest.raises(InputError, match="bias has shape"):
        SparseLinear(Bitmap.pack(torch.ones(2, 3)), torch.zeros(3))
    with pytest.raises(InputError, match="keeps to none of"):
        SparseLinear.from_linear(pruned(), "nm")
    packed = SparseLinear.from_linear(pruned())
    with pytest.raises(InputError, match="x has width 71"):
        packed(some(2, 71))
    with pytest.raises(InputError, match="x is on meta"):
        packed(torch.empty(2, 72, device="meta"))


def test_settings_of_a_format_are_given_on():
    packed = SparseLinear.from_linear(two_of_four(), "nm", settings={"keep": 4, "of": 8})
    assert packed.settings == {"keep": 4, "of": 8}
    found = packed.packed()
    assert isinstance(found, NOfM)
    assert found.of == 8
    assert SparseLinear.from_linear(pruned(), "block", settings={"height": 2, "width": 4}).settings["width"] == 4
