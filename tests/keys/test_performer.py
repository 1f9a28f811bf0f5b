"""FAVOR+ features and linear attention."""

import itertools

import pytest
import torch
from torch import Tensor

from apportion.keys.performer import (
    PerformerFeatures,
    attend_linearly,
    attend_linearly_causal,
    orthogonal_directions,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_with_many_features_linear_attention_is_softmax_attention() -> None:
    # Of a third of the usual length: the longer the vectors, the more features until the law of large numbers is felt.
    q, k, v = (draw(2, 2, 30, 8, seed=seed) / 3 for seed in range(3))
    real = torch.ones(2, 30, dtype=torch.bool)
    real[0, 25:] = False
    logits = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~real[:, None, None], -torch.inf)
    exact = logits.softmax(-1) @ v
    errors = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for features in (256, 4096, 65536):
            of_draws = []
            for _ in range(4):
                kernel = PerformerFeatures(8, features, "softmax")
                out = attend_linearly(kernel(q), kernel(k, kernel.largest_exponent(k, real)), v, real)
                of_draws.append(float((out - exact).norm() / exact.norm()))
            errors.append(sum(of_draws) / 4)
    # Sixteen times the features: a quarter of the error.
    for fewer, more in itertools.pairwise(errors):
        assert more == pytest.approx(fewer / 4, rel=0.5)
    assert errors[-1] < 0.05


@pytest.mark.parametrize("n", [1, 63, 64, 130])
def test_causal_linear_attention_is_that_over_a_table_of_pairs(n: int) -> None:
    q, k, v = draw(2, 2, n, 12).relu() + 0.01, draw(2, 2, n, 12, seed=1).relu() + 0.01, draw(2, 2, n, 5, seed=2)
    real = torch.rand(2, n, generator=torch.Generator().manual_seed(3)) < 0.8
    pairs = (q @ k.transpose(-1, -2)).tril() * real[:, None, None]
    table = pairs @ v / pairs.sum(-1, keepdim=True).clamp_min(1e-9)
    out, state = attend_linearly_causal(q, k, v, real)
    torch.testing.assert_close(out, table, rtol=1e-4, atol=1e-5)
    cut = n // 3
    between = None
    first = out[:, :, :0]
    if cut:
        first, between = attend_linearly_causal(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], real[:, :cut])
    second, after = attend_linearly_causal(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], real[:, cut:], between)
    torch.testing.assert_close(torch.cat([first, second], dim=2), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.mixed, state.mixed)


def test_directions_are_orthogonal_in_blocks_and_as_long_as_gaussian_vectors() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        directions = orthogonal_directions(600, 12)
    unit = directions / directions.norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit[:12] @ unit[:12].T, torch.eye(12), atol=1e-5, rtol=0)
    assert float(directions.square().sum(1).mean()) == pytest.approx(12, rel=0.1)


def test_directions_are_drawn_anew_in_training_only_and_are_part_of_a_checkpoint() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kernel = PerformerFeatures(4, 8, "relu", redraw_every=3)
        drawn = [kernel.directions.clone()]
        for training in (False, False, False, True, True, True):
            kernel.train(training).maybe_redraw()
            drawn.append(kernel.directions.clone())
    assert [torch.equal(drawn[0], each) for each in drawn[1:]] == [True] * 5 + [False]
    assert {"directions", "calls"} == set(kernel.state_dict())
