"""Sparse edits: the greedy choice is the greedy choice, magnitudes are shares, agreements have their baseline."""

import math
from itertools import pairwise

import pytest
import torch

from apportion.errors import InputError
from apportion.features.control import (
    Agreement,
    ablate_subspace,
    edit_magnitude,
    exact_edit,
    feature_weights,
    interpretation_aware_edit,
    sparse_edit,
)

PAIRS, FEATURES, D = 6, 9, 7


def problem(seed: int = 0, active: int = 3) -> dict[str, torch.Tensor]:
    """A correlated dictionary, sparse codes with values of both signs, and activations that it explains in part."""
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.randn(FEATURES, D, generator=generator) + 0.5
    decoder /= decoder.norm(dim=1, keepdim=True)
    codes = []
    for _ in range(2):
        places = torch.rand(PAIRS, FEATURES, generator=generator).argsort(dim=1)[:, :active]
        values = torch.randn(PAIRS, active, generator=generator)
        codes.append(torch.zeros(PAIRS, FEATURES).scatter_(1, places, values))
    source, target = (each @ decoder + 0.3 * torch.randn(PAIRS, D, generator=generator) for each in codes)
    return {
        "source": source,
        "target": target,
        "source_codes": codes[0],
        "target_codes": codes[1],
        "decoder_weight": decoder,
    }


def by_hand(given: dict[str, torch.Tensor], row: int, budget: int, unit: str, spend_all: bool = False) -> torch.Tensor:
    """The definition: vectors, one pair at a time."""
    a, b, u = given["source_codes"][row], given["target_codes"][row], given["decoder_weight"]
    if unit == "move":
        moves = [-a[j] * u[j] for j in range(FEATURES) if a[j] != 0] + [
            b[j] * u[j] for j in range(FEATURES) if b[j] != 0
        ]
    else:
        moves = [(b[j] - a[j]) * u[j] for j in range(FEATURES) if a[j] != b[j]]
    left = given["target"][row] - given["source"][row]
    for _ in range(budget):
        if not moves:
            break
        best = min(range(len(moves)), key=lambda each: float((left - moves[each]).norm()))
        if not spend_all and (left - moves[best]).norm() >= left.norm():
            break
        left = left - moves.pop(best)
    return given["target"][row] - left


