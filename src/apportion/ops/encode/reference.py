"""Encode and allocate, spelled out: the whole score matrix, then the winners, then their values."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from apportion.ops.csr.reference import row_of_each_entry
from apportion.ops.select import reference as select

Codes = tuple[Int64[Tensor, "rows_plus_1"], Int64[Tensor, "entries"], Float[Tensor, "entries"]]


def encode_select(
    x: Float[Tensor, "rows d"],
    weight: Float[Tensor, "columns d"],
    bias: Float[Tensor, "columns"],
    how: str,
    count: int,
    limits: Tensor | None,
) -> Codes:
    """Scores ``x @ weight.T + bias``; who wins by ``how``; their scores."""
    scores = torch.addmm(bias, x, weight.T)
    if how == "rows":
        crow, col = select.select_rows(scores, count)
    elif how == "total":
        crow, col = select.select_total(scores, count)
    elif how == "columns" and limits is not None:
        crow, col = select.select_columns(scores, limits)
    elif how == "above" and limits is not None:
        crow, col = select.select_above(scores, limits)
    else:
        raise ValueError(f"how={how!r}, limits={limits}: use rows, total, columns or above; the last two need limits")
    return crow, col, scores[row_of_each_entry(crow), col]
