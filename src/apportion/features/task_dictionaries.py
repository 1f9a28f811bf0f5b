"""Dictionaries found without labels, on a task's activations: the arms that a supervised dictionary is held against.

ReLU with an L1 penalty, TopK, Gated (arXiv 2405.08366, section 2 and its authors' code), all trained by
``fit_dictionary``; and the controls that any of them has to beat: a *frozen* random decoder whose encoder is trained,
and a *random* dictionary that was not trained at all.

Differences from the paper: no resampling of dead features (an auxiliary loss is at hand in ``Recipe``); TopK values are
rectified, where the authors' code lets them be negative. Attribution dictionaries (which add gradients to the loss) are
not among these arms.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.allocate import Threshold, TokenChoice
from apportion.errors import InputError
from apportion.features.dictionary import SparseAutoencoder
from apportion.features.fitting import Recipe, fit_dictionary

Kind = Literal["topk", "relu", "gated"]


def l1_penalty(weight: float, sample: Float[Tensor, "tokens d"], mean_norm: float | None = None) -> float:
    """The ``Recipe.penalty`` that stands for a published L1 weight.

    Papers minimise ``|x - x_hat|^2 + weight * |f|_1``. `fit_dictionary` divides the squared error by the variance and
    scales inputs to mean square distance d from their centre, so the same trade-off is ``weight / sqrt(d * v)``, where
    v is the mean square distance in the units that the paper's weight is for.

    Args:
        weight: as published.
        sample: activations.
        mean_norm: the mean norm that the paper scales inputs to: 1 (weights .01 to .3) or the root of d (.5 to 5, the
            authors' code). None: the weight is for the activations as they are.
    """
    variance = float((sample - sample.mean(dim=0)).square().sum(dim=1).mean())
    if mean_norm is not None:
        variance = mean_norm**2
    return weight / math.sqrt(sample.shape[1] * variance)


def task_recipe(
    kind: Kind,
    sample: Float[Tensor, "tokens d"],
    *,
    n_features: int = 512,
    steps: int = 1500,
    k: int = 6,
    l1: float = 1.0,
    learning_rate: float = 1e-3,
    batch_size: int = 512,
    seed: int = 0,
) -> Recipe:
    """The recipe of an arm; defaults near those of the paper's authors (8 times the width of a GPT-2 head).

    Args:
        kind: ``topk``, ``relu`` or ``gated``.
        sample: activations, for the meaning of ``l1``.
        n_features: F.
        steps: optimiser steps (the authors' 2000 epochs of 20,000 prompts are far more).
        k: of TopK; the authors try 3, 6, 12, 24.
        l1: of the others, for inputs of mean norm ``sqrt(d)``; the authors try .5, 1, 2.5, 5.
        learning_rate: of Adam; 1e-3 in the paper, 3e-4 in the code.
        batch_size: prompts a step.
        seed: of the initial directions.

    Raises:
        InputError: an unknown kind, or a number that ``Recipe`` refuses.
    """
    if kind not in ("topk", "relu", "gated"):
        raise InputError(f"kind={kind!r}: one of topk, relu, gated")
    return Recipe(
        TokenChoice(k) if kind == "topk" else Threshold(0.0),
        n_features=n_features,
        steps=steps,
        batch_size=batch_size,
        gated=kind == "gated",
        learning_rate=learning_rate,
        auxiliary="none",
        penalty=l1_penalty(l1, sample, mean_norm=math.sqrt(sample.shape[1])),
        seed=seed,
    )


def fit_on_task(x: Float[Tensor, "tokens d"], recipe: Recipe, *, freeze_decoder: bool = False) -> SparseAutoencoder:
    """Train a dictionary on a table of activations, rows drawn anew for every step.

    Args:
        x: the activations.
        recipe: see ``task_recipe``.
        freeze_decoder: leave the random directions of the decoder as they are and train the rest.

    Returns:
        The dictionary in evaluation mode; its codes are in the units of the activations.
    """

    def batch(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        return x[torch.randint(x.shape[0], (recipe.batch_size,), generator=generator)]

    def freeze(sae: SparseAutoencoder) -> None:
        sae.decoder_weight.requires_grad_(not freeze_decoder)

    sae, _ = fit_dictionary(recipe, batch, x.shape[1], start_from=freeze, progress=False)
    return sae


def random_dictionary(x: Float[Tensor, "tokens d"], recipe: Recipe) -> SparseAutoencoder:
    """What ``fit_on_task`` starts from: random directions, an encoder tied to them, the scale and the centre of x."""
    sae = SparseAutoencoder(x.shape[1], recipe.n_features, recipe.rule, gated=recipe.gated, seed=recipe.seed)
    sae.initialise_from(x)
    sae.fold_scale()
    return sae.eval()


@torch.no_grad()
def dense_codes(sae: SparseAutoencoder, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens features"]:
    """Codes as the tests of control and interpretability take them."""
    return sae.encode(x).to_dense()
