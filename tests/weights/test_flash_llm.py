"""The formulas say what the formats take, and the recommendation follows from them or from what was measured."""

import pytest
import torch

from apportion.errors import InputError
from apportion.ops.spmm.formats import Bitmap, NarrowCSR, TiledCSL
from apportion.weights.flash_llm import (
    byte_break_even,
    dense_intensity,
    lscd_intensity,
    recommend,
    tile_density_limit,
    weight_bytes,
)


def test_intensity_is_about_the_batch_and_sparsity_raises_it_by_its_inverse_density():
    assert dense_intensity(4096, 8) == pytest.approx(8, rel=0.01)
    assert lscd_intensity(4096, 8, 0.0) == dense_intensity(4096, 8)
    assert lscd_intensity(2**20, 1, 0.8) == pytest.approx(5, rel=1e-4)
    assert lscd_intensity(2**20, 1, 0.8, overhead=0.2) == pytest.approx(2.5, rel=1e-4), "coordinates halve the gain"


def test_bytes_are_those_of_the_packed_matrix():
    weight = torch.ones(256, 128, dtype=torch.bfloat16)
    weight.view(-1)[::2] = 0
    weight[:, ::4] = 0
    assert weight_bytes(256, 128, 0.5, 2, "bitmap") == Bitmap.pack(weight).nbytes
    assert weight_bytes(256, 128, 0.5, 2, "csr") == NarrowCSR.pack(weight).nbytes
    assert weight_bytes(256, 128, 0.5, 2, "tiled_csl") == TiledCSL.pack(weight).nbytes
    assert weight_bytes(256, 128, 0.5, 2, "dense") == weight.nbytes


def test_break_evens_of_the_sheet():
    assert byte_break_even(2, "tiled_csl") == 0.5
    assert byte_break_even(2, "bitmap") == 1 / 16
    assert byte_break_even(4, "csr") == pytest.approx(1 / 3)
    assert tile_density_limit() == 0.5
    big = (8192, 8192)
    dense = weight_bytes(*big, 0.5, 2, "dense")
    assert dense / weight_bytes(*big, 0.5, 2, "bitmap") == pytest.approx(1.78, abs=0.01)
    assert dense / weight_bytes(*big, 0.7, 2, "bitmap") == pytest.approx(2.76, abs=0.01)
    assert weight_bytes(*big, 0.93, 2, "bitmap") < weight_bytes(*big, 0.93, 2, "tiled_csl")
    assert weight_bytes(*big, 0.95, 2, "bitmap") > weight_bytes(*big, 0.95, 2, "tiled_csl")


def test_recommendations():
    found = recommend((4096, 4096), 0.8)
    assert found.format == "bitmap"
    assert 3 < found.speedup < 5
    assert recommend((4096, 4096), 0.99).format == "csr"
    assert recommend((4096, 4096), 0.0).format == "dense"
    assert "compute is the limit" in recommend((4096, 4096), 0.8, batch=64).reason
    assert recommend((4096, 4096), 0.8, batch=8).speedup < found.speedup
    slow = recommend((4096, 4096), 0.8, measured={"dense": 1.0, "expand": 2.0})
    assert (slow.format, slow.speedup) == ("dense", 1.0)
    assert recommend((4096, 4096), 0.8, measured={"dense": 3.0, "expand": 2.0, "csr": 1.0}).format == "csr"


def test_bad_input():
    with pytest.raises(InputError, match=r"sparsity=1\.5"):
        lscd_intensity(8, 1, 1.5)
    with pytest.raises(InputError, match="format 'coo'"):
        weight_bytes(8, 8, 0.5, 2, "coo")
    with pytest.raises(InputError, match="format 'dense'"):
        byte_break_even(2, "dense")
    with pytest.raises(InputError, match="at least 1 each"):
        recommend((0, 8), 0.5)
    with pytest.raises(InputError, match="seconds of dense"):
        recommend((8, 8), 0.5, measured={"csr": 1.0})
