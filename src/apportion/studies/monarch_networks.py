"""The small networks of the study `monarch`: a next-character model with dense, Monarch, low-rank and pruned layers."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from apportion.data.characters import characters
from apportion.studies.small_networks import (
    WINDOW,
    Batches,
    CharacterNetwork,
    bits_per_character,
    character_batches,
    fit,
    seeded,
)
from apportion.training import TrainingSettings
from apportion.weights.masks import add_masks
from apportion.weights.monarch import MonarchLinear
from apportion.weights.monarch_models import densify, replace_linears
from apportion.weights.monarch_shape import MonarchShape

# The feed-forward layers, which take another structure; embedding and head stay as they are.
LAYERS = ("first", "second")
DENSE, MONARCH, NARROW, LOW_RANK, PRUNED = (
    "dense",
    "Monarch",
    "narrower dense, equal parameters",
    "low rank, equal parameters",
    "pruned by magnitude, equal non-zeros",
)
REVERSE = "Monarch, then dense"
Rates: TypeAlias = Mapping[str, float]


@dataclass(frozen=True)
class TaskSize:
    """The next-character task and how long everything is trained.

    Attributes:
        characters: of text, all three parts together.
        width: of the dense network.
        steps: of the dense network from scratch.
        finetune_steps: after a projection.
        batch: windows a step.
        rates: grid of learning rates, the same for every arm.
        ranks: of the blocks of a projected network; None is the published width.
        structured: share of the steps before a Monarch network is made dense.
        device: to train on.
    """

    characters: int = 1_500_000
    width: int = 256
    steps: int = 500
    finetune_steps: int = 150
    batch: int = 256
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    ranks: tuple[int | None, ...] = (None, 4)
    structured: float = 0.8
    device: str = "cpu"


class LowRankLinear(nn.Module):
    """A linear layer of two dense factors."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features)

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """One factor after the other."""
        return self.up(self.down(x))

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, rank: int) -> "LowRankLinear":
        """The nearest of that rank, each singular value shared out by its square root."""
        left, values, right = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        made = cls(linear.in_features, linear.out_features, rank).to(linear.weight.device)
        share = values[:rank].sqrt()
        made.down.weight.copy_(share[:, None] * right[:rank])
        made.up.weight.copy_(left[:, :rank] * share)
        made.up.bias.copy_(linear.bias)
        return made


