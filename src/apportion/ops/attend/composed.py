"""Attention over chosen keys composed of torch's own operations, and its gradient: gather copies, multiply, mix.

What runs where there is no kernel, and the gradient everywhere.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class _Read(NamedTuple):
    """What the queries of each row read.

    Attributes:
        queries: [batch, rows, new, heads of the row, width].
        keys: [batch, rows, new, chosen, width].
        values: [batch, rows, new, chosen, value_width].
        squashed: scores before the mask, [batch, rows, new, heads of the row, chosen].
        weights: of the values, same shape; zero where nothing is kept.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    squashed: Tensor
    weights: Tensor


def attend_selected(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    kept: Tensor,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """See ``apportion.ops.attend.attend_selected``."""
    read = _read(queries, keys, values, indices, kept, scaling, softcap)
    out = read.weights.to(values.dtype) @ read.values
    return out.transpose(2, 3).reshape(*queries.shape[:3], -1)


def gradients(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    kept: Tensor,
    scaling: float,
    softcap: float | None,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient to queries, keys and values; weights are computed again rather than kept."""
    read = _read(queries, keys, values, indices, kept, scaling, softcap)
    wide = read.weights.dtype
    packed = _by_row(grad, indices.shape[1]).to(wide)
    to_weights = packed @ read.values.to(wide).transpose(-1, -2)
    to_scores = read.weights * (to_weights - (read.weights * to_weights).sum(-1, keepdim=True))
    if softcap is not None:
        to_scores = to_scores * (1 - (read.squashed.to(wide) / softcap).square())
    to_scores = to_scores * scaling
    to_queries = (to_scores @ read.keys.to(wide)).transpose(2, 3).reshape(queries.shape)
    to_keys = _scattered(to_scores.transpose(-1, -2) @ read.queries.to(wide), indices, keys)
    to_values = _scattered(read.weights.transpose(-1, -2) @ packed, indices, values)
    return to_queries.to(queries.dtype), to_keys, to_values


def _read(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    kept: Tensor,
    scaling: float,
    softcap: float | None,
) -> _Read:
    packed = _by_row(queries, indices.shape[1])
    of_rows, read = _gathered(keys, indices), _gathered(values, indices)
    scores = packed @ of_rows.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    masked = scores.masked_fill(~kept[:, :, :, None, :], -torch.inf)
    # Softmax of nothing but -inf is NaN.
    weights = masked.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).nan_to_num(0.0)
    return _Read(packed, of_rows, read, scores, weights)


def _by_row(of_heads: Tensor, rows: int) -> Tensor:
    """[batch, heads, new, width] as [batch, rows, new, heads of the row, width]."""
    batch, heads, new, width = of_heads.shape
    return of_heads.reshape(batch, rows, heads // rows, new, width).transpose(2, 3)


def _gathered(stored: Tensor, indices: Tensor) -> Tensor:
    batch, groups, _, width = stored.shape
    # Rows of one key-value head, one after the other: [batch, groups, rows of it * new * chosen].
    flat = indices.reshape(batch, groups, indices[0, 0].numel() * (indices.shape[1] // groups), 1)
    return stored.gather(2, flat.expand(-1, -1, -1, width)).view(*indices.shape, width)


def _scattered(of_entries: Tensor, indices: Tensor, stored: Tensor) -> Tensor:
    """The transpose of `_gathered`: entries added to where they were read."""
    batch, groups, _, width = stored.shape
    flat = indices.reshape(batch, groups, indices[0, 0].numel() * (indices.shape[1] // groups), 1)
    out = of_entries.new_zeros(stored.shape)
    return out.scatter_add_(2, flat.expand(-1, -1, -1, width), of_entries.reshape(*flat.shape[:3], width)).to(
        stored.dtype
    )
