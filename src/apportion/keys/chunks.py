"""Chunks of consecutive tokens: their mean keys (landmarks), and the few that no mean describes (outliers).

Chunks are laid over the tokens of each row that are no padding, so that a padded row is cut as it would be alone.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.selection import KeySelection
from apportion.keys.stores import Store, gather_tokens
from apportion.models.key_memory import Step


@dataclass(frozen=True)
class ChunkRule:
    """How a prompt is cut.

    Attributes:
        size: tokens of a chunk.
        local: whole chunks at the end of the prompt that are left out, with the tokens that fill no chunk.
        outliers: chunks of each key-value head whose keys agree least with their mean; all, where there are fewer.

    Raises:
        InputError: a size below 1, another below 0.
    """

    size: int = 8
    local: int = 4
    outliers: int = 48

    def __post_init__(self) -> None:
        if self.size < 1 or self.local < 0 or self.outliers < 0:
            raise InputError(
                f"size={self.size}, local={self.local}, outliers={self.outliers}: a chunk has at least 1 token, the "
                "others are 0 or more chunks"
            )

    @property
    def fixed(self) -> int:
        """Tokens of outliers and local chunks together."""
        return self.size * (self.local + self.outliers)


@dataclass(frozen=True, eq=False)
class ChunkTable:
    """The chunks of some rows. A row with fewer than the longest one has nothing in its last places.

    Attributes:
        rule: how they were cut.
        lengths: tokens of each row's prompt, without padding.
        counts: chunks of each row.
        means: of the chunks' keys as attention compares them; planar, see `label_scores`.
        candidates: chunks that may be selected: a row's own, and no outliers.
        outliers: their numbers in ascending order; the last one comes again where a row has fewer.
        order: the tokens of each row, padding last; None where there is no padding.
        starts: the first token of each row that is in no chunk.
    """

    rule: ChunkRule
    lengths: Int[Tensor, " batch"]
    counts: Int[Tensor, " batch"]
    means: Float[Tensor, "batch groups chunks width"]
    candidates: Bool[Tensor, "batch groups chunks"]
    outliers: Int[Tensor, "batch groups outliers"]
    order: Int[Tensor, "batch tokens"] | None
    starts: Int[Tensor, " batch"]

    @property
    def outlier_counts(self) -> Int[Tensor, " batch"]:
        """Outliers of each row."""
        return self.counts.clamp_max(self.rule.outliers)

    def tokens(self, chunks: Int[Tensor, "batch rows some"]) -> Int[Tensor, "batch rows some_tokens"]:
        """The tokens of chunks, one chunk after the other; some tokens or other for chunks that a row has not."""
        return tokens_of(chunks, self.rule.size, self.order)

    def of_lists(self, lists: int) -> "ChunkTable":
        """For so many lists of chunks: one a key-value head, or one for each of its query heads."""
        of_group = lists // self.candidates.shape[1]
        if of_group == 1:
            return self
        tables = (self.means, self.candidates, self.outliers)
        means, candidates, outliers = (each.repeat_interleave(of_group, dim=1) for each in tables)
        return replace(self, means=means, candidates=candidates, outliers=outliers)

    def grown(
        self, keys: Float[Tensor, "batch groups more size width"], real: Bool[Tensor, "batch all_tokens"]
    ) -> "ChunkTable":
        """With the keys of more chunks of each row, none of them an outlier; ``real``: of all tokens so far."""
        batch, groups, more, _, width = keys.shape
        places = self.counts[:, None, None] + torch.arange(more, device=keys.device)
        places = places.expand(batch, groups, more)
        means, candidates = torch.zeros_like(self.means[:, :, :1]), torch.zeros_like(self.candidates[:, :, :1])
        means = torch.cat([self.means, means.expand(-1, -1, more, -1)], dim=2)
        candidates = torch.cat([self.candidates, candidates.expand(-1, -1, more)], dim=2)
        means = _planar(means.scatter_(2, places[..., None].expand(-1, -1, -1, width), _mean(keys)))
        candidates.scatter_(2, places, True)
        order, counts = order_of(real), self.counts + more
        starts = _starts(counts * self.rule.size, real, order)
        return ChunkTable(self.rule, self.lengths, counts, means, candidates, self.outliers, order, starts)

    def pick_rows(self, rows: Int[Tensor, " kept"]) -> "ChunkTable":
        """Of these rows of the batch."""
        return ChunkTable(
            self.rule,
            self.lengths[rows],
            self.counts[rows],
            _planar(self.means[rows]),
            self.candidates[rows],
            self.outliers[rows],
            None if self.order is None else self.order[rows],
            self.starts[rows],
        )

    @property
    def bytes(self) -> int:
        """What it occupies."""
        tensors = (self.means, self.candidates, self.outliers, self.order)
        return sum(each.numel() * each.element_size() for each in tensors if each is not None)


class ChunkSelection(KeySelection):
    """What one new token reads where nothing is padded: the outliers, some chunks, and all tokens that are in none.

    Lists of tokens are made when somebody asks for them, which decoding does not.

    Args:
        table: of the chunks.
        chunks: of each key-value head, ascending; the same number of them everywhere, and no outliers.
        tail: the first token that is in no chunk, and behind the last one.
    """

    def __init__(self, table: ChunkTable, chunks: Int[Tensor, "batch groups chosen"], tail: tuple[int, int]) -> None:
        # Set past the dataclass, which is frozen and whose fields are properties here.
        self.__dict__.update(table=table, chunks=chunks, tail=tail)

    table: ChunkTable
    chunks: Int[Tensor, "batch groups chosen"]
    tail: tuple[int, int]

    @cached_property
    def indices(self) -> Int[Tensor, "batch groups 1 chosen"]:
        """See `KeySelection`."""
        batch, groups = self.chunks.shape[:2]
        tail = torch.arange(*self.tail, device=self.chunks.device).expand(batch, groups, -1)
        of_chunks = (self.table.tokens(each) for each in (self.table.outliers, self.chunks))
        return torch.cat([*of_chunks, tail], dim=-1)[:, :, None]

    @cached_property
    def kept(self) -> Bool[Tensor, "batch groups 1 chosen"]:
        """See `KeySelection`: everything."""
        return torch.ones_like(self.indices, dtype=torch.bool)

    @property
    @override
    def lists(self) -> int:
        return self.chunks.shape[1]

    @property
    @override
    def total(self) -> int:
        return self.chunks.shape[0] * self.chunks.shape[1] * (self.exact + self.in_chunks)

    @property
    def in_chunks(self) -> int:
        """Tokens of the chosen chunks in each list."""
        return self.chunks.shape[2] * self.table.rule.size

    @property
    def exact(self) -> int:
        """All other tokens of each list."""
        return self.table.outliers.shape[2] * self.table.rule.size + self.tail[1] - self.tail[0]


class ChunkedStore(Store):
    """A store that keeps a table of chunks once it is closed."""

    def attend(self, step: Step, selection: ChunkSelection) -> Float[Tensor, "batch heads 1 value_width"] | None:
        """What the queries of a step read of a selection, without gathering it first; None where this cannot be."""
        return None

    @property
    @abstractmethod
    def table(self) -> ChunkTable | None:
        """The chunks; None before closing, and where everything is kept exactly and is to be read."""

    @property
    @abstractmethod
    def tail_start(self) -> int:
        """From this token on everything is kept exactly; no row has a chunk that begins later."""


def order_of(real: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"] | None:
    """The tokens of each row, those that are no padding first; None where none is padding."""
    return None if bool(real.all()) else (~real).int().argsort(dim=-1, stable=True)


def tokens_of(
    chunks: Int[Tensor, "batch rows some"], size: int, order: Int[Tensor, "batch tokens"] | None
) -> Int[Tensor, "batch rows some_tokens"]:
    """The tokens of chunks, one chunk after the other; some tokens or other for chunks that a row has not."""
    places = (chunks[..., None] * size + torch.arange(size, device=chunks.device)).flatten(2)
    if order is None:
        return places
    order = order[:, None].expand(-1, places.shape[1], -1)
    return order.gather(2, places.clamp_max(order.shape[-1] - 1))


def divide(
    keys: Float[Tensor, "batch groups tokens width"], real: Bool[Tensor, "batch tokens"], rule: ChunkRule
) -> ChunkTable:
    """Cut a prompt into chunks.

    Args:
        keys: as attention compares them, after the rotary embedding.
        real: False for padding.
        rule: how.
    """
    batch, groups, _, width = keys.shape
    lengths, order = real.sum(-1), order_of(real)
    counts = (lengths // rule.size - rule.local).clamp_min(0)
    chunks = int(counts.max())
    if order is None:
        inside = keys[:, :, : chunks * rule.size]
    else:
        inside = gather_tokens(keys, order[:, None, : chunks * rule.size].expand(-1, groups, -1))
    inside = inside.reshape(batch, groups, chunks, rule.size, width)
    means = _planar(_mean(inside))
    own = (torch.arange(chunks, device=keys.device) < counts[:, None])[:, None].expand(batch, groups, chunks)
    cosines = torch.nn.functional.cosine_similarity(inside.float(), means.float()[:, :, :, None], dim=-1).amin(-1)
    cosines = cosines.masked_fill(~own, torch.inf)
    worst = cosines.topk(min(rule.outliers, chunks), dim=-1, largest=False)
    candidates = own.scatter(2, worst.indices, False)
    numbers = worst.indices.masked_fill(worst.values == torch.inf, chunks).sort(-1).values
    # Behind a row's own outliers its last one once more.
    outliers = numbers.masked_fill(numbers == chunks, 0).cummax(-1).values if numbers.shape[-1] else numbers
    starts = _starts(counts * rule.size, real, order)
    return ChunkTable(rule, lengths, counts, means, candidates, outliers, order, starts)


def _planar(means: Float[Tensor, "batch groups chunks width"]) -> Float[Tensor, "batch groups chunks width"]:
    return means.transpose(2, 3).contiguous().transpose(2, 3)


def _mean(keys: Float[Tensor, "batch groups chunks size width"]) -> Float[Tensor, "batch groups chunks width"]:
    return keys.float().mean(3).to(keys.dtype)


def _starts(
    places: Int[Tensor, " batch"], real: Bool[Tensor, "batch tokens"], order: Int[Tensor, "batch tokens"] | None
) -> Int[Tensor, " batch"]:
    """The tokens at these places among those of each row that are no padding; behind all tokens where there is none."""
    if order is None:
        return places
    tokens = order.shape[1]
    found = order.gather(1, places.clamp_max(tokens - 1)[:, None])[:, 0]
    return found.masked_fill(places >= real.sum(-1), tokens)
