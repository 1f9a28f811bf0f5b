"""The rules: each looks at scores and says who gets the budget.

A rule is a small frozen object. Call it with scores [rows, columns] and it returns an ``Allocation``; ask it for
``at_inference(...)`` and it returns the rule to use when a row must not depend on who else is in the batch.

Ties are broken one way everywhere: the entry that comes first wins (lower row, then lower column).
"""

import math
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from apportion.allocate.allocation import Allocation
from apportion.allocate.quotas import Profile, Uniform, Zipf, densities, expected_share, whole_quotas
from apportion.ops import encode_select, select_above, select_columns, select_rows, select_total


@dataclass(frozen=True, eq=False)
class Selection:
    """A rule made concrete for one batch: how to select, how many, or within which limits."""

    how: str
    count: int = 0
    limits: Tensor | None = None

    def places(self, scores: Float[Tensor, "rows columns"]) -> tuple[Tensor, Tensor]:
        """The winners among ``scores``."""
        limits = torch.empty(0) if self.limits is None else self.limits.to(scores.device)
        places: tuple[Tensor, Tensor]
        if self.how == "rows":
            places = select_rows(scores, self.count)
        elif self.how == "total":
            places = select_total(scores, self.count)
        elif self.how == "columns":
            places = select_columns(scores, limits)
        else:
            # A threshold halfway between two bfloat16 neighbours must not be rounded onto one of them.
            wide = torch.promote_types(scores.dtype, torch.float32)
            places = select_above(scores.to(wide), limits.to(wide))
        return places

    def encode(
        self,
        x: Float[Tensor, "rows d"],
        weight: Float[Tensor, "columns d"],
        bias: Float[Tensor, "columns"],
        precision: str = "float32",
        exact: bool = False,
        sparse_grad: bool = False,
    ) -> Allocation:
        """The winners of ``x @ weight.T + bias`` with their scores, without keeping the score matrix.

        See ``apportion.ops.encode_select`` for ``precision``, ``exact`` and ``sparse_grad``.
        """
        limits = self.limits
        if limits is not None:
            limits = limits.to(x.device) if self.how == "columns" else limits.to(x.device, x.dtype)
        crow, col, values = encode_select(x, weight, bias, self.how, self.count, limits, precision, exact, sparse_grad)
        return Allocation(crow, col, values, (x.shape[0], weight.shape[0]))


@runtime_checkable
class Rule(Protocol):
    """What every rule can do."""

    def __call__(self, scores: Float[Tensor, "rows columns"], valid: Bool[Tensor, "rows"] | None = None) -> Allocation:
        """Allocate. Rows that are not ``valid`` (padding, attention sinks) get nothing and bring no budget."""
        ...

    def mean_budget(self, columns: int) -> float | None:
        """Mean winners per row, or None where it depends on the scores."""
        ...


def check_scores(scores: Tensor, name: str = "scores", valid: Bool[Tensor, "rows"] | None = None) -> None:
    """Refuse what cannot be ranked; rows that are not ``valid`` may hold anything.

    Raises:
        TypeError: not a floating type.
        ValueError: not two-dimensional, or NaN or infinite somewhere; names the first such entry.
    """
    if not scores.is_floating_point():
        raise TypeError(f"{name} has dtype {scores.dtype}: give floating-point scores")
    if scores.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(scores.shape)}: give two dimensions, rows and columns")
    # A finite sum proves finite entries at a tenth of the cost of looking at each; an infinite one may be overflow.
    if not bool(scores.detach().sum().isfinite()):
        wrong = ~scores.detach().isfinite()
        if valid is not None:
            wrong &= valid.unsqueeze(1)
        if bool(wrong.any()):
            row, column = (int(each) for each in wrong.nonzero()[0])
            raise ValueError(
                f"{name}[{row}, {column}] is {float(scores[row, column])}: scores must be finite "
                f"({int(wrong.sum())} of {wrong.numel()} are not); mask or repair the input before allocating"
            )


def _budget_of(budget: float | None, density: float | None, columns: int, rule: str) -> float:
    wanted = budget if budget is not None else (density or 0.0) * columns
    if wanted > columns:
        raise ValueError(
            f"{rule}: budget={wanted:g} is more than the {columns} candidates; lower it to at most {columns}"
        )
    return wanted


def _check_budget(budget: float | None, density: float | None, rule: str) -> None:
    if (budget is None) == (density is None):
        raise ValueError(
            f"{rule}: give either budget (mean winners per row) or density (share kept), not {budget=} {density=}"
        )
    if budget is not None and not (budget > 0 and math.isfinite(budget)):
        raise ValueError(f"{rule}: budget={budget}: use a number above 0, the mean winners per row")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"{rule}: density={density}: use a share above 0 and at most 1")


