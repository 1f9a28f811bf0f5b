"""The one place where apportion hooks into a transformers model."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from apportion.models.families import transformer_of
from apportion.models.site import Site

Visitor = Callable[[Tensor], Tensor | None]


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
