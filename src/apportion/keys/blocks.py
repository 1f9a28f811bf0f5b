"""Which blocks of keys each block of a prompt's queries reads: the selectors of prefill.

A `BlockScorer` says how much a block of queries wants a block of keys, a `BlockRule` chooses by that, and a
`BlockMemory` reads a prompt so; after the prompt it reads everything. `OracleBlocks` is the upper bound,
`FirstAndRecentBlocks` and `MeanPooledBlocks` are what a learned score has to beat, `RandomBlocks` is the floor.

Blocks are of slots, counted from a row's first one, padding included; pooling and choosing look at tokens alone.

A prompt in chunks: blocks of queries are counted from the chunk's first token, blocks of keys from the prompt's. A rule
knows the tokens that have come so far and no more, so that each chunk has last rows of its own that stay dense, and a
share of the triangle becomes a count by the tokens so far. More is read than in one piece; with everything allowed the
result is the same. Chunks of a multiple of the block size waste least.

The choice of a block's first queries has looked at its later ones. Values stay causal, but a likelihood that is
measured in one pass is slightly optimistic, and a text cannot be read so token by token.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.memory import ComposedMemory
from apportion.keys.stores import Store
from apportion.models.key_memory import LayerFacts, Step
from apportion.ops.attend import attend, causal, reference
from apportion.ops.block_attend import block_attend

ALWAYS = ("first", "own")


@dataclass(frozen=True)
class BlockGrid:
    """Blocks of the newest ``new`` of ``tokens`` tokens as queries, and of all of them as keys.

    Attributes:
        size: tokens of a block; the last of either kind may have fewer.
        new: queries.
        tokens: keys.
    """

    size: int
    new: int
    tokens: int

    @cached_property
    def query_starts(self) -> Int[Tensor, " query_blocks"]:
        """The slot of each block's first query."""
        return torch.arange(self.tokens - self.new, self.tokens, self.size)

    @cached_property
    def key_starts(self) -> Int[Tensor, " key_blocks"]:
        """The slot of each block's first key."""
        return torch.arange(0, self.tokens, self.size)

    @cached_property
    def visible(self) -> Bool[Tensor, "query_blocks key_blocks"]:
        """Whether some query of the one sees some key of the other."""
        last = (self.query_starts + self.size - 1).clamp(max=self.tokens - 1)
        return self.key_starts <= last[:, None]

    @cached_property
    def own(self) -> Bool[Tensor, "query_blocks key_blocks"]:
        """Whether the two share a token: the diagonal, and two blocks a row where a chunk begins within a block."""
        return self.visible & (self.key_starts + self.size > self.query_starts[:, None])

    @cached_property
    def pairs(self) -> Int[Tensor, "query_blocks key_blocks"]:
        """How many (query, key) pairs a tile has whose query sees the key."""
        ends = torch.arange(self.tokens - self.new, self.tokens)[:, None] + 1
        lengths = (self.tokens - self.key_starts).clamp(max=self.size)
        of_query = torch.minimum((ends - self.key_starts).clamp_min(0), lengths)
        rows = torch.arange(self.new) // self.size
        return torch.zeros_like(self.visible, dtype=torch.int64).index_add_(0, rows, of_query)