def _total(budget: float, rows: int) -> int:
    """Whole number of winners for a batch: the part after the point is dropped, but not for a rounding error."""
    return int(budget * rows + 1e-6)


def _apply(selection: Selection, scores: Tensor) -> Allocation:
    crow, col = selection.places(scores.detach())
    rows = torch.repeat_interleave(crow.diff(), output_size=col.numel())
    return Allocation(crow, col, scores[rows, col], (scores.shape[0], scores.shape[1]))


def _spread(allocation: Allocation, valid: Bool[Tensor, "rows"]) -> Allocation:
    """Put rows allocated among the valid ones back in their places; the others are empty."""
    counts = torch.zeros(valid.numel(), dtype=torch.int64, device=valid.device)
    counts[valid] = allocation.winners_per_row()
    crow = torch.zeros(valid.numel() + 1, dtype=torch.int64, device=valid.device)
    torch.cumsum(counts, dim=0, out=crow[1:])
    return Allocation(crow, allocation.col_indices, allocation.values, (valid.numel(), allocation.shape[1]))


class _Selecting:
    """Rules that come down to one ``Selection``: all but those that regroup the scores first."""

    def __call__(self, scores: Float[Tensor, "rows columns"], valid: Bool[Tensor, "rows"] | None = None) -> Allocation:
        check_scores(scores, valid=valid)
        if valid is not None:
            return _spread(self(scores[valid]), valid)
        return _apply(self.selection(scores.shape[0], scores.shape[1]), scores)

    def selection(self, rows: int, columns: int) -> Selection:
        raise TypeError(f"{type(self).__name__} does not select by itself")


@dataclass(frozen=True)
class TokenChoice(_Selecting):
    """Each row keeps its ``budget`` best candidates: TopK dictionaries, MoE gates, Wanda, per-query keys.

    Args:
        budget: whole number of winners of every row, at most the number of columns.
        density: instead, the share of the columns, rounded down (at least one).

    Examples:
        >>> import torch
        >>> TokenChoice(2)(torch.tensor([[1.0, 3.0, 2.0]])).col_indices
        tensor([1, 2])
    """

    budget: float | None = None
    density: float | None = None

    def __post_init__(self) -> None:
        _check_budget(self.budget, self.density, "TokenChoice")
        if self.budget is not None and self.budget != int(self.budget):
            raise ValueError(f"TokenChoice: budget={self.budget}: every row gets the same, so use a whole number")

    def mean_budget(self, columns: int) -> float:
        """Winners of every row."""
        return float(self._count(columns))

    def selection(self, rows: int, columns: int) -> Selection:
        """The ``budget`` best of each row."""
        return Selection("rows", self._count(columns))

    def at_inference(self) -> "TokenChoice":
        """Itself: a row never depends on the others."""
        return self

    def _count(self, columns: int) -> int:
        return max(1, _total(_budget_of(self.budget, self.density, columns, "TokenChoice"), 1))


@dataclass(frozen=True)
class MutualChoice(_Selecting):
    """The best pairs overall: Mutual Choice (arXiv 2411.02124), BatchTopK (arXiv 2412.06410), global magnitude pruning.

    A batch of N rows has ``int(budget * N)`` winners; how many a row gets is decided by its scores.

    Args:
        budget: mean winners per row; need not be whole.
        density: instead, the share of all entries.
    """

    budget: float | None = None
    density: float | None = None

    def __post_init__(self) -> None:
        _check_budget(self.budget, self.density, "MutualChoice")

    def mean_budget(self, columns: int) -> float:
        """Mean winners per row."""
        return _budget_of(self.budget, self.density, columns, "MutualChoice")

    def selection(self, rows: int, columns: int) -> Selection:
        """The best ``int(budget * rows)`` of all."""
        return Selection("total", _total(self.mean_budget(columns), rows))

    def at_inference(self, threshold: float) -> "Threshold":
        """One threshold for all, as ``ThresholdCalibrator`` finds it: a row no longer depends on the batch."""
        return Threshold(float(threshold))


