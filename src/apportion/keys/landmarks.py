"""A selector of chunks by their mean keys (ShadowKV's landmarks)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.budget import KeyBudget
from apportion.keys.chunks import ChunkedStore, ChunkSelection, ChunkTable
from apportion.keys.selection import KeySelection
from apportion.keys.selectors import Selector, visible
from apportion.keys.stores import Store
from apportion.models.key_memory import Step
from apportion.ops.key_choice import choose_chunks
from apportion.ops.label_scores import label_scores
from apportion.ops.shared_entries import shared_entries

_NONE = -1  # in place of a chunk, where a list has fewer than the longest
COUNTED, TURNS = ("selected", "all"), ("shared", "each")


@dataclass(frozen=True)
class ChunkBudget:
    """How many chunks a budget of keys buys.

    Attributes:
        keys: the budget.
        counted: ``selected``: of selected chunks alone, as a share of the prompt; outliers, the end of the prompt and
            later tokens come on top. ``all``: of everything that is read, as a share of what a query could see.
    """

    keys: KeyBudget
    counted: str = "selected"

    @property
    def everything(self) -> bool:
        """Whether it is for all keys, however many there will be."""
        return self.keys.share == 1

    def chunks(
        self, table: ChunkTable, seen: Int[Tensor, "batch new"], tail: Int[Tensor, "batch new"]
    ) -> Int[Tensor, "batch new"]:
        """For queries that see so many tokens, of which so many are in no chunk."""
        size = table.rule.size
        if self.counted == "selected":
            prompt = table.lengths[:, None].expand_as(seen)
            return (self._tokens(prompt) + size - 1) // size
        fixed = table.outlier_counts[:, None] * size + tail
        return ((self._tokens(seen) - fixed) // size).clamp_min(0)

    def reads_all(self, table: ChunkTable) -> bool:
        """Whether it leaves nothing to choose from a prompt that was just closed, though it is not for everything."""
        if self.everything:
            return False
        tail = table.lengths - table.counts * table.rule.size
        wanted = self.chunks(table, table.lengths[:, None], tail[:, None])[:, 0]
        return bool((wanted >= table.counts - table.outlier_counts).all())

    def _tokens(self, seen: Int[Tensor, "batch new"]) -> Int[Tensor, "batch new"]:
        if self.keys.share is not None:
            return (seen * self.keys.share).ceil().long()
        return torch.full_like(seen, self.keys.tokens(2**62))


class Landmarks(Selector):
    """The chunks whose mean keys a query likes best, beside outliers and all tokens that are in no chunk.

    A query's products with the landmarks go through a softmax (in float32); the query heads of a key-value head agree
    on the largest weight.

    Args:
        budget: how many chunks.
        turn: queries of one pass after the prompt: ``shared``: all read the chunks of their summed weights; ``each``:
            every query its own, as if the tokens had come one by one.

    Raises:
        InputError: no such ``turn``.
    """

    def __init__(self, budget: ChunkBudget, turn: str = "shared") -> None:
        if turn not in TURNS:
            raise InputError(f"turn={turn!r}: one of {', '.join(TURNS)}")
        self._budget, self._turn = budget, turn
        self._table: ChunkTable | None = None
        self._before: Int[Tensor, "batch groups most"] | None = None
        self._wanted: tuple[ChunkTable, int] | None = None  # chunks of a table, where they do not depend on the token
        self._hits, self._asked = 0, 0

    in_one_go = True
    """Whether one token's choice is `choose_chunks`; False for who scores or agrees otherwise."""

    @property
    def hit_rate(self) -> float:
        """Share of the chunks selected for a token that were selected for the token before; NaN before two tokens."""
        return self._hits / self._asked if self._asked else float("nan")

    @override
    def close(self, store: Store) -> None:
        if not isinstance(store, ChunkedStore):
            raise InputError(f"Landmarks needs a store that keeps chunks, not {type(store).__name__}")

    @override
    def select(self, step: Step, store: Store) -> KeySelection | None:
        assert isinstance(store, ChunkedStore)
        table = self._table = store.table
        if table is None or self._budget.everything:
            return None
        if self.in_one_go and step.new == 1 and table.order is None and store.all_real:
            return self._select_one(step, store, table)
        seen = visible(step, store)
        tail = torch.arange(store.tail_start, store.length, device=seen.device)
        in_tail = seen[..., store.tail_start :] & (tail >= table.starts[:, None])[:, None]
        wanted = self._budget.chunks(table, seen.sum(-1), in_tail.sum(-1))
        if bool((wanted >= (table.counts - table.outlier_counts)[:, None]).all()):
            return None
        scores = self.scores(step, table)
        table = table.of_lists(scores.shape[1])
        chunks, kept = self._best(scores, table, wanted)
        if step.new == 1:
            chosen = chunks[:, :, 0].masked_fill(~kept[:, :, 0], _NONE).sort(-1).values
            self._compare(chosen, int((chosen == _NONE).sum()))
        return _lists(table, chunks, kept, tail, in_tail)

    def _select_one(self, step: Step, store: ChunkedStore, table: ChunkTable) -> ChunkSelection | None:
        """What one token reads where nothing is padded, so that all rows have as many chunks and see as many tokens."""
        tail = store.tail_start, store.length
        if self._wanted is None or self._wanted[0] is not table or self._budget.counted == "all":
            seen, later = (torch.full_like(table.counts, each)[:, None] for each in (tail[1], tail[1] - tail[0]))
            self._wanted = table, int(self._budget.chunks(table, seen, later)[0, 0])
        wanted = self._wanted[1]
        if wanted >= table.means.shape[2] - table.outliers.shape[2]:
            return None
        given = (table.means, table.candidates, wanted, step.scaling, step.softcap)
        chunks = choose_chunks(step.queries[:, :, 0], *given)
        self._compare(chunks)
        return ChunkSelection(table, chunks, tail)

    def scores(self, step: Step, table: ChunkTable) -> Float[Tensor, "batch lists asking chunks"]:
        """How much each list's heads want each chunk; ``asking`` is 1 where a pass shares its choice."""
        products = self.products(step, table).unflatten(1, (table.means.shape[1], -1))
        products = products.masked_fill(~table.candidates[:, :, None, None], -torch.inf)
        weights = products.softmax(-1).nan_to_num(0.0)
        if self._turn == "shared":
            weights = (weights * step.real[:, None, None, :, None]).sum(3, keepdim=True)
        return self.agree(weights)

    def products(self, step: Step, table: ChunkTable) -> Float[Tensor, "batch heads new chunks"]:
        """Of queries and landmarks, as they go into the softmax."""
        products = label_scores(step.queries, table.means) * step.scaling
        return products if step.softcap is None else step.softcap * torch.tanh(products / step.softcap)

    def agree(
        self, weights: Float[Tensor, "batch groups heads_of_group asking chunks"]
    ) -> Float[Tensor, "batch lists asking chunks"]:
        """What the heads of a key-value head make of their weights: one list for all."""
        return weights.amax(2)

    @override
    def bytes_scanned(self) -> int:
        return 0 if self._table is None else self._table.means.numel() * self._table.means.element_size()

    @override
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        self._before = None if self._before is None else self._before[rows]

    @staticmethod
    def _best(
        scores: Float[Tensor, "batch groups asking chunks"], table: ChunkTable, wanted: Int[Tensor, "batch new"]
    ) -> tuple[Int[Tensor, "batch groups new most"], Bool[Tensor, "batch groups new most"]]:
        scores = scores.masked_fill(~table.candidates[:, :, None], -1.0)
        # In a stable order, so that of equal chunks the earlier ones win.
        best = scores.sort(dim=-1, descending=True, stable=True)
        most = min(scores.shape[-1], int(wanted.max()))
        kept = (best.values[..., :most] >= 0) & (torch.arange(most, device=scores.device) < wanted[:, None, :, None])
        return best.indices[..., :most].expand_as(kept), kept

    def _compare(self, chunks: Int[Tensor, "batch groups most"], missing: int = 0) -> None:
        """Count the chunks, in ascending order, that were chosen before too; so many of them are `_NONE`."""
        before = self._before
        if before is not None and before.shape[0] == chunks.shape[0] and before.shape[2]:
            self._hits += shared_entries(chunks, before)
            self._asked += chunks.numel() - missing
        # No chunk now is not the same as no chunk at the next token.
        self._before = chunks.masked_fill(chunks == _NONE, _NONE - 1) if missing else chunks


def _lists(
    table: ChunkTable,
    chunks: Int[Tensor, "batch groups new most"],
    kept: Bool[Tensor, "batch groups new most"],
    tail: Int[Tensor, " later"],
    in_tail: Bool[Tensor, "batch new later"],
) -> KeySelection:
    """Outliers, selected chunks and the tail as lists of tokens."""
    batch, groups, new, most = chunks.shape
    size = table.rule.size
    outlying = table.tokens(table.outliers)
    own = torch.arange(outlying.shape[-1], device=chunks.device) < (table.outlier_counts * size)[:, None]
    selected = table.tokens(chunks.reshape(batch, groups, new * most)).view(batch, groups, new, most * size)
    indices = [outlying[:, :, None], selected, tail]
    masks = [own[:, None, None], kept.repeat_interleave(size, dim=-1), in_tail[:, None]]
    every = torch.cat([each.expand(batch, groups, new, each.shape[-1]) for each in indices], dim=-1)
    mask = torch.cat([each.expand(batch, groups, new, each.shape[-1]) for each in masks], dim=-1)
    # What no query keeps points to the newest token, which costs nothing to read.
    newest = int(tail[-1])
    return KeySelection(every.masked_fill(~mask.any(2, keepdim=True), newest), mask)
