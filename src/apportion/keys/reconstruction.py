"""CSKV's training: low-rank factors of every layer fitted to the keys and values that it makes of a text.

The model itself runs with exact keys and values, so layers see what they always see and are independent; only the
factors change. ``loss = sum over layers of MSE(K, K^) + MSE(V, V^)``, means over elements. The paper compares rotated
keys; turning is an isometry, so unrotated ones give the same loss.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.low_rank import PARTS, Factors, joint_parts
from apportion.keys.quantising import Quantiser
from apportion.keys.trace import watch_steps
from apportion.models import LanguageModel
from apportion.models.key_memory import Step
from apportion.models.key_projections import KeyProjections
from apportion.training import Metrics, TrainingResult, TrainingSettings, train


@dataclass(frozen=True)
class Reconstruction:
    """How factors are trained; the defaults are the paper's.

    Attributes:
        learning_rate: of AdamW.
        length: tokens of a step: one text's, batch 1.
        epochs: passes over all pieces of that length that the calibration texts have.
        steps: None for as many as there are pieces in the epochs.
        quantised: let the loss see codes as they will be read back, where a method quantises (what the paper calls
            quantisation-aware training).
        seed: of the order of the pieces.
    """

    learning_rate: float = 5e-5
    length: int = 1024
    epochs: int = 1
    steps: int | None = None
    quantised: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "epochs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: at least 1")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps={self.steps}: at least 1, or None for one a piece of text")


Batch = tuple[Tensor, ...]
"""Joint keys, values and the input of every layer, one after another."""


class LayerReconstructions(nn.Module):
    """The factors of all layers, as parameters.

    Args:
        factors: of each layer, by part; those of a linear projection are turned so that they read the layer's input.
        projections: of each layer.
        quantisers: by part; what codes are read through.
    """

    def __init__(
        self,
        factors: Mapping[int, Mapping[str, Factors]],
        projections: Mapping[int, KeyProjections],
        quantisers: Mapping[str, Quantiser | None],
    ) -> None:
        super().__init__()
        self.layers = sorted(factors)
        self._quantisers = quantisers
        self._bias: dict[str, Tensor] = {}
        self._from_hidden: dict[str, bool] = {}
        for layer in self.layers:
            for part in PARTS:
                each, name = factors[layer][part], _name(layer, part)
                projection = getattr(projections[layer], part)
                # A normed key is no linear function of the layer's input: there a code reads the key.
                reads = each.from_hidden or projection is not None
                down = each.down if each.from_hidden or not reads else projection.weight.to(each.down) @ each.down
                self._from_hidden[name], self._bias[name] = reads, each.bias
                self.register_parameter(f"{name}_down", nn.Parameter(down.clone()))
                self.register_parameter(f"{name}_up", nn.Parameter(each.up.clone()))

    def factors(self, layer: int, part: str) -> Factors:
        """As they are now."""
        name = _name(layer, part)
        down, up = self.get_parameter(f"{name}_down"), self.get_parameter(f"{name}_up")
        return Factors(down, up, self._bias[name].to(down), self._from_hidden[name])

    @override
    def forward(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """The mean squared error of each part, summed over layers."""
        losses = {part: torch.zeros((), device=batch[0].device) for part in PARTS}
        for number, layer in enumerate(self.layers):
            keys, values, hidden = batch[3 * number : 3 * number + 3]
            for part, x in zip(PARTS, (keys, values), strict=True):
                factors, quantiser = self.factors(layer, part), self._quantisers[part]
                codes = factors.encode(x, hidden)
                if quantiser is not None:
                    codes = quantiser.fake(codes)
                losses[part] = losses[part] + (factors.decode(codes) - x).square().mean()
        return losses


def train_factors(
    batches: Callable[[int], Batch],
    steps: int,
    factors: Mapping[int, Mapping[str, Factors]],
    projections: Mapping[int, KeyProjections],
    quantisers: Mapping[str, Quantiser | None],
    settings: Reconstruction,
    *,
    device: torch.device | str = "cpu",
    folder: Path | str | None = None,
    provenance: Mapping[str, str | int | float | bool | None] | None = None,
    progress: bool = True,
    stop_after: int | None = None,
) -> tuple[dict[int, dict[str, Factors]], TrainingResult]:
    """Train the factors of some layers to rebuild the keys and values of a model.

    Args:
        batches: what the layers made of a piece of text, by step; see `model_batches`.
        steps: how many.
        factors: to begin with, of the layers to train.
        projections: of the model's layers.
        quantisers: by part.
        settings: how.
        device: to train on.
        folder: see `train`; a run that was interrupted goes on from its checkpoint.
        provenance: see `train`.
        progress: show it.
        stop_after: see `train`.

    Returns:
        The trained factors, on the processor, and how training ended.

    Raises:
        InputError: a length that is not whole groups of tokens; see also `train`.
    """
    group = None if (quantiser := quantisers["keys"]) is None else quantiser.group
    if group and settings.length % group:
        raise InputError(f"length={settings.length}: with quantised codes a multiple of group={group} tokens")
    module = LayerReconstructions(factors, projections, quantisers).to(device)

    def objective(module: LayerReconstructions, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        losses = module(batch)
        return losses["keys"] + losses["values"], {f"{part}_error": loss.detach() for part, loss in losses.items()}

    result = train(
        module,
        objective,
        batches,
        TrainingSettings(steps=steps, learning_rate=settings.learning_rate, seed=settings.seed, checkpoint_every=100),
        folder,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0),
        provenance=provenance,
        progress=progress,
        stop_after=stop_after,
    )
    module = module.cpu().requires_grad_(False)
    trained = {layer: {part: module.factors(layer, part) for part in PARTS} for layer in module.layers}
    return trained, result


def model_batches(
    model: LanguageModel, pieces: Sequence[Int[Tensor, "_"]], layers: Sequence[int], seed: int
) -> Callable[[int], Batch]:
    """What a model's layers make of a piece of text, a piece a step: all once in each epoch, in an order of its own."""

    def batch(step: int) -> Batch:
        epoch, place = divmod(step, len(pieces))
        draw = torch.Generator().manual_seed(seed + 7919 * epoch)
        ids = pieces[int(torch.randperm(len(pieces), generator=draw)[place])]
        found: dict[int, Step] = {}
        watch_steps(model, [ids], found.__setitem__)
        return batch_of([found[layer] for layer in layers])

    return batch


def batch_of(steps: Sequence[Step]) -> Batch:
    """What training takes of one step of each of some layers.

    Raises:
        InputError: the layers do not say what they were given.
    """
    batch: list[Tensor] = []
    for step in steps:
        if step.hidden is None:
            raise InputError("this model does not say what its attention layers are given, which training needs")
        batch += [x.float() for x in joint_parts(step).values()] + [step.hidden.float()]
    return tuple(batch)


def pieces_of(texts: Sequence[Int[Tensor, "_"]], length: int) -> list[Int[Tensor, "_"]]:
    """The whole pieces of that many tokens in some texts; what is left over at the end of each is dropped.

    Raises:
        InputError: no text is that long.
    """
    pieces = [piece for text in texts for piece in text.split(length) if len(piece) == length]
    if not pieces:
        longest = max(len(text) for text in texts)
        raise InputError(
            f"length={length}: the longest calibration text has {longest} tokens; give longer ones, or less"
        )
    return pieces


def _name(layer: int, part: str) -> str:
    return f"layer{layer}_{part}"