@pytest.mark.parametrize("unit", ["move", "feature"])
@pytest.mark.parametrize("spend_all", [False, True])
def test_batched_edits_are_those_of_the_definition(unit: str, spend_all: bool) -> None:
    given = problem()
    edit = sparse_edit(**given, budget=8, unit=unit, spend_all=spend_all)
    for row in range(PAIRS):
        for budget in range(9):
            expected = by_hand(given, row, budget, unit, spend_all)
            torch.testing.assert_close(edit.path[row, budget], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("unit", ["move", "feature"])
def test_what_is_recorded_is_what_was_done(unit: str) -> None:
    given = problem(1)
    edit = sparse_edit(**given, budget=4, unit=unit)
    change = edit.added * given["target_codes"][:, None] - edit.removed * given["source_codes"][:, None]
    torch.testing.assert_close(edit.path, given["source"][:, None] + change @ given["decoder_weight"])
    counts = (edit.removed | edit.added) if unit == "feature" else torch.cat([edit.removed, edit.added], dim=2)
    assert (counts.sum(dim=2) <= torch.arange(5)).all()


@pytest.mark.parametrize("unit", ["move", "feature"])
def test_a_larger_budget_never_ends_further_away(unit: str) -> None:
    given = problem(2)
    distance = sparse_edit(**given, budget=10, unit=unit).distance(given["target"])
    for before, after in pairwise(distance.T):
        assert (after <= before + 1e-6).all()


def test_an_exact_dictionary_with_enough_budget_reproduces_the_target() -> None:
    given = problem(3)
    for which in ("source", "target"):
        given[which] = given[f"{which}_codes"] @ given["decoder_weight"]
    edit = sparse_edit(**given, budget=6, spend_all=True)
    torch.testing.assert_close(edit.path[:, 6], given["target"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("unit", ["move", "feature"])
def test_greedy_is_exact_for_orthogonal_directions_and_close_for_others(unit: str) -> None:
    given = problem(4)
    narrow = {name: each[:, :D] if "codes" in name else each for name, each in given.items()}
    orthogonal = {**narrow, "decoder_weight": torch.linalg.qr(torch.randn(D, D)).Q}
    gaps = []
    for each, exactly in ((orthogonal, True), (given, False)):
        edit = sparse_edit(**each, budget=2, unit=unit)
        for row in range(PAIRS):
            rows = {name: value if name == "decoder_weight" else value[row] for name, value in each.items()}
            best = (exact_edit(**rows, budget=2, unit=unit) - rows["target"]).norm()
            greedy = edit.distance(each["target"])[row, 2]
            assert greedy >= best - 1e-5
            if exactly:
                assert greedy == pytest.approx(float(best), abs=1e-4)
            else:
                gaps.append(float(greedy / best))
    assert max(gaps) < 2


def test_the_exact_edit_can_beat_the_greedy_one() -> None:
    # Together the first two features hit the target; the third alone comes nearer than either.
    decoder = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    source, target = torch.zeros(2), torch.tensor([1.0, 1.0])
    codes = torch.zeros(3), torch.tensor([1.0, 1.0, 1.2])
    greedy = sparse_edit(source[None], target[None], codes[0][None], codes[1][None], decoder, 2)
    best = exact_edit(source, target, *codes, decoder, 2)
    torch.testing.assert_close(best, target)
    assert greedy.distance(target[None])[0, 2] > 0.1


def test_too_many_candidates_to_enumerate_are_refused() -> None:
    with pytest.raises(InputError, match="15 candidates"):
        exact_edit(torch.zeros(3), torch.ones(3), torch.zeros(15), torch.ones(15), torch.randn(15, 3), 2)


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(InputError, match="budget=-1"):
        sparse_edit(**problem(), budget=-1)


def test_empty_codes_leave_activations_alone() -> None:
    given = {**problem(), "source_codes": torch.zeros(PAIRS, FEATURES), "target_codes": torch.zeros(PAIRS, FEATURES)}
    edit = sparse_edit(**given, budget=2)
    assert torch.equal(edit.path, given["source"][:, None].expand(-1, 3, -1))
    assert not (edit.removed | edit.added).any()


def test_weights_sum_to_one_and_magnitude_is_what_was_removed() -> None:
    given = problem(5)
    codes = given["source_codes"].clone()
    codes[2] = 0
    weights = feature_weights(codes, given["decoder_weight"])
    expected = torch.ones(PAIRS)
    expected[2] = 0
    torch.testing.assert_close(weights.sum(dim=1), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(edit_magnitude(codes != 0, weights), expected, atol=1e-5, rtol=1e-5)
    assert edit_magnitude(torch.zeros_like(codes, dtype=torch.bool), weights).abs().max() == 0
    j = int(codes[0].nonzero()[0])
    explained = codes[0] @ given["decoder_weight"]
    by_definition = codes[0, j] * (given["decoder_weight"][j] @ explained) / explained.square().sum()
    torch.testing.assert_close(weights[0, j], by_definition)


def test_magnitudes_come_for_every_budget() -> None:
    given = problem(6)
    edit = sparse_edit(**given, budget=3)
    magnitude = edit_magnitude(edit.removed, feature_weights(given["source_codes"], given["decoder_weight"]))
    assert magnitude.shape == (PAIRS, 4)
    assert magnitude[:, 0].abs().max() == 0


def test_interpretation_aware_edits_take_the_active_features_that_say_it_best() -> None:
    decoder = torch.eye(4)
    source, old = torch.tensor([[1.0, 2.0, 0.0, 5.0]]), torch.tensor([[1.0, 2.0, 0.0, 0.0]])
    new = torch.tensor([[0.0, 2.5, 3.0, 0.0]])
    f1_before, f1_after = torch.tensor([[0.9, 0.3, 1.0, 0.0]]), torch.tensor([[0.9, 0.0, 0.8, 1.0]])
    edit = interpretation_aware_edit(source, old, new, decoder, f1_before, f1_after, budget=2)
    assert edit.path[0].tolist() == [[1.0, 2.0, 0.0, 5.0], [0.0, 2.0, 3.0, 5.0], [0.0, 0.0, 3.0, 5.0]]
    assert edit.removed[0, 2].tolist() == [True, True, False, False]
    assert edit.added[0, 2].tolist() == [False, False, True, False]  # an F1 of zero says nothing


def test_ablating_a_subspace_leaves_nothing_or_the_mean_in_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x, directions = torch.randn(5, D, generator=generator) + 2, torch.randn(2, D, generator=generator)
    dependent = torch.cat([directions, directions.sum(dim=0, keepdim=True)])
    nothing = ablate_subspace(x, dependent)
    torch.testing.assert_close(nothing @ directions.T, torch.zeros(5, 2), atol=1e-4, rtol=0)
    mean = x.mean(dim=0)
    averaged = ablate_subspace(x, dependent, mean)
    torch.testing.assert_close(averaged @ directions.T, (mean @ directions.T).expand(5, 2), atol=1e-4, rtol=1e-4)
    across = torch.linalg.svd(directions).Vh[2:]
    torch.testing.assert_close(averaged @ across.T, x @ across.T, atol=1e-4, rtol=1e-4)
    assert torch.equal(ablate_subspace(x, directions[:0]), x)


def test_agreement_stands_beside_that_of_no_edit() -> None:
    one_hot = torch.eye(3)
    patched, clean = one_hot[[0, 1, 2, 0]], one_hot[[0, 0, 0, 0]]
    edited = one_hot[[0, 1, 0, 0]]
    found = Agreement.of(edited, patched, clean)
    assert (found.accuracy, found.no_edit, found.corrected, found.pairs) == (0.75, 0.5, 0.5, 4)
    assert Agreement.of(clean, patched, clean).corrected == 0
    assert math.isnan(Agreement.of(edited, clean, clean).corrected)
