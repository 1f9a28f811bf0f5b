"""Activation patching of attention heads, exact and to first order: what changes if one head puts out something else?

Noising (Wang et al. 2022, arXiv 2211.00593): in the run on the clean prompt a head's output becomes that of the
counterfactual prompt, at all positions or at one, and everything above it is computed anew. The effect of a head is the
metric without patch minus the metric with it: large where the head carried what the answer rests on. Patching a head of
block L recomputes block L and those above, from the first token that differs on, for several heads in one pass.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.data.tasks.pairs import MetricName
from apportion.errors import InputError
from apportion.models.capture import capture
from apportion.models.gradients import capture_with_gradients
from apportion.models.heads import HeadEdit, edit_heads, head_outputs
from apportion.models.language import LanguageModel
from apportion.models.prompts import TokenPairs, TokenPrompts, judge, predict
from apportion.models.restart import Restart
from apportion.models.site import Site
from apportion.models.splice import splice

MetricChoice = Literal["task", "logit_difference", "probability_difference", "kl"]
# Tokens in one pass: more gain nothing on a processor, and memory stays small.
_TOKENS_AT_ONCE = 2048


def patch_heads(
    model: LanguageModel,
    pairs: TokenPairs,
    *,
    metric: MetricChoice = "task",
    direction: Literal["noising", "denoising"] = "noising",
    role: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "pairs layers heads"]:
    """The effect of patching every head, one at a time, by exact recomputation.

    Args:
        model: a causal language model.
        pairs: the task.
        metric: ``task`` is the one that the task names; ``kl`` is the divergence of the predictions in nats, from the
            unpatched to the patched run.
        direction: ``noising``: counterfactual outputs in the clean run, effect = metric before - metric after.
            ``denoising``: clean outputs in the counterfactual run, effect = metric after - metric before. The metric is
            always that of the clean prompt's answers. Either way a head that serves the task has a positive effect.
        role: patch at the position of this role only; None patches all positions.
        progress: is called with the layers done and their number.

    Raises:
        InputError: an unknown role, metric or direction.
    """
    if direction not in ("noising", "denoising"):
        raise InputError(f"direction {direction!r} is unknown: choose noising or denoising")
    base, source = pairs.clean, pairs.counterfactual
    if direction == "denoising":
        base, source = source, base
    replacement = head_outputs(model, source.input_ids, source.attention_mask)
    # Up to the first token that differs both runs are the same.
    differs = (base.input_ids != source.input_ids).any(0).nonzero().flatten().tolist()
    first = min([*differs[:1], *(int(place.min()) for name, place in base.positions.items() if name in ("end", role))])
    effects = _effects(model, pairs, base, replacement, metric, role, first, progress)
    return -effects if direction == "denoising" and metric != "kl" else effects


def ablate_heads(
    model: LanguageModel,
    pairs: TokenPairs,
    kind: Literal["mean", "zero"] = "mean",
    *,
    metric: MetricChoice = "task",
    means_over: TokenPairs | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "pairs layers heads"]:
    """The effect of ablating every head, one at a time, by exact recomputation.

    Args:
        model: a causal language model.
        pairs: the task; clean prompts are ablated.
        kind: ``zero``: the head puts out nothing. ``mean``: it puts out its mean at that position over all prompts of
            the task, clean and counterfactual.
        metric: as for `patch_heads`.
        means_over: more pairs of the same task and length to take the means over; None takes those that are ablated.
        progress: is called with the layers done and their number.

    Raises:
        InputError: an unknown kind or metric.
    """
    if kind == "mean":
        replacement = mean_outputs(model, pairs if means_over is None else means_over)
        if replacement.shape[1] != pairs.clean.input_ids.shape[1]:
            raise InputError(
                f"means_over has {replacement.shape[1]} tokens a prompt and the pairs have "
                f"{pairs.clean.input_ids.shape[1]}: use pairs of the same task and length"
            )
    elif kind == "zero":
        width = (model.n_layers, model.n_heads, model.head_width)
        replacement = torch.zeros(1, pairs.clean.input_ids.shape[1], *width, device=model.device)
    else:
        raise InputError(f"kind {kind!r} is unknown: choose mean or zero")
    replacement = replacement.expand(len(pairs), *replacement.shape[1:])
    return _effects(model, pairs, pairs.clean, replacement, metric, None, 0, progress)


def attribute_heads(
    model: LanguageModel,
    pairs: TokenPairs,
    *,
    kind: Literal["patching", "importance"] = "patching",
    metric: MetricName | None = None,
) -> Float[Tensor, "pairs layers heads"]:
    """What patching every head would change to first order: two forward passes and one backward for all of them.

    Args:
        model: a causal language model.
        pairs: the task.
        kind: ``patching``: attribution patching (Nanda 2023), the estimate of `patch_heads` by noising,
            ``sum over positions of (z - z counterfactual) . gradient``. ``importance``: head importance (Michel et al.
            2019, arXiv 1905.10650), ``|sum of z . gradient|``, the estimate of a zero ablation's size.
        metric: of the clean prompts' answers; None takes the task's.

    Raises:
        InputError: an unknown kind or metric.
    """
    if kind not in ("patching", "importance"):
        raise InputError(f"kind {kind!r} is unknown: choose patching or importance")
    sites = [Site(layer, "heads") for layer in range(model.n_layers)]
    found = torch.zeros(len(pairs), model.n_layers, model.n_heads, device=model.device)
    at_once = max(1, _TOKENS_AT_ONCE // pairs.clean.input_ids.shape[1])
    for start in range(0, len(pairs), at_once):
        rows = slice(start, start + at_once)
        prompts, other = pairs.clean.select(rows), pairs.counterfactual.select(rows)

        def objective(logits: Tensor, prompts: TokenPrompts = prompts) -> Tensor:
            at_end = logits[torch.arange(len(prompts), device=logits.device), prompts.positions["end"]].float()
            return judge(at_end, prompts, metric or pairs.metric).sum()

        clean = capture_with_gradients(model, sites, prompts.input_ids, objective, prompts.attention_mask)
        instead = capture(model, sites, other.input_ids, other.attention_mask) if kind == "patching" else {}
        for site, (outputs, gradients) in clean.items():
            change = outputs - instead[site] if kind == "patching" else outputs
            effect = (change * gradients).float().unflatten(-1, (model.n_heads, model.head_width)).sum((1, -1))
            found[rows, site.layer] = effect.abs() if kind == "importance" else effect
    return found


def mean_outputs(model: LanguageModel, pairs: TokenPairs) -> Float[Tensor, "1 time layers heads width"]:
    """Each head's mean output at every position, over all prompts of the task that are as long."""
    both = (pairs.clean, pairs.counterfactual)
    outputs = torch.cat([head_outputs(model, each.input_ids, each.attention_mask) for each in both])
    weight = torch.cat([each.attention_mask for each in both])[:, :, None, None, None].to(outputs.dtype)
    return (outputs * weight).sum(0, keepdim=True) / weight.sum(0, keepdim=True).clamp(min=1)


