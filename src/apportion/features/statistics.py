"""What a dictionary remembers about its features while it trains, in buffers that are saved with it."""

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn

from apportion.allocate import Allocation


class FeatureStatistics(nn.Module):
    """Running densities, silence and thresholds of every feature.

    Densities are means at first and exponential averages later: the weight of a batch is ``1 / (batches so far)`` until
    that falls to ``1 / horizon``. So early estimates carry no bias towards the zeros they started from.

    Args:
        n_features: number of features.
        horizon: memory of the averages, in batches.
    """

    batches_seen: Int64[Tensor, ""]
    tokens_seen: Int64[Tensor, ""]
    tokens_since_fired: Int64[Tensor, "features"]
    density: Float[Tensor, "features"]
    demand: Float[Tensor, "features"]
    demand_batches: Int64[Tensor, ""]
    threshold: Float[Tensor, "features"]
    underused: Bool[Tensor, "features"]
    log_penalty: Float[Tensor, ""]

    def __init__(self, n_features: int, horizon: int = 200) -> None:
        super().__init__()
        self.horizon = horizon
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("tokens_since_fired", torch.zeros(n_features, dtype=torch.int64))
        self.register_buffer("density", torch.zeros(n_features))
        self.register_buffer("demand", torch.zeros(n_features))
        self.register_buffer("demand_batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("threshold", torch.full((n_features,), torch.nan))
        self.register_buffer("underused", torch.zeros(n_features, dtype=torch.bool))
        self.register_buffer("log_penalty", torch.zeros(()))

    @torch.no_grad()
    def update(self, codes: Allocation, shared_threshold: bool) -> None:
        """Take in the codes of a training batch (positive values only).

        ``shared_threshold``: whether the smallest positive value counts for all features (Mutual Choice) or each
        feature's for itself (Feature Choice). The running minimum is biased low, so it admits slightly more than the
        budget; ``SparseAutoencoder.calibrate`` replaces it by the exact quantile.
        """
        rows = self._rows(codes)
        if rows == 0:
            return
        counts = self._counts(codes)
        self.batches_seen += 1
        self.tokens_seen += rows
        self.density.lerp_(counts / rows, self._weight(self.batches_seen))
        self.tokens_since_fired += rows
        self.tokens_since_fired[counts > 0] = 0
        smallest = self._smallest(codes, shared_threshold)
        known = ~self.threshold.isnan()
        averaged = torch.lerp(self.threshold, smallest, self._weight(self.batches_seen))
        updated = torch.where(known, averaged, smallest)
        self.threshold.copy_(torch.where(smallest.isfinite(), updated, self.threshold))

    @torch.no_grad()
    def update_demand(self, codes: Allocation) -> None:
        """Take in what features would get if they competed freely (Mutual Choice): Feature Choice ranks by it."""
        self.demand_batches += 1
        self.demand.lerp_(self._counts(codes) / self._rows(codes), self._weight(self.demand_batches))

    def dead(self, tokens: int) -> Bool[Tensor, "features"]:
        """Features that have not fired in the last ``tokens`` tokens."""
        return self.tokens_since_fired >= tokens

    def of_all(self, values: Shaped[Tensor, "features"]) -> Shaped[Tensor, "all_features"]:
        """Values of the features here as those of all features: the same, unless others are held elsewhere."""
        return values

    def of_these(self, values: Shaped[Tensor, "all_features"]) -> Shaped[Tensor, "features"]:
        """Of values of all features those of the features here."""
        return values

    def _weight(self, batches: Tensor) -> float:
        return max(1 / int(batches), 1 / self.horizon)

    def _rows(self, codes: Allocation) -> int:
        return codes.shape[0]

    def _counts(self, codes: Allocation) -> Int64[Tensor, "features"]:
        return codes.winners_per_column()

    def _smallest(self, codes: Allocation, shared: bool) -> Float[Tensor, "features"]:
        """The smallest value that each feature fired with, or any did if it is shared; infinite where there is none."""
        smallest = torch.full_like(self.threshold, torch.inf)
        if shared:
            return codes.values.min().expand_as(smallest) if codes.nnz else smallest
        return smallest.scatter_reduce_(0, codes.col_indices, codes.values.to(smallest.dtype), "amin")
