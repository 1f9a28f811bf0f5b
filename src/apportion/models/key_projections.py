"""The linear maps whose outputs a decoder's keys and values are, found by asking rather than by names of modules.

Every attention layer is given unit vectors in one forward pass, each as a text of one token, whose position turns
nothing; what comes out as keys and values is the map, whether the family keeps it in a matrix of its own, fused with
others or interleaved by heads.
"""

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.models.families import attention_of, base_of, blocks_of, transformer_of
from apportion.models.key_door import attend_with, layer_facts
from apportion.models.key_memory import Step, Watcher


@dataclass(frozen=True, eq=False)
class LinearMap:
    """``hidden @ weight + bias``: keys before the rotary embedding, or values, all key-value heads side by side.

    Attributes:
        weight: in float32.
        bias: zeros where a model has none.
    """

    weight: Float[Tensor, "d_model width"]
    bias: Float[Tensor, " width"]

    def __call__(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch width"]:
        """What a layer makes of its input."""
        return hidden @ self.weight + self.bias


@dataclass(frozen=True, eq=False)
class KeyProjections:
    """How a layer makes keys and values of what it is given (`Step.hidden`).

    Attributes:
        keys: None where it is not linear: Qwen3, OLMo 2 and Gemma 3 norm their keys.
        values: likewise.
    """

    keys: LinearMap | None
    values: LinearMap | None


@torch.no_grad()
def key_projections(model: Any) -> dict[int, KeyProjections]:
    """The maps of all full-attention layers of a decoder, by layer, in one forward pass of ``d_model + 2`` tokens.

    Args:
        model: a `LanguageModel` or a transformers decoder.

    Raises:
        InputError: see `layer_facts`.
    """
    inner: Any = transformer_of(model)
    place = next(inner.parameters())
    width = int(inner.config.get_text_config().hidden_size)
    stray = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    probes = torch.cat([torch.zeros(1, width), torch.eye(width), stray]).to(place)[:, None]
    found: dict[int, Step] = {}

    def given_probes(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": probes}
        return (probes, *args[1:]), kwargs

    with contextlib.ExitStack() as stack:
        for facts in layer_facts(inner):
            attention = attention_of(blocks_of(inner)[facts.layer])
            stack.callback(attention.register_forward_pre_hook(given_probes, with_kwargs=True).remove)
        stack.enter_context(attend_with(inner, lambda facts: Watcher(partial(found.__setitem__, facts.layer))))
        ids = torch.zeros(len(probes), 1, dtype=torch.long, device=place.device)
        base_of(inner)(input_ids=ids, use_cache=False)
    return {
        layer: KeyProjections(_map(step.unrotated_keys(), stray), _map(step.values, stray))
        for layer, step in sorted(found.items())
    }


def _map(outputs: Float[Tensor, "probes groups 1 width"], stray: Float[Tensor, "1 d_model"]) -> LinearMap | None:
    """The map that gave zero, the unit vectors and a stray vector these outputs; None if it is not linear."""
    flat = outputs[:, :, 0].flatten(1).float()
    found = LinearMap(flat[1:-1] - flat[0], flat[0])
    expected = found(stray.to(flat))[0]
    # A stray vector's output in bfloat16 is right to some 1e-2; a norm would be off by its whole size.
    return found if float((flat[-1] - expected).norm()) <= 0.05 * float(expected.norm()) else None
