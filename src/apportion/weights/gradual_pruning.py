"""Gradual magnitude pruning: *To prune, or not to prune* (Zhu & Gupta 2017, arXiv 1710.01878).

What is allocated: the weights that a layer may keep, ever fewer of them while the network is trained; the largest stay.
The mask changes only at the steps of a `SparsitySchedule`, and never again after the last of them.

| paper | here |
|---|---|
| s_t, s_i, s_f, t_0, n, dt | `PolynomialSchedule.at`, ``initial``, ``final``, ``begin``, ``updates``, ``every`` |
| binary mask, as large as the layer | `apportion.weights.masks.Mask`, a buffer of the module |
| "weights that were masked are not updated" | ``regrow``: ``zero`` (and set to 0: they are gone) or ``frozen`` |
| layerwise constant, global (the paper's variants) | ``order="one by one"``, ``scope="global"`` |

What the optimiser keeps of a pruned weight is masked with it (`apportion.weights.masks.keep_masks`). Weights are ranked
as the network uses them, under the old mask, since an optimiser would move pruned ones a little and so let them in
again by chance; with ``regrow="frozen"`` they compete with the value they had when they were pruned.

Departures: a layer keeps exactly the count that is asked for, ties going to the weight that comes first (TensorFlow's
code keeps every weight at the threshold), and ``regrow="zero"``, as TensorFlow's later code has it, is the default.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.training import Hook, Objective, TrainingResult, TrainingSettings
from apportion.weights.layers import WeightLayer, prunable
from apportion.weights.masks import Regrow, add_masks, masks_of, train_masked, zero_pruned
from apportion.weights.patterns import NofMPattern, Pattern, Scope, Unstructured, choose_masks, kept_of
from apportion.weights.schedule import SparsitySchedule

Order = Literal["together", "one by one"]


@dataclass(frozen=True)
class PruningSettings:
    """Who is pruned when.

    Args:
        schedule: how sparse at which step.
        scope: who competes: the weights of a ``layer`` (the paper's), of each of its outputs (``row``), or of all
            layers (``global``).
        group: M, if the same number of every M consecutive inputs is to stay: with ``final=0.5`` and ``group=4`` this
            ends at 2:4, by way of 4:4 and 3:4.
        order: all layers ``together``, or ``one by one`` (the paper's layerwise constant variant): the time between
            the schedule's start and end is shared out evenly, and each layer is pruned in its own part.
        regrow: what happens to a pruned weight: see `apportion.weights.masks`.
        include: patterns of layers' names, see `apportion.weights.prunable`.
        exclude: patterns to leave out again. The paper leaves out a convolutional network's first layer.

    Raises:
        InputError: a value that cannot work.
    """

    schedule: SparsitySchedule
    scope: Scope = "layer"
    group: int | None = None
    order: Order = "together"
    regrow: Regrow = "zero"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Unstructured(self.schedule.final, self.scope)
        if self.order not in ("together", "one by one"):
            raise InputError(f"order={self.order!r}: use 'together' or 'one by one'")
        if self.regrow not in ("zero", "frozen"):
            raise InputError(
                f"regrow={self.regrow!r}: use zero (a pruned weight is gone) or frozen (it keeps its value)"
            )
        if self.order == "one by one" and self.scope == "global":
            raise InputError("order='one by one' and scope='global' exclude each other: use scope='layer'")
        if self.group is None:
            return
        if self.group < 2 or self.scope != "layer":
            raise InputError(f"group={self.group}, scope={self.scope!r}: use at least 2, and scope='layer'")
        stay = (1 - self.schedule.final) * self.group
        if abs(stay - round(stay)) > 1e-6 or round(stay) < 1:
            raise InputError(
                f"group={self.group}: a final sparsity of {self.schedule.final} would leave {stay:g} of them; use one "
                f"that leaves a whole number, such as {1 - max(1, round(stay)) / self.group:g}"
            )

    def pattern(self, sparsity: float) -> Pattern:
        """What masks of a sparsity look like."""
        if self.group is None:
            return Unstructured(sparsity, self.scope)
        return NofMPattern(kept_of(self.group, sparsity), self.group)

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON: what a resumed run must share with the one it continues."""
        content = dataclasses.asdict(self)
        return content | {"schedule": {"kind": type(self.schedule).__name__, **content["schedule"]}}


class GradualPruning(Hook[nn.Module]):
    """Gives a network masks, and chooses them anew whenever the schedule says so.

    Masks are buffers of the network and everything else is a function of the step, so that a run that was killed goes
    on exactly. Train with `apportion.weights.train_masked`, or take `prune_gradually`, which does both.

    Args:
        network: whose layers are given masks (those that have some keep them).
        settings: see `PruningSettings`.

    Raises:
        InputError: there is nothing to prune, or a layer does not fit the group.
    """

    def __init__(self, network: nn.Module, settings: PruningSettings) -> None:
        self.settings = settings
        layers = prunable(network, settings.include, settings.exclude)
        self.names = [each.name for each in layers]
        for each in layers:
            rows, columns = each.matrix().shape
            settings.pattern(settings.schedule.final).check((rows, columns), each.name)
        held = masks_of(network)
        everything = {
            each.name: torch.ones(each.matrix().shape, dtype=torch.bool) for each in layers if each.name not in held
        }
        add_masks(network, everything)
        self._last_step = 0
        if settings.schedule.is_update(0):
            self.choose(network, 0)
        self._sparsity = self._sparsity_of(network)

    def after_step(self, module: nn.Module, step: int, metrics: dict[str, int | float | Tensor], /) -> None:
        """Choose masks if it is time to, and log the sparsity.

        Raises:
            InputError: steps go backwards: the hook has pruned another run.
        """
        done = step + 1
        if done < self._last_step:
            raise InputError(
                f"step={step} comes after step {self._last_step - 1}: a pruning hook serves one run, make another one"
            )
        if self._last_step == 0:
            # The first that this process sees of the run, which may have begun in another one.
            self._sparsity = self._sparsity_of(module)
        self._last_step = done
        if self.settings.schedule.is_update(done):
            self.choose(module, done)
        metrics["sparsity"] = self._sparsity

    def choose(self, network: nn.Module, step: int) -> None:
        """Choose the masks of a step, by the magnitude of what the network holds now."""
        settings = self.settings
        layers = [WeightLayer(name, network.get_submodule(name)) for name in self.names]
        if settings.order == "together":
            prune_by_magnitude(network, layers, settings.pattern(settings.schedule.at(step)), settings.regrow)
        else:
            for place, layer in enumerate(layers):
                sparsity = settings.schedule.at(self._own_step(step, place))
                prune_by_magnitude(network, [layer], settings.pattern(sparsity), settings.regrow)
        self._sparsity = self._sparsity_of(network)

    def _own_step(self, step: int, place: int) -> float:
        """What step it is for a layer that is pruned in its own part of the time."""
        begin, end = self.settings.schedule.start, self.settings.schedule.end
        if step >= end:
            return end
        part = (step - begin) / (end - begin) * len(self.names) - place
        return begin + (end - begin) * min(1.0, max(0.0, part))

    def _sparsity_of(self, network: nn.Module) -> float:
        masks = [mask for name, mask in masks_of(network).items() if name in self.names]
        return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


@torch.no_grad()
def prune_by_magnitude(
    network: nn.Module, layers: Sequence[WeightLayer], pattern: Pattern, regrow: Regrow = "zero"
) -> None:
    """Give layers masks that keep the weights of largest magnitude, among those that their masks have left them.

    Args:
        network: that holds the layers.
        layers: to prune, with masks or without.
        pattern: what the masks look like; its sparsity is of all weights, not of those that are left.
        regrow: ``zero``: what was pruned stays so, unless the pattern asks for more weights than are left, and is set
            to 0; ``frozen``: it competes again with the value that it has.
    """
    held = masks_of(network)
    scores = {}
    for each in layers:
        raw = each.to_matrix(each.parameter).abs()
        if regrow == "zero" and each.name in held:
            # Below every magnitude, so that not even a weight of exactly 0 loses its place to one that is gone.
            raw = torch.where(held[each.name], raw, -1)
        scores[each.name] = raw
    add_masks(network, choose_masks(scores, pattern))
    if regrow == "zero":
        zero_pruned(network)


def prune_gradually(
    network: nn.Module,
    objective: Objective[Any, Any],
    batches: Callable[[int], Any],
    settings: TrainingSettings,
    pruning: PruningSettings,
    folder: Path | str | None = None,
    *,
    provenance: Mapping[str, str | int | float | bool | None] | None = None,
    **options: Any,
) -> TrainingResult:
    """Train a network and prune it meanwhile; it keeps its masks (`apportion.weights.remove_masks` takes them off).

    Killed and called again with the same arguments, a fresh network of the same kind ends with the very weights and
    masks of a run that was never interrupted.

    Args:
        network: as ``module`` of `apportion.training.train`; pruned in place.
        objective: as `train` has it.
        batches: as `train` has them.
        settings: as `train` has them. Masks should have stopped changing before the learning rate falls, since what
            was pruned late cannot be made up for at a small one: a warning says when they do not.
        pruning: who is pruned when.
        folder: as `train` has it.
        provenance: as `train` has it.
        options: of `apportion.weights.train_masked`.

    Raises:
        InputError: the schedule ends after the training, or anything that `train` refuses.
    """
    end = pruning.schedule.end
    if end > settings.steps:
        raise InputError(
            f"the schedule ends at step {end}, the training at step {settings.steps}: the network would never be as "
            "sparse as asked; let it end earlier, and leave some steps to recover"
        )
    falls = settings.steps - round(settings.decay_fraction * settings.steps)
    if end > falls:
        warnings.warn(
            f"masks still change at step {end} while the learning rate falls from step {falls} on: what is pruned then "
            "is hard to make up for; end the schedule earlier, or use a smaller decay_fraction",
            stacklevel=2,
        )
    known = {"pruning": _in_words(pruning.to_json()), **(provenance or {})}
    hooks = [*options.pop("hooks", ()), GradualPruning(network, pruning)]
    return train_masked(
        network,
        objective,
        batches,
        settings,
        folder,
        hooks=hooks,
        regrow=pruning.regrow,
        provenance=known,
        **options,
    )


def _in_words(content: Mapping[str, Any]) -> str:
    """Settings as a line: what a run's provenance may hold."""
    return ", ".join(f"{name}={value}" for name, value in content.items())
