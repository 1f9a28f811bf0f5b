"""Means and covariances of each head's rotated keys and values over calibration texts."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.memory import ComposedMemory
from apportion.models import LanguageModel
from apportion.models.key_door import attend_with, layer_facts
from apportion.models.key_memory import LayerFacts, Step


class _Moments:
    """Sums over tokens, in float64."""

    def __init__(self, facts: LayerFacts) -> None:
        self.count = 0
        self.sum = torch.zeros(2, facts.groups, facts.width, dtype=torch.float64)
        self.products = torch.zeros(2, facts.groups, facts.width, facts.width, dtype=torch.float64)

    def add(self, step: Step) -> None:
        """Count the tokens of a step that are no padding."""
        real = step.real.flatten().nonzero().flatten()
        for kind, vectors in enumerate((step.keys, step.values)):
            rows = vectors.transpose(0, 1).flatten(1, 2)[:, real].double().cpu()
            self.sum[kind] += rows.sum(1)
            self.products[kind] += rows.mT @ rows
        self.count += len(real)

    def mean(self) -> Float[Tensor, "2 groups d"]:
        """Of keys and of values."""
        return self.sum / self.count

    def covariance(self) -> Float[Tensor, "2 groups d d"]:
        """Likewise, about the mean."""
        mean = self.mean()
        return self.products / self.count - mean[..., :, None] * mean[..., None, :]


class _Watched(ComposedMemory):
    """A plain cache that counts what comes in."""

    def __init__(self, facts: LayerFacts, moments: _Moments) -> None:
        super().__init__(facts)
        self._moments = moments

    @override
    def attend(self, step: Step) -> Tensor:
        self._moments.add(step)
        return super().attend(step)


@torch.no_grad()
def head_moments(
    model: LanguageModel, texts: Sequence[str], *, tokens: int = 512, generate: int = 0
) -> tuple[list[int], Float[Tensor, "layers 2 groups d"], Float[Tensor, "layers 2 groups d d"]]:
    """The full-attention layers, and mean and covariance of their keys and values (second dimension), in float64.

    Args:
        model: a decoder.
        texts: at least one.
        tokens: of each text at most, from its start.
        generate: go on for so many likeliest tokens after each text, and count them too.

    Raises:
        InputError: no text, or one of fewer than two tokens.
    """
    if not texts:
        raise InputError("texts is empty: bases need at least one calibration text")
    facts = layer_facts(model)
    moments = {each.layer: _Moments(each) for each in facts}
    with attend_with(model, lambda of_layer: _Watched(of_layer, moments[of_layer.layer])):
        for number, text in enumerate(texts):
            ids = model.tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens)["input_ids"]
            if ids.shape[1] < 2:
                raise InputError(f"text {number} has {ids.shape[1]} tokens: at least 2")
            ids = ids.to(model.device)
            if generate:
                padding = getattr(model.tokenizer, "pad_token_id", None) or 0
                model.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=generate,
                    do_sample=False,
                    pad_token_id=padding,
                )
            else:
                model.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    layers = [each.layer for each in facts]
    means = torch.stack([moments[layer].mean() for layer in layers])
    covariances = torch.stack([moments[layer].covariance() for layer in layers])
    return layers, means, covariances
