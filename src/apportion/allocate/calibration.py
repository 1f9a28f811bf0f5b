"""From a batch rule to thresholds: the exact quantiles of a stream of scores, in bounded memory."""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from apportion.allocate.quotas import whole_quotas
from apportion.allocate.rules import FeatureChoice, MutualChoice, check_scores
from apportion.ops import select_above


class ThresholdCalibrator:
    """Find the threshold(s) at which a stream of rows gets the budget of a batch rule, exactly.

    For ``MutualChoice`` it is one number: the score that ``budget * rows`` scores exceed. For ``FeatureChoice`` it is
    one a column: the score that ``share_i * rows`` of its scores exceed. Feed every batch of scores (or only those that
    can matter, as entries) to ``update``, then call ``finish``.

    Only the best ``wanted + 1`` scores of every group are kept, so memory is that of the winners: about
    ``24 * budget * rows`` bytes at the peak. Thresholds lie halfway between the last winner and the first loser, and
    are at least ``floor`` (0: a rectified code never counts what is not positive).

    Args:
        rule: ``MutualChoice`` or ``FeatureChoice``.
        columns: number of candidates.
        rows: how many rows will come in all; the number kept depends on it.
        share: for ``FeatureChoice``, densities by column if they are not the rule's own by index.
        floor: no threshold lies below.
    """

    def __init__(
        self,
        rule: MutualChoice | FeatureChoice,
        columns: int,
        rows: int,
        share: Float64[Tensor, "columns"] | None = None,
        floor: float = 0.0,
    ) -> None:
        if rows < 1:
            raise ValueError(f"rows={rows}: calibration needs at least one row")
        self.columns, self.rows, self.floor = columns, rows, floor
        self._seen = 0
        self._per_column = isinstance(rule, FeatureChoice)
        if isinstance(rule, FeatureChoice):
            wanted = (rule.share(columns) if share is None else share.cpu()) * rows
            self._wanted = whole_quotas(wanted, round(float(wanted.sum())), rows)
        else:
            self._wanted = torch.tensor([round(rule.mean_budget(columns) * rows)])
        self._scores = torch.empty(0)
        self._groups = torch.empty(0, dtype=torch.int64)
        self._cut = torch.full((self._wanted.numel(),), float(floor))
        self._limit = 2 * int(self._wanted.sum() + self._wanted.numel()) + 1_000_000

    def cut(self) -> Float[Tensor, "columns"]:
        """Scores at or below this (per column) can no longer matter: no need to bring them."""
        return self._cut.expand(self.columns) if self._cut.numel() == 1 else self._cut

    def update(self, scores: Float[Tensor, "rows columns"]) -> None:
        """Take in a batch of scores."""
        check_scores(scores)
        scores = scores.detach().float()
        crow, col = select_above(scores, self.cut().to(scores.device))
        rows = torch.repeat_interleave(crow.diff(), output_size=col.numel())
        self.update_entries(col, scores[rows, col], scores.shape[0])

    def update_entries(self, columns: Tensor, scores: Float[Tensor, "entries"], rows: int) -> None:
        """Take in the entries of ``rows`` rows that lie above ``cut()``; the rest of their scores lie at or below."""
        self._seen += rows
        group = columns.cpu() if self._per_column else torch.zeros(columns.numel(), dtype=torch.int64)
        self._scores = torch.cat([self._scores, scores.detach().float().cpu()])
        self._groups = torch.cat([self._groups, group])
        if self._scores.numel() > self._limit:
            self._trim()

    def finish(self) -> float | Float[Tensor, "columns"]:
        """The threshold, or one a column.

        Raises:
            ValueError: fewer or more rows came than were announced.
        """
        if self._seen != self.rows:
            raise ValueError(f"{self._seen} rows came, but rows={self.rows} were announced: the quantiles would be off")
        last, first_loser = self._trim()
        # Halfway leaves room on both sides for scores that are computed again with other rounding.
        halfway = first_loser + (last - first_loser) / 2
        # Between neighbouring floats there is no halfway, and rounding up would cost the last winner its place.
        theta = torch.where(halfway < last, halfway, first_loser).clamp(min=self.floor)
        return theta if self._per_column else float(theta)

    def _trim(self) -> tuple[Tensor, Tensor]:
        """Keep the best ``wanted + 1`` of each group; return each group's last winner and first loser."""
        order = self._scores.sort(descending=True, stable=True).indices
        order = order[self._groups[order].sort(stable=True).indices]
        scores, groups = self._scores[order], self._groups[order]
        counts = torch.bincount(groups, minlength=self._wanted.numel())
        starts = counts.cumsum(0) - counts
        rank = torch.arange(groups.numel()) - starts[groups]
        first_loser = self._at(scores, starts, counts, self._wanted, float(self.floor))
        # No last winner (inf): a group that wants none, or that has fewer candidates than it wants.
        last = self._at(scores, starts, counts, self._wanted - 1, math.inf)
        keep = rank <= self._wanted[groups]
        self._scores, self._groups = scores[keep], groups[keep]
        self._cut = torch.where(counts > self._wanted, first_loser, self._cut)
        return last, first_loser

    @staticmethod
    def _at(scores: Tensor, starts: Tensor, counts: Tensor, rank: Tensor, otherwise: float) -> Tensor:
        there = (rank >= 0) & (rank < counts)
        found = torch.full((starts.numel(),), otherwise)
        found[there] = scores[(starts + rank)[there]]
        return found
