"""Triton's kernels of the key ops equal their definitions; without a GPU, under Triton's interpreter."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton (`pip install 'apportion[gpu]'`) to run the CUDA kernels")

from apportion.ops import attend_selected, label_scores, low_rank_keys, pack_labels, packed_label_scores
from apportion.ops.attend import cuda as attend_cuda
from apportion.ops.attend import reference as attend_reference
from apportion.ops.label_scores import BITS
from apportion.ops.label_scores import cuda as label_cuda
from apportion.ops.label_scores import reference as label_reference
from apportion.ops.low_rank_keys import cuda as low_rank_cuda
from apportion.ops.low_rank_keys import reference as low_rank_reference


def _cases_of(name: str) -> Any:
    """The shapes and cases that the CPU's kernels are tested with."""
    spec = importlib.util.spec_from_file_location(f"{name}_cases", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


attend_cases, label_cases, low_rank_cases = map(_cases_of, ("test_attend", "test_label_scores", "test_low_rank_keys"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small cases have several blocks, and ends within them."""
    monkeypatch.setattr(attend_cuda, "_PART", 8)
    monkeypatch.setattr(attend_cuda, "_ENTRIES", 4)
    monkeypatch.setattr(label_cuda, "_TOKENS", 16)
    monkeypatch.setattr(low_rank_cuda, "_TOKENS", 16)
    monkeypatch.setattr(low_rank_cuda, "_RANK", 16)
    monkeypatch.setattr(low_rank_cuda, "_WIDTH", 16)


def moved(case: Any) -> list[Any]:
    return [each if each is None else each.to(DEVICE) for each in case]


@pytest.mark.parametrize(("dtype", "seed", "softcap"), [(DTYPES[0], 0, None), (DTYPES[1], 1, 1.5), (DTYPES[2], 2, 1.5)])
@pytest.mark.parametrize("name", attend_cases.SHAPES)
def test_attention_over_lists(name: str, dtype: torch.dtype, seed: int, softcap: float | None) -> None:
    case = attend_cases.make_case(attend_cases.SHAPES[name], seed).to(dtype)
    exact = attend_reference.attend_selected(*case.to(torch.float64), 0.3, softcap)
    found = attend_cuda.attend_selected(*moved(case), 0.3, softcap)
    assert found.dtype == dtype
    tolerance = attend_cases.TOLERANCE[dtype]
    torch.testing.assert_close(found.double().cpu(), exact, rtol=tolerance, atol=4 * tolerance)


def test_attention_reads_views_as_they_lie() -> None:
    case = attend_cases.make_case(attend_cases.Shape(tokens=12, width=8, value_width=8)).to(torch.float32)
    room = torch.full((2, 2, 20, 8), torch.nan)
    room[:, :, :12] = case.keys
    within = case.values.transpose(1, 2).contiguous().transpose(1, 2)
    exact = attend_reference.attend_selected(*case.to(torch.float64), 0.3, None)
    view = room.to(DEVICE)[:, :, :12]
    found = attend_cuda.attend_selected(*moved([case.queries, view, within, case.indices, case.kept]), 0.3, None)
    torch.testing.assert_close(found.double().cpu(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", label_cases.LAYOUTS)
@pytest.mark.parametrize("name", label_cases.SHAPES)
def test_label_scores(name: str, layout: str) -> None:
    place = label_cases.LAYOUTS[layout]
    for seed, dtype in enumerate(DTYPES):
        queries, labels = label_cases.make_case(label_cases.SHAPES[name], seed, dtype)
        exact = label_reference.label_scores(queries.double(), labels.double())
        found = label_cuda.label_scores(*moved([queries, place(labels)]))
        torch.testing.assert_close(found.double().cpu(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["token by token", "planar room"])
@pytest.mark.parametrize("name", label_cases.SHAPES)
def test_packed_label_scores(name: str, layout: str) -> None:
    place = label_cases.LAYOUTS[layout]
    for bits in BITS:
        queries, labels = label_cases.make_case(label_cases.SHAPES[name], bits)
        codes, ranges = pack_labels(labels, bits)
        exact = label_reference.packed_label_scores(queries.double(), codes, ranges.double(), bits)
        found = label_cuda.packed_label_scores(*moved([queries, place(codes), place(ranges)]), bits)
        torch.testing.assert_close(found.double().cpu(), exact, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("dtype", "seed"), [(DTYPES[0], 0), (DTYPES[1], 1), (DTYPES[2], 2)])
@pytest.mark.parametrize("name", low_rank_cases.SHAPES)
def test_low_rank_keys(name: str, dtype: torch.dtype, seed: int) -> None:
    case = low_rank_cases.make_case(low_rank_cases.SHAPES[name], seed).to(dtype)
    exact = low_rank_reference.low_rank_keys(*case.to(torch.float64))
    found = low_rank_cuda.low_rank_keys(*moved(case))
    assert found.dtype == dtype
    tolerance = low_rank_cases.TOLERANCE[dtype]
    torch.testing.assert_close(found.double().cpu(), exact, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_ops_use_the_kernels_on_cuda_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    attended = attend_cases.make_case(attend_cases.Shape(tokens=3000, chosen=1200, width=64)).to(torch.float32)
    exact = attend_reference.attend_selected(*attended.to(torch.float64), 0.3, None)
    torch.testing.assert_close(attend_selected(*moved(attended), 0.3).double().cpu(), exact, rtol=1e-4, atol=1e-4)
    torch.library.opcheck(torch.ops.apportion.attend_selected.default, (*moved(attended), 0.3))
    queries, labels = moved(label_cases.make_case(label_cases.Shape(tokens=3000)))
    torch.testing.assert_close(label_scores(queries, labels), label_reference.label_scores(queries, labels))
    codes, ranges = pack_labels(labels, 4)
    found = packed_label_scores(queries, codes, ranges, 4)
    torch.testing.assert_close(found, label_reference.packed_label_scores(queries, codes, ranges, 4))
    case = moved(low_rank_cases.make_case(low_rank_cases.Shape(tokens=900, kept=300, rank=40)).to(torch.float32))
    torch.testing.assert_close(low_rank_keys(*case), low_rank_reference.low_rank_keys(*case), rtol=1e-4, atol=1e-4)
