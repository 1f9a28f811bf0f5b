"""Attention over whole blocks of keys: what a prompt costs when each block of queries reads only some of them.

``kept`` says for every block of queries which blocks of keys it reads; the softmax is exact over the tokens of these
that a query may see. Work is proportional to the blocks kept: on the CPU they are gathered for dense products, on a GPU
one kernel walks a list of them. A mask on dense attention would give the same numbers and save nothing.

PyTorch's ``flex_attention`` is not used. Where it is not compiled it *ignores* the block lists of
``BlockMask.from_kv_blocks`` and applies ``mask_mod`` alone (measured with torch 2.13): full causal attention comes
back, without a word. Who uses it must say the selection in ``mask_mod``, too.

There is no gradient: blocks are chosen for prompts that are read, not trained on.
"""

import torch
from torch import Tensor

from apportion.ops.block_attend import reference
from apportion.ops.triton_support import triton_is_missing

__all__ = ["block_attend"]


@torch.library.custom_op("apportion::block_attend", mutates_args=())
def block_attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    size: int,
    scaling: float,
    softcap: float | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """Causal attention of the newest tokens over the kept blocks of all tokens.

    Args:
        queries: [batch, heads, new, width], floating; query ``i`` is token ``tokens - new + i``.
        keys: [batch, groups, tokens, width], oldest first; query heads ``g * heads / groups ..`` share key head ``g``.
        values: [batch, groups, tokens, value_width].
        kept: bool [batch, heads, ceil(new / size), ceil(tokens / size)]. Blocks of queries are counted from the first
            of the new tokens, blocks of keys from the first of all; the last of either may be shorter. A block that no
            query of its row may see is ignored.
        size: tokens of a block.
        scaling: of the products.
        softcap: products become ``softcap * tanh(product / softcap)``; None for none.
        real: bool [batch, tokens], False for padding, which nobody sees; None where nothing is padded.

    Returns:
        [batch, heads, new, value_width]; zeros for queries that see nothing.
    """
    return reference.block_attend(queries, keys, values, kept, size, scaling, softcap, real)


@block_attend.register_kernel("cpu")
def _(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    size: int,
    scaling: float,
    softcap: float | None = None,
    real: Tensor | None = None,
) -> Tensor:
    from apportion.ops.block_attend import cpu

    return cpu.block_attend(queries, keys, values, kept, size, scaling, softcap, real)


@block_attend.register_kernel("cuda")
def _(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    size: int,
    scaling: float,
    softcap: float | None = None,
    real: Tensor | None = None,
) -> Tensor:
    if triton_is_missing():
        return reference.block_attend(queries, keys, values, kept, size, scaling, softcap, real)
    from apportion.ops.block_attend import cuda

    return cuda.block_attend(queries, keys, values, kept, size, scaling, softcap, real)


@block_attend.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    size: int,
    scaling: float,
    softcap: float | None = None,
    real: Tensor | None = None,
) -> Tensor:
    return values.new_empty(*queries.shape[:3], values.shape[3])
