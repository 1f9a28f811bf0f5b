"""Which head gets how many coordinates: the paper's greedy allocation (its Algorithm 1), and what it goes by.

All ranks begin at the width. Again and again the head that would lose least by losing ``step`` coordinates (of its
keys, or of its values) loses them, until the mean share that is kept is down to what was asked for.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.errors import InputError
from apportion.keys.matryoshka_basis import HeadBases
from apportion.keys.matryoshka_training import stored_in
from apportion.keys.memory import ComposedMemory
from apportion.keys.projected_store import HeadSpace, ProjectedStore
from apportion.keys.trace import Trace
from apportion.models import LanguageModel
from apportion.ops.attend import attend

LossOfNext: TypeAlias = Callable[[Int[Tensor, "layers 2 groups"]], Float[Tensor, "layers 2 groups"]]
"""Given ranks, the error if one entry alone loses a step more, for every entry; only their order matters."""


def greedy_ranks(
    errors: LossOfNext,
    shape: tuple[int, int, int],
    width: int,
    share: float,
    *,
    step: int,
    floor: int = 0,
    at_once: int = 1,
) -> Int[Tensor, "layers 2 groups"]:
    """Ranks whose mean share of the width is at most ``share``, and not more than one step of one entry below it.

    Args:
        errors: what an entry's next loss would do, see `losses_by_divergence` and `losses_by_attention`.
        shape: layers, 2 (keys, values), key-value heads.
        width: of a head.
        share: of the width that is kept, a mean over entries.
        step: coordinates that an entry loses at a time (the paper's Delta).
        floor: no rank goes below.
        at_once: entries that lose a step before errors are computed anew. The paper's text says 1; its code, 1536 of
            2048.

    Raises:
        InputError: ``step`` does not divide the width, ``floor`` is no multiple of it or leaves too little to take,
            or ``share`` or ``at_once`` make no sense.
    """
    if step < 1 or width % step:
        raise InputError(f"step={step} does not divide {width}, the width of a head: take {max(1, width // 8)}")
    if not 0 <= floor <= width or floor % step:
        raise InputError(f"floor={floor}: a multiple of step={step}, from 0 to {width}")
    if not 0 < share <= 1 or share * width < floor:
        raise InputError(f"share={share}: at most 1, and at least floor / width = {floor / width:g}, above 0")
    if at_once < 1:
        raise InputError(f"at_once={at_once}: at least 1")
    ranks = torch.full(shape, width)
    # A hair's breadth, so that shares such as 0.7 of 10 do not cost a step more by rounding.
    to_lose = math.ceil((ranks.sum().item() - share * width * ranks.numel()) / step - 1e-9)
    while to_lose > 0:
        found = errors(ranks).masked_fill(ranks - step < floor, torch.inf)
        count = min(at_once, to_lose, int(found.isfinite().sum()))
        if count == 0:
            raise InputError(f"share={share} cannot be reached with floor={floor} and step={step}: take a lower floor")
        chosen = found.flatten().topk(count, largest=False).indices
        ranks.view(-1)[chosen] -= step
        to_lose -= count
    return ranks


@torch.no_grad()
def losses_by_divergence(
    model: LanguageModel, bases: HeadBases, ids: Int[Tensor, "texts tokens"], step: int
) -> LossOfNext:
    """The paper's criterion: ``KL(whole model || compressed)`` on calibration texts, a forward pass an entry."""
    teacher = model.model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)

    @torch.no_grad()
    def errors(ranks: Int[Tensor, "layers 2 groups"]) -> Float[Tensor, "layers 2 groups"]:
        found = torch.full(ranks.shape, torch.inf)
        for place in (ranks >= step).nonzero().tolist():
            tried = ranks.clone()
            tried[tuple(place)] -= step
            with stored_in(model, bases.spaces(tried)):
                student = model.model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            divergence = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True)
            found[tuple(place)] = float(divergence.sum(-1).mean())
        return found

    return errors


def losses_by_attention(trace: Trace, bases: HeadBases, step: int) -> LossOfNext:
    """A cheap stand-in (ours): how much the squared error of the layer's own attention output grows.

    Errors are shares of the squared length of the layer's output. A head's error depends on its own two ranks alone, so
    that all combinations are computed once and every round is a look into a table.
    """
    table = attention_error_table(trace, bases, step)
    layers, groups = torch.arange(table.shape[0])[:, None], torch.arange(table.shape[1])

    def errors(ranks: Int[Tensor, "layers 2 groups"]) -> Float[Tensor, "layers 2 groups"]:
        keys, values = (ranks // step).unbind(1)
        now = table[layers, groups, keys, values]
        fewer_keys = table[layers, groups, (keys - 1).clamp_min(0), values]
        fewer_values = table[layers, groups, keys, (values - 1).clamp_min(0)]
        return torch.stack([fewer_keys - now, fewer_values - now], dim=1)

    return errors


@torch.no_grad()
def attention_error_table(
    trace: Trace, bases: HeadBases, step: int
) -> Float[Tensor, "layers groups key_ranks value_ranks"]:
    """Squared errors of attention outputs at every pair of ranks ``0, step, .. width`` of keys and values.

    Each is that of the query heads of one key-value head, as a share of the squared length of all heads' outputs, a
    mean over texts.
    """
    layers, _, groups = bases.shape
    width = bases.width
    places = width // step + 1
    table = torch.zeros(layers, groups, places, places)
    whole = bases.spaces(torch.full(bases.shape, width))
    for row, layer in enumerate(bases.layers):
        key_space, value_space = whole[layer]
        for tokens in trace.steps[layer]:
            exact = attend(tokens.queries, tokens.keys, tokens.values, tokens.scaling, tokens.softcap)
            length = exact.float().square().sum()
            wanted = value_space.project(exact).float()
            for place in range(places):
                cut = HeadSpace(key_space.columns, key_space.mean, [place * step] * groups)
                store = ProjectedStore(cut, value_space, project_prompt=True, bring_back=False)
                found = ComposedMemory(trace.facts[layer], store).attend(tokens).float()
                kept = _of_group((found - wanted).square(), groups)
                lost = _of_group(wanted.square(), groups)
                # Of a prefix: the errors in its coordinates, and all of what lies outside.
                inside = torch.nn.functional.pad(kept.cumsum(-1), (1, 0))[:, ::step]
                outside = lost.sum(-1, keepdim=True) - torch.nn.functional.pad(lost.cumsum(-1), (1, 0))[:, ::step]
                table[row, :, place] += ((inside + outside) / length).cpu() / len(trace.steps[layer])
    return table


def _of_group(squares: Float[Tensor, "batch heads new d"], groups: int) -> Float[Tensor, "groups d"]:
    return squares.unflatten(1, (groups, -1)).sum((0, 2, 3))
