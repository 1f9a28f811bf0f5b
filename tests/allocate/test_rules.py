"""Each rule is the best allocation under its constraint; budgets are exact, ties have one order, bad input is named."""

import functools
import itertools
import math

import hypothesis
import hypothesis.extra.numpy as hypothesis_numpy
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor

from apportion.allocate import (
    RULES,
    Allocation,
    Blocks,
    FeatureChoice,
    MutualChoice,
    NofM,
    Rule,
    Selection,
    Threshold,
    TokenChoice,
    Zipf,
    check_scores,
    whole_quotas,
)

# The first call of a kernel may compile it, so there is no deadline.
SETTINGS = hypothesis.settings(deadline=None, max_examples=60)

ROWS, COLUMNS = 3, 4

# Halves: sums are exact, and ties are common.
HALVES = st.integers(-6, 6).map(lambda number: number / 2)


def scores_of(rows: int, columns: int) -> st.SearchStrategy[Tensor]:
    return hypothesis_numpy.arrays(np.float64, (rows, columns), elements=HALVES).map(torch.from_numpy)


def distinct(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Scores without ties, about half of them negative."""
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
    return (order.view(rows, columns).float() - rows * columns // 2) / 8


@functools.cache
def every_mask() -> Tensor:
    """All 4096 ways to choose among 3 x 4 entries; the first entry counts most in the order."""
    return torch.tensor(list(itertools.product([True, False], repeat=ROWS * COLUMNS))).view(-1, ROWS, COLUMNS)


def best_mask(scores: Tensor, allowed: Tensor) -> Tensor:
    """The allowed mask with the largest sum; of several the one that holds the earliest entries."""
    masks = every_mask()[allowed]
    sums = (masks * scores).sum(dim=(1, 2))
    return masks[sums == sums.max()][0]


def mask_of(allocation: Allocation) -> Tensor:
    """Where the winners are; checks on the way that the entries come in order, each once."""
    flat = allocation.row_indices() * allocation.shape[1] + allocation.col_indices
    assert bool((flat.diff() > 0).all())
    mask = torch.zeros(allocation.shape, dtype=torch.bool)
    mask.view(-1)[flat] = True
    return mask


def check_values(allocation: Allocation, scores: Tensor) -> None:
    assert allocation.shape == tuple(scores.shape)
    assert allocation.values.equal(scores[mask_of(allocation)])


# The best under the constraint --------------------------------------------------------------------------------------


@SETTINGS
@hypothesis.given(scores=scores_of(ROWS, COLUMNS), budget=st.integers(1, COLUMNS))
def test_token_choice_is_the_best_with_so_many_a_row(scores: Tensor, budget: int) -> None:
    allocation = TokenChoice(budget)(scores)
    assert mask_of(allocation).equal(best_mask(scores, (every_mask().sum(dim=2) == budget).all(dim=1)))
    check_values(allocation, scores)


@SETTINGS
@hypothesis.given(scores=scores_of(ROWS, COLUMNS), total=st.integers(1, ROWS * COLUMNS))
def test_mutual_choice_is_the_best_with_so_many_in_all(scores: Tensor, total: int) -> None:
    allocation = MutualChoice(budget=total / ROWS)(scores)
    assert mask_of(allocation).equal(best_mask(scores, every_mask().sum(dim=(1, 2)) == total))
    check_values(allocation, scores)


@SETTINGS
@hypothesis.given(
    scores=scores_of(ROWS, COLUMNS), quotas=st.lists(st.integers(0, ROWS), min_size=COLUMNS, max_size=COLUMNS)
)
def test_feature_choice_is_the_best_with_so_many_a_column(scores: Tensor, quotas: list[int]) -> None:
    wanted = torch.tensor(quotas)
    crow, col = FeatureChoice(1).selection(ROWS, COLUMNS, wanted).places(scores)
    allocation = Allocation(crow, col, scores[torch.repeat_interleave(crow.diff()), col], (ROWS, COLUMNS))
    assert mask_of(allocation).equal(best_mask(scores, (every_mask().sum(dim=1) == wanted).all(dim=1)))


@SETTINGS
@hypothesis.given(scores=scores_of(ROWS, COLUMNS), budget=st.floats(0.34, COLUMNS), exponent=st.floats(0, 2))
def test_feature_choice_spends_its_profiles_quotas(scores: Tensor, budget: float, exponent: float) -> None:
    rule = FeatureChoice(budget=budget, profile=Zipf(exponent))
    allocation = rule(scores)
    quotas = allocation.winners_per_column()
    assert quotas.equal(rule.quotas(ROWS, COLUMNS))
    assert int(quotas.sum()) == int(budget * ROWS + 1e-6)
    assert mask_of(allocation).equal(best_mask(scores, (every_mask().sum(dim=1) == quotas).all(dim=1)))
    check_values(allocation, scores)


@SETTINGS
@hypothesis.given(scores=scores_of(5, 12), n=st.integers(1, 4), m=st.sampled_from([4, 6, 12]))
def test_n_of_m_takes_the_best_of_every_group(scores: Tensor, n: int, m: int) -> None:
    allocation = NofM(n, m)(scores)
    wanted = torch.zeros(5, 12, dtype=torch.bool)
    for row in range(5):
        for start in range(0, 12, m):
            for column in sorted(range(start, start + m), key=lambda c: -float(scores[row, c]))[:n]:
                wanted[row, column] = True
    assert mask_of(allocation).equal(wanted)
    check_values(allocation, scores)


@SETTINGS
@hypothesis.given(scores=scores_of(4, 5), theta=st.lists(HALVES, min_size=5, max_size=5))
def test_threshold_takes_everything_strictly_above(scores: Tensor, theta: list[float]) -> None:
    by_column = Threshold(torch.tensor(theta))(scores)
    assert mask_of(by_column).equal(scores > torch.tensor(theta))
    assert mask_of(Threshold(theta[0])(scores)).equal(scores > theta[0])
    assert mask_of(Threshold(torch.tensor(theta[0]))(scores)).equal(scores > theta[0])
    check_values(by_column, scores)


BLOCK_RULES: list[Rule] = [TokenChoice(2), MutualChoice(1.5), FeatureChoice(1.5), Threshold(0.5), NofM(1, 2)]


@pytest.mark.parametrize("size", [(1, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("rule", BLOCK_RULES, ids=repr)
@hypothesis.settings(SETTINGS, max_examples=12)
@hypothesis.given(data=st.data())
def test_whole_blocks_win_or_lose(rule: Rule, size: tuple[int, int], data: st.DataObject) -> None:
    high, wide = size
    scores = data.draw(scores_of(4 * high, 4 * wide))
    sums = torch.zeros(4, 4, dtype=torch.float64)
    for row in range(4 * high):
        for column in range(4 * wide):
            sums[row // high, column // wide] += scores[row, column]
    blocks = mask_of(rule(sums))
    allocation = Blocks(size, rule)(scores)
    assert mask_of(allocation).equal(blocks.repeat_interleave(high, dim=0).repeat_interleave(wide, dim=1))
    check_values(allocation, scores)


# Ties ---------------------------------------------------------------------------------------------------------------


def test_ties_go_to_the_lower_row_and_then_to_the_lower_column() -> None:
    scores = torch.ones(3, 4)
    assert mask_of(TokenChoice(2)(scores)).tolist() == [[True, True, False, False]] * 3
    assert mask_of(MutualChoice(budget=5 / 3)(scores)).view(-1).tolist() == [True] * 5 + [False] * 7
    assert mask_of(FeatureChoice(budget=4 / 3)(scores)).tolist() == [[True] * 4, [False] * 4, [False] * 4]
    assert mask_of(NofM(1, 2)(scores)).tolist() == [[True, False, True, False]] * 3
    assert mask_of(Blocks((1, 2), TokenChoice(1))(scores)).tolist() == [[True, True, False, False]] * 3


def test_minus_zero_is_no_less_than_zero() -> None:
    scores = torch.tensor([[-0.0, 0.0], [0.0, -0.0]])
    assert TokenChoice(1)(scores).col_indices.tolist() == [0, 0]
    assert Threshold(0.0)(scores).nnz == 0
    assert Threshold(-0.0)(scores).nnz == 0


# Exact budgets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 17, 64])
@pytest.mark.parametrize("budget", [1, 2.5, 4.99, 7, 29])
def test_batch_rules_spend_exactly_their_budget(rows: int, budget: float) -> None:
    scores = distinct(rows, 29)
    for rule in (MutualChoice(budget), FeatureChoice(budget), FeatureChoice(budget, profile=Zipf())):
        assert rule(scores).nnz == int(budget * rows)
        assert rule.mean_budget(29) == budget


def test_a_budget_is_not_lost_to_rounding() -> None:
    # 0.1 * 30 and 0.29 * 100 are a hair below 3 and 29 (or above) in binary.
    assert MutualChoice(0.1)(distinct(30, 7)).nnz == 3
    assert MutualChoice(0.29)(distinct(100, 7)).nnz == 29
    assert FeatureChoice(0.29)(distinct(100, 7)).nnz == 29
    assert MutualChoice(density=0.7)(distinct(10, 10)).nnz == 70


@pytest.mark.parametrize(("density", "columns", "wanted"), [(0.5, 8, 4), (0.3, 10, 3), (0.01, 8, 1), (1.0, 8, 8)])
def test_token_choice_rounds_a_density_down_but_not_to_nothing(density: float, columns: int, wanted: int) -> None:
    rule = TokenChoice(density=density)
    assert rule(distinct(3, columns)).winners_per_row().tolist() == [wanted] * 3
    assert rule.mean_budget(columns) == wanted


def test_density_and_budget_say_the_same() -> None:
    scores = distinct(6, 10)
    for kind in (TokenChoice, MutualChoice, FeatureChoice):
        assert mask_of(kind(density=0.3)(scores)).equal(mask_of(kind(3)(scores)))


def test_mean_budgets() -> None:
    assert NofM(2, 4).mean_budget(12) == 6
    assert Threshold(1.0).mean_budget(12) is None
    assert Blocks((2, 3), TokenChoice(2)).mean_budget(12) == 6
    assert Blocks((2, 3), Threshold(0.0)).mean_budget(12) is None
    assert TokenChoice(2).mean_budget(2) == 2


# Reductions ---------------------------------------------------------------------------------------------------------


def test_mutual_choice_of_one_row_is_token_choice() -> None:
    scores = distinct(1, 9)
    assert mask_of(MutualChoice(4)(scores)).equal(mask_of(TokenChoice(4)(scores)))


def test_a_budget_for_everything_chooses_everything() -> None:
    scores = distinct(5, 7)
    for rule in (TokenChoice(7), MutualChoice(7), FeatureChoice(7), NofM(7, 7), Threshold(-torch.inf)):
        assert mask_of(rule(scores)).all()


def test_blocks_of_one_are_the_rule_itself() -> None:
    scores = distinct(5, 6)
    for rule in BLOCK_RULES:
        assert mask_of(Blocks((1, 1), rule)(scores)).equal(mask_of(rule(scores)))


def test_one_group_a_row_is_token_choice() -> None:
    scores = distinct(5, 6)
    assert mask_of(NofM(2, 6)(scores)).equal(mask_of(TokenChoice(2)(scores)))


# Symmetry -----------------------------------------------------------------------------------------------------------

ALL_RULES: list[Rule] = [
    TokenChoice(3),
    MutualChoice(2.5),
    FeatureChoice(2.5),
    FeatureChoice(2.5, profile=Zipf()),
    NofM(2, 4),
    Threshold(0.5),
    Blocks((1, 2), MutualChoice(1.5)),
]


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
def test_shuffled_rows_get_what_they_got_before(rule: Rule) -> None:
    scores = distinct(10, 8)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    assert mask_of(rule(scores[order])).equal(mask_of(rule(scores))[order])


@pytest.mark.parametrize("rule", [TokenChoice(3), MutualChoice(2.5), FeatureChoice(4), Threshold(0.5)], ids=repr)
def test_shuffled_columns_get_what_they_got_before(rule: Rule) -> None:
    scores = distinct(10, 8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert mask_of(rule(scores[:, order])).equal(mask_of(rule(scores))[:, order])


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
def test_strided_scores_are_as_good(rule: Rule) -> None:
    scores = distinct(8, 20)[:, ::2].T[:8]
    assert not scores.is_contiguous()
    assert mask_of(rule(scores)).equal(mask_of(rule(scores.contiguous())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
def test_every_floating_type_is_ranked_by_its_own_values(rule: Rule, dtype: torch.dtype) -> None:
    scores = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    allocation = rule(scores)
    assert allocation.values.dtype == dtype
    if not isinstance(rule, Blocks):  # sums of blocks are taken in the scores' type
        assert mask_of(allocation).equal(mask_of(rule(scores.double())))
    check_values(allocation, scores)


def test_a_threshold_between_two_bfloat16_neighbours_parts_them() -> None:
    scores = torch.tensor([[1.0, 1.0078125]], dtype=torch.bfloat16)
    assert Threshold(1.004)(scores).col_indices.tolist() == [1]
    assert Threshold(torch.tensor([1.004, 1.006]))(scores).col_indices.tolist() == [1]


def test_a_threshold_for_float64_keeps_all_its_digits() -> None:
    scores = torch.tensor([[0.1, 0.1 + 1e-12]], dtype=torch.float64)
    assert Threshold(0.1)(scores).col_indices.tolist() == [1]


# Rows that are not valid --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
@pytest.mark.parametrize("valid", [[True] * 6, [False] * 6, [True, False, True, True, False, True]])
def test_invalid_rows_get_nothing_and_bring_no_budget(rule: Rule, valid: list[bool]) -> None:
    scores = distinct(6, 8)
    scores[~torch.tensor(valid)] += 1000
    allocation = rule(scores, torch.tensor(valid))
    among_valid = rule(scores[torch.tensor(valid)])
    assert allocation.shape == (6, 8)
    assert mask_of(allocation)[torch.tensor(valid)].equal(mask_of(among_valid))
    assert not mask_of(allocation)[~torch.tensor(valid)].any()
    check_values(allocation, scores)


@pytest.mark.parametrize("rule", [*ALL_RULES, Blocks((2, 2), MutualChoice(1))], ids=repr)
def test_rows_that_are_not_valid_may_hold_nan(rule: Rule) -> None:
    scores, valid = distinct(6, 8), torch.tensor([True, True, False, False, True, True])
    clean = mask_of(rule(scores, valid))
    scores[2], scores[3, 1] = math.nan, math.inf
    assert mask_of(rule(scores, valid)).equal(clean)
    scores[4, 5] = math.nan
    with pytest.raises(ValueError, match=r"scores\[4, 5\] is nan"):
        rule(scores, valid)


def test_valid_rows_of_tall_blocks() -> None:
    rule = Blocks((2, 2), MutualChoice(1))
    scores = distinct(6, 4)
    allocation = rule(scores, torch.tensor([True, True, False, False, True, True]))
    assert mask_of(allocation)[[0, 1, 4, 5]].equal(mask_of(rule(scores[[0, 1, 4, 5]])))
    assert not mask_of(allocation)[2:4].any()
    with pytest.raises(ValueError, match="valid differs within a block of rows"):
        rule(scores, torch.tensor([True, False, False, False, True, True]))


# Empty batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*ALL_RULES, Blocks((2, 2), TokenChoice(1))], ids=repr)
def test_an_empty_batch_gets_an_empty_allocation(rule: Rule) -> None:
    for valid in (None, torch.empty(0, dtype=torch.bool)):
        allocation = rule(torch.empty(0, 8), valid)
        assert allocation.shape == (0, 8)
        assert allocation.nnz == 0
        assert allocation.crow_indices.tolist() == [0]
        assert allocation.to_dense().shape == (0, 8)


# Gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
def test_gradients_reach_the_winners_and_nobody_else(rule: Rule) -> None:
    scores = distinct(4, 8).double().requires_grad_()
    allocation = rule(scores)
    allocation.values.sum().backward()
    assert scores.grad is not None
    assert scores.grad.equal(mask_of(allocation).double())


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
def test_gradients_of_the_values_are_right(rule: Rule) -> None:
    # Off the grid of halves: no score lies on a threshold, where nothing could be differentiated.
    scores = (distinct(3, 8).double() + 0.03)[:, :4].requires_grad_()
    valid = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda s: rule(s, valid).to_dense(), (scores,))


# From activations in one step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "rule", [TokenChoice(3), MutualChoice(2.5), FeatureChoice(2.5), Threshold(0.5), Threshold(torch.full((8,), 0.5))]
)
def test_a_selection_encodes_to_what_the_rule_gives_the_scores(
    rule: TokenChoice | MutualChoice | FeatureChoice | Threshold, dtype: torch.dtype, exact: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((6, 5), (8, 5), (8,)))
    codes = rule.selection(6, 8).encode(x, weight, bias, exact=exact)
    wanted = rule(torch.addmm(bias, x, weight.T))
    assert mask_of(codes).equal(mask_of(wanted))
    assert codes.shape == (6, 8)
    torch.testing.assert_close(codes.values, wanted.values)


def test_a_selection_encodes_in_bfloat16_but_answers_in_full() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((40, 64), (30, 64), (30,)))
    codes = Selection("rows", 4).encode(x, weight, bias, precision="bfloat16")
    torch.testing.assert_close(codes.values, torch.addmm(bias, x, weight.T)[mask_of(codes)], rtol=1e-5, atol=1e-5)


# Inference ----------------------------------------------------------------------------------------------------------


def test_inference_forms_do_not_look_at_other_rows() -> None:
    scores = distinct(9, 8)
    thresholds = torch.linspace(-1, 1, 8)
    forms: list[Rule] = [
        TokenChoice(3).at_inference(),
        MutualChoice(3).at_inference(0.25),
        FeatureChoice(3).at_inference(thresholds),
        Threshold(0.25).at_inference(),
        NofM(1, 4).at_inference(),
        Blocks((1, 2), MutualChoice(1)).at_inference(0.25),
        Blocks((1, 2), TokenChoice(1)).at_inference(),
    ]
    for rule in forms:
        together = mask_of(rule(scores))
        assert together.equal(torch.cat([mask_of(rule(scores[row : row + 1])) for row in range(9)]))
    assert mask_of(forms[1](scores)).equal(scores > 0.25)
    assert mask_of(forms[2](scores)).equal(scores > thresholds)


def test_the_rules_are_listed_by_name() -> None:
    assert set(RULES) == {"TokenChoice", "FeatureChoice", "MutualChoice", "NofM", "Threshold", "Blocks"}
    assert all(isinstance(rule, Rule) for rule in ALL_RULES)


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
def test_scores_that_are_not_finite_are_refused_and_named(rule: Rule, bad: float) -> None:
    scores = distinct(4, 8)
    scores[2, 5] = scores[3, 1] = bad
    with pytest.raises(ValueError, match=rf"scores\[2, 5\] is {bad}: scores must be finite \(2 of 32 are not\)"):
        rule(scores)


def test_infinities_that_cancel_are_found() -> None:
    scores = torch.zeros(2, 3)
    scores[0, 1], scores[1, 2] = torch.inf, -torch.inf
    with pytest.raises(ValueError, match=r"scores\[0, 1\] is inf"):
        check_scores(scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_finite_scores_whose_sum_overflows_are_fine(dtype: torch.dtype) -> None:
    scores = torch.full((5, 8), torch.finfo(dtype).max, dtype=dtype)
    scores[4, 3] = 0
    assert not scores.sum().isfinite()
    assert MutualChoice(1)(scores).col_indices.tolist() == [0, 1, 2, 3, 4]
    scores[4, 3] = torch.nan
    with pytest.raises(ValueError, match=r"scores\[4, 3\] is nan"):
        MutualChoice(1)(scores)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8], ids=str)
def test_scores_that_are_not_floats_are_refused(dtype: torch.dtype) -> None:
    scores = torch.zeros(3, 4, dtype=dtype)
    with pytest.raises(TypeError, match=rf"activations has dtype {dtype}: give floating-point scores"):
        check_scores(scores, "activations")
    for rule in ALL_RULES:
        with pytest.raises(TypeError):
            rule(scores)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), ()])
def test_scores_that_are_no_matrix_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="give two dimensions, rows and columns"):
        check_scores(torch.zeros(shape))


@pytest.mark.parametrize("kind", [TokenChoice, MutualChoice, FeatureChoice])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either budget .* or density .*, not budget=None density=None"),
        ({"budget": 2, "density": 0.5}, "give either budget .* or density .*, not budget=2 density=0.5"),
        ({"budget": 0}, "budget=0: use a number above 0"),
        ({"budget": -3}, "budget=-3: use a number above 0"),
        ({"budget": torch.inf}, "budget=inf: use a number above 0"),
        ({"budget": torch.nan}, "budget=nan: use a number above 0"),
        ({"density": 0.0}, "density=0.0: use a share above 0 and at most 1"),
        ({"density": 1.5}, "density=1.5: use a share above 0 and at most 1"),
        ({"density": torch.nan}, "density=nan: use a share above 0 and at most 1"),
    ],
)
def test_impossible_budgets_are_refused_by_name(kind: type, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: {message}"):
        kind(**arguments)


@pytest.mark.parametrize("kind", [TokenChoice, MutualChoice, FeatureChoice])
def test_a_budget_above_the_number_of_columns_is_refused(kind: type) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: budget=9 is more than the 8 candidates; lower it"):
        kind(budget=9)(distinct(3, 8))
    with pytest.raises(ValueError, match="more than the 8 candidates"):
        kind(budget=9)(torch.empty(0, 8))


def test_token_choice_wants_a_whole_number() -> None:
    with pytest.raises(ValueError, match=r"TokenChoice: budget=2.5: every row gets the same, so use a whole number"):
        TokenChoice(2.5)
    assert TokenChoice(2.0)(distinct(3, 4)).nnz == 6


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 4), (1, 0)])
def test_impossible_groups_are_refused(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"NofM: n={n}, m={m}: use 1 <= n <= m"):
        NofM(n, m)


def test_columns_that_do_not_fill_the_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="NofM: 6 columns are not a multiple of m=4"):
        NofM(2, 4)(distinct(2, 6))
    with pytest.raises(ValueError, match=r"Blocks: scores 4 x 6 are not a multiple of size=\(2, 4\)"):
        Blocks((2, 4), TokenChoice(1))(distinct(4, 6))
    with pytest.raises(ValueError, match=r"Blocks: scores 3 x 8 are not a multiple of size=\(2, 4\)"):
        Blocks((2, 4), TokenChoice(1))(distinct(3, 8))
    with pytest.raises(ValueError, match=r"Blocks: size=\(0, 4\): both sides must be at least 1"):
        Blocks((0, 4), TokenChoice(1))


@pytest.mark.parametrize("theta", [torch.nan, torch.tensor([0.0, torch.nan])])
def test_a_threshold_that_is_not_a_number_is_refused(theta: float | Tensor) -> None:
    with pytest.raises(ValueError, match="Threshold: theta is NaN somewhere"):
        Threshold(theta)


@pytest.mark.parametrize("theta", [torch.zeros(3), torch.zeros(1, 4), torch.zeros(2, 2)])
def test_thresholds_of_another_shape_are_refused(theta: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Threshold: theta has shape .* for 4 columns: give one number, or one each"):
        Threshold(theta)(distinct(2, 4))


def test_infinite_thresholds_switch_columns_off_and_on() -> None:
    theta = torch.tensor([torch.inf, -torch.inf, 0.0])
    assert mask_of(Threshold(theta)(-torch.ones(2, 3))).tolist() == [[False, True, False]] * 2


def test_quotas_that_do_not_fit_are_refused() -> None:
    rule = FeatureChoice(1)
    with pytest.raises(ValueError, match=r"quotas has shape \(3,\): give one for each of the 4 columns"):
        rule.selection(5, 4, torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"quotas has shape \(0,\)"):
        rule.selection(5, 4, torch.ones(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="quotas go from 1 to 6: each must be from 0 to the number of rows, 5"):
        rule.selection(5, 4, torch.tensor([1, 6, 1, 1]))
    with pytest.raises(ValueError, match="quotas go from -1 to 1"):
        rule.selection(5, 4, torch.tensor([1, -1, 1, 1]))


def test_quotas_of_one_batch_are_the_rounded_shares() -> None:
    rule = FeatureChoice(budget=2, profile=Zipf())
    assert rule.quotas(50, 9).equal(whole_quotas(rule.share(9) * 50, 100, 50))
