"""Which tokens, or chunks of tokens, one new token reads: scored, agreed upon and selected in one go.

The same as `label_scores`, an agreement of the heads and `select_rows` one after the other, bit for bit, without their
way through the dispatcher, which takes longer than the work where a context has some thousands of tokens.
Without gradient.
"""

import torch
from torch import Tensor

from apportion.errors import InputError
from apportion.ops.direct import runs_directly
from apportion.ops.key_choice import reference

__all__ = ["GROUPS", "choose_by_labels", "choose_chunks"]

GROUPS = ("head", "max", "mean")


def choose_by_labels(
    queries: Tensor,
    labels: Tensor,
    ranges: Tensor | None,
    bits: int,
    count: int,
    sinks: int,
    recent: int,
    groups: int,
    group: str,
    places: Tensor | None = None,
) -> Tensor:
    """The tokens whose labels have the largest products with the queries of one token; of equals the earlier ones.

    Args:
        queries: [batch, heads, channels], in the labels' channels; rounded here as packed labels are.
        labels: [batch, rows, tokens, channels], or codes of `pack_labels`, [batch, rows, tokens, packed]; rows are
            heads, or key-value heads whose query heads share labels. Fastest planar, see `label_scores`.
        ranges: of `pack_labels`; None where labels are not packed.
        bits: of a code.
        count: tokens of a list, at most as many as there are.
        sinks: first tokens that are in every list.
        recent: newest tokens that are in every list. Together at most ``count``.
        groups: key-value heads.
        group: whose lists: ``head``: each head's own; ``max``, ``mean``: of a key-value head, by its heads' scores.
        places: int64 [heads * channels]: where each head's channels are among all numbers of a row's queries, which are
            then [batch, heads, width]; None where queries have the labels' channels alone.

    Returns:
        int64 [batch, heads or groups, count], in ascending order.

    Raises:
        InputError: no such ``group``.
    """
    if group not in GROUPS:
        raise InputError(f"group={group!r}: one of {', '.join(GROUPS)}")
    if runs_directly(queries, labels):
        from apportion.ops.key_choice import cpu

        return cpu.choose_by_labels(queries, labels, ranges, bits, count, sinks, recent, groups, group, places)
    asked = reference.picked(queries, places)
    found: Tensor = _choose_by_labels(asked, labels, ranges, bits, count, sinks, recent, groups, group)
    return found


@torch.library.custom_op("apportion::choose_by_labels", mutates_args=())
def _choose_by_labels(
    queries: Tensor,
    labels: Tensor,
    ranges: Tensor | None,
    bits: int,
    count: int,
    sinks: int,
    recent: int,
    groups: int,
    group: str,
) -> Tensor:
    return reference.choose_by_labels(queries, labels, ranges, bits, count, sinks, recent, groups, group)


@_choose_by_labels.register_kernel("cpu")
def _(
    queries: Tensor,
    labels: Tensor,
    ranges: Tensor | None,
    bits: int,
    count: int,
    sinks: int,
    recent: int,
    groups: int,
    group: str,
) -> Tensor:
    from apportion.ops.key_choice import cpu

    return cpu.choose_by_labels(queries, labels, ranges, bits, count, sinks, recent, groups, group)


@_choose_by_labels.register_fake
def _(
    queries: Tensor,
    labels: Tensor,
    ranges: Tensor | None,
    bits: int,
    count: int,
    sinks: int,
    recent: int,
    groups: int,
    group: str,
) -> Tensor:
    lists = queries.shape[1] if group == "head" else groups
    return queries.new_empty(queries.shape[0], lists, count, dtype=torch.int64)


def choose_chunks(
    queries: Tensor, means: Tensor, candidates: Tensor, count: int, scaling: float, softcap: float | None = None
) -> Tensor:
    """The chunks whose mean keys some head of a key-value head wants most, as a softmax over the candidates says.

    Args:
        queries: [batch, heads, width].
        means: [batch, groups, chunks, width]. Fastest planar, see `label_scores`.
        candidates: bool [batch, groups, chunks], at least ``count`` of them in each list; no other chunk is chosen.
        count: chunks of a list.
        scaling: of the products.
        softcap: products become ``softcap * tanh(product / softcap)``; None for none.

    Returns:
        int64 [batch, groups, count], in ascending order; of equal chunks the earlier ones.
    """
    if runs_directly(queries, means):
        from apportion.ops.key_choice import cpu

        return cpu.choose_chunks(queries, means, candidates, count, scaling, softcap)
    found: Tensor = _choose_chunks(queries, means, candidates, count, scaling, softcap)
    return found


@torch.library.custom_op("apportion::choose_chunks", mutates_args=())
def _choose_chunks(
    queries: Tensor, means: Tensor, candidates: Tensor, count: int, scaling: float, softcap: float | None = None
) -> Tensor:
    return reference.choose_chunks(queries, means, candidates, count, scaling, softcap)


@_choose_chunks.register_kernel("cpu")
def _(
    queries: Tensor, means: Tensor, candidates: Tensor, count: int, scaling: float, softcap: float | None = None
) -> Tensor:
    from apportion.ops.key_choice import cpu

    return cpu.choose_chunks(queries, means, candidates, count, scaling, softcap)


@_choose_chunks.register_fake
def _(
    queries: Tensor, means: Tensor, candidates: Tensor, count: int, scaling: float, softcap: float | None = None
) -> Tensor:
    return queries.new_empty(*means.shape[:2], count, dtype=torch.int64)
