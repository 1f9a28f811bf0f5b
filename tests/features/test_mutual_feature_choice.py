"""The anchor paper's own parts: Zipf's law, the phases, shares by demand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.allocate import FeatureChoice, MutualChoice, Threshold, TokenChoice, Zipf
from apportion.errors import InputError
from apportion.features import Phases, SparseAutoencoder, fit_zipf, underused_features
from apportion.features.mutual_feature_choice import ranks_by, set_shares_by_demand


@given(
    exponent=st.floats(0.3, 2.0),
    offset=st.sampled_from([0.0, 1.0, 3.0, 10.0, 30.0]),
    scale=st.floats(1e-3, 0.5),
    seed=st.integers(0, 5),
)
def test_the_fit_finds_the_law_that_made_the_densities(exponent: float, offset: float, scale: float, seed: int) -> None:
    density = scale * (torch.arange(1, 401, dtype=torch.float64) + offset) ** -exponent
    order = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
    fit = fit_zipf(density[order])
    assert fit.exponent == pytest.approx(exponent, rel=1e-6)
    assert fit.offset == offset
    assert fit.scale == pytest.approx(scale, rel=1e-6)
    assert fit.r_squared == pytest.approx(1.0)


def test_a_drooping_tail_does_not_drag_the_exponent() -> None:
    density = torch.arange(1, 1001, dtype=torch.float64) ** -1.0
    density[800:] *= 1e-3
    assert fit_zipf(density).exponent == pytest.approx(1.0, rel=1e-6)


def test_features_below_half_their_expectation_are_underused() -> None:
    density = torch.arange(1, 101, dtype=torch.float64) ** -1.0
    density[80:90] *= 0.3
    density[90:] = 0
    found = underused_features(density.float(), fit_zipf(density.float()))
    assert bool(found[80:].all())
    assert not bool(found[:80].any())


def test_too_little_data_for_a_law_is_refused() -> None:
    with pytest.raises(InputError, match="densities"):
        fit_zipf(torch.zeros(50))


def test_ranks_are_one_for_the_largest_and_ties_go_by_index() -> None:
    assert ranks_by(torch.tensor([0.1, 0.5, 0.1, 0.9])).tolist() == [3, 2, 4, 1]


def test_phases_anneal_the_budget_then_hand_over_to_feature_choice() -> None:
    phases = Phases(warmup_fraction=0.1, budget_factor=4, mutual_fraction=0.5)
    rule = FeatureChoice(8, profile=Zipf())
    assert phases.rule(rule, 1000, 0, 100) == MutualChoice(32)
    assert phases.rule(rule, 1000, 5, 100) == MutualChoice(20)
    assert phases.rule(rule, 1000, 10, 100) == MutualChoice(8)
    assert phases.rule(rule, 1000, 50, 100) == FeatureChoice(8, profile=Zipf())
    assert phases.rule(TokenChoice(8), 1000, 0, 100) == TokenChoice(32)
    assert phases.rule(TokenChoice(8), 20, 0, 100) == TokenChoice(20)
    relu = Threshold(0.0)
    assert phases.rule(relu, 1000, 0, 100) is relu


def test_shares_follow_demand_and_hold_still_under_hysteresis() -> None:
    sae = SparseAutoencoder(4, 6, FeatureChoice(2, profile=Zipf()))
    sae.statistics.demand.copy_(torch.tensor([0.1, 0.9, 0.2, 0.05, 0.5, 0.3]))
    set_shares_by_demand(sae, Zipf(), hysteresis=0.0)
    assert sae.share.argsort(descending=True).tolist() == [1, 4, 5, 2, 0, 3]
    assert float(sae.share.sum()) == pytest.approx(2)
    before = sae.share.clone()
    sae.statistics.demand[[2, 5]] = torch.tensor([0.21, 0.20])  # a small change: ranks stay
    set_shares_by_demand(sae, Zipf())
    assert torch.equal(sae.share, before)
    with pytest.raises(TypeError, match="FeatureChoice"):
        set_shares_by_demand(SparseAutoencoder(4, 6, MutualChoice(2)), Zipf())


@pytest.mark.parametrize("wrong", [{"warmup_fraction": 1.0}, {"mutual_fraction": -0.1}, {"budget_factor": 0.5}])
def test_phases_that_cannot_work_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError):
        Phases(**wrong)
