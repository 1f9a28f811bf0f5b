"""Attention over kept blocks on the CPU: each block of queries gathers its blocks of keys and multiplies densely.

The products are the processor's own matrix products, of ``size`` queries with all tokens of the kept blocks. Only
blocks that reach beyond the first query of theirs need a causal mask; they come last, since lists are in order.
"""

import torch
from torch import Tensor


def block_attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    size: int,
    scaling: float,
    softcap: float | None,
    real: Tensor | None,
) -> Tensor:
    """See ``apportion.ops.block_attend``."""
    batch, heads, new, _ = queries.shape
    tokens, group = keys.shape[2], heads // keys.shape[1]
    first = torch.arange(0, new, size) + tokens - new
    last = (first + size - 1).clamp(max=tokens - 1)
    starts = torch.arange(0, tokens, size)
    kept = kept & (starts <= last[:, None])
    # How many of a row's blocks hold tokens that come after its first query, or none at all: the last ones of its list.
    late = (kept & (starts + size - 1 > first[:, None])).sum(-1).tolist()
    counts = kept.sum(-1)
    lists = torch.split(kept.nonzero()[:, 3], counts.flatten().tolist())
    queries = queries * scaling
    out = values.new_zeros(batch, heads, new, values.shape[3])
    hide = _Hidden(size)
    place = 0
    for row in range(batch):
        absent = None if real is None or bool(real[row].all()) else ~_in_blocks(real[row][None], size, False)[0]
        for head in range(heads):
            if head % group == 0:
                of_keys = _in_blocks(keys[row, head // group][None], size, 0.0)[0]
                of_values = _in_blocks(values[row, head // group][None], size, 0.0)[0]
            for block, begin in enumerate(range(0, new, size)):
                chosen = lists[place]
                place += 1
                if not len(chosen):
                    continue
                asking = queries[row, head, begin : begin + size]
                hidden = hide.of(chosen, late[row][head][block], tokens - new + begin, len(asking))
                missing = None if absent is None else absent[chosen].flatten()
                # index_select copies whole blocks; indexing would walk them number by number.
                theirs = of_keys.index_select(0, chosen).flatten(0, 1)
                read = of_values.index_select(0, chosen).flatten(0, 1)
                out[row, head, begin : begin + size] = _tile(asking, theirs, read, hidden, missing, softcap)
    return out


def _tile(
    queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, missing: Tensor | None, softcap: float | None
) -> Tensor:
    """Attention of some queries over gathered keys; ``hidden`` is of the last keys alone."""
    scores = queries @ keys.T
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    late = hidden.shape[1]
    if late:
        scores[:, -late:].masked_fill_(hidden, -torch.inf)
    if missing is not None:
        scores.masked_fill_(missing, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    out = weights @ values
    if missing is None and late < len(keys):
        return out
    # Softmax of nothing but -inf is NaN.
    return out.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)


class _Hidden:
    """Which tokens of the last blocks of a list come after each of some queries.

    Where blocks of queries and keys begin together it is always the same: the upper triangle of the last block.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._triangle = torch.ones(size, size, dtype=torch.bool).triu(1)

    def of(self, chosen: Tensor, late: int, first: int, count: int) -> Tensor:
        """Of the ``late`` last blocks, for ``count`` queries from token ``first`` on."""
        if first % self._size == 0 and late <= 1:
            return self._triangle[:count, : late * self._size]
        slots = (chosen[len(chosen) - late :, None] * self._size + torch.arange(self._size)).flatten()
        return slots > torch.arange(first, first + count)[:, None]


def _in_blocks(content: Tensor, size: int, filler: float | bool) -> Tensor:
    """[rows, tokens, ...] as [rows, blocks, size, ...], the last block filled up."""
    rows, tokens = content.shape[:2]
    blocks = -(-tokens // size)
    if blocks * size > tokens:
        more = content.new_full((rows, blocks * size - tokens, *content.shape[2:]), filler)
        content = torch.cat([content, more], dim=1)
    return content.reshape(rows, blocks, size, *content.shape[2:])
