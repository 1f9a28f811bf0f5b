"""What keys from a low-rank factorisation are, in plain torch: gather, multiply, rotate."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def low_rank_keys(
    factors: Float[Tensor, "batch tokens rank"],
    basis: Float[Tensor, "some groups rank width"],
    tokens: Int[Tensor, "batch groups kept"],
    cos: Float[Tensor, "rows tokens half"] | None,
    sin: Float[Tensor, "rows tokens half"] | None,
) -> Float[Tensor, "batch groups kept width"]:
    """Row ``tokens[b, g, i]`` of ``factors[b] @ basis[b, g]``, rotated by that token's angles."""
    batch, groups, kept = tokens.shape
    flat = tokens.reshape(batch, groups * kept, 1)
    rows = factors.gather(1, flat.expand(-1, -1, factors.shape[-1])).view(batch, groups, kept, -1)
    keys = rows @ basis
    if cos is None or sin is None:
        return keys
    half = cos.shape[-1]
    cos, sin = (
        each.expand(batch, -1, -1).gather(1, flat.expand(-1, -1, half)).view(batch, groups, kept, half).to(keys.dtype)
        for each in (cos, sin)
    )
    first, second, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
