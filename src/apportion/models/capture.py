"""Reading the activations at some sites of a model, at the price of no more blocks than needed."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.models.families import transformer_of
from apportion.models.hooks import Visitor, visit
from apportion.models.site import Site


class _EnoughSeen(Exception):
    """Ends a forward pass from inside, once every site has been seen."""


def capture(
    model: Any,
    sites: Sequence[Site],
    input_ids: Int[Tensor, "batch time"],
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"] | None = None,
) -> dict[Site, Float[Tensor, "batch time _"]]:
    """Run a model on some tokens and keep what it computes at ``sites``.

    The pass ends as soon as every site has been seen: later blocks and the head are not computed.

    Args:
        model: a `LanguageModel` or a transformers model. `splice` s in force are in force here too.
        sites: where to listen.
        input_ids: token ids, on the model's device.
        attention_mask: 1 for tokens, 0 for padding; None where nothing is padded.

    Returns:
        The activations of each site in the model's dtype, without gradients.

    Raises:
        InputError: the model lacks one of the sites.
    """
    model = transformer_of(model)
    missing = set(sites)
    seen: dict[Site, Tensor] = {}

    def keeper(site: Site) -> Visitor:
        def keep(activations: Tensor) -> None:
            seen[site] = activations
            missing.discard(site)
            if not missing:
                raise _EnoughSeen

        return keep

    with contextlib.ExitStack() as hooks:
        for site in dict.fromkeys(sites):
            hooks.enter_context(visit(model, site, keeper(site)))
        if missing:
            with torch.no_grad(), contextlib.suppress(_EnoughSeen):
                model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return {site: seen[site] for site in sites}
