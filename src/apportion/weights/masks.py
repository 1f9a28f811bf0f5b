"""Masks as parametrisations: a weight with a mask is exactly zero where it is pruned, and stays so while it is trained.

A masked module keeps its raw weight as ``parametrizations.weight.original`` and its mask as a buffer, so both are in
every checkpoint. Its ``weight`` is the raw one where the mask holds and 0 elsewhere. `remove_masks` leaves a plain one.

An optimiser does not know this, and would move pruned weights by the momentum that they have left, by weight decay, by
an average. `keep_masks` is the policy, stated once:

- before a step, gradients of pruned weights are 0 (and `train_masked` sees to it before gradients are clipped, so that
  their norm is that of the gradients which are used);
- after a step, whatever the optimiser keeps that has the weight's shape (momentum, moments) is 0 for pruned weights;
- after a step, pruned raw weights are 0 (``regrow="zero"``), or what they were before it (``regrow="frozen"``: they may
  come back, with their old value, when a mask is chosen again).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from apportion.errors import InputError
from apportion.training import Hook, TrainingResult, TrainingSettings, train
from apportion.training.optimizer import OptimizerFactory, adam
from apportion.weights.layers import WeightLayer

Regrow = Literal["zero", "frozen"]


class Mask(nn.Module):
    """The parametrisation: the raw weight where ``mask`` holds, exactly 0 elsewhere.

    Attributes:
        mask: True for weights that stay; a buffer of the weight's shape.
        dense_gradient: let the gradient of the masked weight reach pruned raw weights too, for those who choose by it
            (RigL); `keep_masks` still keeps an optimiser from using it.
    """

    mask: Tensor

    def __init__(self, mask: Bool[Tensor, "..."], dense_gradient: bool = False) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.dense_gradient = dense_gradient

    def forward(self, raw: Tensor) -> Tensor:
        """The masked weight."""
        if self.dense_gradient:
            return straight_through(raw, self.mask)
        return masked(raw, self.mask)


class _StraightThrough(torch.autograd.Function):
    """Masks forward; backward the gradient passes as if there were no mask, and pruned weights are pulled towards 0."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, mask: Tensor, share: float, pull: float) -> Tensor:
        ctx.pull = pull
        if pull:
            ctx.save_for_backward(raw, mask)
        return masked(raw, mask, share)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.pull:
            raw, mask = ctx.saved_tensors
            gradient = gradient + ctx.pull * masked(raw, ~mask)
        return gradient, None, None, None


def masked(raw: Float[Tensor, "..."], mask: Bool[Tensor, "..."], share: float = 0.0) -> Float[Tensor, "..."]:
    """The weight where the mask holds, and a share of it elsewhere: exactly 0 by default, even of infinite weights."""
    return torch.where(mask, raw, raw * share if share else 0)


def straight_through(
    raw: Float[Tensor, "..."], mask: Bool[Tensor, "..."], share: float = 0.0, pull: float = 0.0
) -> Float[Tensor, "..."]:
    """`masked`, with a gradient that passes as if there were no mask.

    Args:
        raw: the dense weight.
        mask: True for weights that stay.
        share: of the other weights that is still used.
        pull: SR-STE's lambda: this share of each pruned raw weight is added to its gradient.
    """
    return _StraightThrough.apply(raw, mask, share, pull)


