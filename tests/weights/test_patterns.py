import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.allocate import NofM
from apportion.errors import InputError
from apportion.weights import BlockPattern, NofMPattern, Unstructured, choose_masks, parse_pattern
from apportion.weights.patterns import keep_best, kept_of


def scores_of(rows: int, columns: int, seed: int, ties: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(0, 3, (rows, columns), generator=generator).float()
    return torch.rand(rows, columns, generator=generator)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(0, 99),
    st.booleans(),
    st.floats(0, 0.999),
    st.sampled_from(["row", "layer"]),
)
def test_unstructured_keeps_the_best_and_exactly_so_many(rows, columns, seed, ties, sparsity, scope):
    scores = scores_of(rows, columns, seed, ties)
    mask = Unstructured(sparsity, scope).keep(scores)
    groups = [(scores[i], mask[i]) for i in range(rows)] if scope == "row" else [(scores.flatten(), mask.flatten())]
    for values, kept in groups:
        count = max(1, round((1 - sparsity) * values.numel()))
        # The slow obvious way: sort by score, then by place.
        order = sorted(range(values.numel()), key=lambda i: (-float(values[i]), i))
        assert sorted(order[:count]) == kept.nonzero().flatten().tolist()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 4)]),
    st.integers(0, 99),
    st.booleans(),
    st.sampled_from(["in", "out"]),
)
def test_n_of_m_beats_every_other_choice_in_every_group(rows, groups, pattern, seed, ties, dim):
    n, m = pattern
    scores = scores_of(rows, groups * m, seed, ties)
    turned = scores if dim == "in" else scores.T.contiguous()
    mask = NofMPattern(n, m, dim).keep(turned)
    mask = mask if dim == "in" else mask.T
    for row, group in itertools.product(range(rows), range(groups)):
        values, kept = scores[row, group * m : group * m + m], mask[row, group * m : group * m + m]
        assert int(kept.sum()) == n
        best = max(sum(float(values[i]) for i in chosen) for chosen in itertools.combinations(range(m), n))
        assert math.isclose(float(values[kept].sum()), best, rel_tol=1e-5)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (7, 8), (8, 8), (1, 16), (5, 16), (15, 16)])
def test_n_of_m_is_what_the_rule_allocates(n, m, ties):
    scores = scores_of(7, 3 * m, n, ties)
    won = NofM(n, m)(scores).col_indices.view(7, -1)
    assert torch.equal(
        NofMPattern(n, m).keep(scores), torch.zeros(scores.shape, dtype=torch.bool).scatter(1, won, True)
    )


def test_of_equal_weights_the_first_of_a_group_stay():
    for m, n in itertools.product((4, 16), (1, 3)):
        assert NofMPattern(n, m).keep(torch.ones(1, m)).tolist() == [[True] * n + [False] * (m - n)]


def test_blocks_go_together_by_their_sum():
    scores = torch.tensor([[1.0, 1.0, 0.0, 3.0], [1.0, 1.0, 0.0, 0.0]])
    assert BlockPattern(2, 2, 0.5).keep(scores).tolist() == [[True, True, False, False]] * 2


def test_global_is_one_threshold_over_all_layers():
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.rand(5, 7, generator=generator), "b": 0.3 * torch.rand(4, 6, generator=generator)}
    masks = choose_masks(scores, Unstructured(0.6, "global"))
    flat = torch.cat([each.flatten() for each in scores.values()])
    threshold = flat.sort(descending=True).values[kept_of(flat.numel(), 0.6) - 1]
    assert all(torch.equal(masks[name], scores[name] >= threshold) for name in scores)


def test_global_over_one_layer_is_local():
    scores = torch.rand(5, 7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(choose_masks({"a": scores}, Unstructured(0.7, "global"))["a"], Unstructured(0.7).keep(scores))


def test_global_leaves_every_layer_a_weight():
    masks = choose_masks({"a": torch.ones(4, 4), "b": torch.zeros(4, 4)}, Unstructured(0.5, "global"))
    assert int(masks["a"].sum()) == 16
    assert int(masks["b"].sum()) == 1


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("0.6", Unstructured(0.6, "row")),
        ("2:4", NofMPattern(2, 4)),
        ("block:16", BlockPattern(16, 16, 0.5)),
        ("block:16x32:0.7", BlockPattern(16, 32, 0.7)),
    ],
)
def test_patterns_are_read_as_people_write_them(text, pattern):
    assert parse_pattern(text) == pattern
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.0", "below 1"),
        ("-0.1", "at least 0"),
        ("nan", "at least 0"),
        ("half", "'half' is no pattern"),
        ("5:4", "1 <= n <= m"),
        ("0:4", "1 <= n <= m"),
        ("block:0", "at least 1"),
        ("block:4:1.5", "below 1"),
    ],
)
def test_what_is_no_pattern_says_so(text, message):
    with pytest.raises(InputError, match=message):
        parse_pattern(text)


@pytest.mark.parametrize(("pattern", "message"), [("2:4", "mlp has 6 inputs"), ("block:4", "mlp has 10 outputs")])
def test_a_pattern_that_does_not_divide_a_layer_names_it(pattern, message):
    with pytest.raises(InputError, match=message):
        choose_masks({"mlp": torch.rand(10, 6)}, parse_pattern(pattern))


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"scores\[0, 1\] is nan"):
        Unstructured(0.5).keep(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match=r"scores\[0, 1\] is nan"):
        NofMPattern(1, 2).keep(torch.tensor([[1.0, float("nan")]]))


def test_a_count_is_kept_to_the_weight():
    scores = scores_of(5, 7, 0, ties=True)
    for count in (0, 1, 17, 35):
        mask = keep_best(scores, count)
        assert int(mask.sum()) == count
        assert scores[mask].sum() == scores.flatten().sort(descending=True).values[:count].sum()
    with pytest.raises(InputError, match="count=36"):
        keep_best(scores, 36)
