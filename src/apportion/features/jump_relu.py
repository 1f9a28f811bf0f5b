"""JumpReLU with a learned threshold (Rajamanoharan et al. 2024, arXiv 2407.14435), touching only what can matter.

A score far below its threshold gives no value and no gradient: the pseudo-derivatives are zero outside a window of one
bandwidth around the threshold. So the op works on the entries above ``threshold - bandwidth / 2`` and on no others.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LearnedThreshold:
    """A threshold per feature, trained by gradient: the rule of a JumpReLU dictionary.

    Args:
        initial: threshold at the start (the paper's 0.001, for inputs of unit mean square).
        bandwidth: width of the window in which the threshold feels a gradient (the paper's 0.001).
    """

    initial: float = 0.001
    bandwidth: float = 0.001

    def __post_init__(self) -> None:
        if not (self.initial > 0 and self.bandwidth > 0):
            raise ValueError(
                f"LearnedThreshold: initial={self.initial}, bandwidth={self.bandwidth}: both must be above 0"
            )

    def mean_budget(self, columns: int) -> None:
        """Set by the penalty, not by the rule."""
        return


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, thresholds: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(scores, thresholds)
        ctx.bandwidth = bandwidth
        return scores * (scores > thresholds)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        scores, thresholds = ctx.saved_tensors
        near = (scores - thresholds).abs() < ctx.bandwidth / 2
        return grad * (scores > thresholds), -grad * thresholds * near / ctx.bandwidth, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, thresholds: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(scores, thresholds)
        ctx.bandwidth = bandwidth
        return (scores > thresholds).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (grad,) = grads
        scores, thresholds = ctx.saved_tensors
        near = (scores - thresholds).abs() < ctx.bandwidth / 2
        return None, -grad * near / ctx.bandwidth, None


def jump_relu(
    scores: Float[Tensor, "entries"], thresholds: Float[Tensor, "entries"], bandwidth: float
) -> Float[Tensor, "entries"]:
    """The score where it exceeds its threshold, else 0; equation 11 of the paper gives the threshold's gradient."""
    return _JumpReLU.apply(scores, thresholds, bandwidth)


def step(
    scores: Float[Tensor, "entries"], thresholds: Float[Tensor, "entries"], bandwidth: float
) -> Float[Tensor, "entries"]:
    """1 where a score exceeds its threshold, with the pseudo-derivative of equation 12; summed, it is the L0."""
    return _Step.apply(scores, thresholds, bandwidth)
