"""Vectors of tokens kept in slow memory and fetched when they are read: host memory beside a GPU.

On a machine without a GPU there is one memory; the accounts are the same.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.keys.stores import gather_tokens


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
        self._tokens, self._resident = self._nothing()

    @override
    def read(
        self, tokens: Int[Tensor, "batch groups some"], wanted: Bool[Tensor, "batch groups some"]
    ) -> Float[Tensor, "batch groups some width"]:
        there = torch.zeros_like(wanted)
        found = self._resident.new_zeros(*tokens.shape, self._resident.shape[-1])
        if self._resident.shape[2]:
            slots = torch.searchsorted(self._tokens, tokens.contiguous()).clamp_max(self._tokens.shape[-1] - 1)
            there = self._tokens.gather(2, slots) == tokens
            found = gather_tokens(self._resident, slots)
        missing = wanted & ~there
        places = true_places(missing)
        fetched = gather_tokens(self._content, tokens.gather(2, places).to(self._content.device)).to(self._device)
        found = put(found, places, missing, fetched)
        self.moved += int(missing.sum()) * found.shape[-1] * found.element_size()
        # Tokens that were not wanted count as later than all.
        self._tokens, order = tokens.masked_fill(~wanted, 2**62).sort(-1)
        self._resident = gather_tokens(found, order)
        return found

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
        self._tokens, self._resident = self._nothing()

    @override
    @property
    def bytes_slow(self) -> int:
        return self._content.numel() * self._content.element_size()

    @override
    @property
    def bytes(self) -> int:
        return self.bytes_slow + self._resident.numel() * self._resident.element_size()

    def _away(self, content: Tensor) -> Tensor:
        return content.cpu().pin_memory() if self._device.type == "cuda" else content

    def _nothing(self) -> tuple[Int[Tensor, "batch groups 0"], Float[Tensor, "batch groups 0 width"]]:
        """What stays of no reading: tokens, and their vectors."""
        shape = (*self._content.shape[:2], 0)
        tokens = torch.empty(shape, dtype=torch.long, device=self._device)
        return tokens, self._content.new_empty(*shape, self._content.shape[-1], device=self._device)


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