def add_masks(network: nn.Module, masks: Mapping[str, Bool[Tensor, "out in"]], *, dense_gradient: bool = False) -> None:
    """Give layers masks, or other ones than they have.

    Raw weights stay as they are, so an earlier mask's victims are there for a later one unless they were set to zero.

    Args:
        network: that holds the layers.
        masks: of the weights as matrices ``[out, in]`` (see `WeightLayer`), by the layers' names.
        dense_gradient: see `Mask`.

    Raises:
        InputError: there is no such layer; a mask has another shape.
    """
    modules = dict(network.named_modules())
    for name, mask in masks.items():
        if name not in modules or not hasattr(modules[name], "weight"):
            raise InputError(f"masks: {type(network).__name__} has no layer {name!r} with a weight")
        layer = WeightLayer(name, modules[name])
        shape = layer.matrix().shape
        if mask.shape != shape:
            raise InputError(
                f"masks[{name!r}] has shape {tuple(mask.shape)}, the weight {tuple(shape)}: they must agree"
            )
        own = layer.from_matrix(mask).to(layer.parameter.device).contiguous()
        existing = _mask_of(modules[name])
        if existing is None:
            mask_module = Mask(own.clone(), dense_gradient)
            parametrize.register_parametrization(modules[name], "weight", mask_module, unsafe=True)
        else:
            existing.mask.copy_(own)
            existing.dense_gradient = dense_gradient


def masks_of(network: nn.Module) -> dict[str, Bool[Tensor, "out in"]]:
    """The masks of all masked layers, as matrices, by the layers' names."""
    return {each.name: each.to_matrix(held_mask(each).mask) for each in masked_layers(network)}


def masked_layers(network: nn.Module) -> list[WeightLayer]:
    """The layers that have a mask, first to last."""
    return [WeightLayer(name, each) for name, each in network.named_modules() if _mask_of(each) is not None]


def held_mask(layer: WeightLayer) -> Mask:
    """The parametrisation of a masked layer: its mask in the weight's own shape, and whether gradients pass it.

    Raises:
        InputError: the layer has no mask.
    """
    mask = _mask_of(layer.module)
    if mask is None:
        raise InputError(f"{layer.name} has no mask: give it one with `add_masks`")
    return mask


def masks_from_zeros(network: nn.Module, layers: Sequence[WeightLayer], minimum: float = 0.1) -> dict[str, Tensor]:
    """Masks that hold where a weight is not 0: how a pruned checkpoint is trained on without filling it again.

    Weights that are 0 for another reason, such as those of a model that was quantised before, look pruned too.

    Args:
        network: that holds the layers; it is given the masks.
        layers: to look at.
        minimum: layers with a smaller share of zeros are left alone (SquareHead's code has 0.1).

    Returns:
        The masks given, as matrices, by name.
    """
    found = {}
    for layer in layers:
        matrix = layer.matrix().detach()
        mask = matrix != 0
        pruned = mask.numel() - int(mask.sum())
        if pruned > 0 and pruned >= minimum * mask.numel():
            found[layer.name] = mask
    add_masks(network, found)
    return found


@torch.no_grad()
def remove_masks(network: nn.Module) -> None:
    """Turn masked layers into plain ones, whose weights are exactly 0 where they were pruned."""
    for layer in masked_layers(network):
        make_plain(layer.module)


@torch.no_grad()
def make_plain(module: nn.Module) -> None:
    """Leave a module its weight as it is now, and no parametrisation of it."""
    # torch takes the weight's property off a class that copies of the module share: give this one a class of its own.
    kind = type(module)
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, own)
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


@torch.no_grad()
def zero_pruned(network: nn.Module) -> None:
    """Set pruned raw weights to 0: they do not come back when another mask is chosen."""
    for layer in masked_layers(network):
        layer.parameter.masked_fill_(~held_mask(layer).mask, 0)


@dataclass(frozen=True)
class Counts:
    """How many weights there are.

    Attributes:
        kept: weights that are not pruned, of the layers counted.
        prunable: all weights of those layers.
        parameters: all parameters of the network, each once.
    """

    kept: int
    prunable: int
    parameters: int

    @property
    def sparsity(self) -> float:
        """The share of prunable weights that are pruned."""
        return 1 - self.kept / self.prunable

    @property
    def sparsity_of_all(self) -> float:
        """The share of all parameters that are pruned: what decides how much smaller a file can be."""
        return (self.prunable - self.kept) / self.parameters


