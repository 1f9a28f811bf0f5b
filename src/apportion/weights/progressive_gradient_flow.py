"""Progressive Gradient Flow for robust N:M training (Bambhaniya et al. 2024, arXiv 2402.04744): MdGf and SdGf.

Allocated are N of every M consecutive weights, by the magnitude of the *current dense* weight: the mask is chosen anew
at every forward pass. On the way there pruned weights fade (MdGf) or easier patterns come first (SdGf), so that what
flows to them is restricted little by little. Beside them stand STE, and SR-STE (Zhou et al. 2021, arXiv 2102.04010).

| paper | here |
|---|---|
| dense weight W, mask m, effective weight W~ | ``raw``, ``mask``, the layer's ``weight`` in train mode |
| mask decay D(j), MdGf linear / exponential | ``share_at``, recipe ``linear`` / ``exponential`` |
| structure decay, SdGf stepwise / geometric | ``pattern_at``, recipe ``stepwise`` / ``geometric`` |
| dense, decay and fine-tune phases | ``dense_fraction``, the rest, ``fine_tune_fraction`` |
| decay coefficient per step | ``decay_frac`` (see `decay_frac_of`) |
| SR-STE's lambda | ``pull`` |

What an evaluation, an export or `finish` sees is always the final binary pattern, at every step, the first included:
only a network in train mode has soft masks. A network trained by this must therefore be put into eval mode (as `train`
leaves it if it was) before it is judged.

Departures. The paper argues with the chain-rule gradient (``gradient="masked"``, where what reaches pruned weights
fades); its released code hands the dense gradient through whatever the decay (``gradient="ste"``), which is the default
here too. The decay is said as a share of its phase, not per step. ``freeze`` is ours. The released code's "densify" and
"custom" schedules are left out. Where it groups across row ends, a pattern that does not divide is refused here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from apportion.errors import InputError
from apportion.training import Hook
from apportion.weights.layers import WeightLayer
from apportion.weights.masks import make_plain, masked, straight_through
from apportion.weights.patterns import NofMPattern

Recipe = Literal["ste", "sr_ste", "linear", "exponential", "stepwise", "geometric"]
_RELEASED = NofMPattern(1, 32)
# Where an exponential decay counts as done: at e^-10 a pruned weight is 0.005 % of itself.
_DONE = 10.0
_SMOOTHING = 0.999  # of second moments, as Adam's


@dataclass(frozen=True)
class ProgressiveGradientFlow:
    """How layers become N:M while they are trained.

    Args:
        pattern: at the end. The released ViT file has 1:32.
        recipe: ``ste`` and ``sr_ste`` are binary from the end of the dense phase on; ``linear`` and ``exponential`` let
            pruned weights fade; ``stepwise`` goes M-1:M, M/2:M, ..., N:M; ``geometric`` 8N:8M, 4N:4M, 2N:2M, N:M.
        gradient: ``ste``: raw weights get the gradient of a dense layer; ``masked``: the chain rule's.
        dense_fraction: share of the steps before anything is pruned.
        fine_tune_fraction: share of the steps, at the end, with the final binary pattern.
        decay_frac: at this share of the decay phase ``linear`` reaches 0 and ``exponential`` e^-10. The default is the
            released 1e-4 a step over that file's 438,000 steps.
        pull: SR-STE's lambda.
        freeze: keep the masks of the fine-tune phase's first step; else they are chosen anew there too.

    Raises:
        InputError: a value that cannot work, or two that contradict each other.
    """

    pattern: NofMPattern = _RELEASED
    recipe: Recipe = "exponential"
    gradient: Literal["ste", "masked"] = "ste"
    dense_fraction: float = 0.0
    fine_tune_fraction: float = 0.0
    decay_frac: float = 0.23
    pull: float = 2e-4
    freeze: bool = False

    def __post_init__(self) -> None:
        if self.recipe not in get_args(Recipe):
            raise InputError(f"recipe={self.recipe!r}: use one of {', '.join(get_args(Recipe))}")
        if self.gradient not in ("ste", "masked"):
            raise InputError(f"gradient={self.gradient!r}: use ste or masked")
        if self.gradient == "masked" and self.recipe in ("ste", "sr_ste"):
            raise InputError(
                f"gradient='masked' contradicts recipe={self.recipe!r}, which is its gradient: leave it out"
            )
        for name in ("dense_fraction", "fine_tune_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)}: use a share of the steps, from 0 to 1")
        if self.dense_fraction + self.fine_tune_fraction > 1:
            raise InputError(
                f"dense_fraction={self.dense_fraction} and fine_tune_fraction={self.fine_tune_fraction} overlap: "
                "together they must be at most 1"
            )
        if not 0 < self.decay_frac < math.inf:
            raise InputError(f"decay_frac={self.decay_frac}: use a share of the decay phase above 0, such as 0.5")
        if not 0 <= self.pull < math.inf:
            raise InputError(f"pull={self.pull}: use 0 or a small positive number, such as 2e-4")
        ratio = self.pattern.m / self.pattern.n
        if self.recipe == "stepwise" and (ratio < 2 or not math.log2(ratio).is_integer()):
            raise InputError(
                f"pattern {self.pattern}: recipe='stepwise' halves the weights of a group, so M/N must be 2, 4, 8, "
                "and so on; choose such a pattern or another recipe"
            )

    def phases(self, steps: int) -> tuple[int, int]:
        """At which step decay begins, and at which fine-tuning."""
        dense = round(self.dense_fraction * steps)
        return dense, max(dense, steps - round(self.fine_tune_fraction * steps))

    def share_at(self, step: int, steps: int) -> float:
        """The share of pruned weights that is used at a step (D(j)): 1 while dense, 0 where masks are binary."""
        start, end = self.phases(steps)
        if step < start:
            return 1.0
        if step >= end or self.recipe not in ("linear", "exponential"):
            return 0.0
        done = (step - start) / (self.decay_frac * (end - start))
        return max(0.0, 1 - done) if self.recipe == "linear" else math.exp(-_DONE * done)

    def patterns(self) -> list[NofMPattern]:
        """The patterns of the decay phase, in equal slices of it, the final one last."""
        n, m, dim = self.pattern.n, self.pattern.m, self.pattern.dim
        if self.recipe == "stepwise":
            halves = [m // 2**power for power in range(1, round(math.log2(m / n)) + 1)]
            return [NofMPattern(each, m, dim) for each in (m - 1, *halves)]
        if self.recipe == "geometric":
            return [NofMPattern(n * times, m * times, dim) for times in (8, 4, 2, 1)]
        return [self.pattern]

    def pattern_at(self, step: int, steps: int) -> NofMPattern:
        """The pattern of a step; the last step of the decay phase has the final one, however short the phase."""
        start, end = self.phases(steps)
        slices = self.patterns()
        if step >= end:
            return self.pattern
        if step < start:
            return slices[0]
        to_go = (end - 1 - step) * len(slices) // (end - start)
        return slices[len(slices) - 1 - to_go]

    def cost(self, steps: int) -> float:
        """Training compute of a layer, of a dense one's.

        Only the forward product can skip pruned weights, where masks are binary. The backward product sums over the
        other dimension, along which these masks are no N:M pattern, and the weights' gradient is dense: both count in
        full.
        """
        densities = (
            1.0 if self.share_at(step, steps) > 0 else self.pattern_at(step, steps).density for step in range(steps)
        )
        return (sum(densities) / steps + 2) / 3

    def start(self, network: nn.Module, layers: Sequence[WeightLayer], steps: int) -> "GradientFlowHook":
        """Put layers of a network on the way to the pattern.

        Args:
            network: in train mode while it is trained.
            layers: of it, such as `prunable` finds. Call again for layers with another pattern.
            steps: of the whole run.

        Returns:
            The hook to train with; it moves all layers on that were started.

        Raises:
            InputError: the pattern, or an easier one on the way, does not fit a layer; ``steps`` is below 1; a layer
                has a parametrisation already.
        """
        if steps < 1:
            raise InputError(f"steps={steps}: give the number of training steps, at least 1")
        for layer in layers:
            if parametrize.is_parametrized(layer.module, "weight"):
                raise InputError(f"{layer.name} has a mask or another parametrisation already: finish it first")
            for pattern in self.patterns():
                layer.check_groups(pattern)
        for layer in layers:
            flow = ScheduledWeight(self, layer, steps).train(layer.module.training)
            parametrize.register_parametrization(layer.module, "weight", flow, unsafe=True)
        return GradientFlowHook()


class ScheduledWeight(nn.Module):
    """The parametrisation of one layer.

    Attributes:
        flow: the settings.
        step: how many steps were taken; set by the hook.
        mask: of the last forward pass in train mode, in the weight's own shape.
        frozen: whether ``mask`` is final.
        flips: entries of masks that have changed since the hook last looked.
        moments: running means of squared gradients of pruned and of kept raw weights.
    """

    step: Tensor
    mask: Tensor
    frozen: Tensor
    flips: Tensor
    moments: Tensor

    def __init__(self, flow: ProgressiveGradientFlow, layer: WeightLayer, steps: int) -> None:
        super().__init__()
        self.flow, self._layer, self._steps = flow, layer, steps
        raw = layer.parameter.detach()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=raw.device))
        self.register_buffer("mask", self._choose(raw, flow.pattern_at(0, steps)))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool, device=raw.device))
        self.register_buffer("flips", torch.zeros((), dtype=torch.int64, device=raw.device))
        self.register_buffer("moments", torch.zeros(2, device=raw.device))

    def forward(self, raw: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The weight of the current step in train mode, that of the final pattern otherwise."""
        if not self.training:
            return masked(raw, self.mask if bool(self.frozen) else self._choose(raw, self.flow.pattern))
        step = int(self.step)
        mask, share = self._renewed(raw, step), self.flow.share_at(step, self._steps)
        if self.flow.gradient == "masked":
            return masked(raw, mask, share)
        return straight_through(raw, mask, share, self.flow.pull if self.flow.recipe == "sr_ste" and share < 1 else 0.0)

    @torch.no_grad()
    def _renewed(self, raw: Tensor, step: int) -> Bool[Tensor, "..."]:
        """This step's mask: a tensor of its own, since the buffer may be written again before a backward pass."""
        if bool(self.frozen):
            return self.mask
        mask = self._choose(raw, self.flow.pattern_at(step, self._steps))
        self.flips += (mask != self.mask).sum()
        self.mask.copy_(mask)
        if self.flow.freeze and step >= self.flow.phases(self._steps)[1]:
            self.frozen.fill_(True)
        return mask

    def _choose(self, raw: Tensor, pattern: NofMPattern) -> Bool[Tensor, "..."]:
        scores = self._layer.to_matrix(raw.detach().abs())
        return self._layer.from_matrix(pattern.keep(scores)).contiguous()


