"""What attention over chosen keys is, in plain torch: gather, compare, softmax, mix."""

import torch
from torch import Tensor


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """Attention of every query over the keys that ``seen`` lets it see; a query that sees none reads zeros.

    Args:
        queries: [batch, heads, new, width].
        keys: [batch, groups, tokens, width]; ``heads / groups`` query heads share one.
        values: [batch, groups, tokens, value_width].
        seen: bool, broadcastable to [batch, heads, new, tokens]; None for all.
        scaling: of the products.
        softcap: products become ``softcap * tanh(product / softcap)``; None for none.
    """
    group = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    return weigh(queries @ keys.transpose(-1, -2), seen, scaling, softcap) @ values


def attend_selected(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    kept: Tensor,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Attention of every query over a list of keys of its own.

    Args:
        queries: [batch, heads, new, width].
        keys: [batch, groups, tokens, width].
        values: [batch, groups, tokens, value_width].
        indices: int64 [batch, rows, new, chosen], from 0 to tokens - 1; rows are heads, or groups whose heads share a
            list. No key may come twice among the kept ones.
        kept: bool, the shape of indices: False where a list is shorter than the longest.
        scaling: see ``attend``.
        softcap: see ``attend``.
    """
    batch, heads, new, width = queries.shape
    group = heads // keys.shape[1]
    indices, kept = (each.repeat_interleave(heads // each.shape[1], dim=1) for each in (indices, kept))
    out = queries.new_zeros(batch, heads, new, values.shape[-1])
    for head in range(heads):
        for query in range(new):
            chosen = indices[:, head, query]
            of_head = keys[:, head // group].gather(1, chosen[..., None].expand(-1, -1, width))
            read = values[:, head // group].gather(1, chosen[..., None].expand(-1, -1, values.shape[-1]))
            products = torch.einsum("bd,bkd->bk", queries[:, head, query], of_head)
            weights = weigh(products, kept[:, head, query], scaling, softcap)
            out[:, head, query] = torch.einsum("bk,bkd->bd", weights, read)
    return out


def weigh(products: Tensor, seen: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
    """Attention weights from products of queries and keys; all zero where nothing is seen."""
    scores = products * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    # Softmax of nothing but -inf is NaN.
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).nan_to_num(0.0).to(scores.dtype)
