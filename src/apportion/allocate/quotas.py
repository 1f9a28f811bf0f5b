"""How many rows each column may take: profiles, whole-number quotas, and quotas over many batches."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn


@dataclass(frozen=True)
class Uniform:
    """Every column gets the same share."""

    def weights(self, columns: int) -> Float64[Tensor, "columns"]:
        """Unnormalised share by rank: ones."""
        return torch.ones(columns, dtype=torch.float64)


@dataclass(frozen=True)
class Zipf:
    """The column of rank r (from 1) gets a share proportional to ``(r + offset) ** -exponent`` (Zipf-Mandelbrot).

    ``offset=0`` is plain Zipf. Which exponent and offset the paper (arXiv 2411.02124) used could not be confirmed;
    the default is Zipf's own law, and ``apportion.features.fit_zipf`` measures both on a trained dictionary.
    """

    exponent: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not self.exponent >= 0:
            raise ValueError(f"exponent={self.exponent}: use a number >= 0 (1 is Zipf's law, 0 is uniform)")
        if not self.offset >= 0:
            raise ValueError(f"offset={self.offset}: use a number >= 0")

    def weights(self, columns: int) -> Float64[Tensor, "columns"]:
        """Unnormalised share by rank."""
        ranks = torch.arange(1, columns + 1, dtype=torch.float64)
        return (ranks + self.offset) ** -self.exponent


Profile = Uniform | Zipf


def densities(weights: Float64[Tensor, "columns"], budget: float) -> Float64[Tensor, "columns"]:
    """Scale shares to densities in [0, 1] that add up to ``budget``.

    A density above 1 is capped, and what the column cannot take goes to the others in proportion.

    Args:
        weights: shares in any unit, finite and >= 0.
        budget: mean winners per row, at most the number of columns whose share is positive.
    """
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError("weights: a share is negative, infinite or NaN; give finite shares >= 0")
    if not 0 < budget <= weights.numel():
        raise ValueError(f"budget={budget}: must be above 0 and at most the number of columns, {weights.numel()}")
    positive = int((weights > 0).sum())
    if budget > positive:
        raise ValueError(
            f"budget={budget}: only {positive} columns have a positive share; lower it, or flatten the shares"
        )
    order = weights.sort(descending=True)
    # With the c largest capped at 1, the rest scale to budget - c; the smallest c for which none exceeds 1 is right.
    tail = order.values.flip(0).cumsum(0).flip(0)
    capped = torch.arange(weights.numel(), dtype=torch.float64)
    scale = (budget - capped) / tail
    fits = (order.values * scale <= 1 + 1e-12) & (scale >= 0)
    first = int(fits.to(torch.int8).argmax())
    scaled = order.values * scale[first]
    scaled[:first] = 1.0
    return torch.empty_like(weights).index_copy_(0, order.indices, scaled.clamp(max=1.0))


def whole_quotas(exact: Float64[Tensor, "columns"], total: int, cap: int) -> Int64[Tensor, "columns"]:
    """Round quotas to whole numbers that add up to ``total``: largest remainder (Hamilton), ties to the lower column.

    Args:
        exact: wanted quotas, >= 0, adding up to about ``total``.
        total: what the whole numbers add up to.
        cap: no quota exceeds it (the number of rows).
    """
    if not bool(exact.isfinite().all()):
        raise ValueError("exact: a quota is NaN or infinite; give finite quotas")
    if not 0 <= total <= cap * exact.numel():
        raise ValueError(f"total={total}: {exact.numel()} columns of at most {cap} rows each cannot hold that many")
    quotas = exact.clamp(0, cap).floor().long()
    missing = total - int(quotas.sum())
    while missing != 0:
        step = 1 if missing > 0 else -1
        room = quotas < cap if step > 0 else quotas > 0
        remainder = (exact - quotas) * step
        remainder[~room] = -torch.inf
        # Ties favour the lower column: it is the first to get one more and the last to give one up.
        order = remainder if step > 0 else remainder.flip(0)
        chosen = order.sort(descending=True, stable=True).indices[: min(abs(missing), int(room.sum()))]
        quotas[chosen if step > 0 else quotas.numel() - 1 - chosen] += step
        missing -= step * chosen.numel()
    return quotas


class QuotaLedger(nn.Module):
    """Whole quotas for a stream of batches: exact totals in every batch, and in the long run exact shares.

    Quotas are often below one row a batch (a million features, 32 winners, 4096 rows: 0.13 each), so rounding within a
    batch would starve the same columns for ever. The ledger keeps what each column was promised and what it was given.
    In every batch a column is due the whole part of its promise; what is left of the batch's total goes to the columns
    whose next due date comes first. Every batch spends its total exactly, and as long as the shares keep their
    proportions, promised and given never differ by one row or more, whatever the sizes of the batches (earliest
    deadline first, Steiner and Yeomans, *Management Science* 39(6), 1993: the same problem as just-in-time sequencing
    and as Tijdeman's chairman assignment). When shares change, more may fall due at once than a batch can give; then
    the columns furthest behind come first.

    The state is in buffers, so that it is saved with the module that holds it.
    """

    promised: Float64[Tensor, "columns"]
    given: Int64[Tensor, "columns"]

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.register_buffer("promised", torch.zeros(columns, dtype=torch.float64))
        self.register_buffer("given", torch.zeros(columns, dtype=torch.int64))

    def draw(self, share: Float64[Tensor, "columns"], rows: int, total: int) -> Int64[Tensor, "columns"]:
        """Quotas of the next batch.

        Args:
            share: density of each column, adding up to ``total / rows``.
            rows: rows of the batch, the cap of every quota.
            total: what the quotas add up to.
        """
        device = self.promised.device
        exact = share.to(device) * rows
        self.promised += exact
        # Sums of thousands of batches carry rounding: a promise within 1e-9 of a whole number is that number.
        due = ((self.promised + 1e-9).floor().long() - self.given).clamp(0, rows)
        open_to_more = ((self.promised - 1e-9).ceil().long() - self.given).clamp(0, rows) > due
        deadline = (self.given + due + 1 - self.promised) / exact.clamp(min=1e-300)
        quotas = due + self._earliest(deadline, open_to_more, total - int(due.sum()))
        if int(quotas.sum()) != total:  # shares changed on the way and promises bunch up: serve the furthest behind
            quotas = whole_quotas(self.promised - self.given, total, rows)
        self.given += quotas
        return quotas

    @staticmethod
    def _earliest(
        deadline: Float64[Tensor, "columns"], eligible: Bool[Tensor, "columns"], count: int
    ) -> Int64[Tensor, "columns"]:
        granted = torch.zeros_like(eligible, dtype=torch.int64)
        if count <= 0:
            return granted
        order = deadline.masked_fill(~eligible, torch.inf).sort(stable=True).indices[: min(count, int(eligible.sum()))]
        return granted.index_fill_(0, order, 1)


def expected_share(profile: Profile, columns: int, budget: float) -> Float[Tensor, "columns"]:
    """Density by rank under a profile, adding up to ``budget`` winners a row."""
    return densities(profile.weights(columns), budget)
