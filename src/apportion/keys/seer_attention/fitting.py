"""Distil gates: the loss, the recipe, and the run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.seer_attention.gate import Example, Gates
from apportion.training import Hook, TrainingResult, TrainingSettings, train

REDUCTIONS = ("element", "row")
_MASKED = -1e9  # finite: a target of 0 times the logarithm of 0 would be no number


@dataclass(frozen=True)
class GateRecipe:
    """How gates are trained; the defaults are the paper's and its code's.

    Attributes:
        steps: optimiser steps.
        batch_size: texts a step; all of them, where there are fewer.
        tokens: of each text at most; never more than the model has positions for.
        learning_rate: peak.
        warmup: steps over which it rises.
        loss_scale: times the loss; it matters to the clipping of gradients alone.
        reduction: ``element``: the mean over all entries of the score matrices, which shrinks as texts grow (the
            code's, by which scale and learning rate are meant); ``row``: the mean over rows.
        held_out: how many of the texts, the last ones, are not trained on; each layer then keeps its weights of the
            step that did best on them. 0 keeps the last.
        check_every: steps between looks at these.
        seed: of the initial weights, and of the order of the texts.

    Raises:
        InputError: a value that cannot work.
    """

    steps: int = 500
    batch_size: int = 16
    tokens: int = 65_536
    learning_rate: float = 1e-3
    warmup: int = 20
    loss_scale: float = 10.0
    reduction: str = "element"
    held_out: int = 0
    check_every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "check_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: at least 1")
        for name in ("warmup", "held_out"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)}: 0 or above")
        if self.tokens < 2:
            raise InputError(f"tokens={self.tokens}: at least 2")
        if self.loss_scale <= 0:
            raise InputError(f"loss_scale={self.loss_scale}: above 0")
        if self.reduction not in REDUCTIONS:
            raise InputError(f"reduction={self.reduction!r}: one of {', '.join(REDUCTIONS)}")

    def settings(self) -> TrainingSettings:
        """Settings of the training loop."""
        rising = min(self.warmup / self.steps, 0.5)
        return TrainingSettings(
            steps=self.steps,
            learning_rate=self.learning_rate,
            warmup_fraction=rising,
            decay_fraction=1 - rising,
            checkpoint_every=100,
            seed=self.seed,
            progress_metrics=("loss", "held out"),
        )


def gate_loss(
    logits: Float[Tensor, "layers heads asking key_blocks"], example: Example, reduction: str = "element"
) -> Float[Tensor, " layers"]:
    """Kullback-Leibler divergence of the gate from the truth, in nats, for each layer; see `GateRecipe.reduction`."""
    logarithms = logits.float().masked_fill(~example.visible, _MASKED).log_softmax(-1)
    each = torch.special.xlogy(example.truth, example.truth) - example.truth * logarithms
    return each.mean((1, 2, 3)) if reduction == "element" else each.sum(-1).mean((1, 2))


class KeepBest(Hook[Gates]):
    """Remembers each layer's weights of the step that did best on held-out texts, in buffers of the module.

    Args:
        gates: that will be trained.
        examples: the held-out texts.
        recipe: how often to look, and by which loss.
    """

    def __init__(self, gates: Gates, examples: Sequence[Example], recipe: GateRecipe) -> None:
        self._examples, self._recipe = examples, recipe
        self._names = [name for name, _ in gates.named_parameters()]
        weight = gates.key_weight
        gates.register_buffer("best_loss", torch.full((len(weight),), torch.inf, device=weight.device))
        for name in self._names:
            gates.register_buffer(f"best_{name}", getattr(gates, name).detach().clone())

    @override
    def after_step(self, module: Gates, step: int, metrics: dict[str, int | float | Tensor], /) -> None:
        if (step + 1) % self._recipe.check_every and step + 1 < self._recipe.steps:
            return
        with torch.no_grad():
            losses = [gate_loss(module(each), each, self._recipe.reduction) for each in self._examples]
            loss = torch.stack(losses).mean(0)
            best = module.get_buffer("best_loss")
            better = loss < best
            best.copy_(torch.minimum(loss, best))
            for name in self._names:
                module.get_buffer(f"best_{name}")[better] = getattr(module, name)[better]
        metrics["held out"] = float(loss.sum())

    @torch.no_grad()
    def restore(self, gates: Gates) -> None:
        """Give the gates what was best."""
        for name in self._names:
            getattr(gates, name).copy_(gates.get_buffer(f"best_{name}"))


def train_gates(
    gates: Gates,
    examples: Sequence[Example],
    recipe: GateRecipe,
    folder: Path | str | None = None,
    *,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
    stop_after: int | None = None,
) -> TrainingResult:
    """Train in place, with a folder resumably; see `apportion.training.train`.

    Args:
        gates: of all layers; they share nothing but the clipping of gradients.
        examples: one a text, the held-out ones last.
        recipe: see `GateRecipe`.
        folder: of the run's log and checkpoints; None keeps nothing.
        provenance: what else decides the weights.
        progress: show progress.
        stop_after: pause after so many steps of the run.

    Raises:
        InputError: no text is left to train on.
    """
    taught = len(examples) - recipe.held_out
    if taught < 1:
        raise InputError(f"held_out={recipe.held_out} of {len(examples)} texts: at least one must be left to train on")
    together = min(recipe.batch_size, taught)

    def batch(step: int) -> tuple[Example, ...]:
        # All texts come before one comes again.
        first = step * together
        places = [_shuffled(place, taught, recipe.seed) for place in range(first, first + together)]
        return tuple(examples[place] for place in places)

    def objective(module: Gates, texts: tuple[Any, ...], step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        losses = [gate_loss(module(example), example, recipe.reduction) for example in (Example(*t) for t in texts)]
        return recipe.loss_scale * torch.stack(losses).mean(0).sum(), {}

    keep = KeepBest(gates, examples[taught:], recipe) if recipe.held_out else None
    hooks = [] if keep is None else [keep]
    # Whoever fits a method may have turned gradients off for the model's sake.
    with torch.enable_grad():
        result = train(
            gates,
            objective,
            batch,
            recipe.settings(),
            folder,
            hooks=hooks,
            provenance=provenance,
            progress=progress,
            stop_after=stop_after,
        )
    if keep is not None:
        keep.restore(gates)
    return result


def _shuffled(place: int, count: int, seed: int) -> int:
    """The text at a place of an endless order in which every ``count`` places hold each text once."""
    turn, within = divmod(place, count)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
    return int(torch.randperm(count, generator=generator)[within])
