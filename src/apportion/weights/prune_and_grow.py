"""Prune and grow: a network is sparse from its first step to its last, and its masks move while it is trained.

Evci, Gale, Menick, Castro, Elsen 2020, *Rigging the Lottery: Making All Tickets Winners* (RigL), arXiv 1911.11134.
Mocanu et al. 2018, *Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity* (SET), arXiv
1707.04780.

What is allocated: a layer's fixed number of weights, again and again. Every so many steps the smallest of those it has
are taken away, and as many are given to places that it has not: where the loss would fall fastest (RigL), or anywhere
(SET).

====================  ====================================
f_decay(t)            ``PruneAndGrowSettings.fraction_at``
alpha (sheet: f)      ``drop_fraction``
Delta T               ``every``
T_end                 ``end * steps``
ArgTopK(-|theta|)     what ``next_mask`` does not keep
ArgTopK(|grad L|)     ``growth`` of ``next_mask``
Erdos-Renyi-Kernel    ``profile="erk"`` of `layer_counts`
====================  ====================================

Masks move *after* the optimiser's step, by the gradient of that step's batch, as in the code of Sparse-IFT; in RigL's
own an update takes the place of the step. What is grown starts at 0 with moments of 0; a weight that is dropped and
grown in one update has never been away, and keeps both.

Departures. Ties go to the place that comes first, where the reference adds noise. SET is run in this frame, as RigL's
authors run it: with their schedule, by magnitude alone, new weights at 0. (Its own paper drops the smallest positive
and the largest negative ones, always the same share, after every epoch, and draws new ones at random.) Adam counts the
steps of a whole tensor, so the moments of a new weight are corrected as if they were old.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override

from apportion.errors import InputError
from apportion.training import Hook
from apportion.weights.layers import WeightLayer
from apportion.weights.masks import add_masks, held_mask, masked_layers, zero_pruned
from apportion.weights.patterns import keep_best

Growth = Literal["gradient", "random"]
Profile = Literal["uniform", "erk"]


@dataclass(frozen=True)
class PruneAndGrowSettings:
    """When masks move, how far, and where to.

    Attributes:
        steps: of the whole training.
        growth: ``gradient`` is RigL, ``random`` is SET.
        drop_fraction: share of a layer's weights that move at the beginning; it falls to 0 along half a cosine. With 0
            masks stay what they are: static sparse training.
        every: steps from one update to the next.
        end: the share of the training after which masks stay.
        seed: of random growth.

    Raises:
        InputError: a value that cannot work.
    """

    steps: int
    growth: Growth = "gradient"
    drop_fraction: float = 0.3
    every: int = 100
    end: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        if self.growth not in ("gradient", "random"):
            raise InputError(f"growth={self.growth!r}: use gradient (RigL) or random (SET)")
        for name in ("steps", "every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: use at least 1 step")
        if not 0 <= self.drop_fraction < 1:
            raise InputError(f"drop_fraction={self.drop_fraction}: use a share of weights, at least 0 and below 1")
        if not 0 < self.end <= 1:
            raise InputError(f"end={self.end}: use a share of the training, above 0 and at most 1")

    def fraction_at(self, steps_done: int) -> float:
        """The share of weights that moves after so many steps; 0 from the end on."""
        last = self.end * self.steps
        if steps_done >= last:
            return 0.0
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * steps_done / last))

    def moves_after(self, steps_done: int) -> bool:
        """Whether masks move when so many steps are done."""
        return steps_done > 0 and steps_done % self.every == 0 and self.fraction_at(steps_done) > 0

    def training_flops(self, sparse: float, dense: float) -> float:
        """Mean cost of a training step, given those of a sparse and of a dense forward pass.

        A step costs three forward passes, one of which is the gradient of the weights; where masks move by gradient,
        that one is dense. (RigL's own formula has an update besides the step, not in it.)
        """
        moves = sum(self.moves_after(step) for step in range(self.every, self.steps + 1, self.every))
        return 3 * sparse + (dense - sparse) * (self.growth == "gradient") * moves / self.steps


class PruneAndGrow(Hook[nn.Module]):
    """Moves the masks of all masked layers while `train_masked` trains them.

    It remembers nothing from one step to the next, masks are buffers, and random growth is a function of seed and step:
    a run that goes on from a checkpoint ends with the weights of one that was not interrupted.

    Args:
        settings: see `PruneAndGrowSettings`.
    """

    def __init__(self, settings: PruneAndGrowSettings) -> None:
        self.settings = settings
        self._growth: dict[str, Tensor] = {}

    @override
    def before_step(self, module: nn.Module, step: int, /) -> None:
        """Look at the gradients, while they still say something of pruned weights.

        Raises:
            InputError: no layer has a mask; a layer has no gradient, or one only of the weights it has.
        """
        if not self.settings.moves_after(step + 1):
            return
        layers = masked_layers(module)
        if not layers:
            raise InputError(f"{type(module).__name__} has no masked layer: start with `start_sparse`")
        generator = _stream(self.settings.seed, step + 1)
        for layer in layers:
            gradient = _gradient(layer, self.settings.growth)
            if self.settings.growth == "gradient":
                self._growth[layer.name] = gradient.abs()
            else:
                drawn = torch.rand(gradient.shape, generator=generator)
                self._growth[layer.name] = drawn.to(gradient.device)

    @override
    def after_step(self, module: nn.Module, step: int, metrics: dict[str, Any], /) -> None:
        """Move the masks; ``metrics`` gets how many weights are new."""
        if not self._growth:
            return
        growth, self._growth = self._growth, {}
        if not all(bool(each.isfinite().all()) for each in growth.values()):
            return  # The loop ends such a run, and if it did not, there would be nothing to rank.
        metrics["weights_grown"] = move_masks(module, growth, self.settings.fraction_at(step + 1))


def next_mask(
    weight: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"], growth: Float[Tensor, "out in"], fraction: float
) -> Bool[Tensor, "out in"]:
    """The mask after a share of a layer's weights has moved; it has as many as the one before.

    Args:
        weight: of the layer; the smallest of those it has are dropped.
        mask: that holds now.
        growth: at least 0; places not kept are given to the largest, and one just dropped may win its own place back.
        fraction: of the weights that are dropped, rounded down.
    """
    count = int(mask.sum())
    dropped = int(fraction * count)
    kept = keep_best(weight.abs().masked_fill(~mask, -1), count - dropped)
    return kept | keep_best(growth.masked_fill(kept, -1), dropped)


@torch.no_grad()
def move_masks(network: nn.Module, growth: Mapping[str, Float[Tensor, "out in"]], fraction: float) -> int:
    """Move the masks of the layers that ``growth`` names; raw weights that are dropped or new become 0.

    Returns:
        How many weights there are that were not there before.
    """
    new = 0
    layers = {layer.name: layer for layer in masked_layers(network)}
    for name, scores in growth.items():
        layer = layers[name]
        own = held_mask(layer).mask
        after = layer.from_matrix(next_mask(layer.matrix(), layer.to_matrix(own), scores, fraction))
        layer.parameter.masked_fill_(~(own & after), 0)
        new += int((after & ~own).sum())
        own.copy_(after)
    return new


@torch.no_grad()
def start_sparse(
    network: nn.Module,
    counts: Mapping[str, int],
    *,
    seed: int = 0,
    rescale: bool = False,
    dense_gradient: bool = True,
) -> None:
    """Give layers random masks to start from, and set what they prune to 0.

    Args:
        network: before its training.
        counts: how many weights each layer keeps, see `layer_counts` and `spend`.
        seed: of the masks.
        rescale: divide the weights that stay by the square root of their share, so that in a network without norms
            activations keep their size. (RigL's and Sparse-IFT's networks have norms and do not.)
        dense_gradient: what RigL needs; without it steps are a little cheaper.

    Raises:
        InputError: there is no such layer; a count is none, or more than the layer has.
    """
    generator = _stream(seed, 0)
    modules = dict(network.named_modules())
    masks = {}
    for name, count in counts.items():
        if name not in modules or not hasattr(modules[name], "weight"):
            raise InputError(f"counts: {type(network).__name__} has no layer {name!r} with a weight")
        layer = WeightLayer(name, modules[name])
        if not 1 <= count <= layer.parameter.numel():
            raise InputError(f"counts[{name!r}]={count}: keep at least 1 of its {layer.parameter.numel()} weights")
        masks[name] = keep_best(torch.rand(layer.matrix().shape, generator=generator), count)
        if rescale:
            layer.set_matrix(layer.matrix() * (layer.parameter.numel() / count) ** 0.5)
    add_masks(network, masks, dense_gradient=dense_gradient)
    zero_pruned(network)


def layer_counts(layers: Sequence[WeightLayer], density: float, profile: Profile = "uniform") -> dict[str, int]:
    """How many weights each layer keeps at a density of all of them together.

    Args:
        layers: that are sparse.
        density: of them together, above 0 and at most 1.
        profile: ``uniform``: the same share of each; ``erk``: a share in proportion to the sum of a weight's dimensions
            over their product, so that small layers are denser; those it would give more than they have are dense.

    Raises:
        InputError: a density that cannot be, or so low that a layer is left without a weight.
    """
    if not 0 < density <= 1:
        raise InputError(f"density={density}: use a share of weights to keep, above 0 and at most 1")
    total = sum(layer.parameter.numel() for layer in layers)
    return spend(layers, round(density * total), {layer.name: 1 for layer in layers}, profile)


def spend(
    layers: Sequence[WeightLayer], budget: int, costs: Mapping[str, int], profile: Profile = "uniform"
) -> dict[str, int]:
    """Spread a budget over layers whose weights cost something each: less than one weight's cost is left over.

    Args:
        layers: that are sparse.
        budget: to spend, in the unit of the costs.
        costs: of a weight of each layer, by its name: 1 to count weights, how often it is applied to count FLOPs.
        profile: see `layer_counts`.

    Returns:
        How many weights each layer keeps.

    Raises:
        InputError: the budget is larger than all of it costs, or a layer is left without a weight.
    """
    sizes = {layer.name: layer.parameter.numel() for layer in layers}
    whole = sum(sizes[name] * costs[name] for name in sizes)
    if not 0 < budget <= whole:
        raise InputError(f"a budget of {budget} cannot be spent: use 1 to {whole}, which all weights together cost")
    exact = {name: share * sizes[name] for name, share in _densities(layers, budget, costs, profile).items()}
    counts = {name: min(sizes[name], math.floor(count)) for name, count in exact.items()}
    left = budget - sum(counts[name] * costs[name] for name in counts)
    # Largest remainders first, then whatever still fits, dearest first.
    for name in sorted(exact, key=lambda each: counts[each] - exact[each]):
        if counts[name] < sizes[name] and costs[name] <= left:
            counts[name], left = counts[name] + 1, left - costs[name]
    for name in sorted(counts, key=lambda each: -costs[each]):
        more = min(sizes[name] - counts[name], left // costs[name])
        counts[name], left = counts[name] + more, left - more * costs[name]
    if empty := [name for name, count in counts.items() if count < 1]:
        raise InputError(f"{empty[0]} would be left without a weight: raise the density, or leave it dense")
    return counts


def _stream(seed: int, step: int) -> torch.Generator:
    """Random numbers of a step, 0 being before the first."""
    # Far from small seeds: a network drawn with the same one would have its largest weights where masks hold.
    return torch.Generator().manual_seed((0x5EED0000 + 1_000_003 * seed + step) % 2**32)


def _densities(
    layers: Sequence[WeightLayer], budget: int, costs: Mapping[str, int], profile: Profile
) -> dict[str, float]:
    """Shares in proportion to the profile that cost the budget; who would get more than all is dense."""
    raw = {layer.name: _proportion(layer, profile) for layer in layers}
    price = {layer.name: layer.parameter.numel() * costs[layer.name] for layer in layers}
    dense: set[str] = set()
    while len(dense) < len(raw):
        rest = [name for name in raw if name not in dense]
        scale = (budget - sum(price[name] for name in dense)) / sum(raw[name] * price[name] for name in rest)
        over = {name for name in rest if scale * raw[name] > 1}
        if not over:
            return {name: 1.0 if name in dense else scale * raw[name] for name in raw}
        dense |= over
    return dict.fromkeys(raw, 1.0)


def _proportion(layer: WeightLayer, profile: Profile) -> float:
    if profile == "uniform":
        return 1.0
    if profile != "erk":
        raise InputError(f"profile={profile!r}: use uniform or erk")
    shape = layer.parameter.shape
    return sum(shape) / math.prod(shape)


def _gradient(layer: WeightLayer, growth: Growth) -> Float[Tensor, "out in"]:
    gradient = layer.parameter.grad
    if gradient is None:
        raise InputError(
            f"{layer.name} has a mask but no gradient: it is frozen, or the loss does not depend on it; it cannot be "
            "pruned and grown, so give it no mask"
        )
    if growth == "gradient" and not held_mask(layer).dense_gradient:
        raise InputError(
            f"the mask of {layer.name} stops the gradient of pruned weights: give it with dense_gradient=True, or grow "
            "at random"
        )
    return layer.to_matrix(gradient)
