"""Queries, keys and values of a text, recorded once, so that selectors and stores are compared in seconds.

A trace answers what a method reads and how far its attention output is from the exact one, layer by layer. It does not
say what that does to the model's text: errors of one layer are not seen by the next.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.errors import InputError
from apportion.keys.memory import ComposedMemory
from apportion.models import LanguageModel
from apportion.models.key_door import attend_with, layer_facts
from apportion.models.key_memory import LayerFacts, Step, Watcher
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


@torch.no_grad()
def watch_steps(model: LanguageModel, texts: Iterable[Int[Tensor, "_"]], show: Callable[[int, Step], None]) -> None:
    """Run texts through a decoder and show what its full-attention layers are given, without keeping any of it.

    Args:
        model: a decoder.
        texts: token ids of one text each.
        show: called with the number of the layer and its step, for every layer of every text.

    Raises:
        InputError: an unsuitable model.
    """
    with attend_with(model, lambda facts: Watcher(partial(show, facts.layer))):
        for ids in texts:
            model.model(input_ids=ids[None].to(model.device), use_cache=False, logits_to_keep=1)


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
    if not texts:
        raise InputError("texts is empty: a trace needs at least one text")
    return record_tokens(model, encode_texts(model, texts, tokens), layers=layers, hidden=hidden)


def record_tokens(
    model: LanguageModel,
    texts: Iterable[Int[Tensor, "_"]],
    *,
    layers: Iterable[int] | None = None,
    hidden: bool = False,
) -> Trace:
    """`record_trace` of texts that are token ids already."""
    known = {each.layer: each for each in layer_facts(model)}
    wanted = list(known) if layers is None else list(layers)
    if missing := [layer for layer in wanted if layer not in known]:
        raise InputError(f"layers={missing}: {model.name} has full attention in {', '.join(map(str, known))}")
    steps: dict[int, list[Step]] = {layer: [] for layer in wanted}

    def keep(layer: int, step: Step) -> None:
        if layer in steps:
            steps[layer].append(step if hidden else replace(step, hidden=None))

    watch_steps(model, texts, keep)
    return Trace({layer: known[layer] for layer in wanted}, steps)


def encode_texts(model: LanguageModel, texts: Sequence[str], tokens: int) -> list[Int[Tensor, "_"]]:
    """Token ids of the beginning of each text: at most ``tokens``, and no more than the model has positions.

    Raises:
        InputError: no text, or one of fewer than two tokens.
    """
    if not texts:
        raise InputError("texts is empty: give at least one text")
    longest = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    tokens = min(tokens, longest or tokens)
    encoded = []
    for number, text in enumerate(texts):
        ids = model.tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens)["input_ids"][0]
        if len(ids) < 2:
            raise InputError(f"text {number} has {len(ids)} tokens: at least 2")
        encoded.append(ids)
    return encoded


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
