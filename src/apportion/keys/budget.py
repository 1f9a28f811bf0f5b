"""Budgets and their accounts: keys read, bytes held, bytes read per step.

Methods that read fewer keys and methods that store fewer bytes spend different things; a comparison says which of the
three is equal.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from apportion.errors import InputError


@dataclass(frozen=True)
class KeyBudget:
    """How many keys a query reads, sinks and recent tokens included.

    Give one of ``keys`` and ``share``.

    Attributes:
        keys: tokens per query (and head, or group of heads).
        share: tokens per query as a share of those it could see, rounded up.
        sinks: of these, the first tokens of the text, always read.
        recent: of these, the newest tokens, always read.

    Raises:
        InputError: both or none are given, or they cannot be spent.
    """

    keys: int | None = None
    share: float | None = None
    sinks: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        if (self.keys is None) == (self.share is None):
            raise InputError(f"keys={self.keys} and share={self.share}: give one of them, such as keys=128")
        if self.keys is not None and self.keys < 1:
            raise InputError(f"keys={self.keys}: a query reads at least 1 key")
        if self.share is not None and not 0 < self.share <= 1:
            raise InputError(f"share={self.share}: above 0, at most 1")
        if self.sinks < 0 or self.recent < 0:
            raise InputError(f"sinks={self.sinks}, recent={self.recent}: 0 or above")
        if self.keys is not None and self.sinks + self.recent > self.keys:
            raise InputError(
                f"sinks={self.sinks} and recent={self.recent} are more than keys={self.keys}: they are part of it"
            )

    def tokens(self, seen: int) -> int:
        """Keys that a query reads which could see ``seen`` tokens; never more than these."""
        wanted = self.keys if self.keys is not None else math.ceil(self.share * seen)  # type: ignore[operator]
        return min(seen, max(wanted, self.sinks + self.recent, 1))


@dataclass
class Usage:
    """What reading and storing have cost, summed over what was accounted for.

    Attributes:
        steps: passes of a layer in which a budget was in force.
        queries: query vectors in them: tokens times query heads, over the batch.
        keys_read: key vectors that these queries were compared with in full, sinks and recent ones included.
        keys_there: key vectors that they could have seen.
        bytes_read: of keys, values and side tables that were touched: a list that the heads of a group share counts
            once, lists of their own count each.
        bytes_dense: what dense attention would have touched.
        bytes_held: that the newest state occupies: keys, values, side tables, factors and rotations.
        bytes_held_dense: what a plain cache of the same tokens would.
        bytes_slow: of ``bytes_held``, what is kept in slow memory (beside a GPU, or counted as such).
        bytes_moved: of ``bytes_read``, what had to come from slow memory for it.
    """

    steps: int = 0
    queries: int = 0
    keys_read: int = 0
    keys_there: int = 0
    bytes_read: int = 0
    bytes_dense: int = 0
    bytes_held: int = 0
    bytes_held_dense: int = 0
    bytes_slow: int = 0
    bytes_moved: int = 0

    @staticmethod
    def total(parts: Iterable["Usage"]) -> "Usage":
        """The sum over layers."""
        whole = Usage()
        for part in parts:
            for field in fields(Usage):
                setattr(whole, field.name, getattr(whole, field.name) + getattr(part, field.name))
        return whole

    @property
    def share_read(self) -> float:
        """Keys read as a share of those there; 1 where nothing was accounted for."""
        return self.keys_read / self.keys_there if self.keys_there else 1.0

    @property
    def share_held(self) -> float:
        """Bytes held as a share of a plain cache's; 1 where nothing is held."""
        return self.bytes_held / self.bytes_held_dense if self.bytes_held_dense else 1.0

    @property
    def share_fast(self) -> float:
        """Bytes held in fast memory as a share of a plain cache's; 1 where nothing is held."""
        return (self.bytes_held - self.bytes_slow) / self.bytes_held_dense if self.bytes_held_dense else 1.0
