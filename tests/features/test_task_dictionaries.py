"""The arms that a supervised dictionary is held against."""

import math

import pytest
import torch

from apportion.allocate import Threshold, TokenChoice
from apportion.features import SparseAutoencoder, l1_loss
from apportion.features.task_dictionaries import dense_codes, fit_on_task, l1_penalty, random_dictionary, task_recipe


def activations(rows: int = 120, d: int = 8) -> torch.Tensor:
    """Two of twelve directions each, off centre and far from unit scale."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(12, d, generator=generator)
    pairs = torch.randint(12, (rows, 2), generator=generator)
    return 5 * directions[pairs].sum(dim=1) + 3


def left(sae: SparseAutoencoder, x: torch.Tensor) -> float:
    with torch.no_grad():
        output = sae(x).output
    return float((x - output).square().sum() / (x - x.mean(dim=0)).square().sum())


def test_a_penalty_means_what_the_published_weight_means() -> None:
    x = activations()
    weight, scale = 0.7, 4.0
    sae = SparseAutoencoder(8, 16, Threshold(0.0))
    sae.initialise_from(x)
    codes = sae.encode(x).detach()
    # In the units of x codes are f / scale: the published loss over the variance is what the recipe minimises.
    l1 = float(l1_loss(codes, sae.decoder_weight.detach()))
    published = weight * l1 / float(sae.input_scale)
    variance = float((x - x.mean(dim=0)).square().sum(dim=1).mean())
    assert l1_penalty(weight, x) * l1 == pytest.approx(published / variance, rel=0.05)  # centre: median against mean
    assert l1_penalty(weight, x, mean_norm=1) == pytest.approx(weight / math.sqrt(8))
    assert l1_penalty(weight, x, mean_norm=math.sqrt(8)) == pytest.approx(weight / 8)
    assert l1_penalty(weight, scale * x) == pytest.approx(l1_penalty(weight, x) / scale)


def test_arms_are_what_they_are_called() -> None:
    x = activations()
    assert task_recipe("topk", x, k=3).rule == TokenChoice(3)
    assert isinstance(task_recipe("relu", x).rule, Threshold)
    assert task_recipe("gated", x).gated
    assert task_recipe("relu", x, l1=2.0).penalty == pytest.approx(2.0 / 8)


@pytest.mark.parametrize("kind", ["topk", "relu", "gated"])
def test_training_beats_the_random_dictionary(kind: str) -> None:
    x = activations()
    recipe = task_recipe(kind, x, n_features=24, steps=100, k=2, l1=0.05, learning_rate=1e-2, batch_size=64)
    fitted = fit_on_task(x, recipe)
    assert left(fitted, x) < 0.7 * left(random_dictionary(x, recipe), x)
    codes = dense_codes(fitted, x)
    torch.testing.assert_close(codes @ fitted.decoder_weight + fitted.decoder_bias, fitted(x).output)


def test_a_frozen_decoder_keeps_its_random_directions_and_learns_the_rest() -> None:
    x = activations()
    recipe = task_recipe("topk", x, n_features=24, steps=60, k=2, learning_rate=1e-2, batch_size=64)
    frozen, start = fit_on_task(x, recipe, freeze_decoder=True), random_dictionary(x, recipe)
    torch.testing.assert_close(frozen.decoder_weight, start.decoder_weight)
    assert not torch.allclose(frozen.encoder_weight, start.encoder_weight, atol=1e-2)
    assert left(frozen, x) < left(start, x)