def counts(network: nn.Module, layers: Sequence[WeightLayer]) -> Counts:
    """Count the weights of layers that are not 0, under their masks."""
    kept = sum(int(layer.weight.detach().count_nonzero()) for layer in layers)
    everything = sum(layer.parameter.numel() for layer in layers)
    return Counts(kept, everything, sum(each.numel() for each in network.parameters()))


def keep_masks(optimizer: torch.optim.Optimizer, network: nn.Module, regrow: Regrow = "zero") -> Callable[[], None]:
    """Hold an optimiser to the masks of a network, whichever they are when it takes a step.

    Args:
        optimizer: any; what it keeps for a parameter in the parameter's shape is masked with it.
        network: whose masks hold.
        regrow: see the module's description.

    Returns:
        A function that lets go of the optimiser again.

    Raises:
        InputError: ``regrow`` is neither of the two.
    """
    if regrow not in ("zero", "frozen"):
        raise InputError(f"regrow={regrow!r}: use zero (a pruned weight is gone) or frozen (it keeps its value)")
    frozen: dict[int, Tensor] = {}

    @torch.no_grad()
    def before(*_: Any) -> None:
        mask_gradients(network)
        if regrow == "frozen":
            frozen.update({id(p): p[~mask] for p, mask in _parameters(network)})

    @torch.no_grad()
    def after(*_: Any) -> None:
        for parameter, mask in _parameters(network):
            for kept in optimizer.state.get(parameter, {}).values():
                if isinstance(kept, Tensor) and kept.shape == parameter.shape:
                    kept.masked_fill_(~mask, 0)
            if regrow == "zero":
                parameter.masked_fill_(~mask, 0)
            else:
                parameter[~mask] = frozen.pop(id(parameter))

    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def let_go() -> None:
        for each in handles:
            each.remove()

    return let_go


@torch.no_grad()
def mask_gradients(network: nn.Module) -> None:
    """Set gradients of pruned weights to 0."""
    for parameter, mask in _parameters(network):
        if parameter.grad is not None:
            parameter.grad.masked_fill_(~mask, 0)


class MaskGradients(Hook[nn.Module]):
    """Before gradients are clipped, those of pruned weights are 0."""

    def before_step(self, module: nn.Module, step: int, /) -> None:
        """Mask them."""
        mask_gradients(module)


def train_masked(
    network: nn.Module,
    objective: Any,
    batches: Callable[[int], Any],
    settings: TrainingSettings,
    folder: Any = None,
    *,
    hooks: Sequence[Hook[Any]] = (),
    optimizer: OptimizerFactory | None = None,
    regrow: Regrow = "zero",
    **options: Any,
) -> TrainingResult:
    """`apportion.training.train` under the network's masks.

    Args:
        network: as ``module`` of `train`.
        objective: as `train` has it.
        batches: as `train` has them.
        settings: as `train` has them.
        folder: as `train` has it.
        hooks: called before gradients are masked: one that chooses masks sees what the loss said of pruned weights, if
            their masks have a ``dense_gradient``.
        optimizer: makes the optimiser; Adam of the settings if None. It is held to the masks.
        regrow: see `keep_masks`.
        options: of `train`.
    """

    def held(parameters: Any) -> torch.optim.Optimizer:
        made = (optimizer or adam(settings))(parameters)
        keep_masks(made, network, regrow)
        return made

    return train(
        network, objective, batches, settings, folder, hooks=[*hooks, MaskGradients()], optimizer=held, **options
    )


def _parameters(network: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    return [(layer.parameter, held_mask(layer).mask) for layer in masked_layers(network)]


def _mask_of(module: nn.Module) -> Mask | None:
    parametrizations = getattr(module, "parametrizations", None)
    if parametrizations is None or "weight" not in parametrizations:
        return None
    return next((each for each in parametrizations["weight"] if isinstance(each, Mask)), None)