class GradientFlowHook(Hook[nn.Module]):
    """Moves all started layers of a network from step to step, and watches them.

    It logs ``flip_rate``, the share of mask entries that changed; ``used_share`` of pruned weights; and
    ``second_moment_pruned`` and ``second_moment_kept``: running means, as Adam's, of the squared gradients that raw
    weights get.
    """

    @torch.no_grad()
    def before_step(self, module: nn.Module, step: int, /) -> None:
        """Look at the gradients before they are clipped."""
        for layer, weight in _started(module):
            gradient = layer.parameter.grad
            if gradient is None:
                continue
            square = gradient.square()
            kept, everything = weight.mask.sum(), weight.mask.numel()
            of_kept = torch.where(weight.mask, square, 0).sum()
            means = torch.stack([(square.sum() - of_kept) / (everything - kept).clamp_min(1), of_kept / kept])
            weight.moments.lerp_(means.to(weight.moments.dtype), 1 - _SMOOTHING)

    @torch.no_grad()
    def after_step(self, module: nn.Module, step: int, metrics: dict[str, Any], /) -> None:
        """The next forward pass is of the next step.

        Raises:
            InputError: no layer of the module was started.
        """
        started = _started(module)
        if not started:
            raise InputError(
                f"{type(module).__name__} has no layer that was started: call start, or leave out the hook"
            )
        weights = [weight for _, weight in started]
        entries = sum(weight.mask.numel() for weight in weights)
        metrics["flip_rate"] = torch.stack([weight.flips for weight in weights]).sum() / entries
        metrics["used_share"] = max(weight.flow.share_at(step, weight._steps) for weight in weights)
        moments = torch.stack([weight.moments for weight in weights]).mean(dim=0) / (1 - _SMOOTHING ** (step + 1))
        metrics["second_moment_pruned"], metrics["second_moment_kept"] = moments[0], moments[1]
        for weight in weights:
            weight.step.fill_(step + 1)
            weight.flips.zero_()


