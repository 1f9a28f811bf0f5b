"""The layers that the students of the study `sea` exchange: dense, estimated, chosen and linear attention."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from apportion.keys.performer import PerformerFeatures, attend_linearly_causal
from apportion.keys.sea import SeaAttention, SeaOutput, SeaSettings
from apportion.keys.sea_distillation import dense_attention
from apportion.keys.sea_lists import KeyLists, attend_lists

SINKS = 1


@dataclass(frozen=True, eq=False)
class Attended:
    """What a layer of the study gives.

    Attributes:
        output: of the layer.
        context: of its heads.
        queries: of its heads.
        keys: of its heads.
        weights: of dense attention; None for others.
        lists: keys that were read; None for dense and linear attention.
        sea: all that SEA gives; None for others.
    """

    output: Float[Tensor, "batch n width"]
    context: Float[Tensor, "batch heads n d"]
    queries: Float[Tensor, "batch heads n d"]
    keys: Float[Tensor, "batch heads n d"]
    weights: Float[Tensor, "batch heads n n"] | None = None
    lists: KeyLists | None = None
    sea: SeaOutput | None = None


class Layer(nn.Module):
    """Projections, and a way to attend that students exchange.

    Args:
        width: of the residual stream.
        heads: of the layer.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.into = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.attend: nn.Module = Dense()

    @override
    def forward(self, x: Float[Tensor, "batch n width"]) -> Attended:
        queries, keys, values = (
            each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in self.into(x).chunk(3, dim=-1)
        )
        context, extra = self.attend(queries, keys, values)
        return Attended(self.out(context.transpose(1, 2).flatten(2)), context, queries, keys, **extra)


def everything(queries: Tensor) -> Tensor:
    """Nothing is padded: bool [batch, n]."""
    return torch.ones(queries.shape[0], queries.shape[2], dtype=torch.bool, device=queries.device)


class Dense(nn.Module):
    """Causal attention over everything."""

    @override
    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, dict[str, Any]]:
        weights = dense_attention(queries, keys, everything(queries), True)
        return weights @ values, {"weights": weights}


class Estimated(nn.Module):
    """SEA; ``budget`` may be set to other keys than the settings'."""

    def __init__(self, settings: SeaSettings) -> None:
        super().__init__()
        self.sea = SeaAttention(settings)
        self.budget: int | None = None

    @override
    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, dict[str, Any]]:
        output = self.sea(queries, keys, values, budget=self.budget)
        return output.context, {"lists": output.lists, "sea": output}


class Chosen(nn.Module):
    """Exact attention over keys that scores choose, as many for each head."""

    def __init__(self, budget: int, scores: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.budget, self.scores = budget, scores

    @override
    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, dict[str, Any]]:
        scores = self.scores(queries.detach(), keys.detach())
        n = scores.shape[-1]
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=scores.device).triu(1), -torch.inf)
        best = scores.topk(min(self.budget, n), dim=-1)
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best.indices, best.values > -torch.inf)
        lists = KeyLists.of_mask(mask)
        return attend_lists(queries, keys, values, lists, queries.shape[-1] ** -0.5), {"lists": lists}


def recent(queries: Tensor, keys: Tensor) -> Tensor:
    """Scores by which sinks come first and then the newest keys."""
    n = keys.shape[2]
    age = torch.arange(n, dtype=torch.float32, device=keys.device)
    age[:SINKS] = n
    return age.expand(*queries.shape[:3], n)


def products(queries: Tensor, keys: Tensor) -> Tensor:
    """Scores that are what attention itself compares."""
    return queries @ keys.transpose(-1, -2)


def at_random(queries: Tensor, keys: Tensor) -> Tensor:
    """Scores that are drawn anew at every pass."""
    return torch.rand(*queries.shape[:3], keys.shape[2], device=keys.device)


class Linear(nn.Module):
    """Performer's causal attention, with as many features as SEA's estimator has."""

    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.features = PerformerFeatures(width, SeaSettings(1, width, feature_factor=factor).features, "relu")

    @override
    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, dict[str, Any]]:
        self.features.maybe_redraw()
        features = self.features(queries), self.features(keys)
        return attend_linearly_causal(*features, values, everything(queries))[0], {}
