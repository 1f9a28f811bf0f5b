"""Encode and allocate in one op: ``x @ weight.T + bias``, but only the winners leave it.

One op rather than a product followed by a selection, so that a kernel may fuse the two and never write the
``rows x columns`` scores. The gradient goes through the winners' values only (none through the choice), by the sparse
products of ``apportion.ops.csr``: no dense gradient of the scores exists at any time.
"""

import torch
from torch import Tensor

from apportion.ops.csr import csr_matmul, csr_transposed_matmul, touched_columns
from apportion.ops.encode import composed
from apportion.ops.triton_support import triton_is_missing

__all__ = ["encode_select"]


@torch.library.custom_op("apportion::encode_select", mutates_args=())
def encode_select(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    how: str,
    count: int,
    limits: Tensor | None,
    precision: str,
    exact: bool,
    sparse_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Winners of ``x @ weight.T + bias`` as ``(crow_indices, col_indices, values)``.

    Args:
        x: [rows, d] float32 or float64, finite.
        weight: [columns, d], same dtype.
        bias: [columns].
        how: ``rows`` (``count`` best of each row), ``total`` (``count`` best of all), ``columns`` (``limits[i]`` best
            of column ``i``, int64) or ``above`` (every score strictly above its column's float limit).
        count: for ``rows`` and ``total``.
        limits: for ``columns`` and ``above``.
        precision: ``float32`` (the scores of the operands' own type decide) or ``bfloat16``: the product is taken in
            bfloat16 and decides who wins (with ``exact``, only who is looked at again); the winners' values are then
            computed in full. ``float32`` may look at a bfloat16 product, too, but never lets it decide.
        exact: for ``rows`` and ``above``: who wins and by how much depends on the row alone, bit for bit, whatever else
            is in the batch.
        sparse_grad: the gradient to ``weight`` is sparse in its first dimension: it holds the winners' rows alone.

    Differentiable in ``x``, ``weight`` and ``bias`` through the values.
    """
    return composed.encode_select(x, weight, bias, how, count, limits, precision, exact)


@encode_select.register_kernel("cpu")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    how: str,
    count: int,
    limits: Tensor | None,
    precision: str,
    exact: bool,
    sparse_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    from apportion.ops.encode import cpu

    return cpu.encode_select(x, weight, bias, how, count, limits, precision, exact)


@encode_select.register_kernel("cuda")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    how: str,
    count: int,
    limits: Tensor | None,
    precision: str,
    exact: bool,
    sparse_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    if triton_is_missing():
        return composed.encode_select(x, weight, bias, how, count, limits, precision, exact)
    from apportion.ops.encode import cuda

    return cuda.encode_select(x, weight, bias, how, count, limits, precision, exact)


@encode_select.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    how: str,
    count: int | torch.SymInt,
    limits: Tensor | None,
    precision: str,
    exact: bool,
    sparse_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    entries: int | torch.SymInt
    if how == "rows":
        entries = x.shape[0] * count
    elif how == "total":
        entries = count
    else:
        entries = torch.library.get_ctx().new_dynamic_size()
    crow = x.new_empty(x.shape[0] + 1, dtype=torch.int64)
    return crow, x.new_empty(entries, dtype=torch.int64), x.new_empty(entries)


def _keep_winners(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, *_, ctx.sparse_grad = inputs
    crow, col, _ = output
    ctx.columns = weight.shape[0]
    # Only the gradient to x asks for the weight, which may be a copy that nobody else keeps.
    ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None, crow, col)


def _backward(ctx, _crow, _col, grad):  # type: ignore[no-untyped-def]
    x, weight, crow, col = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    to_x = csr_matmul(crow, col, grad, weight) if needs_x else None
    transposed_matmul = touched_columns if ctx.sparse_grad else csr_transposed_matmul
    to_weight = transposed_matmul(crow, col, grad, x, ctx.columns) if needs_weight else None
    to_bias = grad.new_zeros(ctx.columns).index_add_(0, col, grad) if needs_bias else None
    return to_x, to_weight, to_bias, None, None, None, None, None, None


encode_select.register_autograd(_backward, setup_context=_keep_winners)
