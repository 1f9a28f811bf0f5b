"""Adaptive Sparse Allocation with Mutual Choice & Feature Choice SAEs (Ayonrinde 2024, arXiv 2411.02124).

Allocated: ``M = budget * N`` matches between N tokens and F features. Mutual Choice gives them to the best pairs of the
whole batch; Feature Choice gives every feature its own number of tokens, more to frequent features (Zipf's law); a loss
helps features that get less than their rank predicts.

| paper | here |
|---|---|
| Mutual Choice: the M largest z' | ``MutualChoice(budget)`` |
| Feature Choice: m_i tokens for feature i | ``FeatureChoice(budget, profile)`` with ``QuotaLedger`` |
| Zipf distribution of feature densities, rho_r = C (r + q)^-alpha | ``ZipfFit``, ``fit_zipf`` |
| aux_zipf_loss | ``aux_zipf_loss`` over ``underused_features`` |
| training phases | ``Phases`` |

The paper released no code. Chosen here, since its text does not settle it: the Zipf-Mandelbrot form with an offset out
of {0, 1, 3, 10, 30}, fitted on the ranks between the first 10 % and the last 30 %; a feature is underused below half of
what the fit expects; the weight of the loss is 1/32 as for aux_k; the phases' lengths; inference by calibrated
thresholds. Rare features are served by a ledger of whole quotas that spends every batch's total exactly.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from apportion.allocate import FeatureChoice, MutualChoice, Rule, TokenChoice, Zipf
from apportion.errors import InputError
from apportion.features.dictionary import SparseAutoencoder
from apportion.features.losses import aux_k_loss

_OFFSETS = (0.0, 1.0, 3.0, 10.0, 30.0)
_FIRST, _LAST = 0.10, 0.70  # share of ranks before and after which a trained dictionary leaves Zipf's law


@dataclass(frozen=True)
class ZipfFit:
    """``density of rank r = scale * (r + offset) ** -exponent``, fitted to the middle ranks.

    Attributes:
        exponent: alpha.
        offset: q of Zipf-Mandelbrot, 0 for plain Zipf.
        scale: C.
        r_squared: share of the variance of log density that the fit explains, over the fitted ranks.
    """

    exponent: float
    offset: float
    scale: float
    r_squared: float

    @property
    def profile(self) -> Zipf:
        """As the profile of a ``FeatureChoice`` rule."""
        return Zipf(exponent=self.exponent, offset=self.offset)

    def expected(self, ranks: Float[Tensor, "features"]) -> Float[Tensor, "features"]:
        """Density that the law expects at each rank (from 1)."""
        return self.scale * (ranks + self.offset) ** -self.exponent


def fit_zipf(density: Float[Tensor, "features"]) -> ZipfFit:
    """Fit Zipf's law to feature densities by least squares in log-log, on the ranks from 10 % to 70 %.

    The first ranks bend down and the last ones droop (dying features), which is the paper's Figure 2; fitting all ranks
    would let the tail drag the exponent. Features that never fire carry no information and are left out.

    Raises:
        InputError: fewer than three features with a density above zero among the middle ranks.
    """
    ordered = density.detach().double().sort(descending=True).values
    count = ordered.numel()
    ranks = torch.arange(1, count + 1, dtype=torch.float64, device=ordered.device)
    middle = (ranks > _FIRST * count) & (ranks <= max(_LAST * count, 3)) & (ordered > 0)
    if int(middle.sum()) < 3:
        raise InputError(
            f"only {int(middle.sum())} of {count} features fire among the ranks that the Zipf fit looks at: "
            "measure densities on more tokens"
        )
    y = ordered[middle].log()
    fits: list[tuple[float, float, float, float]] = []
    for offset in _OFFSETS:
        x = (ranks[middle] + offset).log()
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum().clamp(min=1e-12)
        intercept = y.mean() - slope * x.mean()
        squared = (y - intercept - slope * x).square().sum()
        fits.append((float(squared), offset, float(slope), float(intercept)))
    error, offset, steepness, height = min(fits)
    spread = float((y - y.mean()).square().sum())
    return ZipfFit(
        # A density that rises with rank cannot happen after sorting; a flat one gives a slope of -0.0.
        exponent=max(-steepness, 0.0),
        offset=offset,
        scale=float(torch.tensor(height, dtype=torch.float64).exp()),
        r_squared=1 - error / spread if spread > 0 else 1.0,
    )


def ranks_by(quantity: Float[Tensor, "features"]) -> Float64[Tensor, "features"]:
    """Rank of every feature, 1 for the largest; equal ones by index."""
    order = quantity.sort(descending=True, stable=True).indices
    ranks = torch.empty(quantity.numel(), dtype=torch.float64, device=quantity.device)
    ranks[order] = torch.arange(1, quantity.numel() + 1, dtype=torch.float64, device=quantity.device)
    return ranks


def underused_features(density: Float[Tensor, "features"], fit: ZipfFit, cut: float = 0.5) -> Bool[Tensor, "features"]:
    """Features that fire less than ``cut`` times what Zipf's law expects of their rank; dead ones always do.

    As ``cut`` goes to zero only the dead are left, and aux_zipf becomes aux_k.
    """
    return density < (cut * fit.expected(ranks_by(density))).to(density.dtype)


def aux_zipf_loss(
    sae: SparseAutoencoder,
    x_centred: Float[Tensor, "tokens d"],
    residual: Float[Tensor, "tokens d"],
    cut: float = 0.5,
    k_aux: int | None = None,
) -> Float[Tensor, ""]:
    """``aux_k_loss`` over the features that Zipf's law says are underused, by the dictionary's running densities."""
    density = sae.statistics.density
    return aux_k_loss(sae, x_centred, residual, underused_features(density, fit_zipf(density), cut), k_aux)


@dataclass(frozen=True)
class Phases:
    """The paper's training phases, as shares of the run.

    1. Warm-up: the budget falls linearly from ``budget_factor`` times its value to its value; against early death.
       Off by default: on the synthetic dictionary of the sheet it made every rule worse (TopK FVU 0.25 against 0.20).
    2. Mutual Choice up to ``mutual_fraction`` (Feature Choice dictionaries only): learns directions and densities.
    3. Feature Choice with quotas of the Zipf law fitted to those densities, ranks by demand.
    4. After training, calibration of the inference thresholds (``SparseAutoencoder.calibrate``).

    Args:
        warmup_fraction: length of phase 1; 0 leaves it out.
        budget_factor: at the start of phase 1.
        mutual_fraction: end of phase 2; 0 trains Feature Choice from the start, feature index = rank.
        refresh_every: steps between new ranks in phase 3, and between new sets of underused features.
    """

    warmup_fraction: float = 0.0
    budget_factor: float = 4.0
    mutual_fraction: float = 0.6
    refresh_every: int = 100

    def __post_init__(self) -> None:
        if not (0 <= self.warmup_fraction < 1 and 0 <= self.mutual_fraction < 1):
            raise InputError(f"{self}: warmup_fraction and mutual_fraction are shares of the run, from 0 to below 1")
        if self.budget_factor < 1 or self.refresh_every < 1:
            raise InputError(f"{self}: budget_factor and refresh_every must be at least 1")

    def feature_choice_starts(self, steps: int) -> int:
        """First step of phase 3."""
        return round(self.mutual_fraction * steps)

    def rule(self, rule: Rule, n_features: int, step: int, steps: int) -> Rule:
        """The rule of a training step: annealed, and Mutual Choice before Feature Choice."""
        budget = rule.mean_budget(n_features)
        if budget is None:
            return rule
        budget = min(budget * self._factor(step, steps), n_features)
        if isinstance(rule, TokenChoice):
            return TokenChoice(round(budget))
        if isinstance(rule, FeatureChoice) and step >= self.feature_choice_starts(steps):
            # No annealing once the quotas are those of the final budget.
            return FeatureChoice(rule.mean_budget(n_features), profile=rule.profile)
        return MutualChoice(budget)

    def _factor(self, step: int, steps: int) -> float:
        length = self.warmup_fraction * steps
        if step >= length:
            return 1.0
        return self.budget_factor + (1 - self.budget_factor) * step / length


@torch.no_grad()
def set_shares_by_demand(sae: SparseAutoencoder, profile: Zipf, hysteresis: float = 0.5) -> None:
    """Give the features of a Feature Choice dictionary the shares of ``profile``, ranked by measured demand.

    Demand is what a feature would get under Mutual Choice. The densities that Feature Choice itself produces must not
    be used: they equal the quotas, so the ranks would never change again.

    Args:
        sae: its ``share`` is set.
        profile: share by rank.
        hysteresis: weight of the present share (in log) against demand, so that ranks do not flip on noise; 0 for the
            first assignment.
    """
    rule = sae.rule
    if not isinstance(rule, FeatureChoice):
        raise TypeError(f"shares belong to FeatureChoice dictionaries; the rule is {rule}")
    floor = 1e-12
    wish = sae.statistics.of_all(sae.statistics.demand).double().clamp(min=floor).log()
    if hysteresis > 0:
        wish = (1 - hysteresis) * wish + hysteresis * sae.share.clamp(min=floor).log()
    by_rank = FeatureChoice(rule.mean_budget(sae.n_features), profile=profile).share(sae.n_features)
    order = wish.sort(descending=True, stable=True).indices
    sae.share[order] = by_rank.to(sae.share.device)
