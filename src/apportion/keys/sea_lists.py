"""Key lists of SEA in compressed rows: which columns of a small map win, which keys they stand for, reading these."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.allocate import Allocation

Sharing = Literal["heads", "none", "queries", "all"]
"""Whose places are one pool: of all heads of a query, of no two, of all queries of a head, of all of both."""

# A hair, in columns, is 1 / (2 * 5000) = 1e-4.
_HALF_HAIR = 5000


@dataclass(frozen=True, eq=False)
class KeyLists:
    """The keys that each query of each head reads, in compressed rows over (batch, head, query).

    Attributes:
        crow_indices: where each row's keys begin and end.
        col_indices: the keys, from 0, in order within a row.
        shape: batch, heads, queries, keys.
    """

    crow_indices: Int[Tensor, " rows_plus_1"]
    col_indices: Int[Tensor, " entries"]
    shape: tuple[int, int, int, int]

    @classmethod
    def of_mask(cls, mask: Bool[Tensor, "batch heads queries keys"]) -> "KeyLists":
        """The lists of a mask."""
        counts = mask.flatten(0, 2).sum(1)
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(
            crow,
            mask.flatten().nonzero().squeeze(1) % mask.shape[3],
            (mask.shape[0], mask.shape[1], mask.shape[2], mask.shape[3]),
        )

    def mask(self) -> Bool[Tensor, "batch heads queries keys"]:
        """The same as a mask."""
        batch, heads, queries, keys = self.shape
        flat = torch.zeros(batch * heads * queries, keys, dtype=torch.bool, device=self.col_indices.device)
        flat[self.row_indices(), self.col_indices] = True
        return flat.view(self.shape)

    def row_indices(self) -> Int[Tensor, " entries"]:
        """The row of every entry."""
        return torch.repeat_interleave(self.crow_indices.diff(), output_size=self.col_indices.numel())

    def counts(self) -> Int[Tensor, "batch heads queries"]:
        """How many keys each query reads."""
        return self.crow_indices.diff().view(self.shape[:3])

    def bytes_held(self) -> int:
        """What the lists occupy."""
        return sum(each.numel() * each.element_size() for each in (self.crow_indices, self.col_indices))


def columns_of(
    lengths: Int[Tensor, "*rows"], place: Int[Tensor, "*rows keys"], columns: int
) -> Int[Tensor, "*rows keys"]:
    """Which column of a map each key of a row lies in: ``floor((place + 1/2) / length * columns - 1e-4)``.

    With at least as many keys as columns every column has a key; with fewer, every key has a column of its own. In
    whole numbers, so that `key_starts` draws the very same lines.

    Args:
        lengths: valid keys of each row.
        place: of each key among the valid ones, from 0; what is given for others means nothing.
        columns: of the map.
    """
    lengths = lengths[..., None].clamp_min(1)
    exact = (2 * place + 1) * columns * _HALF_HAIR - lengths
    return torch.div(exact, 2 * _HALF_HAIR * lengths, rounding_mode="floor").clamp(0, columns - 1)


def key_starts(lengths: Int[Tensor, "*rows"], columns: int) -> Int[Tensor, "*rows columns_plus_1"]:
    """The first key of each column, and behind the last column the length: the inverse of `columns_of`."""
    column = torch.arange(columns + 1, device=lengths.device)
    exact = lengths[..., None] * (2 * _HALF_HAIR * column + 1) - _HALF_HAIR * columns
    starts = -torch.div(-exact, 2 * _HALF_HAIR * columns, rounding_mode="floor")
    starts[..., 0] = 0
    starts[..., -1] = lengths
    return torch.minimum(starts.clamp_min(0), lengths[..., None])


def lists_of_columns(
    chosen: Bool[Tensor, "batch heads n columns"],
    lengths: Int[Tensor, "batch n"],
    own: Int[Tensor, "batch n"],
    tokens: int,
) -> KeyLists:
    """The keys of the chosen columns; a query whose head got no key reads its own token.

    What this costs grows with the number of entries and of columns: no table of all pairs is made.

    Args:
        chosen: columns of each query and head; only such as have a key are looked at.
        lengths: valid keys of each query; 0 for padding, which reads nothing.
        own: the key that is the query's own token.
        tokens: keys there are.
    """
    batch, heads, n, columns = chosen.shape
    starts = key_starts(lengths, columns)
    counts = (starts.diff(dim=-1)[:, None] * chosen).flatten(0, 2)
    alone = (counts.sum(1) == 0) & (lengths > 0)[:, None].expand(batch, heads, n).flatten()
    # A query's own token as one more column, which has one key.
    counts = torch.cat([counts, alone[:, None].long()], dim=1)
    first = torch.cat([starts[..., :-1], own[..., None]], dim=-1)[:, None].expand(batch, heads, n, columns + 1)
    flat = counts.flatten()
    before = flat.cumsum(0) - flat
    shift = torch.repeat_interleave(first.flatten() - before, flat)
    keys = torch.arange(shift.numel(), device=chosen.device) + shift
    in_row = counts.sum(1)
    return KeyLists(torch.cat([in_row.new_zeros(1), in_row.cumsum(0)]), keys, (batch, heads, n, tokens))


def row_lengths(real: Bool[Tensor, "batch n"], causal: bool) -> Int[Tensor, "batch n"]:
    """How many keys each query may read: those up to its own, or all; 0 for padding."""
    place = real.cumsum(1)
    return (place if causal else place[:, -1:].expand_as(place)) * real


def row_budget(lengths: Int[Tensor, "batch n"], keys: int, heads: int, columns: int) -> Int[Tensor, "batch n"]:
    """Columns that all heads of a query may have together: ``heads * keys`` keys' worth, at least 1.

    A column stands for ``length / columns`` keys, or for one where there are fewer keys than columns.
    """
    used = lengths.clamp_max(columns)
    return (heads * keys * used / lengths.clamp_min(1)).round().long().clamp_min(1)


def choose_columns(
    scores: Float[Tensor, "batch heads n columns"], budget: Int[Tensor, "batch n"], sharing: Sharing
) -> Bool[Tensor, "batch heads n columns"]:
    """The best columns of each pool, as many as the budgets of its queries add up to.

    Args:
        scores: comparable within a pool: estimated probabilities. Minus infinity for columns that cannot be had.
        budget: columns of a query for all heads.
        sharing: what a pool is. ``queries`` and ``all`` are not causal.
    """
    batch, heads, n, columns = scores.shape
    if sharing == "heads":
        pools, wanted = scores.transpose(1, 2).flatten(2), budget
    elif sharing == "none":
        pools, wanted = scores, (budget[:, None] / heads).round().long().clamp_min(1).expand(batch, heads, n)
    elif sharing == "queries":
        pools, wanted = scores.flatten(2), (budget.sum(1, keepdim=True) / heads).round().long().expand(batch, heads)
    else:
        pools, wanted = scores.flatten(1), budget.sum(1)
    best = pools.sort(dim=-1, descending=True, stable=True)
    taken = (torch.arange(pools.shape[-1], device=scores.device) < wanted[..., None]) & (best.values > -torch.inf)
    chosen = torch.zeros_like(pools, dtype=torch.bool).scatter(-1, best.indices, taken)
    if sharing == "heads":
        return chosen.view(batch, n, heads, columns).transpose(1, 2)
    return chosen.view(scores.shape)


def attend_lists(
    queries: Float[Tensor, "batch heads n d"],
    keys: Float[Tensor, "batch heads tokens d"],
    values: Float[Tensor, "batch heads tokens e"],
    lists: KeyLists,
    scaling: float,
) -> Float[Tensor, "batch heads n e"]:
    """Exact attention of every query over its list; zeros for an empty one. Differentiable in all three.

    Args:
        queries: of all heads.
        keys: of all heads.
        values: of all heads.
        lists: who reads what.
        scaling: of the products.
    """
    batch, heads, n, tokens = lists.shape
    row = lists.row_indices()
    there = torch.div(row, n, rounding_mode="floor") * tokens + lists.col_indices
    products = (queries.flatten(0, 2).index_select(0, row) * keys.flatten(0, 2).index_select(0, there)).sum(
        -1
    ) * scaling
    largest = products.new_full((batch * heads * n,), -torch.inf)
    largest = largest.scatter_reduce(0, row, products.detach(), "amax")
    raised = (products - largest[row]).exp()
    total = products.new_zeros(batch * heads * n).index_add(0, row, raised)
    weights = raised / total[row]
    # A block of rows for each batch row and head, in one matrix.
    allocation = Allocation(lists.crow_indices, there, weights, (batch * heads * n, batch * heads * tokens))
    return allocation.matmul(values.flatten(0, 2)).view(batch, heads, n, -1)
