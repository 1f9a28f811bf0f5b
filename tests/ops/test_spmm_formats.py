"""Every format gives back the matrix that it was given, in as many bytes as its formula says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apportion.errors import InputError
from apportion.ops.spmm.formats import FORMATS, Bitmap, Blocks, Dense, NarrowCSR, NOfM, Packed, TiledCSL
from apportion.ops.spmm.formats import tiled_csl as csl

SHAPES = [(1, 1), (3, 5), (8, 64), (17, 66), (64, 128), (2, 300)]
SIZE = {torch.float32: 4, torch.bfloat16: 2}


def masked(shape: tuple[int, int], sparsity: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=draw).clamp_min(-2)
    weight[weight == 0] = 1
    return (weight * (torch.rand(shape, generator=draw) >= sparsity)).to(dtype)


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    """Equal to the last bit, NaN included; minus zero counts as zero."""
    whole = torch.int32 if wanted.dtype == torch.float32 else torch.int16
    return found.dtype == wanted.dtype and torch.equal(found.view(whole), (wanted + 0.0).view(whole))


def packed(name: str, weight: Tensor) -> Packed:
    return {"nm": lambda: NOfM.pack(weight, 8, 8), "block": lambda: Blocks.pack(weight, 4, 8)}.get(
        name, lambda: FORMATS[name].pack(weight)
    )()


@pytest.mark.parametrize("dtype", SIZE, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_gives_back_what_it_was_given(name, shape, sparsity, dtype):
    weight = masked(shape, sparsity, dtype)
    found = packed(name, weight)
    assert found.shape == shape
    assert torch.equal(found.unpack(), weight)
    assert name == "dense" or same_bits(found.unpack(), weight)
    assert found.nbytes == sum(each.nbytes for each in found.tensors().values())
    restored = FORMATS[name].restore(shape, found.tensors(), found.settings())
    assert torch.equal(restored.unpack(), weight)


@pytest.mark.parametrize("dtype", SIZE, ids=str)
def test_bytes_are_those_of_the_formula(dtype):
    weight, size = masked((64, 200), 0.7, dtype), SIZE[dtype]
    count = int((weight != 0).sum())
    assert Dense.pack(weight).nbytes == Dense.formula((64, 200), count, size) == 64 * 200 * size
    assert Bitmap.pack(weight).nbytes == Bitmap.formula((64, 200), count, size) == 64 * 25 + count * size
    assert NarrowCSR.pack(weight).nbytes == NarrowCSR.formula((64, 200), count, size) == 65 * 4 + count * (size + 2)
    assert NOfM.pack(weight, 5, 5).nbytes == NOfM.formula((64, 200), 5, 5, size) == 64 * (200 * size + 75)
    blocks = Blocks.pack(weight, 32, 100)
    assert blocks.nbytes == Blocks.formula((64, 200), 4, 32, 100, size) == 12 + 4 * (3200 * size + 4)


@pytest.mark.parametrize("name", [each for each in FORMATS if each != "dense"])
def test_nan_infinities_and_denormals_are_values_and_minus_zero_is_none(name):
    weight = torch.zeros(8, 16)
    weight[0, :5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-45, -0.0])
    found = packed(name, weight)
    assert same_bits(found.unpack(), weight)
    if name in ("bitmap", "csr"):
        assert found.tensors()["values"].numel() == 4


@given(st.integers(1, 9), st.integers(1, 70), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_bitmap_is_what_a_plain_reader_finds(rows, columns, sparsity, seed):
    weight = masked((rows, columns), sparsity, seed=seed)
    stored = {name: each.numpy() for name, each in Bitmap.pack(weight).tensors().items()}
    mask = np.unpackbits(stored["bits"], axis=1, bitorder="little")[:, :columns].astype(bool)
    found = np.zeros((rows, columns), np.float32)
    found[mask] = stored["values"]
    assert np.array_equal(found, weight.numpy())


@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (1, 4), (4, 8), (2, 5), (1, 16), (3, 200)])
def test_n_of_m_holds_groups_with_fewer_values_too(pattern):
    keep, of = pattern
    weight = masked((6, 3 * of - 1), 0.3)
    groups = torch.nn.functional.pad(weight, (0, 1)).unflatten(1, (-1, of))
    kept = torch.zeros_like(groups).scatter_(-1, groups.abs().topk(keep).indices, 1) * groups
    kept[0, 0], kept[1, 1, 1:] = 0, 0
    weight = kept.flatten(1)[:, :-1]
    found = NOfM.pack(weight, keep, of)
    assert torch.equal(found.unpack(), weight)
    assert found.nbytes == NOfM.formula((6, 3 * of - 1), keep, of, 4)


def test_n_of_m_finds_its_pattern():
    weight = torch.zeros(4, 32)
    weight[:, ::8] = 1
    assert NOfM.pattern(weight) == (1, 8)
    weight[:, 1::4] = 2
    assert NOfM.pattern(weight) == (2, 4)
    assert NOfM.pattern(torch.ones(4, 32)) is None
    assert NOfM.pattern(torch.ones(0, 32)) is None


def test_which_format_is_smallest_where():
    shape, size = (512, 1024), 2
    numel = 512 * 1024

    def smallest(nonzeros: int) -> str:
        return min(("dense", "bitmap", "csr"), key=lambda each: FORMATS[each].formula(shape, nonzeros, size))

    assert smallest(numel) == "dense"
    assert smallest(int(numel * 0.93)) == "bitmap"
    assert smallest(int(numel / 15)) == "bitmap"
    assert smallest(int(numel / 18)) == "csr"
    assert NOfM.formula(shape, 2, 4, size) == Bitmap.formula(shape, numel // 2, size)
    assert NOfM.formula(shape, 1, 4, size) < Bitmap.formula(shape, numel // 4, size)
    assert NOfM.formula(shape, 4, 8, size) > Bitmap.formula(shape, numel // 2, size)


# Tiled-CSL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "sparsity"), [((128, 64), 0.6), ((130, 70), 0.8), ((256, 64), 1.0), ((1, 1), 0.0)])
def test_tiled_csl_gives_back_what_it_was_given(shape, sparsity, dtype):
    weight = masked(shape, sparsity, dtype)
    found = TiledCSL.pack(weight)
    tiles = -(-shape[0] // 128) * -(-shape[1] // 64)
    assert same_bits(found.unpack(), weight)
    assert len(found.offsets) == tiles + 2
    assert bool((found.offsets.diff() >= 0).all())
    assert int(found.offsets[-1]) == int(found.offsets[-2]) == found.words.numel() // 4
    assert found.nbytes == TiledCSL.formula(shape, found.words.numel()) == 4 * found.words.numel() + 4 * (tiles + 2)


def test_the_swizzle_is_its_own_inverse_and_locations_fit_16_bits():
    row, column = np.divmod(np.arange(128 * 64), 64)
    places = csl.location(row, column)
    assert sorted(places) == list(range(8192))
    assert np.array_equal(csl.location(row, places % 64) % 64, column)
    assert all(np.array_equal(*each) for each in zip(csl.row_and_column(places), (row, column), strict=True))


def test_tiled_csl_deals_words_out_to_different_banks():
    weight = masked((128, 64), 0.8, torch.bfloat16)
    words = TiledCSL.pack(weight).words.numpy().view(np.uint32)
    values = words & 0xFFFF
    filling = words[values == 0] >> 16
    row, column = csl.row_and_column(filling)
    assert not weight[row, column].any(), "what fills a tile up points at zeros"
    assert sorted(values[values != 0]) == sorted(weight[weight != 0].view(torch.int16).numpy().view(np.uint16))

    def worst(places: np.ndarray) -> list[int]:
        turns = [places[chunk : chunk + 128].reshape(-1, 4).T for chunk in range(0, len(places), 128)]
        return [int(np.bincount(csl.bank_of(turn)).max()) for chunk in turns for turn in chunk]

    dealt, sorted_words = worst(words >> 16), worst(np.sort(words >> 16))
    assert np.mean(dealt) < 1.5 < np.mean(sorted_words)
    assert dealt[0] == 1


def test_a_tile_that_is_too_full_is_refused_even_if_the_matrix_is_sparse():
    weight = torch.zeros(128, 256, dtype=torch.bfloat16)
    weight[:, 64:96] = 1
    assert torch.equal(TiledCSL.pack(weight).unpack(), weight)
    weight[0, 96] = 1
    with pytest.raises(InputError, match=r"row 0, column 64 has 4097 values"):
        TiledCSL.pack(weight)


# Bad input


@pytest.mark.parametrize("name", FORMATS)
def test_only_matrices_of_numbers_are_packed(name):
    with pytest.raises(InputError, match="only matrices"):
        packed(name, torch.zeros(3, 4, 5))
    with pytest.raises(InputError, match="only floating-point"):
        packed(name, torch.zeros(3, 4, dtype=torch.int64))


def test_what_cannot_be_packed_says_why():
    with pytest.raises(InputError, match="a group of 4 with 3 values: 2:4 allows 2"):
        NOfM.pack(torch.tensor([[1.0, 1, 1, 0]]), 2, 4)
    with pytest.raises(InputError, match="keep=5, of=4"):
        NOfM.pack(torch.zeros(2, 4), 5, 4)
    with pytest.raises(InputError, match="keeps to none of"):
        NOfM.pack(torch.ones(2, 16))
    with pytest.raises(InputError, match="at least one place"):
        Blocks.pack(torch.zeros(2, 4), 0, 4)
    with pytest.raises(InputError, match="Tiled-CSL holds float16 or bfloat16"):
        TiledCSL.pack(torch.zeros(2, 4))


def _changed(found: Packed, name: str, new: Tensor) -> dict[str, Tensor]:
    return found.tensors() | {name: new}


def test_a_damaged_file_is_refused():
    weight = masked((6, 20), 0.5)
    bitmap, csr, block, nm = (packed(each, weight) for each in ("bitmap", "csr", "block", "nm"))
    one_less = {"bitmap": bitmap, "csr": csr}
    for name, found in one_less.items():
        with pytest.raises(InputError, match="damaged"):
            FORMATS[name].restore((6, 20), _changed(found, "values", found.tensors()["values"][:-1]), {})
        with pytest.raises(InputError, match="lacks 'values'"):
            FORMATS[name].restore((6, 20), {k: v for k, v in found.tensors().items() if k != "values"}, {})
    bits = bitmap.tensors()["bits"].clone()
    bits[0, -1] |= 128
    with pytest.raises(InputError, match="beyond its last column"):
        Bitmap.restore((6, 20), _changed(bitmap, "bits", bits), {})
    with pytest.raises(InputError, match="'bits'"):
        Bitmap.restore((6, 40), bitmap.tensors(), {})
    far = csr.tensors()["columns"].int().add(20).to(torch.uint16)
    with pytest.raises(InputError, match=r"outside of 0\.\.19"):
        NarrowCSR.restore((6, 20), _changed(csr, "columns", far), {})
    backwards = csr.tensors()["starts"].clone()
    backwards[1] = backwards[-1] + 1
    with pytest.raises(InputError, match="do not lead"):
        NarrowCSR.restore((6, 20), _changed(csr, "starts", backwards), {})
    with pytest.raises(InputError, match="height and width"):
        Blocks.restore((6, 20), block.tensors(), {})
    with pytest.raises(InputError, match="outside of the matrix"):
        Blocks.restore((6, 20), _changed(block, "columns", block.tensors()["columns"] + 9), block.settings())
    with pytest.raises(InputError, match="keep and of"):
        NOfM.restore((6, 20), nm.tensors(), {})
    odd = NOfM.pack(torch.zeros(1, 5), 1, 5)
    with pytest.raises(InputError, match="outside of its group"):
        NOfM.restore((1, 5), _changed(odd, "places", torch.tensor([[7]], dtype=torch.uint8)), odd.settings())
