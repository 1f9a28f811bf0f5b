"""Which entries of a score matrix win: exact, deterministic, without gradient.

Each op returns ``(crow_indices, col_indices)``, int64, in CSR order. Scores are finite floats [rows, columns]; who
calls has checked that (``torch.topk`` would rank NaN first, these ops do not promise anything). Ties go to the entry
that comes first: lower row, then lower column. ``select_rows``, ``select_columns`` and ``select_total`` return exactly
what was asked for; the caller has checked that there are enough candidates.
"""

import torch
from torch import Tensor

from apportion.ops.select import reference
from apportion.ops.triton_support import triton_is_missing

__all__ = ["select_above", "select_columns", "select_rows", "select_total"]


@torch.library.custom_op("apportion::select_rows", mutates_args=())
def select_rows(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` best of each row, 0 <= count <= columns."""
    return reference.select_rows(scores, count)


@torch.library.custom_op("apportion::select_columns", mutates_args=())
def select_columns(scores: Tensor, quotas: Tensor) -> tuple[Tensor, Tensor]:
    """The ``quotas[i]`` best of each column ``i``; quotas int64 [columns], each from 0 to rows."""
    return reference.select_columns(scores, quotas)


@torch.library.custom_op("apportion::select_total", mutates_args=())
def select_total(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` best of all, 0 <= count <= rows * columns."""
    return reference.select_total(scores, count)


@torch.library.custom_op("apportion::select_above", mutates_args=())
def select_above(scores: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Every entry strictly above its column's limit; limits [columns] in the scores' dtype, infinities allowed."""
    return reference.select_above(scores, limits)


@select_rows.register_kernel("cpu")
def _(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    from apportion.ops.select import cpu

    return cpu.select_rows(scores, count)


@select_columns.register_kernel("cpu")
def _(scores: Tensor, quotas: Tensor) -> tuple[Tensor, Tensor]:
    from apportion.ops.select import cpu

    return cpu.select_columns(scores, quotas)


@select_total.register_kernel("cpu")
def _(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    from apportion.ops.select import cpu

    return cpu.select_total(scores, count)


@select_above.register_kernel("cpu")
def _(scores: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    from apportion.ops.select import cpu

    return cpu.select_above(scores, limits)


@select_rows.register_kernel("cuda")
def _(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if triton_is_missing():
        return reference.select_rows(scores, count)
    from apportion.ops.select import cuda

    return cuda.select_rows(scores, count)


@select_columns.register_kernel("cuda")
def _(scores: Tensor, quotas: Tensor) -> tuple[Tensor, Tensor]:
    if triton_is_missing():
        return reference.select_columns(scores, quotas)
    from apportion.ops.select import cuda

    return cuda.select_columns(scores, quotas)


@select_total.register_kernel("cuda")
def _(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if triton_is_missing():
        return reference.select_total(scores, count)
    from apportion.ops.select import cuda

    return cuda.select_total(scores, count)


@select_above.register_kernel("cuda")
def _(scores: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    if triton_is_missing():
        return reference.select_above(scores, limits)
    from apportion.ops.select import cuda

    return cuda.select_above(scores, limits)


def _fake(scores: Tensor, entries: int | torch.SymInt | None = None) -> tuple[Tensor, Tensor]:
    if entries is None:
        entries = torch.library.get_ctx().new_dynamic_size()
    crow = scores.new_empty(scores.shape[0] + 1, dtype=torch.int64)
    return crow, scores.new_empty(entries, dtype=torch.int64)


@select_rows.register_fake
def _(scores: Tensor, count: int | torch.SymInt) -> tuple[Tensor, Tensor]:
    return _fake(scores, scores.shape[0] * count)


@select_columns.register_fake
def _(scores: Tensor, quotas: Tensor) -> tuple[Tensor, Tensor]:
    return _fake(scores)


@select_total.register_fake
def _(scores: Tensor, count: int | torch.SymInt) -> tuple[Tensor, Tensor]:
    return _fake(scores, count)


@select_above.register_fake
def _(scores: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    return _fake(scores)