def finish(network: nn.Module) -> None:
    """Make all started layers plain ones, exactly 0 where the final pattern prunes, at whatever step they are."""
    for layer, weight in _started(network):
        weight.eval()
        make_plain(layer.module)


def decay_frac_of(coefficient: float, steps: int, recipe: Literal["linear", "exponential"]) -> float:
    """The ``decay_frac`` of a decay coefficient per step, as the paper and its code say it.

    Args:
        coefficient: beta: D falls by it at each step (linear) or as ``exp(-beta j)``.
        steps: of the decay phase.
        recipe: which of the two.

    Raises:
        InputError: the coefficient is not positive, or the recipe has none.
    """
    if not 0 < coefficient < math.inf:
        raise InputError(f"coefficient={coefficient}: use a positive number a step, such as 1e-4")
    if recipe not in ("linear", "exponential"):
        raise InputError(f"recipe={recipe!r} has no decay coefficient: use linear or exponential")
    return (1.0 if recipe == "linear" else _DONE) / (coefficient * steps)


def _started(network: nn.Module) -> list[tuple[WeightLayer, ScheduledWeight]]:
    found = []
    for name, module in network.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            own = [each for each in module.parametrizations["weight"] if isinstance(each, ScheduledWeight)]
            found += [(WeightLayer(name, module), each) for each in own]
    return found
