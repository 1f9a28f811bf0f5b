"""Triton's selection is exact, with the reference's order of ties; without a GPU, under Triton's interpreter."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (`pip install 'apportion[gpu]'`) to run the CUDA kernels")

from apportion.ops import select_above, select_columns, select_rows, select_total
from apportion.ops.select import cuda, reference

Places = tuple[Tensor, Tensor]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (1, 37), (19, 1), (4, 16), (5, 33)]
F32 = torch.float32


@pytest.fixture(autouse=True, params=[16], ids="{} scores a block".format)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Small blocks, few programs and short chunks, so that small matrices have several, and ends within them."""
    monkeypatch.setattr(cuda, "_BLOCK", request.param)
    monkeypatch.setattr(cuda, "_COUNTERS", 3)
    monkeypatch.setattr(cuda, "_CHUNK", 24)
    monkeypatch.setattr(cuda, "_TRANSPOSED", 60)
    return request.param


def some_scores(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    """One in two is a multiple of a half, so that there are ties, also of zero with minus zero."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    coarse = torch.rand(rows, columns, generator=generator) < 0.5
    return torch.where(coarse, scores.mul(2).round().div(2), scores).to(dtype).to(DEVICE)


def same(ours: Places, theirs: Places) -> None:
    assert all(one.dtype == two.dtype and one.equal(two) for one, two in zip(ours, theirs, strict=True))


def all_equal_their_references(scores: Tensor) -> None:
    rows, columns = scores.shape
    count = max(1, columns // 3)
    same(cuda.select_rows(scores, count), reference.select_rows(scores, count))
    count = max(1, scores.numel() // 3)
    same(cuda.select_total(scores, count), reference.select_total(scores, count))
    quotas = torch.arange(columns, device=DEVICE).flip(0) % (rows + 1)
    same(cuda.select_columns(scores, quotas), reference.select_columns(scores, quotas))
    limits = scores[rows // 2].clone()
    limits[1::7], limits[3::7] = torch.inf, -torch.inf
    same(cuda.select_above(scores, limits), reference.select_above(scores, limits))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_kernels_equal_their_references_on_every_shape(rows: int, columns: int) -> None:
    all_equal_their_references(some_scores(rows, columns))


@pytest.mark.parametrize(
    ("dtype", "seed"), [(F32, 1), (F32, 2), (F32, 3), (torch.float64, 1), (torch.bfloat16, 2), (torch.float16, 3)]
)
def test_the_kernels_equal_their_references_in_every_type(dtype: torch.dtype, seed: int) -> None:
    all_equal_their_references(some_scores(3, 21, seed, dtype))


@pytest.mark.parametrize("share", ["none", "one", "all but one", "all"])
def test_however_many_win_it_is_exactly_those(share: str) -> None:
    scores = some_scores(2, 19)

    def of(most: int) -> int:
        return {"none": 0, "one": 1, "all but one": most - 1, "all": most}[share]

    same(cuda.select_rows(scores, of(19)), reference.select_rows(scores, of(19)))
    same(cuda.select_total(scores, of(38)), reference.select_total(scores, of(38)))
    quotas = torch.full((19,), of(2), device=DEVICE)
    same(cuda.select_columns(scores, quotas), reference.select_columns(scores, quotas))
    limits = scores.flatten().sort().values[[-1, -2, 0, 0]][["none", "one", "all but one", "all"].index(share)]
    limits = (limits if share != "all" else limits - 1).expand(19)
    same(cuda.select_above(scores, limits), reference.select_above(scores, limits))


@pytest.mark.parametrize("count", [0, 1, 11, 49, 50])
def test_the_best_of_a_long_list_are_listed_in_order(count: int) -> None:
    scores = some_scores(1, 50)
    assert cuda.best_of_list(scores[0], count).equal(reference.select_rows(scores, count)[1])


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_all_ties_go_to_the_entries_that_come_first(value: float) -> None:
    scores = torch.full((3, 19), value, device=DEVICE)
    same(cuda.select_rows(scores, 17), reference.select_rows(scores, 17))
    same(cuda.select_total(scores, 40), reference.select_total(scores, 40))
    same(cuda.select_above(scores, scores[0]), reference.select_above(scores, scores[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_that_differ_in_the_last_bit_or_by_everything_are_told_apart(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    scores = torch.tensor([[1.0, 1.0 + info.eps, -1.0, -1.0 - info.eps, info.max, info.min, info.tiny, -info.tiny]])
    scores = torch.cat([scores, scores.flip(1)]).to(dtype).to(DEVICE)
    scores[:, 1::2] = scores[:, 1::2].nextafter(torch.zeros((), dtype=dtype, device=DEVICE))
    for count in (1, 3, 6):
        same(cuda.select_rows(scores, count), reference.select_rows(scores, count))
    for count in (2, 5, 11):
        same(cuda.select_total(scores, count), reference.select_total(scores, count))


@pytest.mark.parametrize(
    "scores",
    [some_scores(19, 3).T, some_scores(6, 57)[::2, ::3], some_scores(1, 19).expand(3, 19)],
    ids=["transposed", "strided", "expanded"],
)
def test_strided_scores_are_read_as_they_are(scores: Tensor) -> None:
    assert not scores.is_contiguous()
    all_equal_their_references(scores)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (4, 0), (0, 0)])
def test_nothing_to_choose_from(rows: int, columns: int) -> None:
    scores = some_scores(rows, columns)
    quotas = torch.zeros(columns, dtype=torch.int64, device=DEVICE)
    same(cuda.select_rows(scores, 0), reference.select_rows(scores, 0))
    same(cuda.select_rows(scores, columns), reference.select_rows(scores, columns))
    same(cuda.select_total(scores, 0), reference.select_total(scores, 0))
    same(cuda.select_columns(scores, quotas), reference.select_columns(scores, quotas))
    same(
        cuda.select_above(scores, some_scores(1, columns)[0]), reference.select_above(scores, scores.new_empty(columns))
    )


@pytest.mark.parametrize("block", [2048], indirect=True)
def test_the_blocks_of_real_use_give_the_same(block: int) -> None:
    scores = some_scores(2, block + 52)
    same(cuda.select_rows(scores, 70), reference.select_rows(scores, 70))
    same(cuda.select_total(scores, 70), reference.select_total(scores, 70))
    same(cuda.select_above(scores, scores[1]), reference.select_above(scores, scores[1]))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("block", [2048], indirect=True)
def test_the_ops_use_the_kernels_on_cuda_tensors(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    scores = some_scores(500, 3001)
    quotas = torch.full((3001,), 5, device=DEVICE)
    limits = torch.full((3001,), 2.0, device=DEVICE)
    same(select_rows(scores, 32), reference.select_rows(scores, 32))
    same(select_total(scores, 9000), reference.select_total(scores, 9000))
    same(select_columns(scores, quotas), reference.select_columns(scores, quotas))
    same(select_above(scores, limits), reference.select_above(scores, limits))
    torch.library.opcheck(select_rows, (scores, 32))
    torch.library.opcheck(select_total, (scores, 9000))
