"""Vectors of tokens kept in slow memory and fetched when they are read: host memory beside a GPU.

On a machine without a GPU there is one memory; the accounts are the same.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.keys.stores import gather_tokens
from apportion.ops.shared_entries import shared_entries


class KeptTokens:
    """Vectors of all tokens so far, where they are.

    Args:
        content: the vectors.
    """

    moved = 0
    """Bytes fetched from slow memory so far."""

    def __init__(self, content: Float[Tensor, "batch groups tokens width"]) -> None:
        self._content = content

    def read(
        self, tokens: Int[Tensor, "batch groups some"], wanted: Bool[Tensor, "batch groups some"]
    ) -> Float[Tensor, "batch groups some width"]:
        """The vectors of some tokens; anything for those not wanted."""
        return gather_tokens(self._content, tokens)

    def all(self) -> Float[Tensor, "batch groups tokens width"]:
        """The vectors of all tokens."""
        return self._content

    def where_they_are(
        self, starts: Int[Tensor, "batch groups runs"], size: int
    ) -> Float[Tensor, "batch groups tokens width"] | None:
        """The vectors of all tokens, for who will read runs of ``size`` consecutive ones in place.

        Args:
            starts: of the runs, ascending and none of them overlapping; all are accounted as read.
            size: tokens of a run.

        Returns:
            None, and nothing accounted, where they must be fetched first.
        """
        return self._content

    def append(self, content: Float[Tensor, "batch groups more width"]) -> None:
        """Add tokens at the end."""
        self._content = torch.cat([self._content, content], dim=2)

    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows of the batch, in this order."""
        self._content = self._content[rows.to(self._content.device)]

    @property
    def bytes_slow(self) -> int:
        """What slow memory holds."""
        return 0

    @property
    def bytes(self) -> int:
        """What is held in all."""
        return self._content.numel() * self._content.element_size()


class SlowTokens(KeptTokens):
    """Vectors in slow memory, of which those that were read last stay in fast memory until the next reading.

    Args:
        content: the vectors, in fast memory. From a GPU they go to pinned host memory.
    """

    _tokens: Tensor
    _resident: Tensor

    def __init__(self, content: Float[Tensor, "batch groups tokens width"]) -> None:
        self._device = content.device
        super().__init__(self._away(content))
        self._runs: tuple[Tensor, int] | None = None  # what was read last, where it was read in runs
        self._tokens, self._resident = self._nothing()

    @override
    def read(
        self, tokens: Int[Tensor, "batch groups some"], wanted: Bool[Tensor, "batch groups some"]
    ) -> Float[Tensor, "batch groups some width"]:
        slots, there = self._slots(tokens)
        missing = wanted & ~there
        self._runs = None
        if self._is_one_memory:
            self._account(int(missing.sum()))
            self._tokens = tokens.masked_fill(~wanted, 2**62).sort(-1).values
            return gather_tokens(self._content, tokens)
        found = self._resident.new_zeros(*tokens.shape, self._resident.shape[-1])
        if slots is not None:
            found = gather_tokens(self._resident, slots)
        places = true_places(missing)
        fetched = gather_tokens(self._content, tokens.gather(2, places).to(self._content.device)).to(self._device)
        found = put(found, places, missing, fetched)
        self._account(int(missing.sum()))
        # Tokens that were not wanted count as later than all.
        self._tokens, order = tokens.masked_fill(~wanted, 2**62).sort(-1)
        self._resident = gather_tokens(found, order)
        return found

    @override
    def where_they_are(
        self, starts: Int[Tensor, "batch groups runs"], size: int
    ) -> Float[Tensor, "batch groups tokens width"] | None:
        if not self._is_one_memory:
            return None
        runs = self._runs
        if runs is not None and runs[1] == size and runs[0].shape[2]:
            self._account(size * (starts.numel() - shared_entries(starts, runs[0])))
        else:
            self._account(int((~self._slots(_tokens_of(starts, size))[1]).sum()))
        self._runs = starts, size
        return self._content

    @override
    def all(self) -> Float[Tensor, "batch groups tokens width"]:
        self.moved += self.bytes_slow
        return self._content.to(self._device)

    @override
    def append(self, content: Float[Tensor, "batch groups more width"]) -> None:
        self._content = self._away(torch.cat([self._content, content.to(self._content.device)], dim=2))

    @override
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        self._content = self._away(self._content[rows.to(self._content.device)])
        self._runs, (self._tokens, self._resident) = None, self._nothing()

    @override
    @property
    def bytes_slow(self) -> int:
        return self._content.numel() * self._content.element_size()

    @override
    @property
    def bytes(self) -> int:
        resident = self._tokens.numel() if self._runs is None else self._runs[0].numel() * self._runs[1]
        return self.bytes_slow + resident * self._content.shape[-1] * self._content.element_size()

    @property
    def _is_one_memory(self) -> bool:
        """Whether slow memory is where everything is: then nothing stays beside it but the account of what would."""
        return self._content.device == self._device

    def _slots(
        self, tokens: Int[Tensor, "batch groups some"]
    ) -> tuple[Int[Tensor, "batch groups some"] | None, Bool[Tensor, "batch groups some"]]:
        """Where tokens stand among the resident ones (None without any), and whether they do."""
        if self._runs is not None:
            self._tokens = _tokens_of(*self._runs)
        if not self._tokens.shape[2]:
            return None, torch.zeros_like(tokens, dtype=torch.bool)
        slots = torch.searchsorted(self._tokens, tokens.contiguous()).clamp_max(self._tokens.shape[-1] - 1)
        return slots, self._tokens.gather(2, slots) == tokens

    def _account(self, missing: int) -> None:
        """So many vectors that were missing have come."""
        self.moved += missing * self._content.shape[-1] * self._content.element_size()

    def _away(self, content: Tensor) -> Tensor:
        return content.cpu().pin_memory() if self._device.type == "cuda" else content

    def _nothing(self) -> tuple[Int[Tensor, "batch groups 0"], Float[Tensor, "batch groups 0 width"]]:
        """What stays of no reading: tokens, and their vectors."""
        shape = (*self._content.shape[:2], 0)
        tokens = torch.empty(shape, dtype=torch.long, device=self._device)
        return tokens, self._content.new_empty(*shape, self._content.shape[-1], device=self._device)


def _tokens_of(starts: Int[Tensor, "batch groups runs"], size: int) -> Int[Tensor, "batch groups some"]:
    return (starts[..., None] + torch.arange(size, device=starts.device)).flatten(2)


def true_places(mask: Bool[Tensor, "batch groups some"]) -> Int[Tensor, "batch groups most"]:
    """The places where a mask is true, in order; rows with fewer than the longest go on with others."""
    most = int(mask.sum(-1).max())
    return mask.int().argsort(dim=-1, descending=True, stable=True)[..., :most]


def put(
    into: Float[Tensor, "batch groups some width"],
    places: Int[Tensor, "batch groups most"],
    mask: Bool[Tensor, "batch groups some"],
    vectors: Float[Tensor, "batch groups most width"],
) -> Float[Tensor, "batch groups some width"]:
    """With vectors at the places of `true_places` of a mask, and only there."""
    kept = torch.where(mask.gather(2, places)[..., None], vectors, gather_tokens(into, places))
    return into.scatter(2, places[..., None].expand_as(kept), kept)