@torch.no_grad()
def keep_heads(
    model: LanguageModel,
    pairs: TokenPairs,
    kept: Bool[Tensor, "layers heads"],
    *,
    others: Literal["counterfactual", "mean"] = "counterfactual",
) -> Float[Tensor, " pairs"]:
    """The task's metric on clean prompts while only some heads do their own work; for the faithfulness of a circuit.

    Heads that are kept compute what they do on whatever reaches them; all others put out what they do on the
    counterfactual prompts, or their mean over the task.

    Raises:
        InputError: an unknown choice of ``others``.
    """
    if others not in ("counterfactual", "mean"):
        raise InputError(f"others {others!r} is unknown: choose counterfactual or mean")
    if others == "mean":
        instead = mean_outputs(model, pairs)
    else:
        instead = head_outputs(model, pairs.counterfactual.input_ids, pairs.counterfactual.attention_mask)
    edits = [HeadEdit(layer, head, instead[:, :, layer, head]) for layer, head in (~kept).nonzero().tolist()]
    with edit_heads(model, edits):
        return judge(predict(model, pairs.clean), pairs.clean, pairs.metric)


@torch.no_grad()
def _effects(
    model: LanguageModel,
    pairs: TokenPairs,
    base: TokenPrompts,
    replacement: Float[Tensor, "pairs time layers heads width"],
    metric: MetricChoice,
    role: str | None,
    first: int,
    progress: Callable[[int, int], None] | None,
) -> Float[Tensor, "pairs layers heads"]:
    """Metric before minus metric after (or the divergence) for every head's replacement in the run on ``base``.

    Positions before ``first`` are taken to stay as they are.
    """
    if metric not in ("task", "logit_difference", "probability_difference", "kl"):
        raise InputError(f"metric {metric!r} is unknown: choose task, logit_difference, probability_difference or kl")
    if role is not None and role not in base.positions:
        raise InputError(f"role {role!r} is unknown: {pairs.name} has {', '.join(base.positions)}")
    places = None if role is None else base.positions[role] - first
    effects = torch.zeros(len(pairs), model.n_layers, model.n_heads, device=model.device)
    time = base.input_ids.shape[1] - first
    at_once = max(1, min(len(pairs), _TOKENS_AT_ONCE // time))
    starts = range(0, len(pairs), at_once)
    for done, start in enumerate(starts):
        rows = slice(start, start + at_once)
        prompts, judged = base.select(rows), pairs.clean.select(rows)
        restart = Restart(model, prompts, first)
        before = restart.logits(model.n_layers - 1)
        heads_at_once = max(1, _TOKENS_AT_ONCE // (time * len(prompts)))
        for layer in range(model.n_layers):
            for group in torch.arange(model.n_heads).split(heads_at_once):
                instead = replacement[rows, first:, layer]
                replace = _each_in_its_copy(model, instead, group, None if places is None else places[rows])
                with splice(model, Site(layer, "heads"), replace):
                    after = restart.logits(layer, copies=len(group)).unflatten(0, (len(group), -1))
                for place, head in enumerate(group.tolist()):
                    effects[rows, layer, head] = _change(before, after[place], judged, metric, pairs)
            if progress is not None:
                progress(done * model.n_layers + layer + 1, len(starts) * model.n_layers)
    return effects


def _each_in_its_copy(
    model: LanguageModel,
    instead: Float[Tensor, "pairs time heads width"],
    group: Int[Tensor, " copies"],
    places: Int[Tensor, " pairs"] | None,
) -> Callable[[Tensor], Tensor]:
    """A replacement at the site ``heads`` which patches the first head of the group in the first copy, and so on."""

    def replace(activations: Tensor) -> Tensor:
        heads = activations.unflatten(-1, (model.n_heads, model.head_width)).unflatten(0, (len(group), -1)).clone()
        rows = torch.arange(len(instead), device=heads.device)
        for copy, head in enumerate(group.tolist()):
            values = instead[:, :, head].to(heads.dtype)
            if places is None:
                heads[copy, :, :, head] = values
            else:
                heads[copy, rows, places, head] = values[rows, places]
        return heads.flatten(-2).flatten(0, 1)

    return replace


def _change(before: Tensor, after: Tensor, judged: TokenPrompts, metric: MetricChoice, pairs: TokenPairs) -> Tensor:
    if metric == "kl":
        old, new = before.log_softmax(-1), after.log_softmax(-1)
        return (old.exp() * (old - new)).sum(-1)
    chosen = pairs.metric if metric == "task" else metric
    return judge(before, judged, chosen) - judge(after, judged, chosen)