def equal_rank(shape: MonarchShape) -> int:
    """The largest rank whose two factors have no more parameters than a Monarch matrix, at least 1."""
    return max(1, shape.parameters // (shape.in_features + shape.out_features))


def largest(weight: Float[Tensor, "out in"], count: int) -> Bool[Tensor, "out in"]:
    """A mask of the ``count`` entries of largest magnitude."""
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[weight.detach().abs().flatten().topk(count).indices] = True
    return mask.view_as(weight)


def multiplications(network: nn.Module) -> int:
    """Of one forward pass of one window; training takes three times as many."""
    linear = sum(each.weight.numel() for each in network.modules() if isinstance(each, nn.Linear))
    return linear + sum(each.shape.parameters for each in network.modules() if isinstance(each, MonarchLinear))


def parameters(network: nn.Module) -> int:
    """All of them."""
    return sum(each.numel() for each in network.parameters())


def steps_at_equal_cost(steps: int, dense: int, monarch: int, structured: float) -> tuple[int, int]:
    """Structured and dense steps that together cost no more than so many dense ones.

    Args:
        steps: of the dense network.
        dense: multiplications of its pass.
        monarch: multiplications of the structured network's.
        structured: share of structured steps.
    """
    all_steps = steps * dense / (structured * monarch + (1 - structured) * dense)
    first = round(structured * all_steps)
    return first, (steps * dense - first * monarch) // dense


def _hidden(network: nn.Module) -> dict[str, nn.Linear]:
    """The dense layers that take another structure."""
    return {name: each for name, each in network.named_children() if name in LAYERS and isinstance(each, nn.Linear)}


class CharacterTask:
    """Everything that one seed trains: initial weights, batches and networks are functions of it."""

    def __init__(self, size: TaskSize, seed: int) -> None:
        self.size, self.seed = size, seed
        self.text = characters(size.characters)
        self._dense: dict[float, nn.Module] = {}

    # --- from scratch ---

    def network(self, arm: str) -> nn.Module:
        """With weights drawn anew; published starts, for low rank alike."""
        return seeded(lambda: self._made(arm), self.seed).to(self.size.device)

    def _made(self, arm: str) -> nn.Module:
        if arm == NARROW:
            return CharacterNetwork(self.narrow_width())
        network = CharacterNetwork(self.size.width)
        if arm == MONARCH:
            replace_linears(network, LAYERS, project=False)
        elif arm == LOW_RANK:
            for name, linear in _hidden(network).items():
                shape = MonarchShape.of(linear.in_features, linear.out_features)
                setattr(network, name, LowRankLinear(shape.in_features, shape.out_features, equal_rank(shape)))
        return network

    def narrow_width(self) -> int:
        """The largest width of a dense network with no more parameters than the Monarch network, head and all."""
        budget = parameters(self._made(MONARCH))
        return next(width for width in range(self.size.width, 0, -1) if parameters(CharacterNetwork(width)) <= budget)

    def from_scratch(self, arm: str, rate: float, steps: int | None = None) -> nn.Module:
        """Trained for as many steps as the dense network, unless told otherwise."""
        if arm == REVERSE:
            return self._reverse(rate)
        return self._fit(self.network(arm), steps or self.size.steps, rate)

    def dense(self, rate: float) -> nn.Module:
        """The trained dense network, trained once."""
        if rate not in self._dense:
            self._dense[rate] = self.from_scratch(DENSE, rate)
        return self._dense[rate]

    # --- sparse to dense, at the dense network's training cost ---

    def steps_of_reverse(self) -> tuple[int, int]:
        """Structured and dense steps that cost as much as dense training."""
        dense, monarch = (multiplications(self._made(arm)) for arm in (DENSE, MONARCH))
        return steps_at_equal_cost(self.size.steps, dense, monarch, self.size.structured)

    def steps_throughout(self, arm: str) -> int:
        """Steps of a cheaper network that cost as much as dense training."""
        return self.size.steps * multiplications(self._made(DENSE)) // multiplications(self._made(arm))

    def _reverse(self, rate: float) -> nn.Module:
        structured, dense = self.steps_of_reverse()
        # Together one schedule: warm up, stay, and fall to zero over the dense steps.
        network = self._fit(self.network(MONARCH), structured, rate, decay=0.0)
        densify(network)
        return self._fit(network, dense, rate, decay=0.95, start=structured)

    # --- dense to sparse ---

    def projected(self, network: nn.Module, arm: str, rank: int | None) -> nn.Module:
        """A copy of a trained network in another structure, as many parameters in it for every arm but dense."""
        network = copy.deepcopy(network)
        layers = _hidden(network)
        shapes = {
            name: MonarchShape.of(each.in_features, each.out_features, rank=rank) for name, each in layers.items()
        }
        if arm == MONARCH:
            replace_linears(network, LAYERS, rank=rank)
        elif arm == LOW_RANK:
            for name, linear in layers.items():
                setattr(network, name, LowRankLinear.from_linear(linear, equal_rank(shapes[name])))
        elif arm == PRUNED:
            add_masks(network, {name: largest(each.weight, shapes[name].parameters) for name, each in layers.items()})
        return network

    def finetuned(self, network: nn.Module, rate: float) -> nn.Module:
        """Trained on, in place, on batches that it has not seen."""
        return self._fit(network, self.size.finetune_steps, rate, start=self.size.steps)

    # --- training and judging ---

    def _fit(self, network: nn.Module, steps: int, rate: float, *, decay: float = 0.2, start: int = 0) -> nn.Module:
        batches: Batches = character_batches(self.text.train, self.size.batch, self.seed)
        settings = TrainingSettings(
            steps=steps, learning_rate=rate, decay_fraction=decay, clip_norm=None, log_every=steps
        )
        return fit(network, lambda step: batches(start + step), steps, rate, seed=self.seed, settings=settings)

    def bits(self, network: nn.Module, part: str = "test") -> float:
        """Bits per character of "validation" or "test" text."""
        codes: Tensor = getattr(self.text, part)
        return bits_per_character(network, codes.to(self.size.device), min(20_000, len(codes) - WINDOW))

    def best_rate(self, train: Callable[[float], nn.Module]) -> float:
        """The rate of the grid whose network has the fewest bits on validation text."""
        return min(self.size.rates, key=lambda rate: self.bits(train(rate), "validation"))
