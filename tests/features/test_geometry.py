"""Chunked nearest features against the full cosine matrix."""

import numpy as np
import pytest
import torch

from apportion.features.geometry import nearest_features


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_nearest_features_equal_a_sort_of_the_full_cosine_matrix(chunk):
    torch.manual_seed(0)
    directions = torch.randn(40, 9) * torch.rand(40, 1)
    found = nearest_features(directions, top=6, chunk=chunk)
    cosine = torch.nn.functional.cosine_similarity(directions[:, None], directions[None], dim=2).numpy()
    np.fill_diagonal(cosine, -np.inf)
    order = np.argsort(-cosine, axis=1)[:, :6]
    assert (found.indices == order).all()
    np.testing.assert_allclose(found.cosine, np.take_along_axis(cosine, order, 1), rtol=1e-4, atol=1e-5)


def test_a_feature_is_never_its_own_neighbour_and_zero_rows_are_allowed():
    directions = torch.ones(5, 3)
    directions[2] = 0
    found = nearest_features(directions, top=4)
    assert all(feature not in found.indices[feature] for feature in range(5))
    assert (found.cosine[2] == 0).all()
    assert found.cosine.max() <= 1


def test_one_feature_has_no_neighbours():
    assert nearest_features(torch.ones(1, 3)).indices.shape == (1, 0)
