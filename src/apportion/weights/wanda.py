"""Wanda: a weight matters by its size and by its input's norm (Sun, Liu, Bair, Kolter 2023, arXiv 2306.11695).

Who gets the budget: the weights of each output compete with one another, and no weight is changed. Comparing within
an output rather than over the layer is what makes it work in language models.

| paper | here |
|---|---|
| ``S_ij = abs(W_ij) * norm(X_j)`` | `wanda_scores` |
| s: ``int(in * s)`` weights of a row go | the pattern: ``round((1 - s) * in)`` stay, one weight apart at most |
| M:N | `NofMPattern` (Wanda's code counts the weights that go) |

Magnitude pruning is the same without the inputs, and stands beside it as the baseline of all.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.weights.calibration import InputStatistics
from apportion.weights.one_shot_method import OneShotMethod, Pruned, Seen
from apportion.weights.patterns import Pattern


def wanda_scores(weight: Float[Tensor, "out in"], statistics: InputStatistics) -> Float[Tensor, "out in"]:
    """``abs(W) * norm`` of each weight."""
    return weight.abs() * statistics.norm.to(weight.dtype).to(weight.device)


@dataclass(frozen=True)
class Wanda(OneShotMethod):
    """Weights by their size times the norm of their input; the pattern's scope ought to be ``row``."""

    slug: ClassVar[str] = "wanda"

    def prune(self, weight: Float[Tensor, "out in"], seen: Seen, pattern: Pattern) -> Pruned:
        """Keep the best."""
        return kept(weight, wanda_scores(weight, seen.statistics), pattern)


@dataclass(frozen=True)
class Magnitude(OneShotMethod):
    """Weights by their size."""

    slug: ClassVar[str] = "magnitude"

    def prune(self, weight: Float[Tensor, "out in"], seen: Seen, pattern: Pattern) -> Pruned:
        """Keep the largest."""
        return kept(weight, weight.abs(), pattern)


def kept(weight: Float[Tensor, "out in"], scores: Float[Tensor, "out in"], pattern: Pattern) -> Pruned:
    """The weights with the best scores, as they are."""
    mask = pattern.keep(scores)
    return Pruned(torch.where(mask, weight, 0), mask)
