"""The tokens that queries read, as lists."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from typing_extensions import override


@dataclass(frozen=True, eq=False)
class KeySelection:
    """The tokens that each query reads.

    Attributes:
        indices: tokens of the store; rows are query heads, or key-value heads whose query heads share a list.
        kept: False where a list is shorter than the longest; what stands there means nothing.
    """

    indices: Int[Tensor, "batch rows new chosen"]
    kept: Bool[Tensor, "batch rows new chosen"]

    def mask(self, tokens: int) -> Bool[Tensor, "batch rows new tokens"]:
        """The same as a mask over all tokens."""
        shape = (*self.indices.shape[:3], tokens)
        counts = torch.zeros(shape, dtype=torch.int32, device=self.indices.device)
        return counts.scatter_add_(-1, self.indices, self.kept.int()) > 0

    @staticmethod
    def of_mask(mask: Bool[Tensor, "batch rows new tokens"]) -> "KeySelection":
        """The lists of a mask, tokens in order."""
        chosen = max(1, int(mask.sum(-1).max()))
        kept, indices = mask.int().sort(dim=-1, descending=True, stable=True)
        return KeySelection(indices[..., :chosen], kept[..., :chosen].bool())

    @property
    def lists(self) -> int:
        """How many lists a row of the batch has for each query: one a query head, or one a key-value head."""
        return self.indices.shape[1]

    @property
    def total(self) -> int:
        """Entries of all lists together."""
        return int(self.kept.sum())

    def common(self) -> Int[Tensor, "batch rows chosen"] | None:
        """The list that all queries share, though some may not keep all of it; None where they have their own."""
        first = self.indices[:, :, :1]
        return first[:, :, 0] if torch.equal(self.indices, first.expand_as(self.indices)) else None

    def tokens_per_group(self, groups: int) -> int:
        """Distinct tokens that some head of a key-value head reads, summed over batch, key-value heads and queries."""
        rows = self.indices.shape[1]
        if rows == groups:
            return int(self.kept.sum())
        tokens = int(self.indices.max()) + 1
        batch, _, new, _ = self.indices.shape
        return int(self.mask(tokens).view(batch, groups, rows // groups, new, tokens).any(2).sum())


class WholeLists(KeySelection):
    """Lists that are all of one length: nothing needs to be said of what is kept of them.

    Args:
        indices: see `KeySelection`; every entry is read.
    """

    def __init__(self, indices: Int[Tensor, "batch rows new chosen"]) -> None:
        # Set past the dataclass, which is frozen and one of whose fields is a property here.
        self.__dict__.update(indices=indices)

    @cached_property
    def kept(self) -> Bool[Tensor, "batch rows new chosen"]:
        """See `KeySelection`: everything."""
        return torch.ones_like(self.indices, dtype=torch.bool)

    @property
    @override
    def total(self) -> int:
        return self.indices.numel()
