"""Swaps of DSnoT against the slow obvious way to make them."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.errors import InputError
from apportion.weights import BlockPattern, NofMPattern, Unstructured
from apportion.weights.calibration import InputStatistics
from apportion.weights.dsnot import DSnoT, mean_error, swap_for_mean
from apportion.weights.one_shot_method import Seen
from apportion.weights.second_moment_swaps import swap_for_second_moment
from apportion.weights.wanda import Magnitude, Wanda


def layer(rows=6, width=8, seed=0, texts=3, time=20):
    draws = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=draws)
    spread = torch.rand(width, generator=draws) + 0.2
    inputs = torch.randn(texts, time, width, generator=draws) * spread + torch.randn(width, generator=draws)
    statistics = InputStatistics(width)
    statistics.add(inputs, torch.ones(texts, time).bool())
    return weight, Seen("the layer", statistics)


def slow_row(weight, kept, mean, revive_by, drop_by, threshold, cycles, overshoot, group):
    """One row, one swap after the other, every candidate looked at."""
    kept, moved, swaps = list(kept), set(), 0
    gain = [float(w) * float(m) for w, m in zip(weight, mean, strict=True)]
    error = sum(g for g, k in zip(gain, kept, strict=True) if not k)
    for _ in range(cycles):
        side = 1 if error > 0 else -1
        back = [i for i in range(len(gain)) if not kept[i] and i not in moved and gain[i] * side > 0]
        if abs(error) <= threshold or not back:
            break
        k = max(back, key=lambda i: float(revive_by[i]) * side)
        if group is None:
            out = [i for i in range(len(gain)) if kept[i] and i not in moved and gain[i] * side < 0]
        else:
            out = [i for i in range(len(gain)) if kept[i] and i not in moved and i // group == k // group]
        if not out:
            break
        q = min(out, key=lambda i: float(drop_by[i]))
        after = error - gain[k] + gain[q]
        if not overshoot and after * error < 0:
            break
        kept[k], kept[q] = True, False
        moved |= {k, q}
        error, swaps = after, swaps + 1
    return kept, swaps


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.sampled_from([None, 4]), st.booleans(), st.integers(0, 6), st.sampled_from([0.0, 0.05]))
def test_swaps_are_those_of_the_slow_way(seed, group, overshoot, cycles, threshold):
    weight, seen = layer(seed=seed)
    statistics = seen.statistics
    pattern = Unstructured(0.5, "row") if group is None else NofMPattern(2, 4)
    first = Wanda().prune(weight, seen, pattern).mask
    measures = {
        "revive_by": weight * (statistics.mean / statistics.variance).float(),
        "drop_by": weight.abs() * statistics.norm.float(),
    }
    mask, swaps = swap_for_mean(
        weight,
        first,
        statistics.mean,
        **measures,
        threshold=torch.full((1,), threshold, dtype=torch.float64),
        cycles=cycles,
        overshoot=overshoot,
        group=group,
    )
    for row in range(len(weight)):
        kept, made = slow_row(
            weight[row],
            first[row].tolist(),
            statistics.mean,
            *(each[row] for each in measures.values()),
            threshold,
            cycles,
            overshoot,
            group,
        )
        assert (mask[row].tolist(), int(swaps[row])) == (kept, made)


@pytest.mark.parametrize("pattern", [Unstructured(0.6, "row"), NofMPattern(2, 4), NofMPattern(4, 8)])
@pytest.mark.parametrize("method", [DSnoT(cycles=5), DSnoT(cycles=5, objective="second_moment"), DSnoT("magnitude")])
def test_counts_stay_and_nothing_but_zeros_changes(pattern, method):
    weight, seen = layer(rows=20, width=40)
    first = (Wanda() if method.start == "wanda" else Magnitude()).prune(weight, seen, pattern)
    found = method.prune(weight, seen, pattern)
    assert torch.equal(found.mask.sum(dim=1), first.mask.sum(dim=1))
    if isinstance(pattern, NofMPattern):
        assert (found.mask.view(20, -1, pattern.m).sum(dim=2) == pattern.n).all()
    assert torch.equal(found.weight, weight * found.mask)
    assert not torch.equal(found.mask, first.mask)


def test_without_overshoot_no_rows_error_grows():
    weight, seen = layer(rows=40, width=64)
    mean = seen.statistics.mean
    errors = []
    for cycles in range(12):
        found = DSnoT(cycles=cycles).prune(weight, seen, Unstructured(0.6, "row"))
        errors.append(mean_error(weight, found.mask, mean).abs())
    assert all(bool((after <= before + 1e-12).all()) for before, after in itertools.pairwise(errors))
    assert errors[-1].mean() < errors[0].mean() / 2


def test_no_cycles_is_the_first_mask_and_so_is_a_matrix_that_keeps_all():
    weight, seen = layer()
    for start, plain in (("wanda", Wanda()), ("magnitude", Magnitude())):
        found = DSnoT(start, cycles=0).prune(weight, seen, Unstructured(0.5, "row"))
        assert torch.equal(found.mask, plain.prune(weight, seen, Unstructured(0.5, "row")).mask)
        assert found.figures["swaps"] == 0
    for objective in ("mean", "second_moment"):
        assert DSnoT(objective=objective, cycles=3).prune(weight, seen, Unstructured(0.0, "row")).mask.all()


def test_one_pruned_weight_is_swapped_once_at_most_and_not_at_all_without_overshoot():
    """The error is that weight's, and after a swap it is that of another one, which has the other sign."""
    weight, seen = layer(rows=50)
    pattern = Unstructured(1 / 8, "row")
    found = DSnoT(preset="reference", attention_only=False).prune(weight, seen, pattern)
    assert (found.mask.sum(dim=1) == 7).all()
    assert 0 < found.figures["swaps"] <= 1
    assert DSnoT(cycles=20).prune(weight, seen, pattern).figures["swaps"] == 0


