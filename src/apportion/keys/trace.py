"""Queries, keys and values of a text, recorded once, so that selectors and stores are compared in seconds.

A trace answers what a method reads and how far its attention output is from the exact one, layer by layer. It does not
say what that does to the model's text: errors of one layer are not seen by the next.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.memory import ComposedMemory
from apportion.models import LanguageModel
from apportion.models.key_door import LayerFacts, LayerMemory, Step, attend_with, layer_facts
from apportion.ops.attend import attend, causal, reference


@dataclass(frozen=True, eq=False)
class Trace:
    """What the full-attention layers were given for some texts.

    Attributes:
        facts: the recorded layers.
        steps: for each of them one step a text, with all of the text's tokens.
    """

    facts: dict[int, LayerFacts]
    steps: dict[int, list[Step]]

    @property
    def layers(self) -> list[int]:
        """The recorded layers."""
        return sorted(self.steps)


class _Recorder(LayerMemory):
    """Exact attention that keeps what it was given."""

    def __init__(self, kept: list[Step] | None) -> None:
        self._kept, self._seen = kept, 0

    @override
    @property
    def seen(self) -> int:
        return self._seen

    @override
    @property
    def batch(self) -> int:
        return 1

    @override
    def close(self) -> None:
        pass

    @override
    def pick_rows(self, rows: Tensor) -> None:
        pass

    @override
    def attend(self, step: Step) -> Tensor:
        self._seen += step.new
        if self._kept is not None:
            hidden = None if step.hidden is None else step.hidden.detach()
            self._kept.append(replace(step, hidden=hidden))
        return attend(step.queries, step.keys, step.values, step.scaling, step.softcap)


@torch.no_grad()
def record_trace(
    model: LanguageModel,
    texts: Sequence[str],
    *,
    tokens: int = 1024,
    layers: Iterable[int] | None = None,
    hidden: bool = False,
) -> Trace:
    """Run each text through a decoder once and keep what its attention layers were given.

    It holds ``layers * texts * tokens * (heads + 2 * groups) * head_width`` numbers.

    Args:
        model: a decoder.
        texts: at least one, each of at least two tokens.
        tokens: of each text at most, from its start.
        layers: None for all of full attention.
        hidden: keep what the projections were given too (``tokens * d_model`` numbers a layer).

    Raises:
        InputError: no text, a text that is too short, a layer that is not of full attention, an unsuitable model.
    """
    known = {each.layer: each for each in layer_facts(model)}
    wanted = list(known) if layers is None else list(layers)
    if missing := [layer for layer in wanted if layer not in known]:
        raise InputError(f"layers={missing}: {model.name} has full attention in {', '.join(map(str, known))}")
    if not texts:
        raise InputError("texts is empty: a trace needs at least one text")
    steps: dict[int, list[Step]] = {layer: [] for layer in wanted}
    with attend_with(model, lambda facts: _Recorder(steps.get(facts.layer))):
        for number, text in enumerate(texts):
            ids = model.tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens)["input_ids"]
            if ids.shape[1] < 2:
                raise InputError(f"text {number} has {ids.shape[1]} tokens: at least 2")
            model.model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    if not hidden:
        steps = {layer: [replace(step, hidden=None) for step in of_layer] for layer, of_layer in steps.items()}
    return Trace({layer: known[layer] for layer in wanted}, steps)


@dataclass(frozen=True)
class OnTrace:
    """How a method did in one layer, as means over texts, query heads and queries.

    Attributes:
        mass: share of the exact attention weight that fell on tokens the method read; 1 for one that reads all.
        error: norm of the difference between its attention output and the exact one, over the norm of the exact one
            (sums over queries and heads).
        share_read: keys read over keys there.
        share_held: bytes held over those of a plain cache.
    """

    mass: float
    error: float
    share_read: float
    share_held: float


@torch.no_grad()
def compare_on_trace(
    trace: Trace, methods: Mapping[str, Callable[[LayerFacts], ComposedMemory]], *, queries: int = 64, step: int = 1
) -> dict[str, dict[int, OnTrace]]:
    """What each method reads, and how far its output is from exact attention, for the last tokens of each text.

    The tokens before them are the prompt; then the memory is closed, and they come one by one, as in generation, or
    several at a time.

    Args:
        trace: see `record_trace`.
        methods: names, and the memories to compare; ``some_method.memory`` is one.
        queries: how many tokens of each text ask.
        step: tokens taken in at a time; above 1 it is a turn of several tokens, which a method that chooses for each
            query by itself and keeps everything reads alike, and much faster.

    Returns:
        By method and layer.

    Raises:
        InputError: a text has no more tokens than ``queries``; a step below 1.
    """
    if step < 1:
        raise InputError(f"step={step}: at least 1 token at a time")
    found: dict[str, dict[int, OnTrace]] = {name: {} for name in methods}
    for layer in trace.layers:
        for name, make in methods.items():
            parts = [_on_text(make(trace.facts[layer]), text, queries, step) for text in trace.steps[layer]]
            count = len(parts)
            found[name][layer] = OnTrace(*(sum(part[place] for part in parts) / count for place in range(4)))
    return found


def _on_text(memory: ComposedMemory, step: Step, queries: int, at_a_time: int) -> tuple[float, float, float, float]:
    before = step.new - queries
    if before < 1:
        raise InputError(f"queries={queries}: a text of the trace has {step.new} tokens, and some must come before")
    memory.attend(part_of(step, 0, before))
    memory.close()
    weights = exact_weights(step, before)
    outs, mass = [], 0.0
    for place in range(before, step.new, at_a_time):
        end = min(place + at_a_time, step.new)
        outs.append(memory.attend(part_of(step, place, end)))
        mass += _mass_read(memory, weights[:, :, place - before : end - before, :end])
    out = torch.cat(outs, dim=2)
    exact = attend(step.queries[:, :, before:], step.keys, step.values, step.scaling, step.softcap)
    error = float((out - exact).norm() / exact.norm())
    return mass / queries, error, memory.usage.share_read, memory.usage.share_held


def _mass_read(memory: ComposedMemory, weights: Float[Tensor, "batch heads asking tokens"]) -> float:
    """The sum over queries of the mean over heads."""
    selection, asking = memory.newest_selection, weights.shape[2]
    if selection is None or memory.store.length != weights.shape[-1]:
        # Everything that is left was read; a store that has evicted says itself what is left.
        return float("nan") if memory.store.length != weights.shape[-1] else float(asking)
    read = selection.mask(weights.shape[-1])
    read = read.repeat_interleave(weights.shape[1] // read.shape[1], dim=1)
    return float((weights * read).sum(-1).mean()) * asking


def part_of(step: Step, start: int, end: int) -> Step:
    """Some of a step's tokens, as if they had come alone."""
    here = slice(start, end)
    return replace(
        step,
        queries=step.queries[:, :, here],
        keys=step.keys[:, :, here],
        values=step.values[:, :, here],
        real=step.real[:, here],
        rotation=None if step.rotation is None else step.rotation.at(here),
        hidden=None if step.hidden is None else step.hidden[:, here],
    )


def exact_weights(step: Step, start: int = 0) -> Float[Tensor, "batch heads asking tokens"]:
    """The attention weights of a step's tokens from ``start`` on, over all of its tokens."""
    seen = causal(step.new - start, step.new, step.keys.device) & step.real[:, None, None, :]
    keys = step.keys.repeat_interleave(step.group, dim=1)
    products = step.queries[:, :, start:] @ keys.transpose(-1, -2)
    return reference.weigh(products, seen, step.scaling, step.softcap)
