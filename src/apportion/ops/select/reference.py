"""Who wins, by sorting everything: the definition that every backend must equal.

One order for all ties: among equal scores the entry that comes first (lower row, then lower column) wins.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Places = tuple[Int64[Tensor, "rows_plus_1"], Int64[Tensor, "entries"]]


def select_rows(scores: Float[Tensor, "rows columns"], count: int) -> Places:
    """The ``count`` best of each row."""
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return _places(_mask_of(scores).scatter_(1, order, True))


def select_columns(scores: Float[Tensor, "rows columns"], quotas: Int64[Tensor, "columns"]) -> Places:
    """The ``quotas[i]`` best of each column ``i``."""
    order = scores.sort(dim=0, descending=True, stable=True).indices
    wins = torch.arange(scores.shape[0], device=scores.device).unsqueeze(1) < quotas
    return _places(_mask_of(scores).scatter_(0, order, wins))


def select_total(scores: Float[Tensor, "rows columns"], count: int) -> Places:
    """The ``count`` best of all."""
    order = scores.flatten().sort(descending=True, stable=True).indices[:count]
    return _places(_mask_of(scores).view(-1).index_fill_(0, order, True).view(scores.shape))


def select_above(scores: Float[Tensor, "rows columns"], limits: Float[Tensor, "columns"]) -> Places:
    """Every entry strictly above its column's limit."""
    return _places(scores > limits)


def _mask_of(scores: Tensor) -> Tensor:
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)


def _places(mask: Tensor) -> Places:
    crow = torch.zeros(mask.shape[0] + 1, dtype=torch.int64, device=mask.device)
    torch.cumsum(mask.sum(dim=1), dim=0, out=crow[1:])
    return crow, mask.nonzero()[:, 1].contiguous()
