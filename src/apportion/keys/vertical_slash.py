"""Blocks by columns and diagonals of the last queries' attention: what MInference reads of a prompt, without training.

Jiang and others, *MInference 1.0*, 2024, arXiv 2407.02490: many heads attend to a few tokens from everywhere (vertical
lines) and at a few distances (slashes), and the last queries of a prompt show which. Here a tile's score is the larger
of the two shares of attention that they promise it, so that the better line wins where the paper has a count of either
kind for each head, found offline.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.blocks import BlockGrid, BlockScorer
from apportion.keys.stores import Store
from apportion.models.key_memory import Step
from apportion.ops.attend import causal, reference


class VerticalSlashBlocks(BlockScorer):
    """The blocks through which the strongest columns and diagonals of the last queries' attention go.

    Args:
        last: how many queries are looked at, as the paper's 64; of a chunk, its own last ones.

    Raises:
        InputError: ``last`` is below 1.
    """

    def __init__(self, last: int = 64) -> None:
        if last < 1:
            raise InputError(f"last={last}: at least 1 query must be looked at")
        self.last = last

    @override
    def scores(self, step: Step, store: Store, grid: BlockGrid) -> Float[Tensor, "batch heads query_blocks key_blocks"]:
        keys, _ = store.read()
        last = min(self.last, step.new)
        products = step.queries[:, :, -last:] @ keys.repeat_interleave(step.group, dim=1).transpose(-1, -2)
        allowed = causal(last, grid.tokens, keys.device) & store.real[:, None, None, :]
        weights = reference.weigh(products, allowed, step.scaling, step.softcap) / last
        short = len(grid.key_starts) * grid.size - grid.tokens
        columns = torch.nn.functional.pad(weights.sum(2), (0, short)).unflatten(-1, (-1, grid.size)).sum(-1)
        tiles = _tiles_of_distances(_by_distance(weights), grid)
        return torch.maximum(columns[:, :, None], tiles)


def _by_distance(
    weights: Float[Tensor, "batch heads last tokens"],
) -> Float[Tensor, "batch heads tokens"]:
    """The weight at each distance between query and key, sums over the queries; these are the last of the tokens."""
    last, tokens = weights.shape[-2:]
    device = weights.device
    distance = torch.arange(tokens - last, tokens, device=device)[:, None] - torch.arange(tokens, device=device)
    # Later keys have no weight: where they are counted does not matter.
    places = distance.clamp_min(0).flatten().expand(*weights.shape[:2], -1)
    return torch.zeros_like(weights[:, :, 0]).scatter_add_(-1, places, weights.flatten(2))


def _tiles_of_distances(
    shares: Float[Tensor, "batch heads tokens"], grid: BlockGrid
) -> Float[Tensor, "batch heads query_blocks key_blocks"]:
    """What a query attends to in each tile, on average, if its attention is a matter of distance alone."""
    starts = grid.query_starts[:, None] - grid.key_starts
    between, which = starts.unique(return_inverse=True)
    distances = torch.arange(grid.tokens)
    # In a tile whose blocks begin ``b`` apart, ``1 - |d - b| / size`` of the queries have a key at distance ``d``.
    part = (1 - (distances - between[:, None]).abs() / grid.size).clamp_min(0).to(shares)
    return (shares @ part.T)[..., which.to(shares.device)]
