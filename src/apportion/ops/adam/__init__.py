"""A step of Adam for a matrix of rows, and what keeps rows at unit norm, each in one pass over memory.

| op | changes | to |
|---|---|---|
| ``adam_step_`` | ``param``, ``exp_avg``, ``exp_avg_sq`` | what ``torch.optim.Adam`` makes of them, then unit rows |
| ``project_rows_`` | ``grad`` | without its part along each row of ``unit`` |

Gradients come whole, or compact: only the rows that have one, with their indices. A compact gradient changes nothing
about the result, since the momentum moves the other rows too. Both ops are ``torch.library`` custom ops, change their
arguments in place, return nothing and have no gradient.
"""

import torch
from torch import Tensor

from apportion.ops.adam import reference
from apportion.ops.triton_support import triton_is_missing

__all__ = ["adam_step_", "project_rows_"]


@torch.library.custom_op("apportion::adam_step_", mutates_args=("param", "exp_avg", "exp_avg_sq"))
def adam_step_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    grad_rows: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    unit_rows: bool,
) -> None:
    """One step of ``torch.optim.Adam`` on ``param`` [rows, d], in place.

    The CPU and CUDA kernels set moments that are too small for a normal number to zero: processors compute slowly with
    such numbers, and those of a row without gradients would stay there for good. No parameter can tell.

    Args:
        param: [rows, d] float32 or float64, contiguous.
        exp_avg: mean of the gradients, like ``param``.
        exp_avg_sq: mean of their squares, like ``param``.
        grad: [rows, d], or [n, d] with ``grad_rows``; of the same dtype.
        grad_rows: the rows that ``grad`` is of, int64 [n], strictly ascending; the gradient of all others is zero.
        step: how many steps there are with this one, from 1.
        lr: learning rate.
        beta1: weight of ``exp_avg`` in its next value.
        beta2: likewise of ``exp_avg_sq``.
        eps: added to the root of the mean square.
        weight_decay: times ``param`` is added to the gradient, as Adam (not AdamW) does.
        unit_rows: divide each row by its norm (at least 1e-12) afterwards.

    Raises:
        TypeError: a dtype that is not float32 or float64, or not the same everywhere.
        ValueError: shapes that do not fit each other, or a ``param`` or moment that is not contiguous.
    """
    _check_step(param, exp_avg, exp_avg_sq, grad, grad_rows)
    reference.adam_step_(
        param, exp_avg, exp_avg_sq, grad, grad_rows, step, lr, beta1, beta2, eps, weight_decay, unit_rows
    )


@torch.library.custom_op("apportion::project_rows_", mutates_args=("grad",))
def project_rows_(grad: Tensor, unit: Tensor, grad_rows: Tensor | None) -> None:
    """Take from each row of ``grad`` its part along the same row of ``unit``, in place.

    Args:
        grad: [rows, d], or [n, d] with ``grad_rows``; float32 or float64, contiguous.
        unit: [rows, d], rows of norm 1, of the same dtype.
        grad_rows: the rows that ``grad`` is of, int64 [n], in any order.

    Raises:
        TypeError: a dtype that is not float32 or float64, or not the same.
        ValueError: shapes that do not fit each other, or a ``grad`` that is not contiguous.
    """
    _check_projection(grad, unit, grad_rows)
    reference.project_rows_(grad, unit, grad_rows)


@adam_step_.register_kernel("cpu")
def _(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    grad_rows: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    unit_rows: bool,
) -> None:
    from apportion.ops.adam import cpu

    _check_step(param, exp_avg, exp_avg_sq, grad, grad_rows)
    cpu.adam_step_(param, exp_avg, exp_avg_sq, grad, grad_rows, step, lr, beta1, beta2, eps, weight_decay, unit_rows)


@project_rows_.register_kernel("cpu")
def _(grad: Tensor, unit: Tensor, grad_rows: Tensor | None) -> None:
    from apportion.ops.adam import cpu

    _check_projection(grad, unit, grad_rows)
    cpu.project_rows_(grad, unit, grad_rows)


@adam_step_.register_kernel("cuda")
def _(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    grad_rows: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    unit_rows: bool,
) -> None:
    _check_step(param, exp_avg, exp_avg_sq, grad, grad_rows)
    if triton_is_missing():
        step_ = reference.adam_step_
    else:
        from apportion.ops.adam import cuda

        step_ = cuda.adam_step_
    step_(param, exp_avg, exp_avg_sq, grad, grad_rows, step, lr, beta1, beta2, eps, weight_decay, unit_rows)


@project_rows_.register_kernel("cuda")
def _(grad: Tensor, unit: Tensor, grad_rows: Tensor | None) -> None:
    _check_projection(grad, unit, grad_rows)
    if triton_is_missing():
        reference.project_rows_(grad, unit, grad_rows)
        return
    from apportion.ops.adam import cuda

    cuda.project_rows_(grad, unit, grad_rows)


@adam_step_.register_fake
def _(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    grad_rows: Tensor | None,
    step: int | torch.SymInt,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    unit_rows: bool,
) -> None:
    return


@project_rows_.register_fake
def _(grad: Tensor, unit: Tensor, grad_rows: Tensor | None) -> None:
    return


def _check_step(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, grad_rows: Tensor | None) -> None:
    _check_dtype(param, "param")
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if moment.shape != param.shape or moment.dtype != param.dtype:
            raise ValueError(f"{name} is {_described(moment)}, but param is {_described(param)}: make it like param")
    for name, tensor in (("param", param), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_contiguous(tensor, name)
    _check_rows(grad, param, "param", grad_rows)


def _check_projection(grad: Tensor, unit: Tensor, grad_rows: Tensor | None) -> None:
    _check_dtype(grad, "grad")
    _check_contiguous(grad, "grad")
    _check_rows(grad, unit, "unit", grad_rows)


def _check_dtype(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} is {_described(tensor)}: use float32 or float64")


def _check_contiguous(tensor: Tensor, name: str) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}: it is changed in place, so give a contiguous tensor")


def _check_rows(grad: Tensor, whole: Tensor, name: str, grad_rows: Tensor | None) -> None:
    rows = whole.shape[0] if grad_rows is None else grad_rows.numel()
    if whole.ndim != 2 or grad.shape != (rows, whole.shape[1]):
        raise ValueError(
            f"grad has shape {tuple(grad.shape)} for {rows} rows of {name} {tuple(whole.shape)}: give two dimensions, "
            "and a row of the same width for each"
        )
    if grad.dtype != whole.dtype:
        raise TypeError(f"grad is {_described(grad)}, but {name} is {_described(whole)}: give both the same dtype")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
