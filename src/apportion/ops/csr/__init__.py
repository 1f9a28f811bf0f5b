"""Three products with a sparse matrix in CSR order. Each one's gradients are the other two.

With ``S`` the sparse matrix that holds ``values`` at ``(crow_indices, col_indices)``:

| op | result | gradient to values | gradient to the dense side |
|---|---|---|---|
| ``csr_matmul`` | ``S @ D`` | sampled product of ``(g, D)`` | transposed matmul of ``g`` |
| ``csr_transposed_matmul`` | ``S.T @ D`` | sampled product of ``(D, g)`` | matmul of ``g`` |
| ``csr_sampled_product`` | ``(A @ B.T)`` at the places of ``S`` | | matmul with ``B``, transposed matmul with ``A`` |

The dictionary step needs nothing else: decoding is the first, both weight gradients are the second, the gradient to
the codes is the third, and none of them makes a ``tokens x k x width`` copy. They are registered as ``torch.library``
custom ops (``torch.ops.apportion.*``), so that ``torch.compile`` and DTensor can see them. The transposed product has
rows of zeros for columns without an entry; as a gradient it can come without them (``sparse_grad``). Index tensors are
int64; values and dense operands share a floating dtype and a device.
"""

import torch
from torch import Tensor

from apportion.ops.csr import reference
from apportion.ops.triton_support import triton_is_missing

__all__ = ["csr_matmul", "csr_sampled_product", "csr_transposed_matmul"]


@torch.library.custom_op("apportion::csr_matmul", mutates_args=())
def csr_matmul(
    crow_indices: Tensor, col_indices: Tensor, values: Tensor, dense: Tensor, sparse_grad: bool = False
) -> Tensor:
    """``S @ dense``: [rows, d] from entries and ``dense`` [columns, d]. Differentiable in ``values`` and ``dense``.

    ``sparse_grad``: the gradient to ``dense`` is what ``touched_columns`` gives, rather than a matrix like ``dense``.
    """
    return reference.csr_matmul(crow_indices, col_indices, values, dense)


@torch.library.custom_op("apportion::csr_transposed_matmul", mutates_args=())
def csr_transposed_matmul(
    crow_indices: Tensor, col_indices: Tensor, values: Tensor, dense: Tensor, columns: int
) -> Tensor:
    """``S.T @ dense``: [columns, d] from entries, ``dense`` [rows, d]. Differentiable in ``values`` and ``dense``."""
    return reference.csr_transposed_matmul(crow_indices, col_indices, values, dense, columns)


