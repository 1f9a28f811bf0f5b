"""Attention heads one by one: what each puts out, what it writes to the residual stream, and putting in other outputs.

A head's output is its slice of the site ``heads`` (the field's ``z``: attention-weighted values, before the output
projection); what it writes is that slice times its slice of the projection's weight. Query heads count, also where
several share keys and values.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.models.capture import capture
from apportion.models.families import blocks_of, layout_of, transformer_of
from apportion.models.language import LanguageModel
from apportion.models.site import Site
from apportion.models.splice import splice


def head_outputs(
    model: LanguageModel,
    input_ids: Int[Tensor, "batch time"],
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"] | None = None,
    layers: Sequence[int] | None = None,
) -> Float[Tensor, "batch time layers heads width"]:
    """The outputs of the heads of some layers (of all if None); edits and splices in force are in force here too."""
    sites = [Site(layer, "heads") for layer in (range(model.n_layers) if layers is None else layers)]
    found = capture(model, sites, input_ids, attention_mask)
    side_by_side = torch.stack([found[site] for site in sites], dim=2)
    return side_by_side.unflatten(-1, (model.n_heads, model.head_width))


def write_weight(model: Any, layer: int) -> Float[Tensor, "heads width d_model"]:
    """The slice of a layer's output projection that maps each head's output to what it writes; biases stay out.

    Args:
        model: a `LanguageModel` or a transformers model.
        layer: its number.
    """
    inner: Any = transformer_of(model)
    module, _ = Site(layer, "heads").resolve(inner)
    weight = module.weight
    assert isinstance(weight, Tensor)
    # GPT-2's Conv1D keeps [in, out], Linear [out, in].
    into_first = weight.T if isinstance(module, nn.Linear) else weight
    return into_first.detach().unflatten(0, (int(inner.config.get_text_config().num_attention_heads), -1))


@contextlib.contextmanager
def heads_written_by(
    model: Any, layer: int, weight: Float[Tensor, "heads width d_model"], bias: Float[Tensor, " d_model"]
) -> Iterator[None]:
    """In a ``with`` block, another projection maps what a layer's heads put out, of whatever width, to the stream.

    Args:
        model: a `LanguageModel` or a transformers model; afterwards it is as it was.
        layer: its number.
        weight: of each head, in place of `write_weight`.
        bias: added to the layer's own, where it has one.
    """
    inner: Any = transformer_of(model)
    block, path = blocks_of(inner)[layer], layout_of(inner).attention_output
    own = block.get_submodule(path)
    inputs = weight.flatten(0, 1)
    projection = nn.Linear(inputs.shape[0], inputs.shape[1]).requires_grad_(False).to(inputs)
    before: Any = getattr(own, "bias", None)
    with torch.no_grad():
        projection.weight.copy_(inputs.T)
        projection.bias.copy_(bias if before is None else bias + before)
    block.set_submodule(path, projection)
    try:
        yield
    finally:
        block.set_submodule(path, own)


def written_by_heads(
    model: LanguageModel, outputs: Float[Tensor, "*batch layers heads width"]
) -> Float[Tensor, "*batch layers heads d_model"]:
    """What each head of every layer writes to the residual stream, given the outputs of all of them.

    Linear: a mean of outputs over positions gives the mean of what was written, at a fraction of the memory.
    """
    weights = torch.stack([write_weight(model, layer) for layer in range(model.n_layers)])
    return torch.einsum("...lhw,lhwd->...lhd", outputs, weights.to(outputs.dtype))


@dataclass(frozen=True, eq=False)
class HeadEdit:
    """Another output for one head.

    Attributes:
        layer, head: which, counted from 0.
        values: what it puts out instead: ``[batch, time, width]``, or ``[batch, width]`` at one position a row; 1 for
            the batch or the time serves all.
        positions: of each row, for values without time; None edits every position.

    Raises:
        InputError: values without time and no positions, or the other way round.
    """

    layer: int
    head: int
    values: Float[Tensor, "batch time width"] | Float[Tensor, "batch width"]
    positions: Int[Tensor, " batch"] | None = None

    def __post_init__(self) -> None:
        if (self.values.dim() == 2) != (self.positions is not None):
            raise InputError(
                f"edit of head {self.head} in layer {self.layer}: values {tuple(self.values.shape)} "
                f"{'need' if self.values.dim() == 2 else 'do not take'} positions"
            )


@contextlib.contextmanager
def edit_heads(model: Any, edits: Sequence[HeadEdit]) -> Iterator[None]:
    """In every forward pass of a ``with`` block, heads put out other values, all of them in one and the same pass.

    Values were computed beforehand, so that edits of early layers do not change those of later ones. Where two edits
    speak of one place, the later one holds. Gradients flow into the values.

    Args:
        model: a `LanguageModel`; afterwards it is as it was.
        edits: what to put where.

    Raises:
        InputError: a layer or head that the model lacks.
    """
    by_layer: dict[int, list[HeadEdit]] = {}
    for edit in edits:
        if not (0 <= edit.layer < model.n_layers and 0 <= edit.head < model.n_heads):
            raise InputError(
                f"layer {edit.layer}, head {edit.head}: {model.name} has {model.n_layers} layers of {model.n_heads} "
                "heads, both counted from 0"
            )
        by_layer.setdefault(edit.layer, []).append(edit)
    with contextlib.ExitStack() as splices:
        for layer, own in by_layer.items():

            def replaced(activations: Tensor, own: list[HeadEdit] = own) -> Tensor:
                heads = activations.unflatten(-1, (model.n_heads, model.head_width)).clone()
                for edit in own:
                    values = edit.values.to(heads.dtype)
                    if edit.positions is None:
                        heads[:, :, edit.head] = values
                    else:
                        heads[torch.arange(len(heads), device=heads.device), edit.positions, edit.head] = values
                return heads.flatten(-2)

            splices.enter_context(splice(model, Site(layer, "heads"), replaced))
        yield