def test_cycles_grow_with_the_width_and_the_reference_has_fifty():
    assert [DSnoT().cycles_of(width) for width in (4096, 576, 96)] == [50, 7, 2]
    assert DSnoT(preset="reference").cycles_of(96) == 50
    assert DSnoT(preset="reference", cycles=9).cycles_of(96) == 9


def test_the_reference_leaves_the_mlp_alone_and_overshoots():
    weight, seen = layer(rows=30, width=64)
    pattern = Unstructured(0.6, "row")
    mlp = DSnoT(preset="reference").prune(weight, seen, pattern)
    assert torch.equal(mlp.mask, Wanda().prune(weight, seen, pattern).mask)
    attention = Seen("the layer", seen.statistics, in_attention=True)
    swapped, own = (DSnoT(preset=each).prune(weight, attention, pattern) for each in ("reference", "scaled"))
    assert swapped.figures["swaps"] > 4 * own.figures["swaps"]


def test_the_references_threshold_is_in_sums_over_a_text():
    """Ten times as long texts of the same means have ten times the sums: half as much error is enough then."""
    weight, seen = layer(rows=40, width=64)
    seen = Seen("the layer", seen.statistics, in_attention=True)
    pattern = Unstructured(0.6, "row")
    swaps = []
    for length in (0.02, 20.0):  # tokens of a text
        seen.statistics.samples = round(seen.statistics.tokens / length)
        swaps.append(DSnoT(preset="reference").prune(weight, seen, pattern).figures["swaps"])
    assert swaps[0] < swaps[1] / 2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.sampled_from([None, 4]))
def test_each_second_moment_swap_is_the_best_of_all(seed, group):
    weight, seen = layer(rows=3, seed=seed)
    moment = seen.statistics.second_moment
    weight = weight.double()
    mask = Wanda().prune(weight.float(), seen, NofMPattern(2, 4) if group else Unstructured(0.5, "row")).mask

    def loss(row, kept):
        lost = weight[row].masked_fill(kept, 0)
        return float(lost @ moment @ lost)

    after, swaps = swap_for_second_moment(weight, mask, moment, cycles=1, candidates=None, group=group)
    for row in range(3):
        found = {}
        for q in mask[row].nonzero().flatten().tolist():
            for k in (~mask[row]).nonzero().flatten().tolist():
                if group is None or q // group == k // group:
                    other = mask[row].clone()
                    other[q], other[k] = False, True
                    found[q, k] = loss(row, other)
        before, best = loss(row, mask[row]), min(found.values())
        assert int(swaps[row]) == (best < before * (1 - 1e-6))
        assert math.isclose(loss(row, after[row]), min(before, best), rel_tol=1e-9, abs_tol=1e-12)


def test_many_swaps_keep_the_books_right_and_few_candidates_are_nearly_as_good():
    weight, seen = layer(rows=30, width=64)
    moment = seen.statistics.second_moment.float()
    first = Wanda().prune(weight, seen, Unstructured(0.6, "row")).mask
    losses = {}
    for candidates in (16, None):
        mask, swaps = swap_for_second_moment(weight, first, moment, cycles=40, candidates=candidates)
        lost = weight.masked_fill(mask, 0)
        losses[candidates] = float(((lost @ moment) * lost).sum())
        assert swaps.max() > 5
        # Nothing is left to gain by any single swap in a row that has stopped.
        _, more = swap_for_second_moment(weight, mask, moment, cycles=1, candidates=candidates)
        assert int(more[swaps < 40].sum()) == 0
    lost = weight.masked_fill(first, 0)
    start = float(((lost @ moment) * lost).sum())
    assert losses[None] < 0.8 * start
    assert losses[16] < losses[None] + 0.1 * (start - losses[None])


def test_a_bias_makes_up_for_the_mean_exactly():
    weight, seen = layer()
    found = DSnoT(cycles=0, correct_mean=True).prune(weight, seen, Unstructured(0.5, "row"))
    mean = seen.statistics.mean
    torch.testing.assert_close(found.weight.double() @ mean + found.bias, weight.double() @ mean, rtol=1e-5, atol=1e-5)
    assert found.figures["mean_error_before"] == found.figures["mean_error_after"] > 0


def test_a_constant_input_is_no_obstacle():
    weight, _ = layer()
    statistics = InputStatistics(8)
    statistics.add(torch.ones(2, 3, 8), torch.ones(2, 3).bool())
    found = DSnoT(cycles=3).prune(weight, Seen("the layer", statistics), Unstructured(0.5, "row"))
    assert (found.mask.sum(dim=1) == 4).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"start": "sparsegpt"}, "start='sparsegpt': use wanda or magnitude"),
        ({"preset": "paper"}, "preset='paper'"),
        ({"objective": "median"}, "objective='median'"),
        ({"cycles": -1}, "cycles=-1"),
        ({"power": -0.5}, "power=-0.5"),
        ({"power": math.nan}, "power=nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, named):
    with pytest.raises(InputError, match=named):
        DSnoT(**settings)


@pytest.mark.parametrize(
    ("pattern", "named"), [(BlockPattern(2, 2), "single weights"), (NofMPattern(2, 4, "out"), "along the inputs")]
)
def test_patterns_without_single_weights_are_refused(pattern, named):
    weight, seen = layer()
    with pytest.raises(InputError, match=named):
        DSnoT().prune(weight, seen, pattern)
