"""A model as the linear map that it is once attention patterns and norm scales are held fixed, for attributions.

With these held fixed the residual stream before a block is a sum of what everything below wrote, and whatever reads it
through a norm, a value projection or an unembedding reads that sum term by term. So the gradient of any such reading,
times what a part has written, is exactly what that part contributes: the terms and a constant (biases) add up to the
reading. It says how the value came about under these patterns, not what would happen if a part were changed.

Sources: Elhage et al. 2021 (A Mathematical Framework for Transformer Circuits); the direct feature attribution of
Kissane et al. 2024 (arXiv 2406.17759); Dunefsky et al. 2024 (arXiv 2406.11944), who freeze a norm as one scalar per
direction where this is the exact linear map.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.models.families import attention_of, blocks_of, transformer_of
from apportion.models.site import Site
from apportion.models.splice import splice

_NAME = "apportion_linear"


@dataclass(frozen=True, eq=False)
class AttentionAtWork:
    """What an attention layer computed in one forward pass; query heads in order.

    Attributes:
        pattern: how much each destination takes from each source; masked sources have 0.
        values: the value vectors; heads that share one (grouped queries) each have a copy of it.
        queries: as they meet the keys, rotary embedding included; where they were asked for.
        keys: likewise; heads that share one each have a copy of it.
        scaling: of their products, before the softmax.
    """

    pattern: Float[Tensor, "batch heads destination source"]
    values: Float[Tensor, "batch heads source head_width"]
    queries: Float[Tensor, "batch heads destination key_width"] | None = None
    keys: Float[Tensor, "batch heads source key_width"] | None = None
    scaling: float = 1.0

    @property
    def heads(self) -> Float[Tensor, "batch time heads head_width"]:
        """The heads' outputs, which the site ``heads`` shows side by side: ``pattern @ values``."""
        return (self.pattern @ self.values).transpose(1, 2)


@dataclass(eq=False)
class _Watch:
    """What is wanted of the attention layers of one model."""

    layers: dict[int, int]  # by the identity of the attention module
    freeze: bool
    graph: bool = False  # keep queries and keys too, and all of it with its graph
    seen: dict[int, AttentionAtWork] = field(default_factory=dict)


# The attention function below is one for all models, so it looks here for those that are watched.
_watches: list[_Watch] = []


@contextlib.contextmanager
def watch_attention(model: Any) -> Iterator[dict[int, AttentionAtWork]]:
    """In a ``with`` block, keep every attention layer's patterns and values of the newest forward pass, by layer.

    Args:
        model: a `LanguageModel` or a transformers model; afterwards it computes attention as before.

    Raises:
        InputError: the model computes attention in a way of its own that cannot be watched.
    """
    with watched(transformer_of(model), freeze=False) as seen:
        yield seen


@contextlib.contextmanager
def linearised(model: Any, mlps: Literal["constant", "model"] = "constant") -> Iterator[dict[int, AttentionAtWork]]:
    """In a ``with`` block, gradients take attention patterns and norm scales for constants; values stay as they are.

    Args:
        model: a `LanguageModel` or a transformers model; afterwards it is as it was.
        mlps: ``constant``: no gradient goes through an MLP, as for direct contributions. ``model``: they have their own
            gradient, for callers who splice something linear in their place.

    Yields:
        Patterns and values of the newest forward pass, by layer.

    Raises:
        InputError: the model computes attention in a way of its own that cannot be watched.
    """
    inner = transformer_of(model)
    with contextlib.ExitStack() as stack:
        seen = stack.enter_context(watched(inner, freeze=True))
        for norm in norms_of(inner):
            stack.callback(norm.register_forward_hook(_frozen(norm)).remove)
        if mlps == "constant":
            for layer in range(len(blocks_of(inner))):
                stack.enter_context(splice(inner, Site(layer, "mlp_out"), torch.Tensor.detach))
        yield seen


