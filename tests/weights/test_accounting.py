"""Bytes by formula, and the small network that costs no more."""

import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from apportion.errors import InputError
from apportion.weights import Unstructured, add_masks, choose_masks, prunable
from apportion.weights.accounting import bitmask_bytes, csr_bytes, largest_width, memory, n_of_m_bytes


def test_formulas_by_hand():
    assert bitmask_bytes(1000, 100) == 125 + 400
    assert bitmask_bytes(1001, 100, 2) == 126 + 200
    assert csr_bytes(10, 100, 50) == 50 * 5 + 11
    assert csr_bytes(10, 300, 1000) == 1000 * 6 + 11 * 2
    assert csr_bytes(10, 256, 255) == 255 * 5 + 11
    assert csr_bytes(10, 257, 256) == 256 * 6 + 22
    assert csr_bytes(10, 100, 50, index_bytes=8, row_bytes=8) == 50 * 12 + 88
    assert n_of_m_bytes(64, 2, 4, 2) == 32 * 2 + 8  # 2 bits for each value that stays
    assert n_of_m_bytes(64, 1, 1) == 256


def test_scipy_stores_csr_in_as_many_bytes():
    matrix = (torch.rand(12, 20, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    stored = scipy.sparse.csr_array(matrix.numpy())
    size = stored.data.nbytes + stored.indices.nbytes + stored.indptr.nbytes
    assert size == csr_bytes(12, 20, int(matrix.sum()), index_bytes=4, row_bytes=4)


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
    assert found.bitmask == 2 * 28 + (6 + 24) + (4 + 16)
    assert found.csr == 2 * 28 + (12 * 3 + 9) + (8 * 3 + 5)
    assert found.smallest == found.bitmask


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
