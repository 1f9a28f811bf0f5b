"""Encode and allocate from the kernels at hand: one dense product, a selection, and a second look where it matters.

A matrix product rounds differently for different batch sizes, so a score next to its limit could win in one batch and
lose in another. The second look removes that: every entry that *could* win, given how far rounding can move a score,
is recomputed by a kernel whose result depends on its own row alone, and only that result decides.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.ops.csr import csr_sampled_product
from apportion.ops.csr.reference import row_of_each_entry
from apportion.ops.encode.reference import Codes
from apportion.ops.select import select_above, select_columns, select_rows, select_total
from apportion.ops.select.reference import Places


def encode_select(
    x: Tensor, weight: Tensor, bias: Tensor, how: str, count: int, limits: Tensor | None, precision: str, exact: bool
) -> Codes:
    """See ``apportion.ops.encode.encode_select``."""
    return choose(DenseScores(x, weight, bias, precision), how, count, limits, exact)


@dataclass(frozen=True)
class DenseScores:
    """``x @ weight.T + bias`` as a matrix, and the ways to find entries by it.

    What finds them by other means (``apportion.ops.encode.cuda``) overrides the five ways. Each returns places in CSR
    order and the scores found there, which are the product's: they may be off by as much as ``rounding`` says.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    precision: str

    @functools.cached_property
    def matrix(self) -> Tensor:
        """Every score, [rows, columns]."""
        if self.precision == "bfloat16":
            return torch.mm(self.x.bfloat16(), self.weight.bfloat16().T).to(self.x.dtype).add_(self.bias)
        return torch.addmm(self.bias, self.x, self.weight.T)

    def rows(self, count: int) -> Codes:
        """The ``count`` best of each row."""
        return self._with_scores(select_rows(self.matrix, count))

    def total(self, count: int) -> Codes:
        """The ``count`` best of all."""
        return self._with_scores(select_total(self.matrix, count))

    def columns(self, quotas: Tensor) -> Codes:
        """The ``quotas[i]`` best of each column ``i``."""
        return self._with_scores(select_columns(self.matrix, quotas))

    def above(self, limits: Tensor) -> Codes:
        """Every score strictly above its column's limit."""
        return self._with_scores(select_above(self.matrix, limits))

    def reaching(self, floors: Tensor) -> Codes:
        """Every score that is at least its row's floor."""
        # Just above zero for every column, so that 'strictly above minus this' means 'at least zero'.
        tiny = torch.full_like(self.bias, torch.finfo(self.bias.dtype).tiny)
        return self._with_scores(select_above(self.matrix - floors.unsqueeze(1), -tiny))

    def rounding(self) -> tuple[Tensor, Tensor]:
        """How far a score can lie from its recomputed value: at most the product of a row's and a column's part.

        A sum of d products is off by at most ``(d + 2) u`` times the product of the norms (Higham, *Accuracy and
        Stability of Numerical Algorithms*, section 3.1), with u the unit roundoff; both sides err, hence twice that.
        Operands and results in bfloat16 add three roundings of 2^-8.
        """
        unit = torch.finfo(self.x.dtype).eps / 2
        relative = 2 * (self.x.shape[1] + 2) * unit + (3 * 2.0**-8 if self.precision == "bfloat16" else 0.0)
        # The norms are those of (x, 1) and (w, b), or bounds of them: the bias counts as one more product.
        rows = (self.x.square().sum(dim=1) + 1).sqrt()
        columns = (self.weight.square().sum(dim=1) + self.bias.square()).sqrt()
        return rows, columns * (1.01 * relative)

    def recomputed(self, crow: Tensor, col: Tensor) -> Tensor:
        """Scores at the given places in full precision, each by its own row and column alone."""
        products: Tensor = csr_sampled_product(crow, col, self.x, self.weight)
        return products + self.bias[col]

    def _with_scores(self, places: Places) -> Codes:
        crow, col = places
        return crow, col, self.matrix.view(-1)[row_of_each_entry(crow) * self.matrix.shape[1] + col]


def choose(scores: DenseScores, how: str, count: int, limits: Tensor | None, exact: bool) -> Codes:
    """The winners and their values, with the second look where ``exact`` asks for it."""
    if exact and how == "above" and limits is not None:
        return _above_exactly(scores, limits)
    if exact and how == "rows":
        return _rows_exactly(scores, count)
    if how == "rows":
        codes = scores.rows(count)
    elif how == "total":
        codes = scores.total(count)
    elif how == "columns" and limits is not None:
        codes = scores.columns(limits)
    elif how == "above" and limits is not None:
        codes = scores.above(limits)
    else:
        raise impossible(how, limits)
    if exact or scores.precision != "float32":
        crow, col, _ = codes
        return crow, col, scores.recomputed(crow, col)
    return codes


def impossible(how: str, limits: Tensor | None) -> ValueError:
    """What to say of an order that cannot be followed."""
    return ValueError(f"how={how!r}, limits={limits}: use rows, total, columns or above; the last two need limits")


def _above_exactly(scores: DenseScores, limits: Tensor) -> Codes:
    if scores.x.shape[0] == 0:
        return scores.above(limits)
    rows, columns = scores.rounding()
    crow, col, _ = scores.above(limits - rows.max() * columns)
    values = scores.recomputed(crow, col)
    return kept(crow, col, values, values > limits[col])


def _rows_exactly(scores: DenseScores, count: int) -> Codes:
    crow, col, found = scores.rows(count)
    if col.numel() == 0:
        return crow, col, found
    last_winners = found.view(-1, count).amin(dim=1)
    rows, columns = scores.rounding()
    # Both the last winner and a challenger may be off, each by one bound.
    crow, col, _ = scores.reaching(last_winners - 2 * rows * columns.max())
    values = scores.recomputed(crow, col)
    row = row_of_each_entry(crow)
    order = values.sort(descending=True, stable=True).indices
    order = order[row[order].sort(stable=True).indices]
    rank_in_row = torch.arange(order.numel(), device=values.device) - crow[row[order]]
    keep = torch.zeros_like(values, dtype=torch.bool).index_fill_(0, order[rank_in_row < count], True)
    return kept(crow, col, values, keep)


def kept(crow: Tensor, col: Tensor, values: Tensor, keep: Tensor) -> Codes:
    """The entries marked in ``keep``."""
    before = torch.zeros(keep.numel() + 1, dtype=torch.int64, device=keep.device)
    torch.cumsum(keep, dim=0, out=before[1:])
    return before[crow], col[keep], values[keep]
