"""scikit-learn's handwritten digits, in three parts."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from apportion.errors import InputError


@dataclass(frozen=True, eq=False)
class Digits:
    """Pictures of 8 x 8 pixels in rows of 64, from 0 to 1, and which digit each shows.

    Attributes:
        train, validation, test: pictures and labels of each part.
    """

    train: tuple[Float[Tensor, "n 64"], Int64[Tensor, "n"]]
    validation: tuple[Float[Tensor, "k 64"], Int64[Tensor, "k"]]
    test: tuple[Float[Tensor, "count 64"], Int64[Tensor, "count"]]


def digits(seed: int = 0, train: int = 1000, validation: int = 297) -> Digits:
    """The 1,797 pictures, dealt out at random.

    Args:
        seed: of the dealing.
        train: pictures to train on.
        validation: pictures to choose by; the rest is for testing.

    Raises:
        InputError: nothing would be left to test on.
    """
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    if train < 1 or validation < 1 or train + validation >= len(labels):
        raise InputError(
            f"train={train} and validation={validation}: each needs a picture, and together they must leave some of "
            f"the {len(labels)} to test on"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(pictures / 16, dtype=torch.float32)[order], torch.tensor(labels, dtype=torch.int64)[order]
    parts = [
        (x[part], y[part]) for part in (slice(train), slice(train, train + validation), slice(train + validation, None))
    ]
    return Digits(*parts)