@torch.library.custom_op("apportion::csr_sampled_product", mutates_args=())
def csr_sampled_product(crow_indices: Tensor, col_indices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` at the places of ``S`` only: [entries]. Differentiable in ``left`` and ``right``.

    With the kernels for the CPU and CUDA the value of an entry depends on its own row of ``left`` and of ``right``
    alone, bit for bit.
    """
    return reference.csr_sampled_product(crow_indices, col_indices, left, right)


@csr_matmul.register_kernel("cpu")
def _(crow_indices: Tensor, col_indices: Tensor, values: Tensor, dense: Tensor, sparse_grad: bool = False) -> Tensor:
    from apportion.ops.csr import cpu

    return cpu.csr_matmul(crow_indices, col_indices, values, dense)


@csr_transposed_matmul.register_kernel("cpu")
def _(crow_indices: Tensor, col_indices: Tensor, values: Tensor, dense: Tensor, columns: int) -> Tensor:
    from apportion.ops.csr import cpu

    return cpu.csr_transposed_matmul(crow_indices, col_indices, values, dense, columns)


@csr_sampled_product.register_kernel("cpu")
def _(crow_indices: Tensor, col_indices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    from apportion.ops.csr import cpu

    return cpu.csr_sampled_product(crow_indices, col_indices, left, right)


@csr_matmul.register_kernel("cuda")
def _(crow_indices: Tensor, col_indices: Tensor, values: Tensor, dense: Tensor, sparse_grad: bool = False) -> Tensor:
    if triton_is_missing():
        return reference.csr_matmul(crow_indices, col_indices, values, dense)
    from apportion.ops.csr import cuda

    return cuda.csr_matmul(crow_indices, col_indices, values, dense)


@csr_transposed_matmul.register_kernel("cuda")
def _(crow_indices: Tensor, col_indices: Tensor, values: Tensor, dense: Tensor, columns: int) -> Tensor:
    if triton_is_missing():
        return reference.csr_transposed_matmul(crow_indices, col_indices, values, dense, columns)
    from apportion.ops.csr import cuda

    return cuda.csr_transposed_matmul(crow_indices, col_indices, values, dense, columns)


@csr_sampled_product.register_kernel("cuda")
def _(crow_indices: Tensor, col_indices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if triton_is_missing():
        return reference.csr_sampled_product(crow_indices, col_indices, left, right)
    from apportion.ops.csr import cuda

    return cuda.csr_sampled_product(crow_indices, col_indices, left, right)


@csr_matmul.register_fake
def _(crow_indices: Tensor, col_indices: Tensor, values: Tensor, dense: Tensor, sparse_grad: bool = False) -> Tensor:
    return dense.new_empty(crow_indices.shape[0] - 1, dense.shape[1])


@csr_transposed_matmul.register_fake
def _(crow_indices: Tensor, col_indices: Tensor, values: Tensor, dense: Tensor, columns: int | torch.SymInt) -> Tensor:
    return dense.new_empty(columns, dense.shape[1])


@csr_sampled_product.register_fake
def _(crow_indices: Tensor, col_indices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(col_indices.shape[0])


def touched_columns(crow_indices: Tensor, col_indices: Tensor, values: Tensor, dense: Tensor, columns: int) -> Tensor:
    """``csr_transposed_matmul`` without its rows of zeros: [columns, d], sparse in its first dimension, coalesced.

    It takes memory for the columns that have an entry only.
    """
    touched, place = torch.unique(col_indices, return_inverse=True)
    rows = csr_transposed_matmul(crow_indices, place, values, dense, touched.numel())
    return torch.sparse_coo_tensor(
        touched.unsqueeze(0), rows, (columns, dense.shape[1]), is_coalesced=True, check_invariants=False
    )


def _keep_all(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*(each for each in inputs if isinstance(each, Tensor)))


def _keep_all_and_flag(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.sparse_grad = inputs
    ctx.save_for_backward(*tensors)


def _matmul_backward(ctx, grad):  # type: ignore[no-untyped-def]
    crow, col, values, dense = ctx.saved_tensors
    # There is a fifth only where sparse_grad was given.
    needs_values, needs_dense = ctx.needs_input_grad[2:4]
    transposed_matmul = touched_columns if ctx.sparse_grad else csr_transposed_matmul
    to_values = csr_sampled_product(crow, col, grad, dense) if needs_values else None
    to_dense = transposed_matmul(crow, col, values, grad, dense.shape[0]) if needs_dense else None
    return None, None, to_values, to_dense, None


def _transposed_matmul_backward(ctx, grad):  # type: ignore[no-untyped-def]
    crow, col, values, dense = ctx.saved_tensors
    _, _, needs_values, needs_dense, _ = ctx.needs_input_grad
    to_values = csr_sampled_product(crow, col, dense, grad) if needs_values else None
    to_dense = csr_matmul(crow, col, values, grad) if needs_dense else None
    return None, None, to_values, to_dense, None


def _sampled_product_backward(ctx, grad):  # type: ignore[no-untyped-def]
    crow, col, left, right = ctx.saved_tensors
    _, _, needs_left, needs_right = ctx.needs_input_grad
    to_left = csr_matmul(crow, col, grad, right) if needs_left else None
    to_right = csr_transposed_matmul(crow, col, grad, left, right.shape[0]) if needs_right else None
    return None, None, to_left, to_right


csr_matmul.register_autograd(_matmul_backward, setup_context=_keep_all_and_flag)
csr_transposed_matmul.register_autograd(_transposed_matmul_backward, setup_context=_keep_all)
csr_sampled_product.register_autograd(_sampled_product_backward, setup_context=_keep_all)
