"""The one door between apportion's key memories and transformers: what a model's attention layers remember, and read.

In a ``with`` block every full-attention layer of a decoder hands its queries, keys and values to a `LayerMemory` and
goes on with what that returns. The memory lives in the model's own key-value cache, so that generation, chunked
prefill, beam search and later turns work as usual; layers with a sliding window and linear-attention layers keep what
transformers gives them. Nothing else in the package knows how transformers computes attention with a cache.

How it is done, on transformers 5 (each trap is a test):

- an attention function *and* a mask function are registered under one name: with the attention function alone the
  model would silently not be causal. Memories get no mask; which tokens are padding they are told, since after eviction
  a mask would no longer line up with what is stored;
- the layers of an empty cache are replaced in place before the blocks run, so that it does not matter who made
  it;
- the rotary embedding that a layer was given is seen by a hook before it, so that scaled and per-layer rotations need
  no table. All families apportion knows rotate the first coordinates of a head, half against half.
"""

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.models.families import attention_of, blocks_of, layout_of, stack_of, transformer_of
from apportion.models.key_memory import LayerFacts, LayerMemory, MakeMemory, Rotation, Step, Watcher

_NAME = "apportion_keys"


@dataclass(eq=False)
class _Pass:
    """The forward pass under way."""

    cache: Any
    mask: Tensor | None
    turned: tuple[Tensor, Rotation] | None = None
    rotations: dict[int, Rotation | None] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    steps: dict[int, LayerMemory] = field(default_factory=dict)


@dataclass(eq=False)
class Door:
    """An open door; what `attend_with` yields.

    Attributes:
        cache: the newest cache that the model wrote to; None before the first pass, or where passes use none.
    """

    make: MakeMemory
    facts: dict[int, LayerFacts]
    modules: dict[int, int]
    cache: Any = None
    under_way: _Pass | None = None

    def memories(self) -> list[LayerMemory]:
        """The memories of the newest cache, first layer to last; of the newest pass where it used no cache."""
        if self.cache is None:
            steps = {} if self.under_way is None else self.under_way.steps
            return [steps[layer] for layer in sorted(steps)]
        return memories_of(self.cache)


def memories_of(cache: Any) -> list[LayerMemory]:
    """The memories in a cache that an open door has filled, first layer to last."""
    return [layer.memory for layer in cache.layers if hasattr(layer, "memory")]


def with_memories(cache: Any, memories: Sequence[LayerMemory]) -> Any:
    """A cache like this one, independent of it, whose full-attention layers hold other memories, first layer to last.

    So one prompt serves several methods or questions: ``with_memories(cache, copy.deepcopy(memories_of(cache)))`` goes
    on from the prompt, and the first cache stays as it was.

    Args:
        cache: one that an open door has filled.
        memories: as many as ``memories_of(cache)`` gives, of the same tokens.
    """
    other = copy.copy(cache)
    rest = iter(memories)
    other.layers = []
    for layer in cache.layers:
        if hasattr(layer, "memory"):
            layer = copy.copy(layer)
            layer.memory = next(rest)
        else:
            layer = copy.deepcopy(layer)
        other.layers.append(layer)
    return other


def close_prompt(cache: Any) -> None:
    """Say that what a cache holds is a whole prompt, so that it is compressed before the next tokens come.

    A memory does so by itself when the first single token comes; between a context and the first question about it
    nobody but the caller knows where the one ends.
    """
    for memory in memories_of(cache):
        memory.close()


# The attention function below is one for all models, so it looks here for the doors that are open.
_doors: list[Door] = []


@contextlib.contextmanager
def attend_with(model: Any, make: MakeMemory) -> Iterator[Door]:
    """In a ``with`` block, let the full-attention layers of a decoder remember and read by memories.

    Passes without a cache (``use_cache=False``) get memories of their own, which are gone afterwards.

    Args:
        model: a `LanguageModel` or a transformers decoder; afterwards it computes attention as before. A cache that was
            filled within the block is of no use outside one.
        make: makes the memory of a layer; called for every full-attention layer of every new cache.

    Raises:
        InputError: the model is no decoder, keeps its keys in a way that this door does not know, or is within such a
            block already.
    """
    inner: Any = transformer_of(model)
    facts, modules = _facts(inner)
    if any(modules.keys() & door.modules.keys() for door in _doors):
        raise InputError(f"{type(inner).__name__} is within such a block already: leave it before you enter another")
    door = Door(make, facts, modules)
    _register()
    before = inner.config._attn_implementation
    with contextlib.ExitStack() as stack:
        inner.set_attn_implementation(_NAME)
        stack.callback(inner.set_attn_implementation, before)
        if inner.config._attn_implementation != _NAME:
            raise InputError(
                f"{type(inner).__name__} computes attention in a way of its own: it cannot be given memories"
            )
        runs = stack_of(inner)
        stack.callback(runs.register_forward_pre_hook(_before_pass(door, runs), with_kwargs=True).remove)
        for layer, block in enumerate(blocks_of(inner)):
            if layer in facts:
                hook = _before_attention(door, layer)
                stack.callback(attention_of(block).register_forward_pre_hook(hook, with_kwargs=True).remove)
        _doors.append(door)
        stack.callback(_doors.remove, door)
        yield door