@dataclass(frozen=True)
class FeatureChoice(_Selecting):
    """Each column keeps its best rows: Feature Choice dictionaries (arXiv 2411.02124), expert choice.

    Column i gets a quota of ``density_i * N`` rows. With the uniform profile all densities are equal; with Zipf they
    fall with the column's rank, which is its index unless ``selection`` is given other quotas (see
    ``apportion.features.mutual_feature_choice`` for ranks by measured demand). Quotas are rounded by largest remainder,
    so that a batch spends ``int(budget * N)`` exactly; for a stream of batches draw them from a ``QuotaLedger``
    instead, which also gives columns with less than one row a batch their turn.

    Args:
        budget: mean winners per row.
        density: instead, the share of all entries.
        profile: ``Uniform()`` or ``Zipf(exponent, offset)``.
    """

    budget: float | None = None
    density: float | None = None
    profile: Profile = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        _check_budget(self.budget, self.density, "FeatureChoice")

    def mean_budget(self, columns: int) -> float:
        """Mean winners per row."""
        return _budget_of(self.budget, self.density, columns, "FeatureChoice")

    def share(self, columns: int) -> Float64[Tensor, "columns"]:
        """Density of the column of each rank; they add up to the budget."""
        return expected_share(self.profile, columns, self.mean_budget(columns))

    def quotas(self, rows: int, columns: int) -> Int64[Tensor, "columns"]:
        """Whole quotas of a single batch, adding up to ``int(budget * rows)``."""
        return whole_quotas(self.share(columns) * rows, _total(self.mean_budget(columns), rows), rows)

    def selection(self, rows: int, columns: int, quotas: Int64[Tensor, "columns"] | None = None) -> Selection:
        """The best ``quotas[i]`` rows of each column."""
        chosen = self.quotas(rows, columns) if quotas is None else quotas
        if chosen.shape != (columns,):
            raise ValueError(f"quotas has shape {tuple(chosen.shape)}: give one for each of the {columns} columns")
        if bool((chosen < 0).any()) or bool((chosen > rows).any()):
            raise ValueError(
                f"quotas go from {int(chosen.min())} to {int(chosen.max())}: "
                f"each must be from 0 to the number of rows, {rows}"
            )
        return Selection("columns", limits=chosen)

    def at_inference(self, thresholds: Float[Tensor, "columns"]) -> "Threshold":
        """One threshold a column, as ``ThresholdCalibrator`` finds them: a row no longer depends on the batch."""
        return Threshold(thresholds)


@dataclass(frozen=True, eq=False)
class Threshold(_Selecting):
    """Every score strictly above a threshold: ReLU (0), JumpReLU, CHESS, the inference form of the batch rules.

    Args:
        theta: one number, or one per column. Infinite thresholds are allowed: a column that never wins.
    """

    theta: float | Tensor = 0.0

    def __post_init__(self) -> None:
        if bool(torch.as_tensor(self.theta).isnan().any()):
            raise ValueError("Threshold: theta is NaN somewhere: calibrate again on finite scores")

    def mean_budget(self, columns: int) -> None:
        """Not known before the scores are."""
        return

    def selection(self, rows: int, columns: int) -> Selection:
        """Everything above."""
        # A number stays as precise as Python has it; the scores' type decides what is left of it.
        theta = self.theta if isinstance(self.theta, Tensor) else torch.tensor(self.theta, dtype=torch.float64)
        if theta.ndim > 1 or (theta.ndim == 1 and theta.numel() != columns):
            raise ValueError(
                f"Threshold: theta has shape {tuple(theta.shape)} for {columns} columns: give one number, or one each"
            )
        return Selection("above", limits=theta.expand(columns))

    def at_inference(self) -> "Threshold":
        """Itself."""
        return self


