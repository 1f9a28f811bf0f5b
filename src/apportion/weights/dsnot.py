"""DSnoT: swap pruned for kept weights until the mean output is right (Zhang et al. 2023, arXiv 2310.08915).

A mask from Wanda or from magnitudes is refined without training and without changing any weight. Who gets the budget:
as many weights of each row (or group) as before, but in each cycle a row revives one weight and drops another.

| paper (and code) | here |
|---|---|
| ``W_rk * mu_k`` (code: sums over a text instead of means) | ``contributions``: what a weight adds to the mean output |
| the expected error, a sum over pruned weights | ``error``: by how much the mean output is too small |
| growing: the largest contribution with the error's sign, over ``var^p`` | `_revivable` |
| pruning: the smallest Wanda score whose loss moves the error towards 0 | `_droppable` |
| ``max_cycle_time`` T, ``update_threshold``, p | `cycles`, `threshold`, `power` |

The published code has T = 50 whatever the width, chosen for rows of 4096 weights; in narrower rows that is a good part
of all kept weights, and errors swing around 0 to no end. By default T grows with the width, a swap that would turn the
error's sign is not made and ends its row, and an error of 1 % of the first one is small enough. ``preset="reference"``
has the published numbers: 50 cycles, an error of 0.1 in sums over a text, overshoot allowed (except for N:M), and
attention layers only, which is what its default ``--skip_layer mlp`` comes to.

Departures from the published code, in both presets: each weight is moved at most once and never from an exhausted list
(there the middle of the list, whose entries do not count, is used up next); variances get 1e-12; SparseGPT's mask is no
starting point (there its second moments are never added up, so that the first inputs are pruned, and its new weights
would not fit revived old ones).

The mean is not all of the output. Two controls show what it is worth: ``correct_mean`` makes up for the error with
the layer's bias, exactly and without a swap; ``objective="second_moment"`` swaps for the whole squared error instead.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.errors import InputError
from apportion.weights.calibration import InputStatistics
from apportion.weights.one_shot_method import OneShotMethod, Pruned, Seen
from apportion.weights.patterns import BlockPattern, NofMPattern, Pattern
from apportion.weights.second_moment_swaps import swap_for_second_moment
from apportion.weights.wanda import Magnitude, Wanda, wanda_scores

# The published 50 cycles in a row of 4096 weights.
_CYCLES_OF_WIDTH = 0.012
_REFERENCE_CYCLES, _REFERENCE_THRESHOLD = 50, 0.1
_ENOUGH = 0.01  # of the first error


@dataclass(frozen=True)
class DSnoT(OneShotMethod):
    """Settings.

    Attributes:
        start: whose mask is refined: ``wanda`` or ``magnitude``.
        preset: ``scaled`` to the width of a row, or ``reference``; see the module's description.
        cycles: swaps of a row at most; None: as the preset has it. 0 leaves the first mask alone.
        power: of the variance that a revived weight's contribution is divided by.
        attention_only: leave the first masks of the MLP alone; None: as the preset has it.
        objective: ``mean``, or ``second_moment``: swap for the whole squared error (see `second_moment_swaps`).
        correct_mean: add what is left of the mean error to the layer's bias.

    Raises:
        InputError: a value that cannot work.
    """

    start: str = "wanda"
    preset: str = "scaled"
    cycles: int | None = None
    power: float = 1.0
    attention_only: bool | None = None
    objective: str = "mean"
    correct_mean: bool = False

    slug: ClassVar[str] = "dsnot"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("start", ("wanda", "magnitude")),
            ("preset", ("scaled", "reference")),
            ("objective", ("mean", "second_moment")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r}: use {' or '.join(allowed)}")
        if self.cycles is not None and self.cycles < 0:
            raise InputError(f"cycles={self.cycles}: a number of swaps, at least 0, or None for the preset's")
        if not math.isfinite(self.power) or self.power < 0:
            raise InputError(f"power={self.power}: at least 0; the published code has 1")

    @property
    def second_moment(self) -> bool:
        """Only the control needs them."""
        return self.objective == "second_moment"

    def check(self, pattern: Pattern) -> None:
        """Weights are swapped one by one within rows or groups of them.

        Raises:
            InputError: the pattern is of blocks, or of groups along the outputs.
        """
        if isinstance(pattern, BlockPattern):
            raise InputError(f"DSnoT swaps single weights, which {pattern} does not allow: use a sparsity or N:M")
        if isinstance(pattern, NofMPattern) and pattern.dim == "out":
            raise InputError("DSnoT swaps along the inputs: use an N:M pattern with dim='in'")

    def prune(self, weight: Float[Tensor, "out in"], seen: Seen, pattern: Pattern) -> Pruned:
        """Refine the first mask."""
        self.check(pattern)
        first = (Wanda() if self.start == "wanda" else Magnitude()).prune(weight, seen, pattern)
        group = pattern.m if isinstance(pattern, NofMPattern) else None
        mask, swaps = first.mask, torch.zeros(len(weight))
        if not (self._attention_only and not seen.in_attention):
            mask, swaps = self._swapped(weight, first.mask, seen.statistics, group)
        mean = seen.statistics.mean.to(weight.device)
        error = mean_error(weight, mask, mean)
        figures = {
            "swaps": float(swaps.float().mean()),
            "mean_error_before": float(mean_error(weight, first.mask, mean).abs().mean()),
            "mean_error_after": float(error.abs().mean()),
        }
        bias = error.to(weight.dtype) if self.correct_mean else None
        return Pruned(torch.where(mask, weight, 0), mask, bias, figures)

    def cycles_of(self, width: int) -> int:
        """Swaps of a row of so many weights at most."""
        if self.cycles is not None:
            return self.cycles
        return _REFERENCE_CYCLES if self.preset == "reference" else math.ceil(_CYCLES_OF_WIDTH * width)

    @property
    def _attention_only(self) -> bool:
        return self.preset == "reference" if self.attention_only is None else self.attention_only

    def _swapped(
        self, weight: Tensor, mask: Tensor, statistics: InputStatistics, group: int | None
    ) -> tuple[Tensor, Tensor]:
        cycles = self.cycles_of(weight.shape[1])
        if self.objective == "second_moment":
            moment = statistics.second_moment.to(weight.device, weight.dtype)
            return swap_for_second_moment(weight, mask, moment, cycles=cycles, group=group)
        mean = statistics.mean.to(weight.device)
        if self.preset == "reference":
            # Theirs is in sums over a text; the mean of so many tokens is that many times smaller.
            threshold = torch.full_like(mean[:1], _REFERENCE_THRESHOLD * statistics.samples / statistics.tokens)
        else:
            threshold = _ENOUGH * mean_error(weight, mask, mean).abs()
        variance = (statistics.variance.to(weight.device) + 1e-12).pow(self.power)
        return swap_for_mean(
            weight,
            mask,
            mean,
            revive_by=weight * (mean / variance).to(weight.dtype),
            drop_by=wanda_scores(weight, statistics) if self.start == "wanda" or group is None else weight.abs(),
            threshold=threshold,
            cycles=cycles,
            overshoot=self.preset == "reference" and group is None,
            group=group,
        )


def mean_error(
    weight: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"], mean: Float[Tensor, " d_in"]
) -> Float[Tensor, " rows"]:
    """By how much each output's mean is too small under a mask: the contributions of its pruned weights."""
    return torch.where(mask, 0, weight).double() @ mean.double()


