"""Activations whose dictionary is known: sparse sums of random directions, some tokens harder than others.

The generator of section 1.7 of the method sheet on Mutual Choice and Feature Choice: feature ``r`` (ranks count from 1)
fires with a probability proportional to ``r ** -exponent``, times a factor of the token's own, drawn from a log-normal
distribution; so tokens differ in how many features they need.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor


@dataclass(frozen=True)
class SyntheticBatch:
    """Tokens and the truth about them.

    Attributes:
        x: the activations.
        codes: how much of each true feature is in them; mostly zeros.
    """

    x: Float32[Tensor, "tokens d"]
    codes: Float32[Tensor, "tokens n_true"]


@dataclass(frozen=True, eq=False)
class SyntheticDictionary:
    """A dictionary of ``n_true`` unit directions in ``d`` dimensions, and a source of tokens made of them.

    Attributes:
        d: width of the activations.
        n_true: number of true features.
        mean_l0: mean number of features per token; exact in expectation.
        exponent: feature r fires with a probability proportional to ``r ** -exponent`` (and at most 1).
        heterogeneity: the sigma of the tokens' log-normal factors ``exp(sigma n - sigma^2 / 2)``, whose mean is 1; 0
            makes all tokens alike. Not used with ``constant_l0``.
        noise: standard deviation of the Gaussian noise on every coordinate.
        seed: of the directions and of all samples.
        constant_l0: every token has exactly ``mean_l0`` features (the control experiment), each with the same frequency
            as without it and ``heterogeneity=0``.

    Raises:
        ValueError: sizes that are not positive, a ``mean_l0`` outside (0, n_true), a fractional one with
            ``constant_l0``.
    """

    d: int = 32
    n_true: int = 128
    mean_l0: float = 5.0
    exponent: float = 1.0
    heterogeneity: float = 0.6
    noise: float = 0.02
    seed: int = 0
    constant_l0: bool = False

    def __post_init__(self) -> None:
        for name in ("d", "n_true"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 < self.mean_l0 < self.n_true:
            raise ValueError(f"mean_l0 is {self.mean_l0}: it must lie between 0 and n_true ({self.n_true})")
        if self.constant_l0 and self.mean_l0 != int(self.mean_l0):
            raise ValueError(f"mean_l0 is {self.mean_l0}: with constant_l0 it must be a whole number")
        for name in ("exponent", "heterogeneity", "noise", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")

    @cached_property
    def directions(self) -> Float32[Tensor, "n_true d"]:
        """The true features: Gaussian directions of length 1, the most frequent first."""
        directions = torch.randn(self.n_true, self.d, generator=_generator(self.seed))
        return directions / directions.norm(dim=1, keepdim=True)

    @cached_property
    def frequencies(self) -> Float32[Tensor, " n_true"]:
        """The probability that each feature fires, over all tokens; they sum to ``mean_l0``."""
        return torch.from_numpy(_capped_mean(self._intensities, self._sigma)).float()

    def sample(self, n: int, seed: int) -> SyntheticBatch:
        """Draw ``n`` tokens; the same seeds give the same tokens.

        A feature that fires has magnitude N(1, 0.3), floored at 0.2.

        Raises:
            ValueError: ``n`` or ``seed`` is out of range.
        """
        if n < 1:
            raise ValueError(f"n is {n}: it must be at least 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}: it must not be negative")
        generator = _generator(self.seed, seed)
        fires = self._draw_exactly(n, generator) if self.constant_l0 else self._draw_independently(n, generator)
        magnitudes = (1 + 0.3 * torch.randn(n, self.n_true, generator=generator)).clamp(min=0.2)
        codes = fires * magnitudes
        x = codes @ self.directions + self.noise * torch.randn(n, self.d, generator=generator)
        return SyntheticBatch(x, codes)

    @property
    def _sigma(self) -> float:
        return 0.0 if self.constant_l0 else self.heterogeneity

    @cached_property
    def _intensities(self) -> np.ndarray:
        """What the tokens' factors multiply, so scaled that the mean L0 is exact although probabilities stop at 1."""
        shape = np.arange(1, self.n_true + 1, dtype=np.float64) ** -self.exponent
        low, high = 0.0, 1.0
        while _capped_mean(high * shape, self._sigma).sum() < self.mean_l0:
            high *= 2
        for _ in range(200):
            middle = (low + high) / 2
            if _capped_mean(middle * shape, self._sigma).sum() < self.mean_l0:
                low = middle
            else:
                high = middle
        return high * shape

    def _draw_independently(self, n: int, generator: torch.Generator) -> Tensor:
        sigma = self.heterogeneity
        factors = torch.exp(sigma * torch.randn(n, 1, generator=generator, dtype=torch.float64) - sigma**2 / 2)
        probabilities = factors * torch.from_numpy(self._intensities)
        return torch.rand(n, self.n_true, generator=generator, dtype=torch.float64) < probabilities

    def _draw_exactly(self, n: int, generator: torch.Generator) -> Tensor:
        """Systematic sampling: lay the probabilities end to end in random order, pick what lies at u, u + 1, and so on.

        It keeps every feature's frequency exactly, which drawing without replacement by weight would not.
        """
        order = torch.rand(n, self.n_true, generator=generator).argsort(dim=1)
        probabilities = torch.from_numpy(_capped_mean(self._intensities, 0.0))
        ends = probabilities[order].cumsum(dim=1)
        ends[:, -1] = self.mean_l0
        offset = torch.rand(n, 1, generator=generator, dtype=torch.float64)
        picks_before_end = torch.floor(ends - offset)
        chosen = torch.diff(picks_before_end, dim=1, prepend=torch.full((n, 1), -1.0, dtype=torch.float64)) > 0
        return torch.zeros(n, self.n_true, dtype=torch.bool).scatter_(1, order, chosen)


def _capped_mean(intensities: np.ndarray, sigma: float) -> np.ndarray:
    """The mean of ``min(1, q f)`` over the tokens' factors f, log-normal with mean 1."""
    if sigma == 0:
        return np.minimum(1.0, intensities)
    log_q = np.log(intensities)
    below_one = intensities * _normal_cdf((-log_q - sigma**2 / 2) / sigma)
    return below_one + _normal_cdf((log_q - sigma**2 / 2) / sigma)


def _normal_cdf(z: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in z])


def _generator(*seeds: int) -> torch.Generator:
    state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))
