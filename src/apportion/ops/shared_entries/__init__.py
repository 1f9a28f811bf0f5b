"""How much two steps' lists have in common: what was chosen before, and so lies near or counts as a hit."""

from torch import Tensor

from apportion.ops.direct import runs_directly
from apportion.ops.shared_entries import reference

__all__ = ["shared_entries"]


def shared_entries(lists: Tensor, others: Tensor) -> int:
    """How many entries of all lists are in the other list of the same place.

    Args:
        lists: int64 [batch, rows, some], each ascending and without duplicates.
        others: int64 [batch, rows, some others], likewise.
    """
    if runs_directly(lists, others):
        from apportion.ops.shared_entries import cpu

        return cpu.shared_entries(lists, others)
    return reference.shared_entries(lists, others)
