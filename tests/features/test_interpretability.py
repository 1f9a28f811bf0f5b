"""What features say about prompts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.errors import InputError
from apportion.features.interpretability import (
    best_predicates,
    f1_scores,
    interpretable,
    keep_features,
    predicates_of,
    union_f1,
)

TABLE = {"IO": ["Mary", "John", "Mary", "Tom"], "S": ["Tom", "Mary", "John", "Mary"], "Pos": ["A", "B", "A", "A"]}


def random_sets(seed: int, prompts: int = 40, features: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(prompts, features, generator=generator) < torch.rand(features, generator=generator)
    return active, torch.rand(prompts, generator=generator) < 0.4


def f1_by_hand(active: torch.Tensor, truth: torch.Tensor) -> float:
    both = int((active & truth).sum())
    if both == 0:
        return 0.0
    precision, recall = both / int(active.sum()), both / int(truth.sum())
    return 2 * precision * recall / (precision + recall)


def test_predicates_are_values_conjunctions_groups_and_anywhere() -> None:
    found = predicates_of(TABLE, ["Pos", ("IO", "Pos")], {"IO": {"women": ["Mary"]}}, anywhere=("IO", "S"))
    truth = dict(zip(map(str, found.names), found.truth.T.tolist(), strict=True))
    assert truth["('Pos', 'A')"] == [True, False, True, True]
    assert truth["(('IO', 'Pos'), ('Mary', 'A'))"] == [True, False, True, False]
    assert truth["('IO', 'women')"] == [True, False, True, False]
    assert truth["('IO or S', 'Tom')"] == [True, False, False, True]
    assert found.index("Pos", "B") == 1
    with pytest.raises(InputError, match="'Pos' is 'C'"):
        found.index("Pos", "C")
    with pytest.raises(InputError, match="no predicate"):
        predicates_of(TABLE, [])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_f1_is_the_harmonic_mean_of_precision_and_recall_and_bounds_both(seed: int) -> None:
    active, truth = random_sets(seed)
    scores = f1_scores(active, truth[:, None])[:, 0]
    for feature, score in enumerate(scores.tolist()):
        assert score == pytest.approx(f1_by_hand(active[:, feature], truth), abs=1e-6)
        if score > 0:
            both = int((active[:, feature] & truth).sum())
            bound = score / (2 - score) - 1e-6
            assert both / int(active[:, feature].sum()) >= bound
            assert both / int(truth.sum()) >= bound


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_a_union_is_never_worse_than_its_best_feature_nor_than_a_smaller_union(seed: int) -> None:
    active, truth = random_sets(seed)
    best_single = float(f1_scores(active, truth[:, None]).max())
    before = best_single
    for size in (1, 2, 5):
        score, chosen = union_f1(active, truth, size)
        assert score >= before - 1e-6
        assert len(chosen) <= size
        if chosen:
            assert score == pytest.approx(f1_by_hand(active[:, chosen].any(dim=1), truth), abs=1e-6)
        before = score


def test_a_union_finds_the_parts_of_a_predicate() -> None:
    truth = torch.tensor([True] * 6 + [False] * 4)
    active = torch.zeros(10, 3, dtype=torch.bool)
    active[:3, 0], active[3:6, 1], active[5:, 2] = True, True, True
    assert union_f1(active, truth, 3) == (1.0, [0, 1])
    with pytest.raises(InputError, match="size=0"):
        union_f1(active, truth, 0)


def test_features_are_kept_by_what_they_tell() -> None:
    predicates = predicates_of(TABLE, ["Pos", "IO"])
    active = torch.tensor([[True, True], [False, True], [True, False], [True, False]])
    f1 = f1_scores(active, predicates.truth)
    assert best_predicates(f1, predicates)[0] == ("Pos is A", 1.0)
    kept = interpretable(f1, 0.9)
    assert kept.tolist() == [True, False]
    codes, decoder = active.float(), torch.eye(2)
    rebuilt = keep_features(codes, kept, decoder, torch.tensor([0.5, 0.5]))
    assert rebuilt.tolist() == [[1.5, 0.5], [0.5, 0.5], [1.5, 0.5], [1.5, 0.5]]
    with pytest.raises(InputError, match="threshold=0"):
        interpretable(f1, 0.0)