def swap_for_mean(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    mean: Float[Tensor, " d_in"],
    *,
    revive_by: Float[Tensor, "out in"],
    drop_by: Float[Tensor, "out in"],
    threshold: Float[Tensor, "#out"],
    cycles: int,
    overshoot: bool = False,
    group: int | None = None,
) -> tuple[Bool[Tensor, "out in"], Int[Tensor, " rows"]]:
    """Swap pruned for kept weights of each row, until its mean output is right.

    Args:
        weight: of the layer.
        mask: the first one.
        mean: of the inputs.
        revive_by: the signed measure of pruned weights: the one furthest to the error's side is revived.
        drop_by: the measure of kept weights: of those whose loss moves the error towards 0 (or, in groups, of all of
            the revived weight's group) the smallest is dropped.
        threshold: an error that is small enough, of each row or of all.
        cycles: swaps of a row at most.
        overshoot: whether swaps may turn the error's sign; if not, the row ends with the one that would.
        group: consecutive weights that keep their number (N:M).

    Returns:
        The mask, and how many swaps each row has made.
    """
    mask = mask.clone()
    rows = torch.arange(len(weight), device=weight.device)
    contributions = weight.double() * mean.double()
    error = mean_error(weight, mask, mean)
    swaps = torch.zeros_like(rows)
    if cycles == 0:
        return mask, swaps
    # Without overshoot an error keeps its sign, and one queue a row will do.
    directions = [torch.ones_like(error), -torch.ones_like(error)] if overshoot else [error.sign()]
    revivable = _revivable(contributions, mask, revive_by, cycles, directions)
    droppable = (
        _droppable_in_group(mask, drop_by, group)
        if group
        else _droppable(contributions, mask, drop_by, cycles, directions)
    )
    active = torch.ones_like(rows, dtype=torch.bool)
    for _ in range(cycles):
        which = (error <= 0).long() if overshoot else torch.zeros_like(rows)
        revived, can_revive = revivable(which)
        dropped, can_drop = droppable(which, revived)
        after = error - contributions[rows, revived] + contributions[rows, dropped]
        active &= (error.abs() > threshold) & can_revive & can_drop
        if not overshoot:
            active &= after * error >= 0
        if not bool(active.any()):
            break
        mask[rows[active], revived[active]] = True
        mask[rows[active], dropped[active]] = False
        error = torch.where(active, after, error)
        swaps += active
    return mask, swaps


