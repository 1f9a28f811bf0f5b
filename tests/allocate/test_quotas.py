"""Quotas: densities add up and are capped, rounding is exact, and over many batches every column gets its share."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from apportion.allocate import QuotaLedger, Uniform, Zipf, densities, expected_share, whole_quotas

SETTINGS = hypothesis.settings(deadline=None, max_examples=100)

WEIGHTS = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30).map(lambda w: torch.tensor(w, dtype=torch.float64))


# Profiles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("exponent", "offset"), [(0.0, 0.0), (1.0, 0.0), (0.7, 3.0), (2.5, 30.0)])
def test_zipf_is_the_formula(exponent: float, offset: float) -> None:
    weights = Zipf(exponent, offset).weights(100)
    assert weights.dtype == torch.float64
    assert weights.tolist() == pytest.approx([1 / (rank + offset) ** exponent for rank in range(1, 101)], rel=1e-12)


def test_exponent_zero_is_uniform() -> None:
    assert Zipf(0, 5).weights(7).equal(Uniform().weights(7))
    assert Uniform().weights(7).tolist() == [1.0] * 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exponent": -1.0}, "exponent=-1.0: use a number >= 0"),
        ({"exponent": torch.nan}, "exponent=nan: use a number >= 0"),
        ({"offset": -0.5}, "offset=-0.5: use a number >= 0"),
        ({"offset": torch.nan}, "offset=nan"),
    ],
)
def test_impossible_profiles_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Zipf(**arguments)


# Densities ------------------------------------------------------------------------------------------------------------


def filled(weights: Tensor, budget: float) -> Tensor:
    """Densities by bisection for the scale at which min(1, scale * weight) add up to the budget."""
    low, high = 0.0, float(1 / weights.min()) + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((weights * middle).clamp(max=1).sum()) < budget else (low, middle)
    return (weights * high).clamp(max=1)


@SETTINGS
@hypothesis.given(weights=WEIGHTS, part=st.floats(0.001, 1.0))
def test_densities_add_up_are_capped_and_keep_the_proportions(weights: Tensor, part: float) -> None:
    budget = part * weights.numel()
    share = densities(weights, budget)
    assert float(share.sum()) == pytest.approx(budget, rel=1e-9)
    assert float(share.min()) >= 0
    assert float(share.max()) <= 1
    torch.testing.assert_close(share, filled(weights, budget), rtol=1e-6, atol=1e-9)


def test_zipf_densities_against_the_formula() -> None:
    share = expected_share(Zipf(1.0, 2.0), 50, 3.0)
    weights = [1 / (rank + 2) for rank in range(1, 51)]
    assert float(share.max()) < 1, "nothing is capped here"
    assert share.tolist() == pytest.approx([3.0 * weight / sum(weights) for weight in weights], rel=1e-12)


def test_what_a_capped_column_cannot_take_goes_to_the_others() -> None:
    share = densities(torch.tensor([1.0, 100.0, 2.0, 1.0], dtype=torch.float64), 2.0)
    assert share.tolist() == pytest.approx([0.25, 1.0, 0.5, 0.25])


def test_columns_without_a_share_get_nothing() -> None:
    assert densities(torch.tensor([3.0, 0.0, 1.0], dtype=torch.float64), 2.0).tolist() == [1.0, 0.0, 1.0]


def test_a_budget_of_all_columns_is_density_one() -> None:
    assert densities(Zipf(3.0).weights(9), 9.0).tolist() == pytest.approx([1.0] * 9)


@pytest.mark.parametrize("budget", [0.0, -1.0, 5.5, torch.nan])
def test_densities_refuse_an_impossible_budget(budget: float) -> None:
    with pytest.raises(ValueError, match=f"budget={budget}: must be above 0 and at most the number of columns, 5"):
        densities(torch.ones(5, dtype=torch.float64), budget)


def test_densities_refuse_more_budget_than_the_shares_can_hold() -> None:
    with pytest.raises(ValueError, match=r"budget=2.0: only 1 columns have a positive share"):
        densities(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), 2.0)
    # So steep that the later shares are below the smallest float.
    with pytest.raises(ValueError, match=r"budget=32: only \d+ columns have a positive share"):
        expected_share(Zipf(exponent=400), 64, 32)


@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
def test_densities_refuse_impossible_shares(bad: float) -> None:
    with pytest.raises(ValueError, match="weights: a share is negative, infinite or NaN"):
        densities(torch.tensor([1.0, bad, 1.0], dtype=torch.float64), 1.0)


# Whole quotas ---------------------------------------------------------------------------------------------------------


def hamilton(exact: list[float], total: int) -> list[int]:
    """Largest remainder, for quotas that add up to the total."""
    quotas = [int(each) for each in exact]
    by_remainder = sorted(range(len(exact)), key=lambda column: -(exact[column] - quotas[column]))
    for column in by_remainder[: total - sum(quotas)]:
        quotas[column] += 1
    return quotas


# Eighths have exact remainders, so that ties are ties.
@SETTINGS
@hypothesis.given(eighths=st.lists(st.integers(0, 80), min_size=1, max_size=20))
def test_whole_quotas_are_hamiltons(eighths: list[int]) -> None:
    eighths[0] += -sum(eighths) % 8
    exact = torch.tensor(eighths, dtype=torch.float64) / 8
    total = sum(eighths) // 8
    quotas = whole_quotas(exact, total, cap=20)
    assert quotas.tolist() == hamilton(exact.tolist(), total)
    assert float((quotas - exact).abs().max()) < 1


@SETTINGS
@hypothesis.given(
    exact=st.lists(st.floats(0, 12), min_size=1, max_size=12), cap=st.integers(0, 9), part=st.floats(0, 1)
)
def test_whole_quotas_add_up_whatever_was_wanted(exact: list[float], cap: int, part: float) -> None:
    total = round(part * cap * len(exact))
    quotas = whole_quotas(torch.tensor(exact, dtype=torch.float64), total, cap)
    assert int(quotas.sum()) == total
    assert int(quotas.min()) >= 0
    assert int(quotas.max()) <= cap


def test_equal_remainders_go_to_the_lower_column() -> None:
    exact = torch.full((4,), 0.5, dtype=torch.float64)
    assert whole_quotas(exact, 2, cap=3).tolist() == [1, 1, 0, 0]
    assert whole_quotas(exact + 1, 3, cap=3).tolist() == [1, 1, 1, 0], "the last to give one up"


def test_too_large_a_total_is_refused() -> None:
    with pytest.raises(ValueError, match="total=7: 3 columns of at most 2 rows each cannot hold that many"):
        whole_quotas(torch.ones(3, dtype=torch.float64), 7, cap=2)
    with pytest.raises(ValueError, match="total=-1"):
        whole_quotas(torch.ones(3, dtype=torch.float64), -1, cap=2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_quotas_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="exact: a quota is NaN or infinite"):
        whole_quotas(torch.tensor([1.0, bad], dtype=torch.float64), 2, cap=2)


# The ledger -----------------------------------------------------------------------------------------------------------


def draws(ledger: QuotaLedger, share: Tensor, budget: float, rows_of_batches: list[int]) -> None:
    """Draw a batch each, checking after every one that totals are exact and nobody is a whole row off."""
    for rows in rows_of_batches:
        total = int(budget * rows + 1e-6)
        quotas = ledger.draw(share * (total / (budget * rows)), rows, total)
        assert int(quotas.sum()) == total
        assert int(quotas.min()) >= 0
        assert int(quotas.max()) <= rows
        assert float((ledger.promised - ledger.given).abs().max()) < 1


LEDGERS = {
    "uniform": (Uniform().weights(40), 7.0),
    "uniform, far below one row a batch": (Uniform().weights(3000), 2.0),
    "zipf": (Zipf(1.0).weights(60), 5.0),
    "zipf, most columns far below one row a batch": (Zipf(1.3).weights(1000), 2.0),
    "some columns always win": (Zipf(2.0).weights(30), 12.0),
    "a fractional budget": (Zipf(0.8, 3.0).weights(50), 2.37),
    "everything": (Uniform().weights(6), 6.0),
    "one column": (Uniform().weights(1), 1.0),
    "less than one winner a row": (Zipf(1.0).weights(20), 0.2),
}


@pytest.mark.parametrize("changing", [False, True])
@pytest.mark.parametrize(("weights", "budget"), LEDGERS.values(), ids=LEDGERS.keys())
def test_the_ledger_is_exact_in_every_batch_and_never_a_row_off(weights: Tensor, budget: float, changing: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 40, (200,), generator=generator).tolist() if changing else [16] * 200
    order = torch.randperm(weights.numel(), generator=generator)
    draws(QuotaLedger(weights.numel()), densities(weights[order], budget), budget, sizes)


@SETTINGS
@hypothesis.given(weights=WEIGHTS, part=st.floats(0.01, 1), sizes=st.lists(st.integers(1, 30), min_size=1, max_size=30))
def test_the_ledger_is_never_a_row_off_for_random_shares(weights: Tensor, part: float, sizes: list[int]) -> None:
    budget = part * weights.numel()
    draws(QuotaLedger(weights.numel()), densities(weights, budget), budget, sizes)


def test_a_rare_column_has_its_turn() -> None:
    ledger = QuotaLedger(1000)
    share = densities(Uniform().weights(1000), 1.0)
    for _ in range(250):
        ledger.draw(share, rows=4, total=4)
    assert ledger.given.tolist() == [1] * 1000


def test_new_ranks_keep_totals_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    ledger = QuotaLedger(50)
    for _ in range(60):
        share = densities(Zipf(1.0).weights(50)[torch.randperm(50, generator=generator)], 4.0)
        draws(ledger, share, 4.0, torch.randint(1, 9, (5,), generator=generator).tolist())


def test_promises_that_bunch_up_are_served_furthest_behind_first() -> None:
    ledger = QuotaLedger(4)
    for share in ([1 / 4] * 4, [0, 1 / 3, 1 / 3, 1 / 3]):
        ledger.draw(torch.tensor(share, dtype=torch.float64), rows=1, total=1)
    assert ledger.given.tolist() == [1, 1, 0, 0]
    # Both others are now due a whole row, and there is one to give.
    late = torch.tensor([0, 0, 0.5, 0.5], dtype=torch.float64)
    assert ledger.draw(late, rows=1, total=1).tolist() == [0, 0, 1, 0]
    assert ledger.draw(late, rows=1, total=1).tolist() == [0, 0, 0, 1]
    assert float((ledger.promised - ledger.given).abs().max()) < 1


def test_the_ledger_goes_on_where_its_state_was_saved() -> None:
    share = densities(Zipf(1.0).weights(30), 3.0)
    ledger = QuotaLedger(30)
    for _ in range(20):
        ledger.draw(share, rows=5, total=15)
    restored = QuotaLedger(30)
    restored.load_state_dict({name: value.clone() for name, value in ledger.state_dict().items()})
    assert set(ledger.state_dict()) == {"promised", "given"}
    for _ in range(20):
        assert restored.draw(share, rows=5, total=15).equal(ledger.draw(share, rows=5, total=15))
