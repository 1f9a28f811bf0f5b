"""Bytes by formula, and the small network that costs no more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from apportion.errors import InputError
from apportion.ops.spmm.formats import Bitmap, Dense, NarrowCSR
from apportion.weights import Unstructured, add_masks, choose_masks, prunable
from apportion.weights.accounting import largest_width, memory
from apportion.weights.sparse_linear import smallest


@pytest.mark.parametrize("sparsity", [0.5, 0.97])
def test_bytes_are_those_of_the_packed_layers(sparsity):
    net = nn.Sequential(nn.Conv2d(3, 9, 3), nn.Flatten(), nn.Linear(9, 300), nn.Linear(300, 10, bias=False))
    layers = prunable(net)
    add_masks(net, choose_masks({each.name: each.matrix().detach().abs() for each in layers}, Unstructured(sparsity)))
    found = memory(net, layers)
    weights = [each.matrix().detach() for each in layers]
    beside = 4 * (9 + 300)
    for name, packed in (("dense", Dense), ("bitmap", Bitmap), ("csr", NarrowCSR)):
        assert getattr(found, name) == beside + sum(packed.pack(each).nbytes for each in weights)
    assert found.smallest == beside + sum(smallest(each).nbytes for each in weights)
    assert found.smallest <= min(found.dense, found.bitmap, found.csr)


def test_a_network_is_counted_with_all_it_has():
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    layers = prunable(net)
    full = memory(net, layers)
    assert (full.weights, full.kept, full.others) == (80, 80, 28)
    assert full.dense == full.smallest == 4 * 108
    add_masks(net, choose_masks({each.name: each.matrix().detach().abs() for each in layers}, Unstructured(0.75)))
    found = memory(net, layers, value_bytes=2)
    assert (found.kept, found.nonzeros) == (20, 48)
    assert found.dense == 2 * 108
    assert found.bitmap == 2 * 28 + (8 + 24) + (4 + 16)  # a byte a row, and 2 bytes a value
    assert found.csr == 2 * 28 + (12 * 4 + 9 * 4) + (8 * 4 + 5 * 4)
    assert found.smallest == found.bitmap


@given(st.integers(1, 100_000), st.integers(1, 50))
def test_the_small_network_is_the_largest_that_fits(budget, factor):
    def cost(width: int) -> int:
        return width * width + factor * width

    if cost(1) > budget:
        with pytest.raises(InputError, match="width 1 costs"):
            largest_width(cost, budget)
        return
    width = largest_width(cost, budget)
    assert cost(width) <= budget < cost(width + 1)
