"""What attention over chunks is: their keys gathered or rebuilt, put beside exact ones, and attended over.

Composed of ops, so that a device that has kernels for these uses them.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.ops.attend import attend_selected
from apportion.ops.low_rank_keys import low_rank_keys


def attend_chunks(
    queries: Float[Tensor, "batch heads width"],
    chunks: Int[Tensor, "batch groups chosen"],
    size: int,
    keys: Tensor,
    basis: Float[Tensor, "some groups rank width"] | None,
    cos: Tensor | None,
    sin: Tensor | None,
    values: Float[Tensor, "batch groups tokens value_width"],
    exact_keys: list[Tensor],
    exact_values: list[Tensor],
    scaling: float,
    softcap: float | None,
) -> Float[Tensor, "batch heads value_width"]:
    """See ``apportion.ops.chunk_attend.attend_chunks``."""
    tokens = (chunks[..., None] * size + torch.arange(size, device=chunks.device)).flatten(2)
    if basis is None:
        of_chunks = _gathered(keys, tokens)
    else:
        of_chunks = low_rank_keys(keys, basis, tokens, cos, sin)
    every = torch.cat([of_chunks, *exact_keys], dim=2)
    read = torch.cat([_gathered(values, tokens), *exact_values], dim=2)
    lists = torch.arange(every.shape[2], device=chunks.device).expand(*chunks.shape[:2], 1, -1)
    kept = torch.ones_like(lists, dtype=torch.bool)
    out: Tensor = attend_selected(queries[:, :, None], every, read, lists, kept, scaling, softcap)
    return out[:, :, 0]


def _gathered(stored: Tensor, tokens: Tensor) -> Tensor:
    return stored.gather(2, tokens[..., None].expand(-1, -1, -1, stored.shape[-1]))
