"""What the Monarch class contains, and whether brute force finds anything nearer than the closed-form projection."""

import math

import torch
from torch import Tensor

from apportion.weights.monarch import MonarchFactors, materialise, projection_error
from apportion.weights.monarch_shape import MonarchShape

_TURNS = 30


def exactness(n: int, starts: int, seed: int) -> dict[str, dict[str, float]]:
    """Shares of squared norm that the nearest Monarch matrix of sqrt(n) blocks leaves over, and a small brute force.

    Args:
        n: size of the matrices, a power of 4.
        starts: of alternating least squares on a random 4 x 4 matrix.
        seed: of what is random.
    """
    shape, root = MonarchShape.square(n), math.isqrt(n)
    draws = torch.Generator().manual_seed(seed)
    fourier = torch.fft.fft(torch.eye(n, dtype=torch.complex128))
    column = torch.randn(n, generator=draws, dtype=torch.float64)
    matrices = {
        "Fourier, inputs in the transpose order": fourier[:, torch.arange(n).view(root, root).T.flatten()],
        "Fourier": fourier,
        "Hadamard": _hadamard(n),
        "circulant": torch.stack([column.roll(i) for i in range(n)], dim=1),
    }
    found = {
        f"exactness: {name}": {"squared norm left over": (projection_error(each, shape) / float(each.norm())) ** 2}
        for name, each in matrices.items()
    }
    weight = torch.randn(4, 4, generator=draws, dtype=torch.float64)
    small = MonarchShape(4, 4, 2, 2, 4)
    least = projection_error(weight, small)
    reached = min(_alternating(weight, small, draws) for _ in range(starts))
    found["exactness: alternating least squares"] = {"error relative to the projection's": reached / least}
    return found


def _hadamard(n: int) -> Tensor:
    made = torch.ones(1, 1, dtype=torch.float64)
    while made.shape[0] < n:
        made = torch.kron(made, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return made


def _alternating(weight: Tensor, shape: MonarchShape, draws: torch.Generator) -> float:
    """The error that a random start reaches, each factor in turn the least-squares solution given the other."""
    factors = [torch.randn(each, generator=draws, dtype=torch.float64) for each in (shape.first, shape.second)]
    for turn in range(2 * _TURNS):
        free = turn % 2
        columns = []
        # The matrix is linear in each factor: unit factors give the map.
        for unit in torch.eye(factors[free].numel(), dtype=torch.float64):
            given = list(factors)
            given[free] = unit.view_as(factors[free])
            columns.append(materialise(MonarchFactors(*given), shape).flatten())
        map_of_free = torch.stack(columns, dim=1)
        factors[free] = torch.linalg.lstsq(map_of_free, weight.flatten(), driver="gelsd").solution.view_as(
            factors[free]
        )
    return float((weight - materialise(MonarchFactors(*factors), shape)).norm())
