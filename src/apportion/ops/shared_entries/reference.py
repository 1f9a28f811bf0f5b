"""What shared entries are, in plain torch: each is looked up in the other list."""

import torch
from jaxtyping import Int
from torch import Tensor


def shared_entries(lists: Int[Tensor, "batch rows some"], others: Int[Tensor, "batch rows other"]) -> int:
    """See ``apportion.ops.shared_entries.shared_entries``."""
    if others.shape[2] == 0:
        return 0
    slots = torch.searchsorted(others.contiguous(), lists.contiguous()).clamp_max(others.shape[2] - 1)
    return int((others.gather(2, slots) == lists).sum())