class _Queues:
    """For each row, for each direction of the error, the places of its candidates, best first.

    Args:
        measures: of every weight, the largest first; one for each direction.
        allowed: which weights are candidates; likewise.
        length: of a queue at most.
    """

    def __init__(self, measures: Sequence[Tensor], allowed: Sequence[Tensor], length: int) -> None:
        length = min(length, measures[0].shape[1])
        self._sizes = torch.stack([each.sum(dim=1).clamp_max(length) for each in allowed])
        filled = (torch.where(fits, each, -math.inf) for each, fits in zip(measures, allowed, strict=True))
        self._places = torch.stack([each.topk(length, dim=1).indices for each in filled])
        self._next = torch.zeros_like(self._sizes)

    def take(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """The next place of each row in the queue of one direction, and whether there is one."""
        rows = torch.arange(which.numel(), device=which.device)
        at = self._next[which, rows]
        self._next[which, rows] += 1
        return self._places[which, rows, at.clamp_max(self._places.shape[2] - 1)], at < self._sizes[which, rows]


def _revivable(
    contributions: Tensor, mask: Tensor, measure: Tensor, cycles: int, directions: Sequence[Tensor]
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Pruned weights whose return makes the error smaller, best first."""
    signs = [each.unsqueeze(1) for each in directions]
    return _Queues(
        [measure * sign.to(measure.dtype) for sign in signs],
        [~mask & (contributions * sign > 0) for sign in signs],
        cycles,
    ).take


def _droppable(
    contributions: Tensor, mask: Tensor, measure: Tensor, cycles: int, directions: Sequence[Tensor]
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Kept weights whose loss makes the error smaller, the least of them first."""
    allowed = [mask & (contributions * each.unsqueeze(1) < 0) for each in directions]
    queues = _Queues([-measure] * len(directions), allowed, cycles)
    return lambda which, revived: queues.take(which)


def _droppable_in_group(mask: Tensor, measure: Tensor, group: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The least of the kept weights in the revived weight's group that was not taken before."""
    left = torch.where(mask, measure, math.inf).view(len(mask), -1, group).clone()
    rows = torch.arange(len(mask), device=mask.device)

    def take(which: Tensor, revived: Tensor) -> tuple[Tensor, Tensor]:
        own = revived // group
        least, place = left[rows, own].min(dim=1)
        left[rows, own, place] = math.inf
        return own * group + place, least < math.inf

    return take
