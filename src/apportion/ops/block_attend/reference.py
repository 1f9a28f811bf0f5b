"""What attention over kept blocks is, in plain torch: dense attention under a mask."""

import torch
from torch import Tensor

from apportion.ops.attend import causal
from apportion.ops.attend import reference as dense


def block_attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    size: int,
    scaling: float,
    softcap: float | None,
    real: Tensor | None,
) -> Tensor:
    """See ``apportion.ops.block_attend``; it holds ``heads * new * tokens`` scores."""
    new, tokens = queries.shape[2], keys.shape[2]
    of_queries = torch.arange(new, device=kept.device) // size
    of_keys = torch.arange(tokens, device=kept.device) // size
    seen = kept[:, :, of_queries][..., of_keys] & causal(new, tokens, kept.device)
    if real is not None:
        seen = seen & real[:, None, None, :]
    return dense.attend(queries, keys, values, seen, scaling, softcap)
