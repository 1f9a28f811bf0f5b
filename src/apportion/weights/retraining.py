"""How a pruned network is trained again: SGD under its masks, and learning rates that rise and fall with its length.

The schedules are those of *How I Learned to Stop Worrying and Love Retraining* (Zimmer et al. 2023, arXiv 2111.00843),
which Sparse Model Soups (arXiv 2306.16788) retrains by. ``linear`` is LLR: a tenth of the steps rises along a cosine
to the peak, the rest falls in a straight line to 0. `adaptive_peak` is ALLR's: the more was pruned away, the higher.

Left out are rewinding (LRW) and its scaled form (SLR), which replay the schedule of the original training: give `train`
that schedule.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from apportion.errors import InputError
from apportion.training import LearningRateSchedule, Objective, TrainingResult, TrainingSettings
from apportion.weights.masks import train_masked

ScheduleName = Literal["linear", "cosine", "constant"]
_WARMUP = 0.1


@dataclass(frozen=True)
class Branch:
    """One way to retrain: what the branches of a soup differ in.

    Args:
        steps: of retraining.
        seed: of the batches' order and of torch's random stream.
        learning_rate: the peak.
        weight_decay: of SGD; where it is above 0 the momentum is Nesterov's, as in the paper's code.
        momentum: of SGD.
        schedule: ``linear`` (LLR), ``cosine`` (CLR: falls along a cosine), ``constant`` (FT: the learning rate is the
            last one of the original training).

    Raises:
        InputError: a value that cannot work.
    """

    steps: int
    seed: int = 0
    learning_rate: float = 0.1
    weight_decay: float = 1e-4
    momentum: float = 0.9
    schedule: ScheduleName = "linear"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps={self.steps}: retrain for at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate={self.learning_rate}: use a positive number")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay={self.weight_decay}: use 0 or a positive number")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum={self.momentum}: use at least 0 and below 1")
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule={self.schedule!r}: use one of {', '.join(SCHEDULES)}")


def linear(step: int, steps: int) -> float:
    """LLR: the factor on the peak at a step (0-based), never 0."""
    warmup = round(_WARMUP * steps)
    return _rise(step, warmup) if step < warmup else (steps - step) / (steps - warmup)


def cosine(step: int, steps: int) -> float:
    """CLR: the same rise, and a fall along half a cosine."""
    warmup = round(_WARMUP * steps)
    return _rise(step, warmup) if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def constant(step: int, steps: int) -> float:
    """FT: the peak throughout."""
    return 1.0


SCHEDULES: dict[str, LearningRateSchedule] = {"linear": linear, "cosine": cosine, "constant": constant}


def adaptive_peak(largest: float, norm_drop: float, removed: float, smallest: float) -> float:
    """ALLR's peak learning rate: ``clip(largest * norm_drop / sqrt(removed), smallest, largest)``.

    Args:
        largest: peak that is never passed.
        norm_drop: ``|w - mask * w| / |w|`` of the weights before pruning; at most ``sqrt(removed)`` where the smallest
            go, and just that where weights go by chance.
        removed: the share of the remaining weights that went.
        smallest: peak that is never fallen below; the paper's code has the share of the original training's steps that
            are retrained, times ``largest``.

    Raises:
        InputError: ``removed`` is no share above 0.
    """
    if not 0 < removed <= 1:
        raise InputError(f"removed={removed}: a share above 0 and at most 1 of the weights must have gone")
    return min(max(largest * norm_drop / math.sqrt(removed), smallest), largest)


def retrain(
    network: nn.Module,
    branch: Branch,
    objective: Objective[Any, Any],
    batches: Callable[[int], Any],
    folder: Path | str | None = None,
    **options: Any,
) -> TrainingResult:
    """Train under the masks as a branch says: SGD, fresh, with no gradient clipping.

    Args:
        network: trained in place; its masks stay.
        branch: how.
        objective: as `apportion.training.train` has it.
        batches: as `train` has them; let them follow the branch's seed.
        folder: as `train` has it: a run that was killed goes on from its last checkpoint.
        options: of `apportion.weights.train_masked`.
    """
    settings = TrainingSettings(
        steps=branch.steps,
        learning_rate=branch.learning_rate,
        clip_norm=None,
        seed=branch.seed,
        log_every=max(1, branch.steps // 20),
    )

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters,
            lr=branch.learning_rate,
            momentum=branch.momentum,
            weight_decay=branch.weight_decay,
            nesterov=branch.weight_decay > 0 and branch.momentum > 0,
        )

    known = {f"branch {name}": value for name, value in asdict(branch).items()}
    options = {"progress": False, "optimizer": sgd, "schedule": SCHEDULES[branch.schedule], **options}
    options["provenance"] = {**known, **options.get("provenance", {})}
    return train_masked(network, objective, batches, settings, folder, **options)


def _rise(step: int, warmup: int) -> float:
    return (1 - math.cos(math.pi * (step + 1) / (warmup + 1))) / 2