class LinearNorm:
    """A norm with its scale held fixed: ``x -> scale(x) * gain * (x - mean(x)) + bias``, the mean for LayerNorms only.

    What kind of norm it is, its gain and its bias are found by asking it, so that it does not matter how a family calls
    them (Gemma keeps ``gain - 1``).

    Args:
        norm: a LayerNorm or RMSNorm over the last dimension.
        width: of that dimension.

    Raises:
        InputError: it is neither.
    """

    def __init__(self, norm: nn.Module, width: int) -> None:
        place = next(iter(norm.parameters()), torch.zeros(()))
        # Mean zero and no entry zero, whatever the width.
        probe = torch.ones(width, dtype=place.dtype, device=place.device)
        probe[-1] = 1 - width
        with torch.no_grad():
            self.bias = norm(torch.zeros_like(probe))
            direction = norm(probe) - self.bias
            self.centres = torch.allclose(norm(probe + 3.0), norm(probe), rtol=1e-3, atol=1e-4)
            self.gain = direction / probe
            again = norm(probe.flip(0)) - self.bias
        if not torch.allclose(again, self.gain * probe.flip(0), rtol=1e-2, atol=1e-4):
            raise InputError(f"{type(norm).__name__} is neither a LayerNorm nor an RMSNorm over the last dimension")

    def scale(self, x: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
        """The factor that the norm chose for inputs ``x`` with outputs ``y``; 0 where the input has no direction."""
        along = self.directions(x)
        square = along.square().sum(-1, keepdim=True)
        return torch.where(square > 0, ((y - self.bias) * along).sum(-1, keepdim=True) / square, 0.0)

    def directions(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The linear part at scale 1; components of a sum may go through it one by one."""
        centred = x - x.mean(-1, keepdim=True) if self.centres else x
        return self.gain * centred


@dataclass(eq=False)
class NormsAtWork:
    """What went into the norms of a model and what came out, in one forward pass.

    Attributes:
        calls: the module, its input and its output, in the order in which they were computed.
    """

    calls: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)

    def around(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output of the norm that a tensor with a gradient was last computed through.

        Raises:
            InputError: it was computed through none.
        """
        found = self.call(tensor)
        return found[1], found[2]

    def call(self, tensor: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
        """`around`, with the module.

        Raises:
            InputError: the tensor was computed through none.
        """
        for module, before, after in reversed(self.calls):
            if tensor is after:
                return module, before, after
            # The newest norm that it depends on is the one in front of it.
            if tensor.requires_grad and after.requires_grad:
                (grad,) = torch.autograd.grad(tensor.sum(), after, retain_graph=True, allow_unused=True)
                if grad is not None:
                    return module, before, after
        raise InputError("no norm was computed on the way to this reading: this family of models norms elsewhere")


@contextlib.contextmanager
def norm_inputs(model: Any) -> Iterator[NormsAtWork]:
    """In a ``with`` block, keep what goes into the norms of a model and what comes out of them.

    Entered within `linearised`, what is kept is what the rest of the model computes with.
    """
    seen = NormsAtWork()

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.calls.append((module, args[0], output))

    with contextlib.ExitStack() as stack:
        for norm in norms_of(transformer_of(model)):
            stack.callback(norm.register_forward_hook(keep).remove)
        yield seen


def norms_of(model: nn.Module) -> list[nn.Module]:
    """All norms within the model: the leaves that their families call so."""
    return [
        each
        for each in model.modules()
        if "norm" in type(each).__name__.lower() and not any(True for _ in each.children())
    ]


def _frozen(norm: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook: the same output, whose gradient takes the scale for a constant."""
    linear: list[LinearNorm] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        if not linear:
            # The hook is not called again from within: the norm is asked through its class.
            linear.append(LinearNorm(BareNorm(norm), x.shape[-1]))
        directions = linear[0].directions(x)
        scale = linear[0].scale(x.detach(), output.detach())
        through = directions * scale
        return output.detach() + (through - through.detach())

    return hook


class BareNorm(nn.Module):
    """A module without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._ask, self._named = module.forward, type(module).__name__
        self._parameters = module._parameters

    def forward(self, x: Tensor) -> Tensor:
        """What the module computes."""
        found: Tensor = self._ask(x)
        return found


@contextlib.contextmanager
def watched(model: Any, freeze: bool, graph: bool = False) -> Iterator[dict[int, AttentionAtWork]]:
    """What `watch_attention` and `linearised` do with attention: see it, freeze its patterns, keep its graph."""
    _register()
    modules = [attention_of(block) for block in blocks_of(model)]
    watch = _Watch({id(module): layer for layer, module in enumerate(modules)}, freeze, graph)
    config = model.config
    before = config._attn_implementation
    model.set_attn_implementation(_NAME)
    if model.config._attn_implementation != _NAME:
        raise InputError(f"{type(model).__name__} computes attention in a way of its own: its patterns cannot be seen")
    _watches.append(watch)
    try:
        yield watch.seen
    finally:
        _watches.remove(watch)
        model.set_attn_implementation(before)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_NAME, _attention)
    # Without a mask function of its own a new attention function is silently not causal.
    AttentionMaskInterface.register(_NAME, eager_mask)


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
) -> tuple[Tensor, Tensor]:
    """Attention as its definition says, seen by the newest watch; an attention function of transformers."""
    if others.get("s_aux") is not None:
        raise InputError(f"{type(module).__name__} has attention sinks of its own, which apportion does not know")
    watch = next(each for each in reversed(_watches) if id(module) in each.layers)
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.set_grad_enabled(torch.is_grad_enabled() and not watch.freeze):
        scores = query @ key.transpose(-1, -2) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if attention_mask is not None:
            scores = scores + attention_mask[..., : key.shape[-2]]
        pattern = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    seen = AttentionAtWork(pattern.detach(), value.detach())
    if watch.graph:
        seen = AttentionAtWork(pattern.detach(), value, query, key, scaling)
    watch.seen[watch.layers[id(module)]] = seen
    return (pattern @ value).transpose(1, 2).contiguous(), pattern
