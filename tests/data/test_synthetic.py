import pytest
import torch

from apportion.data import SyntheticDictionary


def test_directions_are_unit_vectors_of_the_seed():
    directions = SyntheticDictionary(seed=3).directions
    assert directions.shape == (128, 32)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(128))
    assert torch.equal(directions, SyntheticDictionary(seed=3).directions)
    assert not torch.equal(directions, SyntheticDictionary(seed=4).directions)


def test_a_sample_is_a_pure_function_of_both_seeds():
    truth = SyntheticDictionary(seed=1)
    torch.manual_seed(0)
    once = truth.sample(50, seed=7)
    torch.manual_seed(1)
    again = SyntheticDictionary(seed=1).sample(50, seed=7)
    assert torch.equal(once.x, again.x)
    assert torch.equal(once.codes, again.codes)
    assert not torch.equal(once.x, truth.sample(50, seed=8).x)
    assert not torch.equal(once.codes, SyntheticDictionary(seed=2).sample(50, seed=7).codes)


@pytest.mark.parametrize("heterogeneity", [0.0, 0.6, 1.2])
@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_the_mean_l0_is_exact_although_probabilities_stop_at_one(heterogeneity, exponent):
    truth = SyntheticDictionary(heterogeneity=heterogeneity, exponent=exponent)
    assert float(truth.frequencies.sum()) == pytest.approx(5.0, abs=1e-4)
    assert float(truth.frequencies.max()) <= 1
    l0 = (truth.sample(40_000, seed=0).codes > 0).sum(dim=1).double()
    assert float(l0.mean()) == pytest.approx(5.0, abs=5 * float(l0.std()) / 200)


@pytest.mark.parametrize("constant_l0", [False, True])
def test_each_feature_fires_as_often_as_announced(constant_l0):
    truth = SyntheticDictionary(constant_l0=constant_l0)
    found = (truth.sample(40_000, seed=1).codes > 0).double().mean(dim=0)
    expected = truth.frequencies.double()
    standard_error = (expected * (1 - expected) / 40_000).sqrt()
    assert ((found - expected).abs() < 5 * standard_error + 1e-9).all()


def test_frequencies_follow_the_power_of_the_rank_below_the_cap():
    frequencies = SyntheticDictionary(heterogeneity=0, exponent=1.0).frequencies.double()
    torch.testing.assert_close(
        frequencies[3] / frequencies[15], torch.tensor(4.0, dtype=torch.float64), rtol=1e-5, atol=0
    )
    capped = SyntheticDictionary(heterogeneity=0, mean_l0=20, exponent=1.0).frequencies
    assert float(capped[0]) == 1.0
    assert float(capped.sum()) == pytest.approx(20, abs=1e-4)


def test_tokens_differ_in_difficulty_only_where_asked():
    def variance(**settings):
        return float((SyntheticDictionary(**settings).sample(20_000, seed=0).codes > 0).sum(dim=1).double().var())

    # Independent features of a mean of 5 have a variance below 5; factors of their own widen it.
    assert variance(heterogeneity=0.0) < 5
    assert variance(heterogeneity=0.6) > 7
    assert variance(constant_l0=True) == 0


def test_magnitudes_are_near_one_and_never_below_the_floor():
    codes = SyntheticDictionary().sample(20_000, seed=0).codes
    magnitudes = codes[codes > 0]
    assert float(magnitudes.min()) == pytest.approx(0.2)
    assert float(magnitudes.mean()) == pytest.approx(1.0, abs=0.005)
    assert float(magnitudes.std()) == pytest.approx(0.3, abs=0.01)


def test_what_the_codes_do_not_explain_is_the_noise():
    truth = SyntheticDictionary(noise=0.02)
    batch = truth.sample(5_000, seed=0)
    assert float((batch.x - batch.codes @ truth.directions).std()) == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mean_l0": 0.0}, "mean_l0"),
        ({"mean_l0": 128.0}, "n_true"),
        ({"mean_l0": 2.5, "constant_l0": True}, "whole number"),
        ({"d": 0}, "d is 0"),
        ({"noise": -1.0}, "noise"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, named):
    with pytest.raises(ValueError, match=named):
        SyntheticDictionary(**settings)


def test_a_sample_needs_tokens_and_a_seed():
    with pytest.raises(ValueError, match="n is 0"):
        SyntheticDictionary().sample(0, seed=0)
    with pytest.raises(ValueError, match="seed is -1"):
        SyntheticDictionary().sample(1, seed=-1)