def layer_facts(model: Any) -> list[LayerFacts]:
    """The full-attention layers of a decoder, first to last: those that would be given memories.

    Raises:
        InputError: see `attend_with`.
    """
    facts, _ = _facts(transformer_of(model))
    return [facts[layer] for layer in sorted(facts)]


@torch.no_grad()
def queries_of(
    model: Any, layer: int, hidden: Float[Tensor, "batch new d_model"], rotation: Rotation | None
) -> Float[Tensor, "batch heads new width"]:
    """The queries that a layer would have, rotated, if its projections were given some hidden states.

    The layer's own attention module makes them, so that its biases, norms and partial rotations are in them.

    Args:
        model: a `LanguageModel` or a transformers decoder.
        layer: of full attention, from 0.
        hidden: what the projections are given, such as ``Step.hidden``.
        rotation: of the tokens' places; None for a model without rotary embedding.

    Raises:
        InputError: the model has no such layer of full attention; or see `attend_with`.
    """
    inner: Any = transformer_of(model)
    steps: list[Step] = []
    with attend_with(inner, lambda facts: Watcher(steps.append)) as door:
        if layer not in door.facts:
            known = ", ".join(map(str, sorted(door.facts)))
            raise InputError(f"layer={layer}: {type(inner).__name__} has full attention in {known}")
        attention: Any = attention_of(blocks_of(inner)[layer])
        door.under_way = _Pass(None, None)
        given: dict[str, Any] = {"hidden_states": hidden, "attention_mask": None}
        if rotation is not None:
            given["position_embeddings"] = tuple(torch.cat([each, each], -1) for each in (rotation.cos, rotation.sin))
        attention(**given)
    return steps[0].queries


def _facts(model: Any) -> tuple[dict[int, LayerFacts], dict[int, int]]:
    config = model.config.get_text_config()
    if not layout_of(model).causal:
        raise InputError(f"{type(model).__name__} is an encoder: it keeps no keys from token to token")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise InputError(f"{type(model).__name__} stores latent vectors (MLA) in place of keys, which apportion cannot")
    if getattr(config, "num_kv_shared_layers", 0):
        raise InputError(f"{type(model).__name__} has layers that share one cache, which apportion does not know")
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    blocks = blocks_of(model)
    kinds = getattr(config, "layer_types", None) or _kinds(config, len(blocks))
    facts = {
        layer: LayerFacts(layer, heads, groups, width, len(blocks))
        for layer, kind in enumerate(kinds)
        if kind == "full_attention"
    }
    if not facts:
        raise InputError(
            f"{type(model).__name__} has no layer of full attention (its layers: {', '.join(sorted(set(kinds)))}): "
            "there is nothing to save"
        )
    return facts, {id(attention_of(blocks[layer])): layer for layer in facts}


def _kinds(config: Any, layers: int) -> list[str]:
    # Models from before ``layer_types``: one window for all layers, or none.
    windowed = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if windowed else "full_attention"] * layers


