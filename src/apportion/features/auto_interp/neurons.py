"""Neurons as if they were a dictionary's features: what the paper compares dictionaries with."""

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.allocate import Allocation, TokenChoice
from apportion.errors import InputError


class TopNeurons:
    """The ``k`` neurons of largest magnitude on each token, so that they fire as rarely as a dictionary's features do.

    Args:
        width: number of neurons, see the site ``layers.9.neurons``.
        k: neurons a token.
        rotation: seed of a random orthogonal matrix that mixes the neurons first: directions of the same space that
            nothing singles out; None leaves the neurons as they are.

    Raises:
        InputError: sizes that cannot work.
    """

    def __init__(self, width: int, k: int, rotation: int | None = None) -> None:
        if not 1 <= k <= width:
            raise InputError(f"k={k}: from 1 to the number of neurons, which is {width}")
        self.n_features, self.rule = width, TokenChoice(k)
        self._rotation: Tensor | None = None
        if rotation is not None:
            random = torch.randn(width, width, generator=torch.Generator().manual_seed(rotation))
            self._rotation = torch.linalg.qr(random).Q

    def encode(self, x: Float[Tensor, "tokens width"]) -> Allocation:
        """Magnitudes of the winners."""
        turned = x if self._rotation is None else x @ self._rotation.to(x)
        return self.rule(turned.abs())
