"""Two dictionaries are compared by their directions and by the tokens they fire on; big ones in chunks."""

import itertools

import numpy as np
import pytest
import torch

from apportion.allocate import TokenChoice
from apportion.errors import InputError
from apportion.features import SparseAutoencoder
from apportion.features.similarity import best_matches, compare_activations, one_to_one

D = 8


def directions(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def test_a_permuted_and_rescaled_copy_is_found_again() -> None:
    a = directions(20, 0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    b = a[order] * torch.linspace(0.1, 9, 20).unsqueeze(1)
    best = best_matches(a, b, chunk=7)
    assert (order[torch.from_numpy(best.indices)] == torch.arange(20)).all()
    np.testing.assert_allclose(best.similarity, 1, atol=1e-5)
    for limit in (100, 0):
        matching = one_to_one(a, b, hungarian_limit=limit, chunk=7)
        assert matching.method == ("hungarian" if limit else "greedy")
        assert (order.numpy()[matching.b] == matching.a).all()
        assert matching.shared() == 20
        assert [len(each) for each in matching.alone(20, 20)] == [0, 0]


def test_the_assignment_is_the_best_of_all() -> None:
    a, b = directions(5, 2), directions(6, 3)
    matching = one_to_one(a, b)
    cosine = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    best = max(
        sum(float(cosine[row, column]) for row, column in enumerate(chosen))
        for chosen in itertools.permutations(range(6), 5)
    )
    assert matching.cosine.sum() == pytest.approx(best, rel=1e-5)
    assert len(set(matching.b.tolist())) == 5
    assert (np.diff(matching.cosine) <= 0).all()
    greedy = one_to_one(a, b, hungarian_limit=0)
    assert greedy.cosine.sum() <= best + 1e-6
    assert greedy.cosine[0] == pytest.approx(float(cosine.max()), rel=1e-5)


def test_opposite_directions_are_neither_partners_nor_shared() -> None:
    a = torch.eye(D)[:3]
    matching = one_to_one(a, -a)
    assert (matching.cosine == 0).all()
    assert matching.shared() == 0
    assert [each.tolist() for each in matching.alone(3, 3)] == [[0, 1, 2], [0, 1, 2]]


def test_activations_of_partners_agree_with_dense_correlations() -> None:
    a, b = (SparseAutoencoder(D, 20, TokenChoice(3), seed=seed).eval() for seed in (0, 1))
    x = directions(300, 5)
    matching = one_to_one(a.decoder_weight, b.decoder_weight)
    pairs, best = compare_activations(a, b, [(x[:100], x[:100]), (x[100:], x[100:])], matching, chunk=7)
    codes_a, codes_b = (each.encode(x).to_dense().detach().double().numpy() for each in (a, b))
    full = np.corrcoef(codes_a.T, codes_b.T)[:20, 20:]
    np.testing.assert_allclose(pairs.correlation, full[matching.a, matching.b], atol=1e-5)
    np.testing.assert_allclose(best.similarity, full.max(axis=1), atol=1e-5)
    assert (best.indices == full.argmax(axis=1)).all()
    both = (codes_a[:, matching.a] > 0) & (codes_b[:, matching.b] > 0)
    either = (codes_a[:, matching.a] > 0) | (codes_b[:, matching.b] > 0)
    np.testing.assert_allclose(pairs.overlap, both.sum(0) / either.sum(0))
    assert pairs.tokens == 300
    assert (pairs.fires_a == (codes_a[:, matching.a] > 0).sum(0)).all()


def test_a_feature_that_never_fires_correlates_with_nothing() -> None:
    a = SparseAutoencoder(D, 20, TokenChoice(3)).eval()
    with torch.no_grad():
        a.encoder_bias[4] = -1e6
    x = directions(100, 5)
    matching = one_to_one(a.decoder_weight, a.decoder_weight)
    pairs, best = compare_activations(a, a, [(x, x)], matching)
    silent = matching.a == 4
    assert pairs.correlation[silent] == pairs.overlap[silent] == 0
    assert best.similarity[4] == 0
    np.testing.assert_allclose(pairs.correlation[~silent], 1, atol=1e-5)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="width 8, the other 3"):
        best_matches(directions(4, 0), torch.ones(4, 3))
    with pytest.raises(InputError, match="no features"):
        one_to_one(directions(4, 0), torch.ones(0, D))
    a = SparseAutoencoder(D, 20, TokenChoice(3)).eval()
    with pytest.raises(InputError, match="no tokens"):
        compare_activations(a, a, [], one_to_one(a.decoder_weight, a.decoder_weight))
