"""What a pruned network costs in memory, by formula, and the dense network that costs no more.

Bytes are those of files and of memory at rest; what is in the packed formats that products run on is measured where
they are made. A weight is stored as

- ``dense``: every value;
- ``bitmask``: a bit for every place, and the values that stay;
- ``csr``: values that stay, the column of each, and where each row begins, columns and places as small as they can be;
- ``n:m``: values that stay, and for each its place within its group.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from apportion.errors import InputError
from apportion.weights.layers import WeightLayer


def bitmask_bytes(weights: int, kept: int, value_bytes: int = 4) -> int:
    """A bit for every weight and the values that stay."""
    return math.ceil(weights / 8) + kept * value_bytes


def csr_bytes(
    rows: int,
    columns: int,
    kept: int,
    value_bytes: int = 4,
    index_bytes: int | None = None,
    row_bytes: int | None = None,
) -> int:
    """Values, their columns, and where each of the rows begins.

    Args:
        rows: outputs.
        columns: inputs.
        kept: weights that stay.
        value_bytes: of a value.
        index_bytes: of a column; as few of 1, 2, 4 and 8 as will do if None (torch's own CSR has 8, or 4).
        row_bytes: of a row's beginning, likewise.
    """
    index = index_bytes or _bytes_for(columns - 1)
    row = row_bytes or _bytes_for(kept)
    return kept * (value_bytes + index) + (rows + 1) * row


def n_of_m_bytes(weights: int, n: int, m: int, value_bytes: int = 4) -> int:
    """Values that stay, and for each ``log2(m)`` bits, rounded up, that say which of its group it is (2 in 2:4)."""
    kept = math.ceil(weights / m) * n
    return kept * value_bytes + math.ceil(kept * math.ceil(math.log2(m)) / 8)


@dataclass(frozen=True)
class Memory:
    """What a network holds, all parameters counted, its biases, norms and embeddings too.

    Attributes:
        weights: of the layers that can be pruned.
        kept: of these, those that are not 0.
        others: parameters besides.
        dense, bitmask, csr: bytes, if those layers are stored so and everything else densely.
    """

    weights: int
    kept: int
    others: int
    dense: int
    bitmask: int
    csr: int

    @property
    def nonzeros(self) -> int:
        """Weights that are not 0, and all other parameters."""
        return self.kept + self.others

    @property
    def smallest(self) -> int:
        """Bytes in the best of the three."""
        return min(self.dense, self.bitmask, self.csr)


def memory(network: nn.Module, layers: Sequence[WeightLayer], value_bytes: int = 4) -> Memory:
    """Count a network.

    Args:
        network: with masks or without.
        layers: that can be pruned.
        value_bytes: of a value as it would be stored: 4 for float32, 2 for bfloat16, 1 for int8.
    """
    shapes = [each.matrix().shape for each in layers]
    kept = [int(each.weight.detach().count_nonzero()) for each in layers]
    weights = [rows * columns for rows, columns in shapes]
    others = sum(each.numel() for each in network.parameters()) - sum(weights)
    beside = others * value_bytes
    return Memory(
        sum(weights),
        sum(kept),
        others,
        dense=beside + sum(weights) * value_bytes,
        bitmask=beside + sum(bitmask_bytes(w, k, value_bytes) for w, k in zip(weights, kept, strict=True)),
        csr=beside + sum(csr_bytes(r, c, k, value_bytes) for (r, c), k in zip(shapes, kept, strict=True)),
    )


def largest_width(cost: Callable[[int], int], budget: int) -> int:
    """The widest network that a budget pays for: the small-dense baseline of a pruned one.

    Args:
        cost: of a width, in whatever the budget is in; it must not fall as the width grows.
        budget: not to be passed.

    Raises:
        InputError: not even a width of 1 is within the budget.
    """
    if cost(1) > budget:
        raise InputError(f"budget={budget}: a network of width 1 costs {cost(1)} already; give more, or prune less")
    low, high = 1, 2
    while cost(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


def _bytes_for(largest: int) -> int:
    return next(size for size in (1, 2, 4, 8) if largest < 256**size)