@dataclass(frozen=True)
class BlockRule:
    """Chooses blocks by their scores, each query head for itself.

    Give one of ``threshold``, ``sparsity`` and ``blocks``.

    Attributes:
        threshold: every block whose share (the softmax of a row's scores) is above it, the best one and the row's own
            always. Rows, heads and layers then share out one budget among themselves. 0 for everything.
        sparsity: share of the causal triangle that is left out, by one count for all rows: ``blocks_for``.
        blocks: that count.
        dense_rows: the last so many rows read everything.
        always: ``first`` and ``own`` blocks are chosen before any other; they are part of the count
            (and exceed one that is smaller).

    Raises:
        InputError: none or several are given, or one cannot be.
    """

    threshold: float | None = None
    sparsity: float | None = None
    blocks: int | None = None
    dense_rows: int = 2
    always: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = {"threshold": self.threshold, "sparsity": self.sparsity, "blocks": self.blocks}
        if sum(value is not None for value in given.values()) != 1:
            words = ", ".join(f"{name}={value}" for name, value in given.items())
            raise InputError(f"{words}: give one of them, such as threshold=5e-4")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise InputError(f"threshold={self.threshold}: from 0 to below 1, such as 5e-4")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity={self.sparsity}: from 0 to below 1, the share of the triangle left out")
        if self.blocks is not None and self.blocks < 1:
            raise InputError(f"blocks={self.blocks}: a row reads at least 1 block")
        if self.dense_rows < 0:
            raise InputError(f"dense_rows={self.dense_rows}: 0 or above")
        if unknown := [each for each in self.always if each not in ALWAYS]:
            raise InputError(f"always={unknown}: any of {', '.join(ALWAYS)}")

    @property
    def everything(self) -> bool:
        """Whether nothing is left out, whatever the scores."""
        return self.threshold == 0 or self.sparsity == 0

    def blocks_for(self, key_blocks: int) -> int:
        """How many blocks a row reads of so many, at least 1.

        A row of fewer blocks reads all of its own, so k blocks keep ``1 - (1 - k / n) ** 2`` of the triangle.
        """
        if self.blocks is not None:
            return min(self.blocks, key_blocks)
        assert self.sparsity is not None
        return max(1, math.floor((1 - math.sqrt(self.sparsity)) * key_blocks))

    def choose(
        self,
        scores: Float[Tensor, "batch heads query_blocks key_blocks"],
        grid: BlockGrid,
        there: Bool[Tensor, "batch key_blocks"],
    ) -> Bool[Tensor, "batch heads query_blocks key_blocks"]:
        """Which blocks are read; ``there``: the blocks of keys that hold a token."""
        device = scores.device
        own = grid.own.to(device)
        seen = grid.visible.to(device) & there[:, None, None, :]
        first = seen & (seen.cumsum(-1) == 1)
        forced = torch.zeros_like(seen)
        if "first" in self.always:
            forced = forced | first
        # A chunk that begins within a block has rows whose first queries would see nothing of a later block.
        if "own" in self.always or self.threshold is not None or (grid.tokens - grid.new) % grid.size:
            forced = forced | (own & seen)
        scores = scores.masked_fill(~seen, -torch.inf)
        if self.threshold is not None:
            shares = scores.softmax(-1).nan_to_num(0.0)
            best = shares == shares.amax(-1, keepdim=True)
            kept = (shares > self.threshold) | best | forced
        else:
            scores = scores.masked_fill(forced, torch.inf)
            best_blocks = scores.topk(self.blocks_for(grid.tokens // grid.size + bool(grid.tokens % grid.size)), dim=-1)
            kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best_blocks.indices, True) | forced
        if self.dense_rows:
            kept[:, :, -self.dense_rows :] = True
        return kept & seen


class BlockScorer(ABC):
    """How much blocks of queries want blocks of keys. It may keep a side table of the prompt's keys."""

    def extend(self, step: Step) -> None:
        """Take in the newest tokens of the prompt."""
        return None

    @abstractmethod
    def scores(self, step: Step, store: Store, grid: BlockGrid) -> Float[Tensor, "batch heads query_blocks key_blocks"]:
        """Of a step's queries for all keys of the store; where a block sees another is not its business."""

    def close(self) -> None:
        """The prompt is complete: the side table is needed no more."""
        return None

    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows of the batch, in this order."""
        return None

    def bytes_held(self) -> int:
        """What the side table occupies."""
        return 0


class OracleBlocks(BlockScorer):
    """The blocks on which most attention weight falls, which takes dense attention to know."""

    @override
    def scores(self, step: Step, store: Store, grid: BlockGrid) -> Float[Tensor, "batch heads query_blocks key_blocks"]:
        keys, _ = store.read()
        return attention_tiles(step, keys, store.real, grid)[1]


class MeanPooledBlocks(BlockScorer):
    """The product of mean query and mean key, both as attention compares them: the usual score without training."""

    @override
    def scores(self, step: Step, store: Store, grid: BlockGrid) -> Float[Tensor, "batch heads query_blocks key_blocks"]:
        keys, _ = store.read()
        queries = pool_blocks(step.queries, step.real, grid.size, ("mean",))
        pooled = pool_blocks(keys, store.real, grid.size, ("mean",)).repeat_interleave(step.group, dim=1)
        return queries @ pooled.transpose(-1, -2) * step.scaling


class FirstAndRecentBlocks(BlockScorer):
    """The first block and the newest ones."""

    @override
    def scores(self, step: Step, store: Store, grid: BlockGrid) -> Float[Tensor, "batch heads query_blocks key_blocks"]:
        places = torch.arange(len(grid.key_starts), device=step.queries.device, dtype=torch.float32)
        there = blocks_there(store.real, grid.size)
        first = there & (there.cumsum(-1) == 1)
        scores = torch.where(first, torch.inf, places)[:, None, None, :]
        return scores.expand(len(step.queries), step.queries.shape[1], len(grid.query_starts), -1)


class RandomBlocks(BlockScorer):
    """Blocks drawn anew for every row, the row's own always among them."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    @override
    def scores(self, step: Step, store: Store, grid: BlockGrid) -> Float[Tensor, "batch heads query_blocks key_blocks"]:
        shape = (len(step.queries), step.queries.shape[1], *grid.visible.shape)
        drawn = torch.rand(shape, generator=self._generator)
        return drawn.masked_fill(grid.own, torch.inf).to(step.queries.device)


class BlockMemory(ComposedMemory):
    """Reads the prompt in chosen blocks, and everything afterwards.

    The prompt ends with the first single token, or when `close` is called; what comes then (a question about it, say)
    is read densely.

    Args:
        facts: the layer.
        scorer: see `BlockScorer`.
        rule: see `BlockRule`.
        size: tokens of a block.

    Attributes:
        newest_blocks: what the newest tokens of a prompt read: bool [batch, heads, query_blocks, key_blocks]; None
            where they read everything.
    """

    def __init__(self, facts: LayerFacts, scorer: BlockScorer, rule: BlockRule, size: int) -> None:
        super().__init__(facts)
        self.scorer, self.rule, self.size = scorer, rule, size
        self.newest_blocks: Bool[Tensor, "batch heads query_blocks key_blocks"] | None = None

    @override
    def close(self) -> None:
        super().close()
        self.scorer.close()

    @override
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        super().pick_rows(rows)
        self.scorer.pick_rows(rows)

    @override
    def attend(self, step: Step) -> Float[Tensor, "batch heads new value_width"]:
        if step.new == 1 and self.seen:
            self.close()
        self.newest_blocks = None
        if self.store.closed:
            return super().attend(step)
        self.take_in(step)
        keys, values = self.store.read()
        real = self.store.real if self._padded else None
        grid = BlockGrid(self.size, step.new, self.store.length)
        if self.rule.everything:
            out = attend(step.queries, keys, values, step.scaling, step.softcap, real)
        else:
            self.scorer.extend(step)
            scores = self.scorer.scores(step, self.store, grid)
            kept = self.rule.choose(scores, grid, blocks_there(self.store.real, self.size))
            self.newest_blocks = kept
            out = block_attend(step.queries, keys, values, kept, self.size, step.scaling, step.softcap, real)
        self._account_blocks(step, grid)
        return out

    def _account_blocks(self, step: Step, grid: BlockGrid) -> None:
        """Pairs of a query and a key count as reads; bytes are those of the blocks that each head's rows read."""
        batch, heads = step.queries.shape[:2]
        self._account(step, None)
        of_block = self.store.bytes_of(self.size) // self.facts.groups
        tiles, pairs = (int(each.sum()) * batch * heads for each in (grid.visible, grid.pairs))
        usage = self.usage
        usage.bytes_held += self.scorer.bytes_held()
        usage.steps += 1
        usage.queries += batch * heads * step.new
        usage.keys_there += pairs
        usage.bytes_dense += tiles * of_block
        kept = self.newest_blocks
        usage.keys_read += pairs if kept is None else int((kept * grid.pairs.to(kept.device)).sum())
        usage.bytes_read += (tiles if kept is None else int(kept.sum())) * of_block


_POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda vectors, there: (vectors * there).sum(-2) / there.sum(-2).clamp_min(1),
    "max": lambda vectors, there: vectors.masked_fill(~there, -torch.inf).amax(-2),
    "min": lambda vectors, there: vectors.masked_fill(~there, torch.inf).amin(-2),
}
POOLS = tuple(_POOLS)


