"""Keys of a few tokens, rebuilt from a low-rank factorisation of all keys before their rotation, and rotated.

Without gradient: what is stored of a prompt is not trained.
"""

import torch
from torch import Tensor

from apportion.ops.low_rank_keys import reference
from apportion.ops.triton_support import triton_is_missing

__all__ = ["low_rank_keys"]


@torch.library.custom_op("apportion::low_rank_keys", mutates_args=())
def low_rank_keys(
    factors: Tensor, basis: Tensor, tokens: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
) -> Tensor:
    """Row ``tokens[b, g, i]`` of ``factors[b] @ basis[b, g]``, rotated by that token's own angles.

    Args:
        factors: [batch, tokens, rank], shared by all key-value heads.
        basis: [batch, groups, rank, width], or [1, groups, rank, width] for all rows of the batch, same dtype.
        tokens: int64 [batch, groups, kept], from 0 to tokens - 1; a token may come more than once.
        cos: [batch or 1, tokens, half], ``2 * half <= width``: coordinate ``i`` turns together with ``i + half``, the
            rest stays (see `apportion.models.key_memory.Rotation`); None, as ``sin``, for keys that are not rotated.
        sin: likewise.

    Returns:
        [batch, groups, kept, width] in the factors' dtype.
    """
    return reference.low_rank_keys(factors, basis, tokens, cos, sin)


@low_rank_keys.register_kernel("cpu")
def _(factors: Tensor, basis: Tensor, tokens: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    from apportion.ops.low_rank_keys import cpu

    return cpu.low_rank_keys(factors, basis, tokens, cos, sin)


@low_rank_keys.register_kernel("cuda")
def _(factors: Tensor, basis: Tensor, tokens: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    if triton_is_missing():
        return reference.low_rank_keys(factors, basis, tokens, cos, sin)
    from apportion.ops.low_rank_keys import cuda

    return cuda.low_rank_keys(factors, basis, tokens, cos, sin)


@low_rank_keys.register_fake
def _(factors: Tensor, basis: Tensor, tokens: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    return factors.new_empty(*tokens.shape, basis.shape[-1])
