"""Linear regression on many tokens: sums that are added to, a ridge chosen on tokens held out, R^2 on yet others.

What is audited are activations, whose mean is large and whose dimensions differ in scale by orders of magnitude. So a
bias is always fitted (by centring), sums are kept in float64 around the mean of the first tokens, and R^2 comes in two
forms: averaged over output dimensions (each counts the same, however small its variance), and weighted by variance.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from apportion.errors import InputError

# Shares of the mean variance of an input dimension. 0 is least squares.
RIDGES = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Directions whose variance is below this share of the largest carry rounding only; the paper's rcond.
_RANK = 1e-9
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Tokens:
    """Some tokens, held in memory.

    Attributes:
        x: their activations.
        documents: the document of each: what splits and standard errors go by.
    """

    x: Float[Tensor, "tokens d"]
    documents: Int64[Tensor, " tokens"]

    def __post_init__(self) -> None:
        if not bool(self.x.isfinite().all()):
            wrong = int((~self.x.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(f"x[{wrong}] has NaN or infinite activations: drop such tokens")

    def __len__(self) -> int:
        return len(self.x)


def held_out_rows(documents: Int64[Tensor, " tokens"], share: float, seed: int = 0) -> Bool[Tensor, " tokens"]:
    """Rows to hold out: about ``share`` of them, in whole documents (of a single document its end).

    Raises:
        InputError: there are not two tokens.
    """
    names, counts = torch.unique(documents, return_counts=True)
    if len(documents) < 2:
        raise InputError(f"{len(documents)} tokens cannot be split: give at least 2")
    if len(names) == 1:
        end = min(max(round(share * len(documents)), 1), len(documents) - 1)
        return torch.arange(len(documents), device=documents.device) >= len(documents) - end
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    reached = counts[order].cumsum(0) <= share * len(documents)
    reached[0], reached[-1] = True, False
    return torch.isin(documents, names[order[reached]])


class Moments:
    """Means and covariances of inputs and targets, added to a part at a time; all that a linear fit needs."""

    def __init__(self, inputs: Float[Tensor, "tokens d_in"], targets: Float[Tensor, "tokens d_out"]) -> None:
        if len(inputs) != len(targets) or len(inputs) == 0:
            raise InputError(f"{len(inputs)} inputs and {len(targets)} targets: give as many of each, at least 1")
        self._shift = inputs.double().mean(dim=0), targets.double().mean(dim=0)
        self.n = 0
        self._axes: dict[int, tuple[Tensor, Tensor]] = {}
        self._sums = [torch.zeros(each.shape[1], dtype=torch.float64) for each in (inputs, targets)]
        self._squares = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
        self._products = torch.zeros(inputs.shape[1], targets.shape[1], dtype=torch.float64)
        self._target_squares = torch.zeros(targets.shape[1], dtype=torch.float64)
        self.add(inputs, targets)

    def add(self, inputs: Float[Tensor, "tokens d_in"], targets: Float[Tensor, "tokens d_out"]) -> None:
        """Add tokens."""
        for x, y in zip(inputs.split(_ROWS_AT_ONCE), targets.split(_ROWS_AT_ONCE), strict=True):
            x, y = x.double().cpu() - self._shift[0], y.double().cpu() - self._shift[1]
            self.n += len(x)
            self._sums[0] += x.sum(dim=0)
            self._sums[1] += y.sum(dim=0)
            self._squares += x.T @ x
            self._products += x.T @ y
            self._target_squares += y.square().sum(dim=0)

    def of(self, targets: slice) -> "Moments":
        """The moments of some of the targets; what is worked out for the inputs is shared."""
        part = copy.copy(self)
        part._shift = self._shift[0], self._shift[1][targets]
        part._sums = [self._sums[0], self._sums[1][targets]]
        part._products, part._target_squares = self._products[:, targets], self._target_squares[targets]
        return part

    def axes(self) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "d_in d_in"]]:
        """Eigenvalues, smallest first, and eigenvectors of the covariance."""
        if self.n not in self._axes:
            self._axes.clear()
            values, vectors = torch.linalg.eigh(self.covariance)
            self._axes[self.n] = values, vectors
        return self._axes[self.n]

    @property
    def input_mean(self) -> Float[Tensor, " d_in"]:
        """Mean of the inputs."""
        return self._shift[0] + self._sums[0] / self.n

    @property
    def target_mean(self) -> Float[Tensor, " d_out"]:
        """Mean of the targets."""
        return self._shift[1] + self._sums[1] / self.n

    @property
    def covariance(self) -> Float[Tensor, "d_in d_in"]:
        """Of the inputs with each other."""
        mean = self._sums[0] / self.n
        return self._squares / self.n - mean.outer(mean)

    @property
    def cross_covariance(self) -> Float[Tensor, "d_in d_out"]:
        """Of the inputs with the targets."""
        return self._products / self.n - (self._sums[0] / self.n).outer(self._sums[1] / self.n)

    @property
    def target_variance(self) -> Float[Tensor, " d_out"]:
        """Of each target."""
        return (self._target_squares / self.n - (self._sums[1] / self.n).square()).clamp(min=0)


@dataclass(frozen=True)
class LinearMap:
    """``inputs @ weight + bias``.

    Attributes:
        weight, bias: of the map, float32.
        ridge: that was chosen, as a share of the mean variance of an input dimension.
    """

    weight: Float[Tensor, "d_in d_out"]
    bias: Float[Tensor, " d_out"]
    ridge: float

    def __call__(self, inputs: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_out"]:
        """The prediction, on the device of the inputs."""
        return inputs.float() @ self.weight.to(inputs.device) + self.bias.to(inputs.device)


def fit_linear(fit: Moments, validation: Moments | None = None, ridges: Sequence[float] = RIDGES) -> LinearMap:
    """The linear map, with bias, of least squared error; of several ridges the one that is best on held-out tokens.

    Args:
        fit: what the map is fitted to.
        validation: what the ridge is chosen by; not needed for a single one.
        ridges: to try, as shares of the mean variance of an input dimension; 0 is least squares.

    Raises:
        InputError: several ridges and nothing to choose by; or least squares alone on fewer tokens than inputs + 1.
    """
    if len(ridges) > 1 and validation is None:
        raise InputError(f"{len(ridges)} ridges and no tokens to choose by: give validation tokens, or a single ridge")
    d_in = len(fit.input_mean)
    usable = [ridge for ridge in ridges if ridge > 0 or fit.n >= d_in + 1]
    if not usable:
        raise InputError(
            f"{fit.n} tokens cannot decide {d_in} inputs and a bias by least squares: give at least {d_in + 1}, or a "
            "ridge above 0"
        )
    values, vectors = fit.axes()
    rotated = vectors.T @ fit.cross_covariance
    kept = values > _RANK * values[-1].clamp(min=0)
    found: list[tuple[float, Tensor, float]] = []
    for ridge in usable:
        scale = torch.where(kept, 1 / (values + ridge * values.clamp(min=0).mean()).clamp(min=1e-300), 0.0)
        weight = vectors @ (scale.unsqueeze(1) * rotated)
        loss = 0.0 if validation is None else _loss(weight, fit, validation)
        found.append((loss, weight, ridge))
    _, weight, ridge = min(found, key=lambda each: each[0])
    return LinearMap(weight.float(), (fit.target_mean - fit.input_mean @ weight).float(), ridge)


def fit_by_document(
    inputs: Float[Tensor, "tokens d_in"],
    targets: Float[Tensor, "tokens d_out"],
    documents: Int64[Tensor, " tokens"],
    ridges: Sequence[float] = RIDGES,
    validation: float = 0.2,
    groups: Sequence[int] | None = None,
) -> list[LinearMap]:
    """Linear maps whose ridge is chosen on a share of the documents.

    Args:
        inputs: one row a token.
        targets: what is predicted, in the same order.
        documents: the document of each token.
        ridges: see ``fit_linear``.
        validation: share of the tokens, in whole documents, on which the ridge is chosen.
        groups: how many targets belong together; each group has a map and a ridge of its own. None: all.
    """
    out = held_out_rows(documents, validation)
    fit, chooser = (_moments_of(inputs, targets, rows) for rows in (~out, out))
    ends = np.cumsum(groups or [targets.shape[1]]).tolist()
    parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return [fit_linear(fit.of(part), chooser.of(part), ridges) for part in parts]


def _moments_of(inputs: Tensor, targets: Tensor, mask: Tensor) -> Moments:
    """Of the rows where a mask holds, without a copy of them all."""
    parts = mask.nonzero().flatten().split(_ROWS_AT_ONCE)
    moments = Moments(inputs[parts[0]], targets[parts[0]])
    for rows in parts[1:]:
        moments.add(inputs[rows], targets[rows])
    return moments


def _loss(weight: Tensor, fit: Moments, on: Moments) -> float:
    """Mean squared error of a map fitted to some tokens, on others; targets count by the variance they have."""
    bias = fit.target_mean - fit.input_mean @ weight
    offset = on.target_mean - bias - on.input_mean @ weight
    varying = (weight * (on.covariance @ weight - 2 * on.cross_covariance)).sum(dim=0) + on.target_variance
    return float((varying + offset.square()).sum())


@dataclass(frozen=True)
class Determination:
    """How much of some targets is predicted.

    Attributes:
        weighted: R^2 of all targets together, ``1 - squared error / squared distance from the mean``.
        mean_over_dimensions: R^2 of each dimension, averaged; dimensions that do not vary are left out.
        constant_dimensions: how many those are.
    """

    weighted: float
    mean_over_dimensions: float
    constant_dimensions: int


def determination(predicted: Float[Tensor, "tokens d_out"], targets: Float[Tensor, "tokens d_out"]) -> Determination:
    """R^2 of a prediction on tokens that the map was not fitted to.

    Raises:
        InputError: no tokens.
    """
    if len(targets) == 0:
        raise InputError("there are no tokens to test on: hold out more text")
    error = _column_sums(predicted, targets)
    total = _column_sums(targets.double().mean(dim=0).expand_as(targets), targets)
    # What is left of a constant by rounding is no variation.
    floor = 1e-12 * targets.double().square().sum(dim=0)
    varies = total > floor
    if not bool(varies.any()):
        return Determination(math.nan, math.nan, len(total))
    each = 1 - error[varies] / total[varies]
    return Determination(float(1 - error.sum() / total.sum()), float(each.mean()), int((~varies).sum()))


def _column_sums(a: Tensor, b: Tensor) -> Float[Tensor, " d"]:
    total = torch.zeros(b.shape[1], dtype=torch.float64)
    for left, right in zip(a.split(_ROWS_AT_ONCE), b.split(_ROWS_AT_ONCE), strict=True):
        total += (left.double() - right.double()).square().sum(dim=0).cpu()
    return total
