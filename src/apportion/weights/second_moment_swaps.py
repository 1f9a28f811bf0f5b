"""Swaps of pruned for kept weights that make a layer's squared error smaller, the one true objective of a layer.

DSnoT swaps for the mean of the output alone. With the second moments ``M`` of the inputs the squared error of a row is
``d M d``, where ``d`` is the row's pruned weights, and what a swap changes of it has a closed form (as in SparseSwaps,
arXiv 2512.10922): with ``u = M d``, dropping weight q and reviving weight k adds

    2 W_q u_q + W_q^2 M_qq - 2 W_k u_k + W_k^2 M_kk - 2 W_q W_k M_qk

Departure: of each row's kept and pruned weights, only the 16 that would be best alone are tried in pairs, unless
``candidates`` is None; the SparseSwaps paper tries all. In groups (N:M) all pairs are tried.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# A swap that saves less of the row's first error than this is rounding.
_TOO_LITTLE = 1e-6


def swap_for_second_moment(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    moment: Float[Tensor, "d_in d_in"],
    *,
    cycles: int,
    candidates: int | None = 16,
    group: int | None = None,
) -> tuple[Bool[Tensor, "out in"], Int[Tensor, " rows"]]:
    """Make the best swap of each row, over and over.

    Args:
        weight: of the layer.
        mask: the first one.
        moment: ``x x^T`` of the inputs, a mean.
        cycles: swaps of a row at most.
        candidates: kept and pruned weights of a row that are tried in pairs; None tries all.
        group: consecutive weights that keep their number (N:M).

    Returns:
        The mask, and how many swaps each row has made.
    """
    mask = mask.clone()
    rows = torch.arange(len(weight), device=weight.device)
    swaps = torch.zeros_like(rows)
    pruned = torch.where(mask, 0, weight)
    reached = pruned @ moment
    enough = -_TOO_LITTLE * (pruned * reached).sum(dim=1)
    own = weight.square() * moment.diagonal()
    for _ in range(cycles):
        crossed = 2 * weight * reached
        drop_cost = torch.where(mask, own + crossed, math.inf)
        revive_cost = torch.where(mask, math.inf, own - crossed)
        if group is None:
            dropped, revived, cost = _best_pair(weight, moment, drop_cost, revive_cost, candidates)
        else:
            dropped, revived, cost = _best_pair_in_groups(weight, moment, drop_cost, revive_cost, group)
        made = cost < enough
        if not bool(made.any()):
            break
        at, dropped, revived = rows[made], dropped[made], revived[made]
        reached[at] += weight[at, dropped, None] * moment[dropped] - weight[at, revived, None] * moment[revived]
        mask[at, revived] = True
        mask[at, dropped] = False
        swaps += made
    return mask, swaps


def _best_pair(
    weight: Tensor, moment: Tensor, drop_cost: Tensor, revive_cost: Tensor, candidates: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    count = weight.shape[1] if candidates is None else min(candidates, weight.shape[1])
    drops = drop_cost.topk(count, dim=1, largest=False)
    revives = revive_cost.topk(count, dim=1, largest=False)
    both = moment[drops.indices.unsqueeze(2), revives.indices.unsqueeze(1)]
    both = both * weight.gather(1, drops.indices).unsqueeze(2) * weight.gather(1, revives.indices).unsqueeze(1)
    costs = drops.values.unsqueeze(2) + revives.values.unsqueeze(1) - 2 * both
    cost, pair = costs.flatten(1).min(dim=1)
    rows = torch.arange(len(weight), device=weight.device)
    return drops.indices[rows, pair // count], revives.indices[rows, pair % count], cost


def _best_pair_in_groups(
    weight: Tensor, moment: Tensor, drop_cost: Tensor, revive_cost: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = weight.shape
    places = torch.arange(width, device=weight.device).view(-1, group)
    within = moment[places.unsqueeze(2), places.unsqueeze(1)]
    weights = weight.view(rows, -1, group)
    both = within * weights.unsqueeze(3) * weights.unsqueeze(2)
    costs = drop_cost.view_as(weights).unsqueeze(3) + revive_cost.view_as(weights).unsqueeze(2) - 2 * both
    cost, pair = costs.flatten(1).min(dim=1)
    start, pair = pair // group**2 * group, pair % group**2
    return start + pair // group, start + pair % group, cost
