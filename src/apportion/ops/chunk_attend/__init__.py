"""Attention of one token over chunks of stored tokens and some exact ones, chunks' keys rebuilt where they are needed.

What ShadowKV reads: chunks whose keys are in a low-rank factorisation, outliers and the newest tokens as they are.
Without gradient: what is stored of a prompt is not trained.
"""

import torch
from torch import Tensor

from apportion.ops.chunk_attend import reference
from apportion.ops.direct import runs_directly

__all__ = ["attend_chunks"]


def attend_chunks(
    queries: Tensor,
    chunks: Tensor,
    size: int,
    keys: Tensor,
    basis: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    values: Tensor,
    exact_keys: list[Tensor],
    exact_values: list[Tensor],
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of the heads of one token over the tokens of chunks, and over exact keys beside them.

    Args:
        queries: [batch, heads, width].
        chunks: int64 [batch, groups, chosen], all different; chunk ``j`` is tokens ``j * size .. (j + 1) * size - 1``.
        size: tokens of a chunk.
        keys: [batch, groups, tokens, width]; or, with ``basis``, factors [batch, tokens, rank] of keys before their
            rotation, see `low_rank_keys`.
        basis: [batch or 1, groups, rank, width]; None where keys are kept as they are.
        cos: of the tokens' angles [batch or 1, tokens, half]; None, as ``sin``, where keys are not rotated or kept
            rotated.
        sin: likewise.
        values: [batch, groups, tokens, value_width], the queries' dtype.
        exact_keys: further keys, each [batch, groups, some, width]; at least one in all of ``chunks`` and these.
        exact_values: their values.
        scaling: of the products.
        softcap: products become ``softcap * tanh(product / softcap)``; None for none.

    Returns:
        [batch, heads, value_width] in the queries' dtype.
    """
    if runs_directly(queries, keys, values, *exact_keys, *exact_values):
        from apportion.ops.chunk_attend import cpu

        return cpu.attend_chunks(
            queries, chunks, size, keys, basis, cos, sin, values, exact_keys, exact_values, scaling, softcap
        )
    found: Tensor = _attend_chunks(
        queries, chunks, size, keys, basis, cos, sin, values, exact_keys, exact_values, scaling, softcap
    )
    return found


@torch.library.custom_op("apportion::attend_chunks", mutates_args=())
def _attend_chunks(
    queries: Tensor,
    chunks: Tensor,
    size: int,
    keys: Tensor,
    basis: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    values: Tensor,
    exact_keys: list[Tensor],
    exact_values: list[Tensor],
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    return reference.attend_chunks(
        queries, chunks, size, keys, basis, cos, sin, values, exact_keys, exact_values, scaling, softcap
    )


@_attend_chunks.register_kernel("cpu")
def _(
    queries: Tensor,
    chunks: Tensor,
    size: int,
    keys: Tensor,
    basis: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    values: Tensor,
    exact_keys: list[Tensor],
    exact_values: list[Tensor],
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    from apportion.ops.chunk_attend import cpu

    return cpu.attend_chunks(
        queries, chunks, size, keys, basis, cos, sin, values, exact_keys, exact_values, scaling, softcap
    )


@_attend_chunks.register_fake
def _(
    queries: Tensor,
    chunks: Tensor,
    size: int,
    keys: Tensor,
    basis: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    values: Tensor,
    exact_keys: list[Tensor],
    exact_values: list[Tensor],
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    return queries.new_empty(*queries.shape[:2], values.shape[-1])
