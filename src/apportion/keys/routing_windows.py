"""Attention inside clusters of tokens: over the last members of one's own cluster, or over whole chosen clusters."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot, scaled_dot_product_attention


@dataclass(frozen=True, eq=False)
class Read:
    """What some heads read.

    Attributes:
        output: of each head; zeros for padding and for tokens that no cluster chose.
        keys: how many keys each query was compared with, over all clusters that it is in.
        clusters: in how many clusters each token was, as a query.
    """

    output: Float[Tensor, "batch heads n d"]
    keys: Int[Tensor, "batch heads n"]
    clusters: Int[Tensor, "batch heads n"]


def ranks(
    cluster: Int[Tensor, "batch heads n"], clusters: int, real: Bool[Tensor, "batch n"]
) -> tuple[Int[Tensor, "batch heads n"], Int[Tensor, "batch heads clusters"]]:
    """Each token's place among the members of its cluster, in time, from 0; and how many members clusters have."""
    member = one_hot(cluster, clusters) * real[:, None, :, None]
    rank = member.cumsum(2).gather(3, cluster[..., None]).squeeze(3) - 1
    return rank, member.sum(2)


def attend_recent_members(
    queries: Float[Tensor, "batch heads n d"],
    keys: Float[Tensor, "batch heads n d"],
    values: Float[Tensor, "batch heads n d"],
    cluster: Int[Tensor, "batch heads n"],
    real: Bool[Tensor, "batch n"],
    *,
    clusters: int,
    window: int,
    skip_self: bool = False,
    both_sides: bool = False,
) -> Read:
    """Each token reads the last ``window`` members of its cluster up to itself: strictly causal.

    Members of a cluster are laid side by side in blocks of ``window``, so that a block's queries need its own keys and
    those of the block before. Each cluster begins a block: what later tokens do moves nothing that earlier ones read.

    Args:
        queries: may be the keys.
        keys: see ``queries``.
        values: what is mixed.
        cluster: of each token, from 0; one cluster makes an ordinary window.
        real: False for padding.
        clusters: how many there are.
        window: keys of a query at most, its own included.
        skip_self: a token reads itself only if it has nothing else to read.
        both_sides: it reads the next ``window - 1`` members too, which is not causal.
    """
    rank, members = ranks(cluster, clusters, real)
    window = min(window, cluster.shape[2])
    blocks = (members + window - 1) // window
    before = blocks.cumsum(2) - blocks
    count = max(1, int(blocks.sum(2).max()))
    place = before.gather(2, cluster) * window + rank
    # Padding goes to a place of its own behind all blocks.
    place = place.masked_fill(~real[:, None], count * window)

    def laid_out(rows: Tensor) -> Tensor:
        room = rows.new_zeros(*rows.shape[:2], count * window + 1, *rows.shape[3:])
        index = place if rows.ndim == 3 else place[..., None].expand_as(rows)
        return room.scatter(2, index, rows)[:, :, :-1].unflatten(2, (count, window))

    whose = laid_out(cluster + 1)
    q, k, v = laid_out(queries), laid_out(keys), laid_out(values)
    others, last = whose, window
    if count > 1:
        k, v, others = (_with_neighbours(each, both_sides) for each in (k, v, whose))
        last = 2 * window if both_sides else window
    apart = torch.arange(window, device=q.device)[:, None] - torch.arange(last - k.shape[3], last, device=q.device)
    near = apart.abs() < window if both_sides else (apart >= 0) & (apart < window)
    seen = near & (others[:, :, :, None, :] == whose[..., None])
    if skip_self:
        seen = _without_self(seen, apart == 0)
    out = scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), seen.flatten(0, 1))
    out = out.view(*q.shape).flatten(2, 3)
    at_home = place.clamp_max(count * window - 1)
    out = out.gather(2, at_home[..., None].expand_as(queries)) * real[:, None, :, None]
    read = (rank + 1).clamp_max(window)
    if both_sides:
        read = read + (members.gather(2, cluster) - 1 - rank).clamp_max(window - 1)
    if skip_self:
        read = (read - 1).clamp_min(1)
    return Read(out, read * real[:, None], real[:, None].expand_as(read).long())


