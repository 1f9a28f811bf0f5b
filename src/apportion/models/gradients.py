"""Activations together with the gradient of something that the model computes from them: one forward, one backward.

At every site a tensor of zeros is added, and the gradient is taken with respect to that: it is what the site's readers
alone make of a change, also where others read the same tensor (an MLP in parallel with attention), and no site cuts the
path to another. Weights get no gradient, so the forward pass below the lowest site leaves no graph, and the backward
pass ends there: it costs about as much as the forward pass of the blocks above.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.models.families import base_of, finish_logits, layout_of, transformer_of
from apportion.models.hooks import Visitor, visit
from apportion.models.language import LOGITS_AT_ONCE
from apportion.models.site import Site

# Maps logits [batch, time, vocab] (of an encoder: its last hidden states) to one number.
Objective = Callable[[Tensor], Tensor]
TARGETS = ("label", "sampled")


def capture_with_gradients(
    model: Any,
    sites: Sequence[Site],
    input_ids: Int[Tensor, "batch time"],
    objective: Objective,
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"] | None = None,
) -> dict[Site, tuple[Float[Tensor, "batch time _"], Float[Tensor, "batch time _"]]]:
    """Run a model on some tokens and keep what it computes at ``sites``, with the gradient of an objective there.

    The gradient at a site is the total one: it goes through everything above, other sites included. Splices and
    `linearised` in force are in force here too; what they detach, no gradient goes through.

    Args:
        model: a `LanguageModel` or a transformers model in eval mode; afterwards it is as it was.
        sites: where to listen.
        input_ids: token ids, on the model's device.
        objective: maps the logits ``[batch, time, vocab]`` (of an encoder the last hidden states) to one number. A sum
            over tokens gives each token the gradient of its own effect; a mean makes all gradients smaller by their
            number.
        attention_mask: 1 for tokens, 0 for padding; None where nothing is padded.

    Returns:
        Activations and gradients of each site, in the model's dtype and without a graph. A site on which the objective
        does not depend has gradient 0.

    Raises:
        InputError: the model lacks one of the sites or is in training mode, or the objective is not one number or does
            not depend on any site.
    """
    inner = transformer_of(model)
    with _listening(inner, sites) as seen:
        output = inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        value = objective(output.logits if hasattr(output, "logits") else output.last_hidden_state)
        if value.numel() != 1:
            raise InputError(f"objective gives shape {tuple(value.shape)}: it must give one number, such as a sum")
        return _with_gradients(seen, sites, value.reshape(()), None)


def capture_with_loss_gradients(
    model: Any,
    sites: Sequence[Site],
    input_ids: Int[Tensor, "batch time"],
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"] | None = None,
    *,
    target: str = "label",
    seed: int | Sequence[int] = 0,
) -> dict[Site, tuple[Float[Tensor, "batch time _"], Float[Tensor, "batch time _"]]]:
    """`capture_with_gradients` of the sum of all next-token losses, without all logits in memory at once.

    Args:
        model: see `capture_with_gradients`; it must predict the next token.
        sites: see there.
        input_ids: see there.
        attention_mask: see there. Padding is neither predicted nor predicted from, and its gradients are 0.
        target: whose loss. ``label``: of the tokens that follow in ``input_ids``; the last of a row has none.
            ``sampled``: of tokens drawn from the model's own distribution, one for every position, so that the
            gradient does not know the answer.
        seed: of the draw.

    Returns:
        Activations and gradients (in nats per unit) of each site, in the model's dtype.

    Raises:
        InputError: the model lacks one of the sites, is in training mode or does not predict the next token, or another
            target.
    """
    inner: Any = transformer_of(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None or not layout_of(inner).causal:
        raise InputError(f"{type(inner).__name__} does not predict the next token, so it has no loss to differentiate")
    if target not in TARGETS:
        raise InputError(f"target is {target!r}: choose one of {', '.join(TARGETS)}")
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    labels = None
    predicted_from = real
    if target == "label":
        labels = input_ids.roll(-1, dims=1)
        predicted_from = real & real.roll(-1, dims=1)
        predicted_from[:, -1] = False
    with _listening(inner, sites) as seen:
        hidden = base_of(inner)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        onto_hidden = torch.zeros_like(hidden)
        onto_hidden[predicted_from] = _loss_gradient(
            inner, head, hidden.detach()[predicted_from], None if labels is None else labels[predicted_from], seed
        )
        found = _with_gradients(seen, sites, hidden, onto_hidden)
    return {site: (x, gradient * real.unsqueeze(-1)) for site, (x, gradient) in found.items()}


def _loss_gradient(
    model: nn.Module,
    head: Any,
    hidden: Float[Tensor, "n d_model"],
    labels: Int[Tensor, " n"] | None,
    seed: int | Sequence[int],
) -> Float[Tensor, "n d_model"]:
    """The gradient of the sum of losses with respect to what the head reads, a few logits at a time."""
    draw = torch.Generator(hidden.device)
    draw.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    gradient = torch.empty_like(hidden)
    step = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        leaf = hidden[part].requires_grad_()
        logits = head(leaf)
        logits = finish_logits(model, logits.to(torch.promote_types(logits.dtype, torch.float32)))
        if labels is None:
            wanted = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw).squeeze(1)
        else:
            wanted = labels[part].long()
        loss = nn.functional.cross_entropy(logits, wanted, reduction="sum")
        (gradient[part],) = torch.autograd.grad(loss, leaf)
    return gradient


@contextlib.contextmanager
def _listening(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[Site, tuple[Tensor, Tensor]]]:
    """In a ``with`` block gradients are on, weights want none, and forward passes leave activations and added zeros."""
    if not sites:
        raise InputError("sites is empty: name at least one")
    if model.training:
        raise InputError(f"{type(model).__name__} is in training mode, where dropout is at work: call its eval()")
    seen: dict[Site, tuple[Tensor, Tensor]] = {}

    def keeper(site: Site) -> Visitor:
        def keep(activations: Tensor) -> Tensor:
            added = torch.zeros_like(activations, requires_grad=True)
            seen[site] = activations.detach(), added
            return activations + added

        return keep

    with contextlib.ExitStack() as stack:
        stack.enter_context(_weights_at_rest(model))
        stack.enter_context(torch.enable_grad())
        for site in dict.fromkeys(sites):
            stack.enter_context(visit(model, site, keeper(site)))
        yield seen


def _with_gradients(
    seen: dict[Site, tuple[Tensor, Tensor]], sites: Sequence[Site], value: Tensor, onto: Tensor | None
) -> dict[Site, tuple[Tensor, Tensor]]:
    if not value.requires_grad:
        raise InputError(f"what is differentiated does not depend on {', '.join(map(str, sites))}: choose lower sites")
    gradients = torch.autograd.grad(value, [seen[site][1] for site in sites], onto, materialize_grads=True)
    return {site: (seen[site][0], gradient) for site, gradient in zip(sites, gradients, strict=True)}


@contextlib.contextmanager
def _weights_at_rest(model: nn.Module) -> Iterator[None]:
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
