"""Stores that forget: what is left of a prompt after its key-value heads have each kept their best tokens.

Positions are kept as they were: a key stays rotated by its own position, and later tokens go on counting where the
prompt ended. Forgetting saves bytes; what was forgotten no later question can ask for.
"""

from abc import abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.keys.budget import KeyBudget
from apportion.keys.stores import ExactStore


class EvictingStore(ExactStore):
    """Keeps the best tokens of a prompt for each key-value head when it is closed, and every token that comes later.

    Args:
        budget: tokens kept of the prompt, its sinks and recent ones first.
    """

    def __init__(self, budget: KeyBudget) -> None:
        super().__init__()
        self.budget = budget

    @abstractmethod
    def scores(self) -> Float[Tensor, "batch groups tokens"]:
        """How much each token is worth keeping; what stands at padding does not matter."""

    def capacity(self, tokens: int) -> int:
        """How many of a prompt's tokens are kept."""
        return self.budget.tokens(tokens)

    @override
    def close(self) -> None:
        if self.closed:
            return
        super().close()
        if not self.length:
            return
        there = self.real.sum(-1)
        wanted = torch.tensor([self.capacity(tokens) for tokens in there.tolist()], device=there.device)
        if int((there - wanted).max()) > 0:
            keep_best(self, self.scores(), wanted, self.budget.sinks, self.budget.recent)


def keep_best(
    store: ExactStore,
    scores: Float[Tensor, "batch groups tokens"],
    wanted: Int[Tensor, " batch"],
    sinks: int = 0,
    recent: int = 0,
) -> None:
    """Evict all but the best real tokens of each key-value head.

    Args:
        store: what to evict from.
        scores: of its tokens.
        wanted: tokens to keep of each row, at most its real ones and at least ``sinks + recent`` where it has them.
        sinks: first real tokens of each row that are kept whatever their score.
        recent: last real tokens likewise.
    """
    real = store.real
    place = real.cumsum(-1)  # from 1, of the real tokens
    forced = real & ((place <= sinks) | (place > place[:, -1:] - recent))
    scores = scores.masked_fill(~real[:, None], -torch.inf).masked_fill(forced[:, None], torch.inf)
    most = int(wanted.max())
    best = scores.topk(most, dim=-1).indices
    rank = torch.arange(most, device=scores.device)
    # Rows that keep fewer hold padding in front, so that all their heads have it in the same places.
    kept = torch.where(rank < wanted[:, None, None], best, -1).sort(-1).values
    store.keep_tokens(kept.clamp_min(0), rank >= most - wanted[:, None])
