"""What a training run is told; the part that decides its weights is compared when it resumes."""

import dataclasses
import math
from typing import Any, Literal

from apportion.errors import InputError

# A run may be resumed with other values of these: they change what is shown and kept, never the weights.
_WITHOUT_EFFECT_ON_WEIGHTS = ("checkpoint_every", "log_every", "keep_checkpoints", "tensorboard", "progress_metrics")


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """Settings of `train`.

    Attributes:
        steps: optimiser steps of the whole run.
        learning_rate: peak learning rate, reached after the warm-up.
        betas, eps, weight_decay: of Adam.
        warmup_fraction: share of the steps over which the learning rate rises linearly.
        decay_fraction: share of the steps, at the end, over which it falls linearly to zero.
        clip_norm: largest norm of all gradients together; None leaves them alone.
        precision: "bfloat16" runs the objective under autocast; weights and optimiser stay as they are.
        checkpoint_every: steps between checkpoints.
        log_every: steps between log records (the first and the last step are always logged).
        keep_checkpoints: how many checkpoints stay on disk; 2 lets a run survive a damaged one.
        seed: of torch's random stream during training.
        tensorboard: also write TensorBoard events (needs the tensorboard package).
        progress_metrics: which logged values the progress display shows.

    Raises:
        InputError: a value that cannot work; the message names it and what would do.
    """

    steps: int
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.2
    clip_norm: float | None = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: int = 500
    log_every: int = 10
    keep_checkpoints: int = 2
    seed: int = 0
    tensorboard: bool = False
    progress_metrics: tuple[str, ...] = ("loss",)

    def __post_init__(self) -> None:
        for name in ("steps", "checkpoint_every", "log_every", "keep_checkpoints"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "eps"):
            self._require(name, 0 < getattr(self, name) < math.inf, "a positive number")
        self._require("clip_norm", self.clip_norm is None or self.clip_norm > 0, "a positive number or None")
        self._require("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, "zero or a positive number")
        for name in ("warmup_fraction", "decay_fraction"):
            self._require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        if self.warmup_fraction + self.decay_fraction > 1:
            raise InputError(
                f"warmup_fraction={self.warmup_fraction} and decay_fraction={self.decay_fraction} overlap: "
                "together they must be at most 1"
            )
        self._require("precision", self.precision in ("float32", "bfloat16"), '"float32" or "bfloat16"')
        self._require("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1")

    def _require(self, name: str, holds: bool, what_would_do: str) -> None:
        if not holds:
            raise InputError(f"{name}={getattr(self, name)!r} cannot work: it must be {what_would_do}")

    def to_json(self) -> dict[str, Any]:
        """All settings, ready for a JSON file."""
        return dataclasses.asdict(self)

    def that_decide_weights(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run it continues."""
        return {name: value for name, value in self.to_json().items() if name not in _WITHOUT_EFFECT_ON_WEIGHTS}
