"""Attention over all keys that a query may see, and over a few chosen ones."""

import torch
from torch import Tensor, nn

from apportion.ops.attend import reference

__all__ = ["attend", "attend_masked", "attend_selected"]


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    softcap: float | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """Causal attention of the newest tokens over all tokens: query ``i`` of ``new`` sees ``tokens - new + i + 1``.

    Args:
        queries: [batch, heads, new, width].
        keys: [batch, groups, tokens, width], oldest first; the newest are the queries' own.
        values: [batch, groups, tokens, value_width].
        scaling: of the products.
        softcap: products become ``softcap * tanh(product / softcap)``; None for none.
        real: bool [batch, tokens], False for padding, which nobody sees; None where nothing is padded.

    Returns:
        [batch, heads, new, value_width]; zeros for queries that see nothing.
    """
    new, tokens = queries.shape[2], keys.shape[2]
    group = queries.shape[1] // keys.shape[1]
    seen = None
    if real is not None:
        seen = causal(new, tokens, queries.device)[None, None] & real[:, None, None, :]
    elif new > 1 and (new < tokens or softcap is not None):
        seen = causal(new, tokens, queries.device)[None, None]
    if softcap is not None:
        return reference.attend(queries, keys, values, seen, scaling, softcap)
    if new == 1:
        # The heads of a group stand in for queries, so that no key is copied.
        batch, heads, _, width = queries.shape
        packed = queries.reshape(batch, keys.shape[1], group, width)
        out = nn.functional.scaled_dot_product_attention(packed, keys, values, seen, scale=scaling)
        return _nothing_seen(out, seen).reshape(batch, heads, 1, -1)
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    out = nn.functional.scaled_dot_product_attention(queries, keys, values, seen, is_causal=seen is None, scale=scaling)
    return _nothing_seen(out, seen)


def attend_selected(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    kept: Tensor,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of every query over a list of keys of its own; see ``reference.attend_selected`` for the shapes."""
    batch, heads, new, width = queries.shape
    groups, rows, chosen = keys.shape[1], indices.shape[1], indices.shape[-1]
    # Rows of one key-value head, one after the other: [batch, groups, rows of it * new * chosen].
    flat = indices.reshape(batch, groups, -1, 1)
    shape = (batch, rows, new, chosen)
    of_rows = keys.gather(2, flat.expand(-1, -1, -1, width)).view(*shape, width)
    read = values.gather(2, flat.expand(-1, -1, -1, values.shape[-1])).view(*shape, -1)
    packed = queries.view(batch, rows, heads // rows, new, width).transpose(2, 3)
    scores = packed @ of_rows.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~kept[:, :, :, None, :], -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).nan_to_num(0.0)
    out = weights.to(read.dtype) @ read
    return out.transpose(2, 3).reshape(batch, heads, new, -1)


def attend_masked(
    queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scaling: float, softcap: float | None = None
) -> Tensor:
    """Attention of every query over the keys that a mask lets it see: for many queries that each read many keys.

    It compares every query with every key, which costs less than gathering where the lists of `attend_selected` are
    together longer than what is stored.

    Args:
        queries: [batch, heads, new, width].
        keys: [batch, groups, tokens, width].
        values: [batch, groups, tokens, value_width].
        seen: bool [batch, rows, new, tokens]; rows are heads, or groups whose heads share a mask.
        scaling: see `attend`.
        softcap: see `attend`.

    Returns:
        [batch, heads, new, value_width]; zeros for queries that see nothing.
    """
    heads, groups = queries.shape[1], keys.shape[1]
    seen = seen.repeat_interleave(heads // seen.shape[1], dim=1)
    if softcap is not None:
        return reference.attend(queries, keys, values, seen, scaling, softcap)
    keys, values = (each.repeat_interleave(heads // groups, dim=1) for each in (keys, values))
    out = nn.functional.scaled_dot_product_attention(queries, keys, values, seen, scale=scaling)
    return _nothing_seen(out, seen)


def causal(new: int, tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """Which of ``tokens`` each of the ``new`` newest sees: bool [new, tokens]."""
    own = torch.arange(tokens - new, tokens, device=device)
    return torch.arange(tokens, device=device) <= own[:, None]


def _nothing_seen(out: Tensor, seen: Tensor | None) -> Tensor:
    # What a backend gives for a query that sees nothing differs: NaN, or the mean of everything.
    if seen is None:
        return out
    return torch.where(seen.any(-1, keepdim=True), out, 0.0)
