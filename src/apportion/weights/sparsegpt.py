"""SparseGPT: what is left of a row makes up for what goes (Frantar, Alistarh 2023, arXiv 2301.00774).

Columns are taken from left to right. A weight that goes costs ``w^2`` over the variance of its input given all later
ones, and the later weights of its row are moved to where the layer's output changes least. Who gets the budget: all
weights of 128 columns compete, so that the sparsity is exact for these columns and not for each row.

| paper | here |
|---|---|
| ``H = X X^T + lambda I`` | `second_moment` of the inputs, and ``damp`` times its mean diagonal |
| ``U``, the Cholesky factor of ``H^-1`` | `inverse_factor` |
| ``B_s``, ``B`` | ``block`` for both, as in the published code |
| ``w^2 / [H^-1]_cc^2`` | `_scores`: the factor's squared diagonal is that entry once the earlier columns are gone |

Departures: the number of weights that stay is rounded (the published code removes one more, and fails at s = 1); an
input that is always 0 gets the mean diagonal (theirs: 1, which depends on the scale of ``H``) and its weights go first;
the factor is computed in float64.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.errors import InputError
from apportion.weights.one_shot_method import OneShotMethod, Pruned, Seen
from apportion.weights.patterns import BlockPattern, NofMPattern, Pattern, Unstructured


@dataclass(frozen=True)
class SparseGPT(OneShotMethod):
    """Settings; the defaults are the paper's.

    Attributes:
        block: columns over which weights compete, and between whose ends later columns wait for their updates.
        damp: share of the mean diagonal that is added to the diagonal.

    Raises:
        InputError: a value that cannot work.
    """

    block: int = 128
    damp: float = 0.01

    slug: ClassVar[str] = "sparsegpt"
    needs_second_moment: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.block < 1:
            raise InputError(f"block={self.block}: at least 1 column")
        if not self.damp >= 0:
            raise InputError(f"damp={self.damp}: at least 0, such as 0.01")

    def check(self, pattern: Pattern) -> None:
        """Groups and blocks must not be cut by the 128 columns.

        Raises:
            InputError: they would be, or groups lie along the outputs.
        """
        size = pattern.m if isinstance(pattern, NofMPattern) else getattr(pattern, "width", 1)
        if self.block % size:
            raise InputError(
                f"block={self.block} is not a multiple of {size}, which the pattern {pattern} needs: choose another "
                f"block, such as {max(1, self.block // size) * size}"
            )
        if isinstance(pattern, NofMPattern) and pattern.dim == "out":
            raise InputError("SparseGPT chooses along the inputs: use an N:M pattern with dim='in'")

    def prune(self, weight: Float[Tensor, "out in"], seen: Seen, pattern: Pattern) -> Pruned:
        """Prune and repair, column by column."""
        self.check(pattern)
        factor, dead = inverse_factor(seen.statistics.second_moment.to(weight.device), self.damp, seen.name)
        # Columns as rows: each is one piece of memory.
        columns = weight.float().T.clone()
        columns[dead] = 0
        upper = factor.float()
        mask = torch.ones_like(columns, dtype=torch.bool)
        for start in range(0, len(columns), self.block):
            part = slice(start, start + self.block)
            errors = _prune_columns(columns[part], upper[part, part], mask[part], pattern)
            columns[start + self.block :] -= upper[part, start + self.block :].T @ errors
        kept = mask.T.contiguous()
        return Pruned(torch.where(kept, columns.T, 0).to(weight.dtype), kept)


def inverse_factor(
    second_moment: Float[Tensor, "d_in d_in"], damp: float, name: str = "the layer"
) -> tuple[Float[Tensor, "d_in d_in"], Bool[Tensor, " d_in"]]:
    """The upper triangular ``U`` with ``U^T U = (H + damp)^-1``.

    Args:
        second_moment: of the inputs.
        damp: share of the mean diagonal that is added.
        name: of the layer, for the message.

    Returns:
        The factor in float64, and which inputs are always 0.

    Raises:
        InputError: the matrix has no inverse even so.
    """
    moment = second_moment.double().clone()
    diagonal = moment.diagonal()
    dead = diagonal == 0
    live = diagonal[~dead].mean() if not bool(dead.all()) else torch.ones((), dtype=torch.float64, device=moment.device)
    diagonal[dead] = live
    diagonal += damp * live
    lower, failed = torch.linalg.cholesky_ex(moment)
    if not bool(failed):
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if bool(failed) or not bool(torch.isfinite(upper).all()):
        raise InputError(
            f"{name}: the second moments of its inputs have no inverse with damp={damp}: give a larger damp, such as "
            "0.01, or more calibration text"
        )
    return upper, dead


def _prune_columns(
    columns: Float[Tensor, "part out"],
    upper: Float[Tensor, "part part"],
    mask: Bool[Tensor, "part out"],
    pattern: Pattern,
) -> Float[Tensor, "part out"]:
    """Prune some columns in place, left to right, and choose their masks on the way.

    Returns:
        The error of each column over its entry of the factor's diagonal: later columns are still to be moved by it.
    """
    diagonal = upper.diagonal()
    group = pattern.m if isinstance(pattern, NofMPattern) else len(columns)
    errors = torch.empty_like(columns)
    for place in range(len(columns)):
        if place % group == 0:
            part = slice(place, place + group)
            mask[part] = _choose(columns[part], diagonal[part], pattern)
        errors[place] = torch.where(mask[place], 0, columns[place]) / diagonal[place]
        columns[place:].addr_(upper[place, place:], errors[place], alpha=-1)
    return errors


def _choose(columns: Tensor, diagonal: Tensor, pattern: Pattern) -> Tensor:
    """The mask of columns that compete with one another."""
    if isinstance(pattern, Unstructured | BlockPattern):
        pattern = replace(pattern, scope="layer")
    return pattern.keep(_scores(columns, diagonal).T.contiguous()).T


def _scores(columns: Tensor, diagonal: Tensor) -> Tensor:
    return (columns / diagonal.unsqueeze(1)).square()
