"""What a pruned network costs in memory, by formula, and the dense network that costs no more.

Bytes are those of the formats that files and packed layers are written in, by their own formulas
(`apportion.ops.spmm.formats`), each layer a matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from apportion.errors import InputError
from apportion.ops.spmm.formats import Bitmap, Dense, NarrowCSR
from apportion.weights.layers import WeightLayer


@dataclass(frozen=True)
class Memory:
    """What a network holds, all parameters counted, its biases, norms and embeddings too.

    Attributes:
        weights: of the layers that can be pruned.
        kept: of these, those that are not 0.
        others: parameters besides.
        dense, bitmap, csr: bytes, if all those layers are packed so and everything else is dense.
        smallest: bytes, if each of those layers is packed in whichever of the three takes least.
    """

    weights: int
    kept: int
    others: int
    dense: int
    bitmap: int
    csr: int
    smallest: int

    @property
    def nonzeros(self) -> int:
        """Weights that are not 0, and all other parameters."""
        return self.kept + self.others


def memory(network: nn.Module, layers: Sequence[WeightLayer], value_bytes: int = 4) -> Memory:
    """Count a network.

    Args:
        network: with masks or without.
        layers: that can be pruned, at least one.
        value_bytes: of a value as it would be stored: 4 for float32, 2 for bfloat16, 1 for int8.
    """
    matrices = [(each.matrix().shape, int(each.weight.detach().count_nonzero())) for each in layers]
    packed = [_packed((rows, columns), kept, value_bytes) for (rows, columns), kept in matrices]
    weights = sum(rows * columns for (rows, columns), _ in matrices)
    others = sum(each.numel() for each in network.parameters()) - weights
    dense, bitmap, csr = (others * value_bytes + sum(sizes) for sizes in zip(*packed, strict=True))
    smallest = others * value_bytes + sum(min(sizes) for sizes in packed)
    return Memory(weights, sum(kept for _, kept in matrices), others, dense, bitmap, csr, smallest)


def _packed(shape: tuple[int, int], kept: int, value_bytes: int) -> tuple[int, int, int]:
    """Bytes of a matrix: dense, as a bitmap, in CSR."""
    formats = (Dense, Bitmap, NarrowCSR)
    dense, bitmap, csr = (each.formula(shape, kept, value_bytes) for each in formats)
    return dense, bitmap, csr


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
