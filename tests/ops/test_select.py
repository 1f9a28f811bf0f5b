"""Selection is exact, in one order of ties, whatever the data look like; the kernels equal sorting everything."""

from collections.abc import Callable

import hypothesis
import hypothesis.extra.numpy as hypothesis_numpy
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor

from apportion.ops import select_above, select_columns, select_rows, select_total
from apportion.ops.select import cpu, reference

Places = tuple[Tensor, Tensor]

# The first call of a kernel may compile it, so there is no deadline.
SETTINGS = hypothesis.settings(deadline=None, max_examples=100)

# Few distinct values, so that most draws are full of ties; minus zero ties with zero.
TIED = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0])
ANY = st.floats(-(2.0**100), 2.0**100, width=32)


@st.composite
def score_matrices(draw: st.DrawFn, min_rows: int = 0) -> Tensor:
    rows, columns = draw(st.integers(min_rows, 9)), draw(st.integers(1, 9))
    scores = draw(hypothesis_numpy.arrays(np.float32, (rows, columns), elements=draw(st.sampled_from([TIED, ANY]))))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    return torch.from_numpy(scores).clamp(-6e4, 6e4).to(dtype)


def random_scores(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def winners(places: Places) -> list[tuple[int, int]]:
    """(row, column) of every winner in the order given."""
    crow, col = places
    assert crow.dtype == col.dtype == torch.int64
    assert crow[0] == 0
    assert crow[-1] == col.numel()
    return list(zip(torch.repeat_interleave(crow.diff()).tolist(), col.tolist(), strict=True))


def best(candidates: list[tuple[int, int]], scores: Tensor, count: int) -> list[tuple[int, int]]:
    """The first ``count`` by falling score; Python's stable sort leaves equals in the order given."""
    return sorted(candidates, key=lambda place: -float(scores[place]))[:count]


def everything(scores: Tensor) -> list[tuple[int, int]]:
    return [(row, column) for row in range(scores.shape[0]) for column in range(scores.shape[1])]


def same(ours: Places, theirs: Places) -> None:
    assert all(one.dtype == two.dtype and one.equal(two) for one, two in zip(ours, theirs, strict=True))


@SETTINGS
@hypothesis.given(scores=score_matrices(), data=st.data())
def test_select_rows_is_the_best_of_each_row(scores: Tensor, data: st.DataObject) -> None:
    rows, columns = scores.shape
    count = data.draw(st.integers(0, columns))
    wanted = [place for row in range(rows) for place in best([(row, c) for c in range(columns)], scores, count)]
    for function in (reference.select_rows, select_rows):
        assert winners(function(scores, count)) == sorted(wanted)


@SETTINGS
@hypothesis.given(scores=score_matrices(), data=st.data())
def test_select_columns_is_the_best_of_each_column(scores: Tensor, data: st.DataObject) -> None:
    rows, columns = scores.shape
    quotas = data.draw(st.lists(st.integers(0, rows), min_size=columns, max_size=columns))
    wanted = [place for c, quota in enumerate(quotas) for place in best([(r, c) for r in range(rows)], scores, quota)]
    for function in (reference.select_columns, select_columns):
        assert winners(function(scores, torch.tensor(quotas, dtype=torch.int64))) == sorted(wanted)


# The tiny samples make the cut's estimate bad, as it is on large data that are not exchangeable.
@pytest.mark.parametrize("sample", [1, 8, 65_536])
@hypothesis.settings(SETTINGS, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(scores=score_matrices(), data=st.data())
def test_select_total_is_the_best_of_all(
    sample: int, monkeypatch: pytest.MonkeyPatch, scores: Tensor, data: st.DataObject
) -> None:
    monkeypatch.setattr(cpu, "_SAMPLE", sample)
    count = data.draw(st.integers(0, scores.numel()))
    wanted = best(everything(scores), scores, count)
    for function in (reference.select_total, select_total):
        assert winners(function(scores, count)) == sorted(wanted)


@SETTINGS
@hypothesis.given(scores=score_matrices(), data=st.data())
def test_select_above_is_everything_strictly_above(scores: Tensor, data: st.DataObject) -> None:
    columns = scores.shape[1]
    limit = st.one_of(TIED, st.sampled_from([torch.inf, -torch.inf]))
    limits = torch.tensor(data.draw(st.lists(limit, min_size=columns, max_size=columns)), dtype=scores.dtype)
    wanted = [(row, column) for row, column in everything(scores) if scores[row, column] > limits[column]]
    for function in (reference.select_above, select_above):
        assert winners(function(scores, limits)) == wanted


SHAPES = [(0, 5), (1, 1), (1, 200), (200, 1), (37, 129), (64, 64), (5, 1000), (130, 67)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_kernels_equal_the_references(rows: int, columns: int, dtype: torch.dtype) -> None:
    scores = random_scores(rows, columns, dtype=dtype)
    for count in {0, 1, columns // 3, columns - 1, columns}:
        same(select_rows(scores, count), reference.select_rows(scores, count))
    for count in {0, min(1, scores.numel()), scores.numel() // 50, max(0, scores.numel() - 1), scores.numel()}:
        same(select_total(scores, count), reference.select_total(scores, count))
    quotas = torch.randint(0, rows + 1, (columns,), generator=torch.Generator().manual_seed(1))
    for each in (quotas, torch.zeros_like(quotas), torch.full_like(quotas, rows), quotas.clamp(max=1)):
        same(select_columns(scores, each), reference.select_columns(scores, each))
    limits = random_scores(1, columns, seed=2, dtype=dtype)[0]
    limits[::7], limits[3::7] = torch.inf, -torch.inf
    same(select_above(scores, limits), reference.select_above(scores, limits))


@pytest.mark.parametrize("value", [0.0, -3.0, 7.0])
def test_all_ties_go_to_the_entries_that_come_first(value: float) -> None:
    scores = torch.full((4, 5), value)
    assert winners(select_rows(scores, 2)) == [(row, column) for row in range(4) for column in (0, 1)]
    assert winners(select_columns(scores, torch.tensor([1, 0, 2, 0, 4]))) == [
        *[(0, 0), (0, 2), (0, 4), (1, 2), (1, 4)],
        *[(2, 4), (3, 4)],
    ]
    assert winners(select_total(scores, 7)) == everything(scores)[:7]
    assert winners(select_above(scores, torch.full((5,), value))) == []


def test_minus_zero_ties_with_zero() -> None:
    scores = torch.tensor([[-0.0, 0.0], [0.0, -0.0]])
    assert winners(select_rows(scores, 1)) == [(0, 0), (1, 0)]
    assert winners(select_columns(scores, torch.tensor([1, 1]))) == [(0, 0), (0, 1)]
    assert winners(select_total(scores, 3)) == [(0, 0), (0, 1), (1, 0)]
    assert winners(select_above(scores, torch.tensor([-0.0, 0.0]))) == []


@pytest.mark.parametrize("values", [(3.0, 1.0), (1.0, 3.0)])
def test_sorted_rows_and_columns_are_no_special_case(values: tuple[float, float]) -> None:
    ramp = torch.linspace(*values, 60 * 70).view(60, 70)
    for scores in (ramp, ramp.T):
        quotas = torch.full((scores.shape[1],), 9)
        same(select_rows(scores, 9), reference.select_rows(scores, 9))
        same(select_columns(scores, quotas), reference.select_columns(scores, quotas))
        same(select_total(scores, 500), reference.select_total(scores, 500))


def one_row_owns_everything() -> tuple[Tensor, int]:
    scores = random_scores(300, 700)
    scores[123] += 100
    return scores, 700


def aligned_with_the_sample() -> tuple[Tensor, int]:
    # Every sampled score is high, everything between is low: the sample promises three times what is there.
    scores = random_scores(300, 700)
    scores.view(-1)[::3] += 100
    return scores, 100_000


def against_the_sample() -> tuple[Tensor, int]:
    scores = random_scores(300, 700)
    scores.view(-1)[::3] -= 100
    return scores, 100_000


def constant() -> tuple[Tensor, int]:
    return torch.full((300, 700), 0.25), 12_345


def two_values() -> tuple[Tensor, int]:
    return (random_scores(300, 700) > 2).float(), 12_345


def a_few_outliers_the_sample_misses() -> tuple[Tensor, int]:
    scores = torch.zeros(300, 700)
    scores.view(-1)[1::3][:40] = torch.arange(40.0)
    return scores, 30


CRAFTED = [
    one_row_owns_everything,
    aligned_with_the_sample,
    against_the_sample,
    constant,
    two_values,
    a_few_outliers_the_sample_misses,
]


@pytest.mark.parametrize("make", CRAFTED)
def test_select_total_survives_data_that_fool_its_sample(make: Callable[[], tuple[Tensor, int]]) -> None:
    scores, count = make()
    assert scores.numel() // cpu._SAMPLE == 3, "the sample must leave something out for this test to mean anything"
    same(select_total(scores, count), reference.select_total(scores, count))


def test_one_of_the_crafted_cases_does_fool_every_estimate() -> None:
    scores, count = aligned_with_the_sample()
    *estimates, last = cpu._cuts(scores.numpy(), count)
    assert len(estimates) == 2
    assert all(int((scores >= float(cut)).sum()) < count for cut in estimates)
    assert last == -np.inf


@pytest.mark.parametrize(("rows", "columns"), [(600, 512), (600, 700), (256, 2304), (1024, 768)])
def test_the_sample_visits_every_column(rows: int, columns: int) -> None:
    stride = cpu._sample_stride(rows, columns)
    assert stride > 1
    assert {place % columns for place in range(0, rows * columns, stride)} == set(range(columns))


def test_strided_scores_give_the_same_winners() -> None:
    scores = random_scores(40, 90)
    for view in (scores.T, scores[:, ::3], scores[::2, 1:], scores[:1].expand(8, 90)):
        assert not view.is_contiguous()
        quotas = torch.full((2 * view.shape[1],), 3)[::2]
        limits = random_scores(1, 2 * view.shape[1], seed=3)[0, ::2]
        plain = view.clone(memory_format=torch.contiguous_format)
        same(select_rows(view, 5), reference.select_rows(plain, 5))
        same(select_columns(view, quotas), reference.select_columns(plain, quotas))
        same(select_total(view, 17), reference.select_total(plain, 17))
        same(select_above(view, limits), reference.select_above(plain, limits))


def test_scores_that_carry_gradients_are_selected_without_them() -> None:
    scores = random_scores(6, 7).requires_grad_()
    for crow, col in (
        select_rows(scores, 2),
        select_columns(scores, torch.full((7,), 2)),
        select_total(scores, 5),
        select_above(scores, torch.zeros(7)),
    ):
        assert not crow.requires_grad
        assert not col.requires_grad


def test_more_threads_change_nothing() -> None:
    scores = random_scores(200, 300)
    quotas, limits = torch.full((300,), 4), torch.full((300,), 1.5)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(
                [
                    *select_rows(scores, 7),
                    *select_columns(scores, quotas),
                    *select_total(scores, 999),
                    *select_above(scores, limits),
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert all(one.equal(two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("rows", [0, 5])
def test_the_ops_keep_torch_librarys_contract(rows: int) -> None:
    scores = random_scores(rows, 8)
    torch.library.opcheck(select_rows, (scores, 2))
    torch.library.opcheck(select_columns, (scores, torch.full((8,), min(rows, 3))))
    torch.library.opcheck(select_total, (scores, min(rows, 4)))
    torch.library.opcheck(select_above, (scores, torch.zeros(8)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_function_selects_the_same(dynamic: bool) -> None:
    scores = random_scores(20, 30)

    def kept(scores: Tensor) -> Tensor:
        _, first = select_rows(scores, 3)
        _, second = select_columns(scores, torch.ones(scores.shape[1], dtype=torch.int64))
        _, third = select_total(scores, 11)
        _, fourth = select_above(scores * 2, scores[0])
        return torch.cat([first, second, third, fourth])

    compiled = torch.compile(kept, backend="aot_eager", dynamic=dynamic)
    assert compiled(scores).equal(kept(scores))
    assert compiled(scores[:9]).equal(kept(scores[:9]))


@pytest.fixture
def by_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are chosen by a cut from a sample of a few scores, however few win."""
    monkeypatch.setattr(cpu, "_LARGE_HEAP", 0)
    monkeypatch.setattr(cpu, "_ROW_SAMPLE", 40)


@pytest.mark.usefixtures("by_cut")
@hypothesis.settings(SETTINGS, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(score_matrices(min_rows=1), st.data())
def test_a_cut_finds_the_winners_of_every_small_matrix(scores: Tensor, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, scores.shape[1]))
    same(cpu.select_rows(scores, count), reference.select_rows(scores, count))


@pytest.mark.usefixtures("by_cut")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["normal", "coarse", "constant", "sorted", "outliers", "periodic", "infinite"])
def test_a_cut_finds_the_winners_whatever_the_sample_says(kind: str, seed: int) -> None:
    scores = random_scores(5, 1000, seed)
    if kind == "coarse":
        scores = scores.mul(2).round().div(2) * torch.where(scores > 0, 1, -1)
    elif kind == "constant":
        scores = torch.full((5, 1000), -0.0).where(scores > 0, 0.0)
    elif kind == "sorted":
        scores = scores.sort(dim=1).values
    elif kind == "outliers":
        scores[:, 500:503] = 1e30
    elif kind == "periodic":
        # The sample sees every 25th score, and these say nothing of the others.
        scores[:, ::25] = 100 + torch.arange(40.0)
    elif kind == "infinite":
        scores[:, :40], scores[:, 40:90] = torch.inf, -torch.inf
    for count in (1, 7, 63, 500, 999, 1000):
        same(cpu.select_rows(scores, count), reference.select_rows(scores, count))


def test_many_winners_of_a_row_are_found_without_a_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_rows", None)
    scores = random_scores(3, 2000)
    same(select_rows(scores, 125), reference.select_rows(scores, 125))
