"""Multi-query associative recall: pairs of a key and a value, then the same keys in another order.

``a 3 c 7 b 1 | b 1 a 3 c 7``: after each key of the second half the model has to say its value. A model that reads only
nearby tokens cannot; how far back the pair stands is drawn. The form is that of Arora et al. 2023 (arXiv 2312.04927).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from apportion.errors import InputError


@dataclass(frozen=True)
class Recall:
    """The task and its sizes.

    Attributes:
        pairs: in each text, all with different keys.
        keys: there are, tokens 0 to ``keys - 1``.
        values: there are, the tokens after the keys; several keys may have one value.

    Raises:
        InputError: more pairs than keys, or a size below 1.
    """

    pairs: int = 16
    keys: int = 32
    values: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.keys:
            raise InputError(f"pairs={self.pairs}: from 1 to keys={self.keys}, since no key comes twice")
        if self.values < 1:
            raise InputError(f"values={self.values}: at least 1")

    @property
    def length(self) -> int:
        """Tokens of a text."""
        return 4 * self.pairs

    @property
    def vocabulary(self) -> int:
        """Tokens there are."""
        return self.keys + self.values

    @property
    def asked(self) -> slice:
        """Where the keys of the second half stand; the token after each is the answer."""
        return slice(2 * self.pairs, 4 * self.pairs, 2)

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / self.values

    def draw(self, count: int, seed: int) -> Int[Tensor, "count length"]:
        """Some texts; the same seed gives the same.

        Args:
            count: texts.
            seed: of the draws.
        """
        generator = torch.Generator().manual_seed(seed)
        keys = torch.rand(count, self.keys, generator=generator).argsort(1)[:, : self.pairs]
        values = self.keys + torch.randint(self.values, (count, self.pairs), generator=generator)
        order = torch.rand(count, self.pairs, generator=generator).argsort(1)
        first = torch.stack([keys, values], dim=2).flatten(1)
        second = torch.stack([keys.gather(1, order), values.gather(1, order)], dim=2).flatten(1)
        return torch.cat([first, second], dim=1)

    def answers(self, texts: Int[Tensor, "count length"]) -> Int[Tensor, "count pairs"]:
        """What comes after each asked key."""
        return texts[:, self.asked.start + 1 :: 2]