@dataclass(frozen=True)
class NofM:
    """The ``n`` best of every ``m`` consecutive candidates of a row: N:M sparsity (2:4 on sparse tensor cores).

    Args:
        n: winners of each group, from 1 to m.
        m: size of a group; the number of columns must be a multiple.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ValueError(f"NofM: n={self.n}, m={self.m}: use 1 <= n <= m, such as NofM(2, 4)")

    def __call__(self, scores: Float[Tensor, "rows columns"], valid: Bool[Tensor, "rows"] | None = None) -> Allocation:
        """Allocate."""
        check_scores(scores, valid=valid)
        if valid is not None:
            return _spread(self(scores[valid]), valid)
        rows, columns = scores.shape
        groups = self._groups(columns)
        _, col = select_rows(scores.detach().reshape(rows * groups, self.m), self.n)
        first = torch.arange(groups, device=scores.device).repeat(rows).repeat_interleave(self.n) * self.m
        col = col + first
        crow = torch.arange(rows + 1, device=scores.device) * (groups * self.n)
        row = torch.arange(rows, device=scores.device).repeat_interleave(groups * self.n)
        return Allocation(crow, col, scores[row, col], (rows, columns))

    def mask(self, scores: Float[Tensor, "rows columns"]) -> Bool[Tensor, "rows columns"]:
        """Who wins, as a mask and without lists of indices: for those who ask at every step of a training."""
        check_scores(scores)
        self._groups(scores.shape[1])
        return _best_of_groups(scores.detach().reshape(-1, self.m), self.n).view(scores.shape)

    def mean_budget(self, columns: int) -> float:
        """Winners of every row."""
        return float(self._groups(columns) * self.n)

    def at_inference(self) -> "NofM":
        """Itself: a row never depends on the others."""
        return self

    def _groups(self, columns: int) -> int:
        if columns % self.m:
            raise ValueError(f"NofM: {columns} columns are not a multiple of m={self.m}: pad them or choose another m")
        return columns // self.m


# Up to here all pairs of a group are compared; larger ones are sorted.
_FEW = 8


def _best_of_groups(groups: Float[Tensor, "groups m"], n: int) -> Bool[Tensor, "groups m"]:
    """The winners of every group, as a mask."""
    m = groups.shape[1]
    if n == m:
        return torch.ones_like(groups, dtype=torch.bool)
    if n == 1:  # the first of the largest, as torch has it
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.argmax(dim=1, keepdim=True), True)
    if m <= _FEW:
        return _by_rank(groups.T.contiguous(), n).T.contiguous()
    last = groups.topk(n, dim=1).values[:, -1:]
    above, level = groups > last, groups == last
    return above | (level & (level.cumsum(dim=1) <= n - above.sum(dim=1, keepdim=True)))


def _by_rank(scores: Float[Tensor, "m groups"], n: int) -> Bool[Tensor, "m groups"]:
    """Those that fewer than ``n`` others of their group come before."""
    before = torch.zeros_like(scores, dtype=torch.int8)
    for second in range(1, len(scores)):
        for first in range(second):
            overtakes = scores[second] > scores[first]
            before[first] += overtakes
            before[second] += ~overtakes
    return before < n


@dataclass(frozen=True)
class Blocks:
    """Whole blocks win or lose together: sparse attention, block pruning.

    A block's score is the sum of its entries' (for magnitudes: its L1 norm); ``rule`` allocates blocks.

    Args:
        size: (rows, columns) of a block; the scores' shape must be a multiple.
        rule: any rule over the blocks. Its budget counts blocks per block row; a density is a density either way.
    """

    size: tuple[int, int]
    rule: Rule

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"Blocks: size={self.size}: both sides must be at least 1")

    def __call__(self, scores: Float[Tensor, "rows columns"], valid: Bool[Tensor, "rows"] | None = None) -> Allocation:
        """Allocate. ``valid`` must agree within a block row."""
        check_scores(scores, valid=valid)
        high, wide = self.size
        rows, columns = scores.shape
        if rows % high or columns % wide:
            raise ValueError(f"Blocks: scores {rows} x {columns} are not a multiple of size={self.size}: pad them")
        summed = scores.detach() if valid is None else scores.detach().where(valid.unsqueeze(1), 0.0)
        blocks = summed.reshape(rows // high, high, columns // wide, wide).sum(dim=(1, 3))
        block_valid = None if valid is None else self._valid_blocks(valid)
        won = self.rule(blocks, block_valid)
        # Each of a block row's rows holds every winning block's columns.
        widths = won.winners_per_row().repeat_interleave(high)
        crow = torch.zeros(rows + 1, dtype=torch.int64, device=scores.device)
        torch.cumsum(widths * wide, dim=0, out=crow[1:])
        row_of_winner = torch.repeat_interleave(widths)
        start = won.crow_indices[:-1].repeat_interleave(high)[row_of_winner]
        place = torch.arange(row_of_winner.numel(), device=scores.device) - (crow[:-1] // wide)[row_of_winner]
        within = torch.arange(wide, device=scores.device)
        col = (won.col_indices[start + place].unsqueeze(1) * wide + within).flatten()
        return Allocation(crow, col, scores[row_of_winner.repeat_interleave(wide), col], (rows, columns))

    def mean_budget(self, columns: int) -> float | None:
        """Mean winners per row."""
        blocks = self.rule.mean_budget(columns // self.size[1])
        return None if blocks is None else blocks * self.size[1]

    def at_inference(self, *calibration: float | Tensor) -> "Blocks":
        """Blocks under the inner rule's inference form."""
        return Blocks(self.size, self.rule.at_inference(*calibration))  # type: ignore[attr-defined]

    def _valid_blocks(self, valid: Bool[Tensor, "rows"]) -> Bool[Tensor, "blocks"]:
        by_block = valid.view(-1, self.size[0])
        if bool((by_block.any(dim=1) != by_block.all(dim=1)).any()):
            raise ValueError("Blocks: valid differs within a block of rows: pad whole blocks")
        return by_block.all(dim=1)


RULES = {rule.__name__: rule for rule in (TokenChoice, FeatureChoice, MutualChoice, NofM, Threshold, Blocks)}

__all__ = [
    "RULES",
    "Blocks",
    "FeatureChoice",
    "MutualChoice",
    "NofM",
    "Rule",
    "Selection",
    "Threshold",
    "TokenChoice",
    "Uniform",
    "Zipf",
    "check_scores",
    "densities",
]