def pool_blocks(
    vectors: Float[Tensor, "batch heads tokens width"],
    real: Bool[Tensor, "batch tokens"],
    size: int,
    how: Sequence[str],
) -> Float[Tensor, "batch heads blocks pooled"]:
    """What each block of tokens has in common, coordinate by coordinate; padding does not count.

    Args:
        vectors: of the tokens.
        real: False for padding.
        size: tokens of a block; the last one may have fewer.
        how: of ``mean``, ``max`` and ``min``, laid side by side in this order.

    Returns:
        Zeros for blocks of nothing but padding.
    """
    batch, heads, tokens, width = vectors.shape
    blocks = -(-tokens // size)
    short = blocks * size - tokens
    vectors = torch.nn.functional.pad(vectors, (0, 0, 0, short)).view(batch, heads, blocks, size, width)
    there = torch.nn.functional.pad(real, (0, short)).view(batch, 1, blocks, size, 1)
    pooled = torch.cat([_POOLS[each](vectors, there) for each in how], dim=-1)
    return pooled.masked_fill(~there.any(-2), 0.0)


def blocks_there(real: Bool[Tensor, "batch tokens"], size: int) -> Bool[Tensor, "batch blocks"]:
    """Which blocks hold a token that is no padding."""
    short = -real.shape[1] % size
    return torch.nn.functional.pad(real, (0, short)).unflatten(1, (-1, size)).any(-1)


def attention_tiles(
    step: Step,
    keys: Float[Tensor, "batch groups tokens width"],
    real: Bool[Tensor, "batch tokens"],
    grid: BlockGrid,
) -> tuple[Float[Tensor, "batch heads query_blocks key_blocks"], Float[Tensor, "batch heads query_blocks key_blocks"]]:
    """The largest attention weight of each tile, and the sum of its weights.

    Rows of blocks are computed one after the other: of all heads only ``size * tokens`` weights exist at a time.
    """
    batch, heads = step.queries.shape[:2]
    keys = keys.repeat_interleave(step.group, dim=1)
    first = grid.tokens - grid.new
    seen = causal(grid.new, grid.tokens, keys.device)
    shape = (batch, heads, *grid.visible.shape)
    peak, mass = step.queries.new_zeros(shape), step.queries.new_zeros(shape)
    for row, start in enumerate(range(0, grid.new, grid.size)):
        stop = min(start + grid.size, grid.new)
        # Up to the end of the last block that the row sees.
        end = min(grid.tokens, -(-(first + stop) // grid.size) * grid.size)
        products = step.queries[:, :, start:stop] @ keys[:, :, :end].transpose(-1, -2)
        allowed = seen[start:stop, :end] & real[:, None, None, :end]
        weights = reference.weigh(products, allowed, step.scaling, step.softcap)
        weights = torch.nn.functional.pad(weights, (0, -end % grid.size)).unflatten(-1, (-1, grid.size))
        blocks = weights.shape[-2]
        peak[:, :, row, :blocks] = weights.amax((2, 4))
        mass[:, :, row, :blocks] = weights.sum((2, 4))
    return peak, mass
