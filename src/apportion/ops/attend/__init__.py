"""Attention over all keys that a query may see, and over a few chosen ones."""

import torch
from torch import Tensor, nn

from apportion.ops.attend import composed, reference
from apportion.ops.direct import runs_directly
from apportion.ops.triton_support import triton_is_missing

__all__ = ["attend", "attend_masked", "attend_selected", "causal"]


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    softcap: float | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """Causal attention of the newest tokens over all tokens: query ``i`` of ``new`` sees ``tokens - new + i + 1``.

    Args:
        queries: [batch, heads, new, width].
        keys: [batch, groups, tokens, width], oldest first; the newest are the queries' own.
        values: [batch, groups, tokens, value_width].
        scaling: of the products.
        softcap: products become ``softcap * tanh(product / softcap)``; None for none.
        real: bool [batch, tokens], False for padding, which nobody sees; None where nothing is padded.

    Returns:
        [batch, heads, new, value_width]; zeros for queries that see nothing.
    """
    new, tokens = queries.shape[2], keys.shape[2]
    group = queries.shape[1] // keys.shape[1]
    seen = None
    if real is not None:
        seen = causal(new, tokens, queries.device)[None, None] & real[:, None, None, :]
    elif new > 1 and (new < tokens or softcap is not None):
        seen = causal(new, tokens, queries.device)[None, None]
    if softcap is not None:
        return reference.attend(queries, keys, values, seen, scaling, softcap)
    if new == 1:
        # The heads of a group stand in for queries, so that no key is copied.
        batch, heads, _, width = queries.shape
        packed = queries.reshape(batch, keys.shape[1], group, width)
        out = nn.functional.scaled_dot_product_attention(packed, keys, values, seen, scale=scaling)
        return _nothing_seen(out, seen).reshape(batch, heads, 1, -1)
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    out = nn.functional.scaled_dot_product_attention(queries, keys, values, seen, is_causal=seen is None, scale=scaling)
    return _nothing_seen(out, seen)


def attend_selected(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    kept: Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of every query over a list of keys of its own.

    Differentiable in queries, keys and values.

    Args:
        queries: [batch, heads, new, width].
        keys: [batch, groups, tokens, width], the queries' dtype.
        values: [batch, groups, tokens, value_width], the queries' dtype.
        indices: int64 [batch, rows, new, chosen], from 0 to tokens - 1; rows are heads, or groups whose heads share a
            list. No key may come twice among the kept ones.
        kept: bool, the shape of indices: False where a list is shorter than the longest; None where none is.
        scaling: of the products.
        softcap: products become ``softcap * tanh(product / softcap)``; None for none.

    Returns:
        [batch, heads, new, value_width]; zeros for queries that keep nothing.
    """
    if runs_directly(queries, keys, values):
        from apportion.ops.attend import cpu

        return cpu.attend_selected(queries, keys, values, indices, kept, scaling, softcap)
    kept = torch.ones_like(indices, dtype=torch.bool) if kept is None else kept
    found: Tensor = _attend_selected(queries, keys, values, indices, kept, scaling, softcap)
    return found


@torch.library.custom_op("apportion::attend_selected", mutates_args=())
def _attend_selected(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    kept: Tensor,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    return composed.attend_selected(queries, keys, values, indices, kept, scaling, softcap)


@_attend_selected.register_kernel("cpu")
def _(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    kept: Tensor,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    from apportion.ops.attend import cpu

    return cpu.attend_selected(queries, keys, values, indices, kept, scaling, softcap)


@_attend_selected.register_kernel("cuda")
def _(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    kept: Tensor,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    if triton_is_missing():
        return composed.attend_selected(queries, keys, values, indices, kept, scaling, softcap)
    from apportion.ops.attend import cuda

    return cuda.attend_selected(queries, keys, values, indices, kept, scaling, softcap)


@_attend_selected.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    kept: Tensor,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    return queries.new_empty(*queries.shape[:3], values.shape[-1])


def _keep_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.scaling, ctx.softcap = inputs[5:]
    ctx.save_for_backward(*inputs[:5])


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    queries, keys, values, indices, kept = ctx.saved_tensors
    to_inputs = composed.gradients(queries, keys, values, indices, kept, ctx.scaling, ctx.softcap, grad)
    return *to_inputs, None, None, None, None


_attend_selected.register_autograd(_backward, setup_context=_keep_inputs)


def attend_masked(
    queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scaling: float, softcap: float | None = None
) -> Tensor:
    """Attention of every query over the keys that a mask lets it see: for many queries that each read many keys.

    It compares every query with every key, which costs less than gathering where the lists of `attend_selected` are
    together longer than what is stored.

    Args:
        queries: [batch, heads, new, width].
        keys: [batch, groups, tokens, width].
        values: [batch, groups, tokens, value_width].
        seen: bool [batch, rows, new, tokens]; rows are heads, or groups whose heads share a mask.
        scaling: see `attend`.
        softcap: see `attend`.

    Returns:
        [batch, heads, new, value_width]; zeros for queries that see nothing.
    """
    heads, groups = queries.shape[1], keys.shape[1]
    seen = seen.repeat_interleave(heads // seen.shape[1], dim=1)
    if softcap is not None:
        return reference.attend(queries, keys, values, seen, scaling, softcap)
    keys, values = (each.repeat_interleave(heads // groups, dim=1) for each in (keys, values))
    out = nn.functional.scaled_dot_product_attention(queries, keys, values, seen, scale=scaling)
    return _nothing_seen(out, seen)


def causal(new: int, tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """Which of ``tokens`` each of the ``new`` newest sees: bool [new, tokens]."""
    own = torch.arange(tokens - new, tokens, device=device)
    return torch.arange(tokens, device=device) <= own[:, None]


def _nothing_seen(out: Tensor, seen: Tensor | None) -> Tensor:
    # What a backend gives for a query that sees nothing differs: NaN, or the mean of everything.
    if seen is None:
        return out
    return torch.where(seen.any(-1, keepdim=True), out, 0.0)
