"""A linear fit has a bias, chooses its ridge on held-out documents, and says when it has too few tokens."""

import numpy as np
import pytest
import torch

from apportion.errors import InputError
from apportion.features.linear_fit import (
    LinearMap,
    Moments,
    Tokens,
    determination,
    fit_by_document,
    fit_linear,
    held_out_rows,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


DOCUMENTS = torch.arange(40).repeat_interleave(25)
X = random(1000, 6) * torch.tensor([100.0, 10, 1, 1, 0.1, 0.01]) + 50
Y = X @ random(6, 3, seed=1) + 7 + 0.1 * random(1000, 3, seed=2)


def test_least_squares_with_a_bias_is_numpys() -> None:
    found = fit_linear(Moments(X, Y), ridges=(0.0,))
    design = np.concatenate([X.double().numpy(), np.ones((1000, 1))], axis=1)
    expected = np.linalg.lstsq(design, Y.double().numpy(), rcond=None)[0]
    torch.testing.assert_close(found.weight, torch.from_numpy(expected[:-1]).float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found(X), torch.from_numpy(design @ expected).float(), rtol=1e-4, atol=1e-3)


def test_moments_do_not_depend_on_the_parts_they_were_added_in() -> None:
    whole, parts = Moments(X, Y), Moments(X[:10], Y[:10])
    parts.add(X[10:400], Y[10:400])
    parts.add(X[400:], Y[400:])
    assert parts.n == 1000
    for name in ("input_mean", "target_mean", "covariance", "cross_covariance", "target_variance"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    torch.testing.assert_close(whole.covariance, torch.cov(X.double().T, correction=0))
    torch.testing.assert_close(whole.of(slice(1, 3)).cross_covariance, whole.cross_covariance[:, 1:3])


def test_the_ridge_is_the_one_that_is_best_on_held_out_tokens() -> None:
    noise = random(60, 50, seed=3), random(60, 2, seed=4)
    few, others = Moments(*noise), Moments(random(500, 50, seed=5), random(500, 2, seed=6))
    assert fit_linear(few, others).ridge == 1.0
    assert fit_linear(Moments(X[:500], Y[:500]), Moments(X[500:], Y[500:])).ridge < 1e-3


def test_groups_of_targets_have_ridges_of_their_own() -> None:
    noise = random(1000, 2, seed=9)
    signal, nothing = fit_by_document(X, torch.cat([Y, noise], dim=1), DOCUMENTS, groups=(3, 2))
    assert signal.ridge < nothing.ridge
    (alone,) = fit_by_document(X, Y, DOCUMENTS)
    torch.testing.assert_close(alone.weight, signal.weight, rtol=1e-3, atol=1e-4)


def test_a_split_is_by_document() -> None:
    out = held_out_rows(DOCUMENTS, 0.2)
    assert not set(DOCUMENTS[out].tolist()) & set(DOCUMENTS[~out].tolist())
    assert int(out.sum()) == 200
    assert 0 < int(held_out_rows(DOCUMENTS[:50], 0.01).sum()) < 50
    assert held_out_rows(torch.zeros(5, dtype=torch.int64), 0.2).tolist() == [False] * 4 + [True]


def test_determination_of_what_varies() -> None:
    targets = torch.cat([Y, torch.full((1000, 1), 3.0)], dim=1)
    mean = targets.mean(dim=0).expand_as(targets)
    found = determination(mean, targets)
    assert found.constant_dimensions == 1
    assert found.weighted == pytest.approx(0, abs=1e-6)
    assert found.mean_over_dimensions == pytest.approx(0, abs=1e-6)
    perfect = determination(targets, targets)
    assert perfect.weighted == perfect.mean_over_dimensions == 1
    assert np.isnan(determination(mean[:, 3:], targets[:, 3:]).weighted)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(InputError, match=r"6 tokens cannot decide 6 inputs .* at least 7, or a ridge"):
        fit_linear(Moments(X[:6], Y[:6]), ridges=(0.0,))
    assert isinstance(fit_linear(Moments(X[:6], Y[:6]), ridges=(0.1,)), LinearMap)
    with pytest.raises(InputError, match="no tokens to choose by"):
        fit_linear(Moments(X, Y))
    with pytest.raises(InputError, match="1 tokens cannot be split"):
        held_out_rows(torch.zeros(1, dtype=torch.int64), 0.5)
    with pytest.raises(InputError, match="no tokens to test on"):
        determination(Y[:0], Y[:0])
    with pytest.raises(ValueError, match=r"x\[2\] has NaN"):
        Tokens(torch.tensor([[1.0], [2.0], [float("nan")]]), torch.arange(3))
