"""A packed layer computes what the pruned layer does, and is that layer again when asked."""

import pytest
import torch
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.ops.spmm import cpu
from apportion.ops.spmm.formats import Bitmap, Dense, NOfM
from apportion.weights import crossover, semi_structured
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
    nonzeros = int(linear.weight.count_nonzero())
    assert packed.nbytes == Bitmap.formula((64, 256), nonzeros, 4) + 65 * 8
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
    assert packed.bits.dtype == torch.int64
    assert packed(some(2, 72).bfloat16()).dtype == torch.bfloat16


def test_it_can_be_saved_and_read_as_a_state():
    packed = SparseLinear.from_linear(pruned())
    other = SparseLinear.from_linear(pruned())
    other.values.zero_()
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other.weight, packed.weight)


# Measuring


def test_a_measured_layer_takes_the_ways_that_were_fastest(monkeypatch):
    took = {"dense": 9.0, "csr": 3.0, "nonzeros": 2.0, "panels": 4.0}
    seconds = {1: took, 4: took, 16: took | {"csr": 1.0}, 64: took | {"panels": 1.0}}
    found = crossover.Crossover(seconds)
    assert found.format == "bitmap"
    assert [found.way(count) for count in (1, 3, 16, 17, 64, 65)] == ["nonzeros"] * 3 + ["panels"] * 3
    assert found.gain() == 4.5
    assert crossover.Crossover(seconds | {1: took | {"csr": 1.0}}).format == "csr"
    asked = []
    real = cpu.bitmap_matmul
    monkeypatch.setattr(cpu, "bitmap_matmul", lambda *given: asked.append(given[-1]) or real(*given))
    layer = SparseLinear(Bitmap.pack(pruned().weight), None, found)
    layer(some(2, 72)), layer(some(30, 72))
    assert asked == ["nonzeros", "panels"]


def test_measuring_tries_every_way_on_this_machine(monkeypatch):
    monkeypatch.setattr(crossover, "BUDGET", 0.0)
    crossover._measured.cache_clear()
    packed = SparseLinear.from_linear(pruned(), measure=True)
    assert packed.crossover is not None
    assert set(packed.crossover.seconds) == set(crossover.COUNTS)
    wanted = {"dense", "csr", *(cpu.WAYS if cpu.has_expand() else cpu.WAYS[1:])}
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
