"""Replacing the activations at a site of a model with something else."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from apportion.models.hooks import visit
from apportion.models.site import Site


@contextlib.contextmanager
def splice(model: Any, site: Site, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """In every forward pass of a ``with`` block, put ``replace(activations)`` in the place of those at ``site``.

    Args:
        model: a `LanguageModel` or a transformers model; afterwards it is as it was, also if the block raises.
        site: where to replace.
        replace: maps activations ``[batch, time, width]`` in the model's dtype to others of that shape. Another dtype
            is cast back. Gradients flow through it unless the caller forbids them.

    Raises:
        InputError: the model lacks the site.
        ValueError: from the forward pass, if a replacement has another shape.
    """

    def checked(activations: Tensor) -> Tensor:
        replacement = replace(activations)
        if replacement.shape != activations.shape:
            raise ValueError(
                f"the replacement at {site} has shape {tuple(replacement.shape)} instead of {tuple(activations.shape)}"
            )
        return replacement.to(activations.dtype)

    with visit(model, site, checked):
        yield


@contextlib.contextmanager
def splice_from(model: Any, source: Site, site: Site, replace: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """`splice`, where the replacement is made of what the same pass computed earlier: a transcoder in an MLP's place.

    Args:
        model: see `splice`.
        source: where to listen; computed before ``site``.
        site: where to replace.
        replace: maps the activations at ``source`` and those at ``site`` to others of the shape of the latter.

    Raises:
        InputError: the model lacks a site.
        ValueError: from the forward pass, if a replacement has another shape, or ``source`` is computed after ``site``.
    """
    heard: list[Tensor] = []

    def listen(activations: Tensor) -> None:
        heard[:] = [activations]

    def put(activations: Tensor) -> Tensor:
        if not heard:
            raise ValueError(f"nothing was computed at {source} before {site}: listen to something below")
        return replace(heard.pop(), activations)

    with visit(model, source, listen), splice(model, site, put):
        yield