def _before_pass(door: Door, runs: nn.Module) -> Any:
    """Before the blocks run: make the cache ours, and note which tokens are padding."""
    signature = inspect.signature(runs.forward)

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(signature.bind_partial(*args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        cache = given.get("past_key_values")
        wanted = given.get("use_cache")
        if cache is None and (wanted if wanted is not None else module.config.get_text_config().use_cache):
            from transformers import DynamicCache

            cache = given["past_key_values"] = DynamicCache(config=module.config)
        if cache is not None:
            _take_over(door, cache, module.config)
        mask = given.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise InputError(
                "attention_mask must be [batch, tokens], 0 for padding: masks with more dimensions say who sees whom, "
                "which key memories decide themselves"
            )
        door.cache = cache
        door.under_way = _Pass(cache, mask)
        return (), given

    return hook


def _take_over(door: Door, cache: Any, config: Any) -> None:
    """Give an empty cache our layers; one of ours stays; any other is refused."""
    from transformers import DynamicCache

    ours = [layer for layer in cache.layers if hasattr(layer, "memory")]
    if ours:
        return
    if type(cache) is not DynamicCache or cache.get_seq_length() > 0:
        state = f"a {type(cache).__name__} of {cache.get_seq_length()} tokens"
        raise InputError(f"past_key_values is {state}: give none or an empty DynamicCache, or one filled in this block")
    layer_class = _memory_layer()
    layers: list[Any] = DynamicCache(config=config).layers
    if not layers:
        layers = [None] * (max(door.facts) + 1)
    cache.layers = [
        layer_class(door.make(door.facts[number])) if number in door.facts else layer
        for number, layer in enumerate(layers)
    ]
    cache.layer_class_to_replicate = None


def _memory_layer() -> Any:
    """The class of our cache layers; made late, since importing transformers takes seconds."""
    global _MEMORY_LAYER
    if _MEMORY_LAYER is None:
        from transformers.cache_utils import CacheLayerMixin

        class MemoryLayer(CacheLayerMixin):
            """A layer of a transformers cache whose content is a `LayerMemory`."""

            is_sliding = False
            is_croppable = True

            def __init__(self, memory: LayerMemory) -> None:
                super().__init__()
                self.memory = memory

            def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
                self.is_initialized = True

            def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                # Another model's open door does not help: attention would see the newest tokens alone.
                passes = [door.under_way for door in _doors if door.under_way is not None]
                if not any(now.cache is not None and self in now.cache.layers for now in passes):
                    raise InputError(
                        "this cache was filled within a block of a key method: go on with it within such a block"
                    )
                self.is_initialized = True
                return key_states, value_states

            def get_seq_length(self) -> int:
                return self.memory.seen

            def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
                return self.memory.seen + query_length, 0

            def get_max_length(self) -> int:
                return -1

            def reset(self) -> None:
                raise InputError("a cache of key memories cannot be emptied: begin with a new one")

            def reorder_cache(self, beam_idx: Tensor) -> None:
                self.memory.pick_rows(beam_idx)

            def batch_repeat_interleave(self, repeats: int) -> None:
                self.memory.pick_rows(torch.arange(self.memory.batch).repeat_interleave(repeats))

            def batch_select_indices(self, indices: Tensor) -> None:
                self.memory.pick_rows(indices)

            def crop(self, tokens_to_remove: int) -> None:
                if tokens_to_remove:
                    self.memory.forget_newest(abs(tokens_to_remove))

        _MEMORY_LAYER = MemoryLayer
    return _MEMORY_LAYER


_MEMORY_LAYER: Any = None


def _before_attention(door: Door, layer: int) -> Any:
    """Before an attention layer runs: keep its rotary embedding and what its projections will read."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert door.under_way is not None
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if isinstance(hidden, Tensor):
            door.under_way.hidden[layer] = hidden
        turned = kwargs.get("position_embeddings")
        if turned is None:
            door.under_way.rotations[layer] = None
            return
        # Layers that are given the same tensors share one rotation, so that what is kept of it is kept once.
        newest = door.under_way.turned
        if newest is None or newest[0] is not turned[0]:
            cos, sin = turned
            half = cos.shape[-1] // 2
            newest = (cos, Rotation(cos[..., :half], sin[..., :half]))
            door.under_way.turned = newest
        door.under_way.rotations[layer] = newest[1]

    return hook


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)


def _mask(**given: Any) -> Tensor | None:
    """Full-attention layers need no mask, memories know better; sliding windows get the library's."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if given.get("mask_function") is causal_mask_function:
        return None
    mask: Tensor | None = sdpa_mask(**{**given, "allow_is_causal_skip": False})
    return mask


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention by the memory of the layer; an attention function of transformers."""
    if others.get("s_aux") is not None:
        raise InputError(f"{type(module).__name__} has attention sinks of its own, which apportion does not know")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    for door in reversed(_doors):
        layer = door.modules.get(id(module))
        if layer is not None:
            break
    else:
        # A layer with a sliding window.
        return _windowed(query, key, value, attention_mask, scaling, softcap).transpose(1, 2).contiguous(), None
    if attention_mask is not None:
        raise InputError("several sequences in one row (packed position_ids) cannot be used with key memories")
    now = door.under_way
    assert now is not None
    memory = door.make(door.facts[layer]) if now.cache is None else now.cache.layers[layer].memory
    real = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    if now.mask is not None:
        real = now.mask[:, -key.shape[2] :].bool()
    known = (now.rotations.get(layer), now.hidden.get(layer), module)
    step = Step(query, key, value, real, scaling, softcap, *known)
    now.steps[layer] = memory
    return memory.attend(step).transpose(1, 2).contiguous(), None


def _windowed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(group, dim=1) for each in (key, value))
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    scores = query @ key.transpose(-1, -2) * scaling
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).nan_to_num(0.0).to(value.dtype) @ value
