"""What choosing keys for one token is, in plain torch: score everything, let the heads of a group agree, sort."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.ops.label_scores.reference import label_scores, pack_labels, unpack_labels
from apportion.ops.select.reference import select_rows


def choose_by_labels(
    queries: Float[Tensor, "batch heads channels"],
    labels: Tensor,
    ranges: Float[Tensor, "batch rows tokens 2"] | None,
    bits: int,
    count: int,
    sinks: int,
    recent: int,
    groups: int,
    group: str,
) -> Int[Tensor, "batch lists count"]:
    """See ``apportion.ops.key_choice.choose_by_labels``."""
    asked = queries[:, :, None]
    if ranges is not None:
        channels = queries.shape[-1]
        asked = unpack_labels(*pack_labels(asked, bits), bits, channels)
        labels = unpack_labels(labels, ranges, bits, channels)
    scores = label_scores(asked, labels)[:, :, 0]
    if group != "head":
        of_group = scores.view(len(scores), groups, queries.shape[1] // groups, scores.shape[-1])
        scores = of_group.mean(2) if group == "mean" else of_group.amax(2)
    scores[..., :sinks] = torch.inf
    scores[..., max(0, scores.shape[-1] - recent) :] = torch.inf
    return _best(scores, count)


def picked(
    queries: Float[Tensor, "batch heads width"], places: Int[Tensor, " all_channels"] | None
) -> Float[Tensor, "batch heads channels"]:
    """The numbers of queries that labels have; see ``apportion.ops.key_choice.choose_by_labels``."""
    if places is None:
        return queries
    return queries.flatten(1).index_select(1, places).view(*queries.shape[:2], -1)


def choose_chunks(
    queries: Float[Tensor, "batch heads width"],
    means: Float[Tensor, "batch groups chunks width"],
    candidates: Bool[Tensor, "batch groups chunks"],
    count: int,
    scaling: float,
    softcap: float | None,
) -> Int[Tensor, "batch groups count"]:
    """See ``apportion.ops.key_choice.choose_chunks``."""
    batch, heads, _ = queries.shape
    groups, chunks = means.shape[1:3]
    products = label_scores(queries[:, :, None], means).view(batch, groups, heads // groups, chunks) * scaling
    if softcap is not None:
        products = softcap * torch.tanh(products / softcap)
    weights = products.masked_fill(~candidates[:, :, None], -torch.inf).softmax(-1).amax(2)
    return _best(weights.masked_fill(~candidates, -1.0), count)


def _best(scores: Float[Tensor, "batch lists places"], count: int) -> Int[Tensor, "batch lists count"]:
    _, winners = select_rows(scores.reshape(-1, scores.shape[-1]), count)
    return winners.view(*scores.shape[:2], count)
