"""Some heads of a circuit at the last token of prompts: where dictionaries of a task are fitted and tried.

A *cross-section* (Makelov et al. 2024, arXiv 2405.08366) is a set of places that together carry what a task needs past
a point of the model. Each place has its own dictionary; whatever is put in their place is computed on clean
activations, and put there in one pass, at all of them.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.data.tasks import Prompt
from apportion.features.supervised_dictionaries import Table
from apportion.models import LanguageModel, TokenPairs, TokenPrompts, head_outputs
from apportion.models.last_token import LastToken
from apportion.models.prompts import judge

Head = tuple[int, int]
_PROMPTS_AT_ONCE = 64


def table_of(prompts: Sequence[Prompt]) -> Table:
    """The attributes of prompts, a column each."""
    return {name: [prompt.attributes[name] for prompt in prompts] for name in prompts[0].attributes}


def outputs_at_end(
    model: LanguageModel, heads: Sequence[Head], prompts: TokenPrompts
) -> dict[Head, Float[Tensor, "prompts width"]]:
    """What some heads (layer, head) put out at the last token of each prompt; on the CPU, where dictionaries fit."""
    layers = sorted({layer for layer, _ in heads})
    parts = []
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        some = prompts.select(slice(start, start + _PROMPTS_AT_ONCE))
        outputs = head_outputs(model, some.input_ids, some.attention_mask, layers)
        rows = torch.arange(len(some), device=outputs.device)
        parts.append(outputs[rows, some.positions["end"]].cpu())
    whole = torch.cat(parts)
    return {(layer, head): whole[:, layers.index(layer), head] for layer, head in heads}


class CrossSection:
    """Heads at the last token of some prompts, read once, and the model with something else in their place.

    Args:
        model: a causal language model.
        heads: (layer, head) each, counted from 0.
        prompts: all of one length.

    Attributes:
        outputs: the clean activations of every head.

    Raises:
        InputError: prompts of several lengths.
    """

    def __init__(self, model: LanguageModel, heads: Sequence[Head], prompts: TokenPrompts) -> None:
        self.outputs = outputs_at_end(model, heads, prompts)
        self._prompts, self._last = prompts, LastToken(model, prompts)

    def logits(
        self, values: Mapping[Head, Float[Tensor, "prompts width"]] | None = None
    ) -> Float[Tensor, "prompts vocab"]:
        """What the model predicts with other activations at some heads."""
        return self._last.logits(values)

    def score(self, values: Mapping[Head, Float[Tensor, "prompts width"]] | None = None) -> Float[Tensor, " prompts"]:
        """The logit difference between the answer and the other name; ``run`` of ``approximation``."""
        return judge(self.logits(values), self._prompts, "logit_difference")


def effects_at_end(model: LanguageModel, pairs: TokenPairs) -> Float[Tensor, "layers heads"]:
    """By how much the logit difference falls if a head puts out, at the last token, what it does on the counterfactual.

    Exact, and the mean over pairs: one pass of the last token a layer, with a copy of the prompts for every head.
    """
    every = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    clean, other = (outputs_at_end(model, every, prompts) for prompts in (pairs.clean, pairs.counterfactual))
    last, count = LastToken(model, pairs.clean), len(pairs)
    before = judge(last.logits(), pairs.clean, "logit_difference")
    effects = torch.zeros(model.n_layers, model.n_heads)
    for layer in range(model.n_layers):
        values = {(layer, head): clean[layer, head].repeat(model.n_heads, 1) for head in range(model.n_heads)}
        for head in range(model.n_heads):
            values[layer, head][head * count : (head + 1) * count] = other[layer, head]
        for head, logits in enumerate(last.logits(values, copies=model.n_heads).split(count)):
            effects[layer, head] = (before - judge(logits, pairs.clean, "logit_difference")).mean()
    return effects


def strongest_heads(effects: Float[Tensor, "layers heads"], count: int) -> list[Head]:
    """The heads of largest effect in either direction, strongest first."""
    order = effects.abs().flatten().argsort(descending=True, stable=True)[:count].tolist()
    return [divmod(place, effects.shape[1]) for place in order]
