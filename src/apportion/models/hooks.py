"""The one place where apportion hooks into a transformers model."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from apportion.models.families import base_of, layout_of, transformer_of
from apportion.models.site import Site

Visitor = Callable[[Tensor], Tensor | None]


@dataclass
class Pass:
    """What the forward pass under way was told about its tokens.

    Attributes:
        mask: ``[batch, past + time]``, not 0 for tokens, 0 for padding; None where nothing is padded.
        past: how many tokens of each row the key-value cache holds already.
        cached: False if the pass was told to use no cache.
    """

    mask: Tensor | None = None
    past: int = 0
    cached: bool = True

    def tokens(self, batch: int, time: int) -> tuple[Bool[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
        """Which places of this pass hold tokens, and which of those hold the first token of their row's text."""
        if self.mask is None:
            real = torch.ones(batch, self.past + time, dtype=torch.bool)
        else:
            real = self.mask.bool()
        first = real & (real.cumsum(dim=1) == 1)
        here = slice(self.past, self.past + time)
        return real[:, here], first[:, here]


@contextlib.contextmanager
def visit(model: Any, site: Site, visitor: Visitor) -> Iterator[None]:
    """Show ``visitor`` the activations ``[batch, time, width]`` at ``site`` in every forward pass of a ``with`` block.

    What the visitor returns takes their place; None leaves them alone. The hooks are gone afterwards, whatever
    happened.
    """
    model = transformer_of(model)
    module, side = site.resolve(model)
    batch_and_time: list[int] = []

    def note_shape(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch_and_time[:] = _first(args, kwargs).shape[:2]

    def show(activations: Tensor) -> Tensor | None:
        # OPT flattens the tokens of a batch before its MLP.
        flat = activations.dim() == 2
        replacement = visitor(activations.view(*batch_and_time, -1) if flat else activations)
        if replacement is None:
            return None
        return replacement.reshape(activations.shape) if flat else replacement

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        replacement = show(_first(args, kwargs))
        if replacement is None:
            return None
        if args:
            return (replacement, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": replacement}

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        replacement = show(output[0] if isinstance(output, tuple) else output)
        if replacement is None:
            return None
        return (replacement, *output[1:]) if isinstance(output, tuple) else replacement

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(_hooked(site.block(model).register_forward_pre_hook(note_shape, with_kwargs=True)))
        if side == "input":
            hooks.enter_context(_hooked(module.register_forward_pre_hook(before, with_kwargs=True)))
        else:
            hooks.enter_context(_hooked(module.register_forward_hook(after)))
        yield


@contextlib.contextmanager
def watch_passes(model: Any) -> Iterator[Pass]:
    """In a ``with`` block, keep what the model's forward pass under way was told about padding and cache."""
    model = transformer_of(model)
    current = Pass()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        mask = given.get("attention_mask")
        if mask is None or mask.dim() == 2:  # An encoder hands its blocks a mask that it has made wider.
            current.mask = mask
        cache = given.get("past_key_values")
        current.cached = given.get("use_cache") is not False
        current.past = 0 if cache is None else int(cache.get_seq_length())

    base = base_of(model)
    # The head may call the base model, or (OPT) what holds the blocks; people may call either.
    holder = base.get_submodule(layout_of(model).blocks.rpartition(".")[0])
    with contextlib.ExitStack() as hooks:
        for module in {id(each): each for each in (model, base, holder)}.values():
            hooks.enter_context(_hooked(module.register_forward_pre_hook(note, with_kwargs=True)))
        yield current


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    first = args[0] if args else kwargs["hidden_states"]
    assert isinstance(first, Tensor)
    return first


@contextlib.contextmanager
def _hooked(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
