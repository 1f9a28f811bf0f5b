"""Encode and allocate from the kernels at hand: one dense product, a selection, and a second look where it matters.

A matrix product rounds differently for different batch sizes, so a score next to its limit could win in one batch and
lose in another. The second look removes that: every entry that *could* win, given how far rounding can move a score,
is recomputed by a kernel whose result depends on its own row alone, and only that result decides.
"""

import torch
from torch import Tensor

from apportion.ops.csr import csr_sampled_product
from apportion.ops.csr.reference import row_of_each_entry
from apportion.ops.encode.reference import Codes
from apportion.ops.select import select_above, select_columns, select_rows, select_total


def encode_select(
    x: Tensor, weight: Tensor, bias: Tensor, how: str, count: int, limits: Tensor | None, precision: str, exact: bool
) -> Codes:
    """See ``apportion.ops.encode.encode_select``."""
    scores = _scores(x, weight, bias, precision)
    if exact and how == "above" and limits is not None:
        return _above_exactly(scores, x, weight, bias, limits, precision)
    if exact and how == "rows":
        return _rows_exactly(scores, x, weight, bias, count, precision)
    if how == "rows":
        crow, col = select_rows(scores, count)
    elif how == "total":
        crow, col = select_total(scores, count)
    elif how == "columns" and limits is not None:
        crow, col = select_columns(scores, limits)
    elif how == "above" and limits is not None:
        crow, col = select_above(scores, limits)
    else:
        raise ValueError(f"how={how!r}, limits={limits}: use rows, total, columns or above; the last two need limits")
    if exact or precision != "float32":
        return crow, col, _recomputed(crow, col, x, weight, bias)
    return crow, col, scores.view(-1)[row_of_each_entry(crow) * scores.shape[1] + col]


def _scores(x: Tensor, weight: Tensor, bias: Tensor, precision: str) -> Tensor:
    if precision == "bfloat16":
        return torch.mm(x.bfloat16(), weight.bfloat16().T).to(x.dtype).add_(bias)
    return torch.addmm(bias, x, weight.T)


def _recomputed(crow: Tensor, col: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    products: Tensor = csr_sampled_product(crow, col, x, weight)
    return products + bias[col]


def _rounding(x: Tensor, weight: Tensor, bias: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """How far a score can lie from its recomputed value: at most the product of a row's and a column's part.

    A sum of d products is off by at most ``(d + 2) u`` times the product of the norms (Higham, *Accuracy and Stability
    of Numerical Algorithms*, section 3.1), with u the unit roundoff; both sides err, hence twice that. Operands and
    results in bfloat16 add three roundings of 2^-8.
    """
    unit = torch.finfo(x.dtype).eps / 2
    relative = 2 * (x.shape[1] + 2) * unit + (3 * 2.0**-8 if precision == "bfloat16" else 0.0)
    # sqrt(|x|^2 + 1) * sqrt(|w|^2 + b^2) bounds the norms of (x, 1) and (w, b): the bias counts as one more product.
    rows = (x.square().sum(dim=1) + 1).sqrt()
    columns = (weight.square().sum(dim=1) + bias.square()).sqrt()
    return rows, columns * (1.01 * relative)


def _above_exactly(scores: Tensor, x: Tensor, weight: Tensor, bias: Tensor, limits: Tensor, precision: str) -> Codes:
    if x.shape[0] == 0:
        crow, col = select_above(scores, limits)
        return crow, col, scores.new_empty(0)
    rows, columns = _rounding(x, weight, bias, precision)
    crow, col = select_above(scores, limits - rows.max() * columns)
    values = _recomputed(crow, col, x, weight, bias)
    return _kept(crow, col, values, values > limits[col])


def _rows_exactly(scores: Tensor, x: Tensor, weight: Tensor, bias: Tensor, count: int, precision: str) -> Codes:
    crow, col = select_rows(scores, count)
    if col.numel() == 0:
        return crow, col, scores.new_empty(0)
    last_winners = scores.gather(1, col.view(-1, count)).amin(dim=1)
    rows, columns = _rounding(x, weight, bias, precision)
    # Both the last winner and a challenger may be off, each by one bound.
    crow, col = select_above(scores - (last_winners - 2 * rows * columns.max()).unsqueeze(1), -_tiny_limits(weight))
    values = _recomputed(crow, col, x, weight, bias)
    row = row_of_each_entry(crow)
    order = values.sort(descending=True, stable=True).indices
    order = order[row[order].sort(stable=True).indices]
    rank_in_row = torch.arange(order.numel(), device=x.device) - crow[row[order]]
    keep = torch.zeros_like(values, dtype=torch.bool).index_fill_(0, order[rank_in_row < count], True)
    return _kept(crow, col, values, keep)


def _tiny_limits(weight: Tensor) -> Tensor:
    """Just above zero for every column, so that 'strictly above minus this' means 'at least zero'."""
    return torch.full((weight.shape[0],), torch.finfo(weight.dtype).tiny, dtype=weight.dtype, device=weight.device)


def _kept(crow: Tensor, col: Tensor, values: Tensor, keep: Tensor) -> Codes:
    before = torch.zeros(keep.numel() + 1, dtype=torch.int64, device=keep.device)
    torch.cumsum(keep, dim=0, out=before[1:])
    return before[crow], col[keep], values[keep]
