"""Many methods at once on one text: the prompt is computed once, and what follows it once for all of them.

A prompt's own attention is exact, so its keys and values are the same under every method that compresses after it. Each
method takes them in from a trace and closes; the tokens after the prompt then go through the model as rows of one
batch, a row for each method and text, each of which reads what its own method kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.budget import Usage
from apportion.keys.memory import ComposedMemory, MakeComposed
from apportion.keys.trace import Trace
from apportion.models import LanguageModel
from apportion.models.key_door import attend_with
from apportion.models.key_memory import LayerMemory, Step


class SideBySide(LayerMemory):
    """Several memories of one layer, each of which serves an equal share of a batch's rows.

    Args:
        memories: at least one, all of the same tokens.
    """

    def __init__(self, memories: Sequence[ComposedMemory]) -> None:
        self.memories = list(memories)

    @override
    @property
    def seen(self) -> int:
        return self.memories[0].seen

    @override
    @property
    def batch(self) -> int:
        return sum(each.batch for each in self.memories)

    @override
    def attend(self, step: Step) -> Float[Tensor, "batch heads new value_width"]:
        rows = len(step.keys) // len(self.memories)
        parts = [rows_of(step, slice(rows * n, rows * (n + 1))) for n in range(len(self.memories))]
        return torch.cat([each.attend(part) for each, part in zip(self.memories, parts, strict=True)])

    @override
    def close(self) -> None:
        for each in self.memories:
            each.close()

    @override
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        raise InputError("memories side by side keep their rows: search with beams under one method at a time")


@dataclass(frozen=True, eq=False)
class ReadOn:
    """What a model made of the tokens after a prompt under one method.

    Attributes:
        nll: of each token but the first, in nats.
        hit: whether it was the likeliest.
        usage: over all layers and texts, since the prompt.
    """

    nll: Float[Tensor, "texts predicted"]
    hit: Bool[Tensor, "texts predicted"]
    usage: Usage


@torch.no_grad()
def read_on(
    model: LanguageModel,
    prompts: Trace,
    ids: Int[Tensor, "texts later"],
    methods: Mapping[str, MakeComposed],
    *,
    turn: int = 1,
    stride: int = 1,
) -> dict[str, ReadOn]:
    """Read on after prompts under several methods at once.

    Args:
        model: a decoder whose full-attention layers are all in the trace.
        prompts: of equal lengths, one text each.
        ids: what follows each prompt; predicted are all but the first.
        methods: names, and what makes a layer's memory: `ComposedMemory` itself for dense attention, or a method's
            ``memory``. Each makes new ones.
        turn: how many of the tokens come at once, as a question would; the others come after it.
        stride: how many of these go through the model in one pass. Above 1 only memories that read as token by token in
            a pass of several give the same: those whose queries choose for themselves, and `OneByOne`.

    Raises:
        InputError: prompts of different lengths or of another number than texts; a turn that leaves nothing; a stride
            below 1; a model with layers that remember in other ways.
    """
    if len(prompts.facts) != next(iter(prompts.facts.values())).layers:
        raise InputError("the trace lacks layers: give one of all layers, of a model all of whose layers are in it")
    if not 1 <= turn < ids.shape[1]:
        raise InputError(f"turn={turn}: at least 1, and less than the {ids.shape[1]} tokens that follow")
    if stride < 1:
        raise InputError(f"stride={stride}: at least 1")
    memories = {layer: [make(facts) for make in methods.values()] for layer, facts in prompts.facts.items()}
    for layer, of_layer in memories.items():
        whole = joined(prompts.steps[layer])
        if len(whole.keys) != len(ids):
            raise InputError(f"{len(whole.keys)} prompts and {len(ids)} texts that follow them")
        for memory in of_layer:
            memory.take_in(whole)
            memory.close()
    rows = ids.repeat(len(methods), 1).to(model.device)
    nll: list[Tensor] = []
    hit: list[Tensor] = []
    cache = None
    with attend_with(model, lambda facts: SideBySide(memories[facts.layer])):
        for part in (rows[:, :turn], *rows[:, turn:-1].split(stride, dim=1)):
            out = model.model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            start = sum(each.shape[1] for each in nll)
            targets = rows[:, start + 1 : start + 1 + part.shape[1]]
            nll.append(torch.nn.functional.cross_entropy(out.logits.float().mT, targets, reduction="none"))
            hit.append(out.logits.argmax(-1) == targets)
    losses, hits = (torch.cat(each, dim=1).cpu().split(len(ids)) for each in (nll, hit))
    return {
        name: ReadOn(losses[n], hits[n], Usage.total(of_layer[n].usage for of_layer in memories.values()))
        for n, name in enumerate(methods)
    }


def joined(steps: Sequence[Step]) -> Step:
    """Texts of equal lengths and positions as the rows of one batch.

    Raises:
        InputError: their lengths differ.
    """
    if len({step.new for step in steps}) != 1:
        raise InputError(f"texts of {sorted({step.new for step in steps})} tokens: all must have as many")
    hidden = [step.hidden for step in steps if step.hidden is not None]
    return replace(
        steps[0],
        queries=torch.cat([step.queries for step in steps]),
        keys=torch.cat([step.keys for step in steps]),
        values=torch.cat([step.values for step in steps]),
        real=torch.cat([step.real for step in steps]),
        hidden=torch.cat(hidden) if len(hidden) == len(steps) else None,
    )


def rows_of(step: Step, rows: slice) -> Step:
    """Some rows of a batch."""
    turned = step.rotation
    return replace(
        step,
        queries=step.queries[rows],
        keys=step.keys[rows],
        values=step.values[rows],
        real=step.real[rows],
        rotation=None if turned is None else turned.rows(torch.arange(len(step.keys))[rows]),
        hidden=None if step.hidden is None else step.hidden[rows],
    )
