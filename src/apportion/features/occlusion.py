"""Two ways in which sparse dictionaries miss what is there, on made data with known truth (Makelov et al. 2024).

*Occlusion* (arXiv 2405.08366, section 6 and appendix A.13): of two attributes in one activation the one of smaller
magnitude is not found. *Over-splitting* (appendices A.14 and A.15): a binary attribute becomes many features, because
the loss itself prefers many to the right two.

Allocated: in both the L1 budget of a ReLU dictionary. It goes where a feature buys most squared error, not where an
attribute is.

| paper | here |
|---|---|
| a = rho u_i + v_j + noise | ``TwoAttributes`` |
| a - alpha u_io(p) | ``TwoAttributes.reduced`` |
| mixture of two Gaussians, x = +-mu + N(0, I) | ``two_gaussians`` |
| loss of the ideal dictionary, and of m random Gaussian features | ``ideal_loss``, ``random_features_loss`` |

Occlusion needs superposition: with fewer directions than dimensions nothing is occluded at any rho, so the sizes here
are 60 directions in 20 dimensions (ours; the paper shows it on a model).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from apportion.errors import InputError
from apportion.features.interpretability import f1_scores


@dataclass(frozen=True, eq=False)
class LabelledActivations:
    """Activations and the value of both attributes."""

    x: Float[Tensor, "rows d"]
    high: Int64[Tensor, " rows"]
    low: Int64[Tensor, " rows"]


@dataclass(frozen=True)
class TwoAttributes:
    """A source of activations ``ratio * u_i + v_j + noise``, u and v random unit directions, i and j uniform.

    Attributes:
        ratio: rho, how much larger the vectors of the ``high`` attribute are.
        values: of each attribute.
        d: width; occlusion needs fewer dimensions than the 2 * ``values`` directions.
        noise: standard deviation of every coordinate.
        seed: of the directions.
    """

    ratio: float = 2.0
    values: int = 30
    d: int = 20
    noise: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ratio < 1:
            raise InputError(f"ratio={self.ratio}: the high attribute is at least as large as the low one; 1 or more")
        if min(self.values, self.d) < 1 or self.noise < 0:
            raise InputError(f"{self}: values and d must be at least 1, noise not negative")

    @property
    def directions(self) -> Float[Tensor, "two values d"]:
        """Unit vectors of the high and of the low attribute's values."""
        generator = torch.Generator().manual_seed(self.seed)
        directions = torch.randn(2, self.values, self.d, generator=generator)
        return directions / directions.norm(dim=2, keepdim=True)

    def sample(self, rows: int, seed: int) -> LabelledActivations:
        """Draw activations; the same seeds give the same ones."""
        generator = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + seed)
        high, low = torch.randint(self.values, (2, rows), generator=generator)
        noise = self.noise * torch.randn(rows, self.d, generator=generator)
        u, v = self.directions
        return LabelledActivations(self.ratio * u[high] + v[low] + noise, high, low)

    def reduced(self, drawn: LabelledActivations, share: float) -> LabelledActivations:
        """Subtract a share of the high attribute's vector from every activation: 0 nothing, 1 all of it.

        ``1 - 1 / ratio`` makes both attributes equally large.
        """
        x = drawn.x - share * self.ratio * self.directions[0][drawn.high]
        return LabelledActivations(x, drawn.high, drawn.low)


def share_found(
    active: Bool[Tensor, "rows features"], labels: Int64[Tensor, " rows"], values: int, threshold: float = 0.5
) -> float:
    """The share of an attribute's values for which some feature has at least this F1."""
    truth = labels[:, None] == torch.arange(values)
    return float((f1_scores(active, truth).amax(dim=0) >= threshold).float().mean())


# --- over-splitting -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Losses:
    """Loss of the best setting of a dictionary for each penalty, and what that setting's codes are like.

    Attributes:
        penalties: lambda.
        total: mean squared distance plus lambda times mean L1 norm.
        l0: mean number of active features.
    """

    penalties: tuple[float, ...]
    total: list[float]
    l0: list[float]


def two_gaussians(rows: int, seed: int, d: int = 100, distance: float = 2.0) -> Float[Tensor, "rows d"]:
    """Equal parts of two unit Gaussians, whose centres lie ``distance`` from the origin on the first axis."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d, generator=generator)
    x[:, 0] += distance * (2 * torch.randint(2, (rows,), generator=generator) - 1)
    return x


def ideal_loss(x: Float[Tensor, "rows d"], penalties: Sequence[float], gains: int = 41, thresholds: int = 61) -> Losses:
    """The two features that a person would choose, one a class, with the encoder gain and threshold that suit best.

    Both point along the line through the centres (the first axis, as ``two_gaussians`` lays them); gain and threshold
    are searched on a grid for each penalty.
    """
    along = x[:, 0].double()
    across = float(x[:, 1:].double().square().sum(dim=1).mean())
    settings = []
    for gain in torch.linspace(0, 1, gains, dtype=torch.float64).tolist():
        cut = torch.linspace(0, 4, thresholds, dtype=torch.float64)[:, None]
        plus, minus = (gain * along - cut).clamp(min=0), (-gain * along - cut).clamp(min=0)
        error = across + (along - (plus - minus)).square().mean(dim=1)
        fires = (plus > 0).double().mean(dim=1) + (minus > 0).double().mean(dim=1)
        settings.append(torch.stack([error, (plus + minus).mean(dim=1), fires], dim=1))
    return _best_of(torch.cat(settings), penalties)


def random_features_loss(
    x: Float[Tensor, "rows d"],
    samples: Float[Tensor, "features d"],
    penalties: Sequence[float],
    bias: float = 2.35,
    scales: Sequence[float] | None = None,
    rows_at_once: int = 2048,
) -> Losses:
    """A dictionary that was not trained: encoder rows are other samples of the same mixture, scaled; decoder rows too.

    Args:
        x: what is encoded.
        samples: fresh samples of the same mixture; a feature is ``relu(scale * sample . x - bias)``, decoded along its
            sample at unit norm.
        penalties: lambda.
        bias: gamma.
        scales: beta, of which the best is taken for each penalty; default 20 from .01 to .1.
        rows_at_once: bounds the memory.
    """
    chosen = torch.linspace(0.01, 0.1, 20).tolist() if scales is None else list(scales)
    decoder = samples / samples.norm(dim=1, keepdim=True)
    sums = torch.zeros(len(chosen), 3, dtype=torch.float64)
    for part in x.split(rows_at_once):
        products = part @ samples.T
        for row, scale in enumerate(chosen):
            codes = (scale * products - bias).clamp_(min=0)
            error = (part - codes @ decoder).square().sum()
            sums[row] += torch.stack([error, codes.sum(), (codes > 0).sum()]).double()
    return _best_of(sums / x.shape[0], penalties)


def _best_of(settings: Float[Tensor, "settings three"], penalties: Sequence[float]) -> Losses:
    """The best of settings with known error, L1 and L0, for each penalty."""
    total = settings[:, 0] + torch.tensor(penalties, dtype=torch.float64)[:, None] * settings[:, 1]
    best, which = total.min(dim=1)
    return Losses(tuple(penalties), best.tolist(), settings[which, 2].tolist())