def attend_chosen_members(
    queries: Float[Tensor, "batch heads n d"],
    keys: Float[Tensor, "batch heads n d"],
    values: Float[Tensor, "batch heads n d"],
    query_scores: Float[Tensor, "batch heads n clusters"],
    key_scores: Float[Tensor, "batch heads n clusters"],
    real: Bool[Tensor, "batch n"],
    *,
    window: int,
    causal: bool,
    skip_self: bool,
    epsilon: float,
) -> Read:
    """Each cluster takes the ``window`` tokens that score best in it, and they read one another (the paper's form).

    Whether a token is in a cluster depends on *later* tokens, even where ``causal`` lets it read earlier ones only.

    Args:
        queries: may be the keys.
        keys: see ``queries``.
        values: what is mixed.
        query_scores: by cluster.
        key_scores: by cluster.
        real: False for padding, which is never chosen.
        window: tokens of a cluster; all of them where there are fewer.
        causal: a token reads none that comes later.
        skip_self: a token reads itself only if it has nothing else to read.
        epsilon: outputs of a token's clusters are summed and divided by ``number of clusters + epsilon``.
    """
    window = min(window, queries.shape[2])
    asking, asks = _best(query_scores, real, window)
    answering, answers = _best(key_scores, real, window)
    q = _take(queries, asking)
    k, v = _take(keys, answering), _take(values, answering)
    seen = asks[..., None] & answers[..., None, :]
    if causal:
        seen = seen & (answering[..., None, :] <= asking[..., None])
    if skip_self:
        seen = _without_self(seen, seen & (answering[..., None, :] == asking[..., None]))
    something = seen.any(-1)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    # A query that reads nothing reads everything instead, evenly, and is not counted: softmax of nothing is NaN.
    weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1)
    out = (weights @ v) * something[..., None]
    flat = asking.flatten(2)
    total = torch.zeros_like(queries).scatter_add(
        2, flat[..., None].expand(*flat.shape, v.shape[-1]), out.flatten(2, 3)
    )
    zero = torch.zeros_like(flat[..., :1]).expand(*flat.shape[:2], queries.shape[2])
    chosen_by = zero.scatter_add(2, flat, asks.flatten(2).long())
    read = zero.scatter_add(2, flat, seen.sum(-1).flatten(2))
    divisor = torch.where(chosen_by > 0, chosen_by + epsilon, 1.0)
    return Read(total / divisor[..., None].to(total.dtype), read, chosen_by)


def _with_neighbours(blocks: Tensor, both_sides: bool) -> Tensor:
    """Each block behind the one before it, and before the one after it; zeros where there is none."""
    nothing = torch.zeros_like(blocks[:, :, :1])
    parts = [torch.cat([nothing, blocks[:, :, :-1]], dim=2), blocks]
    if both_sides:
        parts.append(torch.cat([blocks[:, :, 1:], nothing], dim=2))
    return torch.cat(parts, dim=3)


def _without_self(seen: Tensor, own: Tensor) -> Tensor:
    others = seen & ~own
    return torch.where(others.any(-1, keepdim=True), others, seen)


def _best(scores: Tensor, real: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Of each cluster the best tokens, in any order, and whether they are real: [batch, heads, clusters, window]."""
    scores = scores.masked_fill(~real[:, None, :, None], -torch.inf)
    indices = scores.topk(window, dim=2).indices.transpose(2, 3)
    return indices, real[:, None, None].expand(*indices.shape[:3], -1).gather(3, indices)


def _take(rows: Tensor, indices: Tensor) -> Tensor:
    flat = indices.flatten(2)
    taken = rows.gather(2, flat[..., None].expand(*flat.shape, rows.shape[-1]))
    return taken.view(*indices.shape, rows.shape[-1])
