"""The problem that all training steps get: the same activations, the same initial directions."""

from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor

from apportion.data import SyntheticDictionary

LEARNING_RATE = 1e-4
_BATCHES = 4  # taken in turn, so that no step finds its input in the cache


@dataclass(frozen=True)
class Shape:
    """Sizes of a dictionary's training step.

    Attributes:
        tokens: rows of the batch.
        width: of the activations, d.
        features: of the dictionary, F.
        budget: winners per token on average, k.
    """

    tokens: int = 2048
    width: int = 576
    features: int = 8192
    budget: int = 32

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)

    @property
    def scores_bytes(self) -> int:
        """Size of the tokens x features matrix of scores in float32."""
        return 4 * self.tokens * self.features


USUAL = Shape()
SMOKE = Shape(tokens=64, width=16, features=128, budget=4)


class Problem:
    """Batches and initial directions of a shape.

    The activations are sparse sums of directions whose popularity follows Zipf's law, centred and scaled to a mean
    squared norm of ``width``: what apportion scales every input to, and what the defaults of its peers suppose.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        truth = SyntheticDictionary(d=shape.width, n_true=4 * shape.width, mean_l0=shape.budget / 2)
        self.batches = [_scaled(truth.sample(shape.tokens, seed).x) for seed in range(1, 1 + _BATCHES)]

    def batch(self, turn: int) -> Tensor:
        """The batch of a step."""
        return self.batches[turn % _BATCHES]

    @cached_property
    def directions(self) -> Tensor:
        """Unit rows [features, width]: every encoder and every decoder starts from them."""
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(self.shape.features, self.shape.width, generator=generator)
        return directions / directions.norm(dim=1, keepdim=True)


def _scaled(x: Tensor) -> Tensor:
    x = x - x.mean(dim=0)
    return x * (x.shape[1] / x.square().sum(dim=1).mean()).sqrt()
