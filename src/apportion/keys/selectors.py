"""Which keys a query reads: the first axis of a key method, and the selectors that every comparison shows.

`Oracle` is the upper bound, `SinksAndRecent` what a method has to beat, `RandomKeys` the floor.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.budget import KeyBudget
from apportion.keys.selection import KeySelection
from apportion.keys.stores import Store
from apportion.models.key_memory import Step
from apportion.ops import select_rows
from apportion.ops.attend import causal

GROUP_POLICIES = ("head", "max", "mean", "max of softmax")


class Selector(ABC):
    """Which tokens of a store the queries of one layer read. It may keep a side table of the tokens."""

    def extend(self, step: Step, store: Store) -> None:
        """Take in the newest tokens, which the store has taken in already."""
        return None

    def close(self, store: Store) -> None:
        """The prompt is complete; the store has been told already."""
        return None

    @abstractmethod
    def select(self, step: Step, store: Store) -> KeySelection | None:
        """What the queries of a step read, of all tokens of the store, the step's own included; None: everything.

        A query must not read a later token, nor padding.
        """

    def bytes_held(self) -> int:
        """What the side table occupies."""
        return 0

    def bytes_scanned(self) -> int:
        """What one decoding step touches in order to choose, of all rows of the batch."""
        return 0

    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows of the batch, in this order."""
        return None


class TopKeys(Selector):
    """The tokens with the best scores, sinks and recent tokens first: what most selectors are.

    Args:
        budget: how many.
        group: how the query heads of a key-value head agree. ``head``: each reads a list of its own. ``max`` and
            ``mean``: all read the list of the largest or the mean score; ``max of softmax`` compares the heads after a
            softmax over tokens. What is agreed upon costs fewer real reads and some quality.
    """

    def __init__(self, budget: KeyBudget, group: str = "head") -> None:
        if group not in GROUP_POLICIES:
            raise InputError(f"group={group!r}: one of {', '.join(GROUP_POLICIES)}")
        self.budget, self.group = budget, group

    @abstractmethod
    def scores(self, step: Step, store: Store) -> Float[Tensor, "batch heads new tokens"]:
        """How much each query wants each token of the store; where a query sees a token is not its business."""

    @override
    def select(self, step: Step, store: Store) -> KeySelection | None:
        length = store.length
        if self.budget.tokens(length) >= length:
            return None
        seen = visible(step, store)
        scores = across_group(self.scores(step, store), seen, step.group, self.group)
        return best_tokens(scores, seen, self.budget)


class Oracle(TopKeys):
    """The tokens with the largest products of query and key: what every cheaper score tries to be."""

    @override
    def scores(self, step: Step, store: Store) -> Float[Tensor, "batch heads new tokens"]:
        keys, _ = store.read()
        queries = store.queries(step.queries)
        return queries @ keys.repeat_interleave(step.group, dim=1).transpose(-1, -2) * step.scaling


class SinksAndRecent(TopKeys):
    """The first tokens and the newest ones (StreamingLLM's pattern, with the positions left as they are).

    Args:
        budget: how many; what is not ``sinks`` goes to the newest tokens. 4 sinks unless the budget says otherwise.
    """

    def __init__(self, budget: KeyBudget) -> None:
        sinks = budget.sinks or min(4, budget.keys or 4)
        super().__init__(KeyBudget(budget.keys, budget.share, sinks, budget.recent), "max")

    @override
    def scores(self, step: Step, store: Store) -> Float[Tensor, "batch heads new tokens"]:
        shape = (step.queries.shape[0], step.queries.shape[1], step.new, store.length)
        return torch.arange(store.length, device=step.queries.device, dtype=torch.float32).expand(shape)


class RandomKeys(TopKeys):
    """Tokens drawn anew for every query, the query's own always among them."""

    def __init__(self, budget: KeyBudget, seed: int = 0) -> None:
        super().__init__(KeyBudget(budget.keys, budget.share, budget.sinks, max(1, budget.recent)), "head")
        self._generator = torch.Generator().manual_seed(seed)

    @override
    def scores(self, step: Step, store: Store) -> Float[Tensor, "batch heads new tokens"]:
        shape = (step.queries.shape[0], step.queries.shape[1], step.new, store.length)
        return torch.rand(shape, generator=self._generator).to(step.queries.device)


def visible(step: Step, store: Store) -> Bool[Tensor, "batch new tokens"]:
    """Which tokens of a store the queries of a step may read: none later than the query's own, and no padding."""
    return causal(step.new, store.length, step.queries.device) & store.real[:, None, :]


def across_group(
    scores: Float[Tensor, "batch heads new tokens"],
    seen: Bool[Tensor, "batch new tokens"],
    group: int,
    policy: str,
) -> Float[Tensor, "batch rows new tokens"]:
    """The scores of each head, or what the heads of a key-value head agree upon."""
    if policy == "head" or group == 1:
        return scores
    if policy == "max of softmax":
        scores = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    batch, heads, new, tokens = scores.shape
    of_group = scores.reshape(batch, heads // group, group, new, tokens)
    return of_group.mean(2) if policy == "mean" else of_group.amax(2)


def best_tokens(
    scores: Float[Tensor, "batch rows new tokens"], seen: Bool[Tensor, "batch new tokens"], budget: KeyBudget
) -> KeySelection:
    """The best visible tokens of each row, sinks and recent ones first; each query spends its budget or all it sees.

    Of equal scores those of earlier tokens win, except where queries of different budgets are chosen for together (a
    padded batch, or a share of several queries): which of the equals wins there is not said.
    """
    batch, rows, new, tokens = scores.shape
    if new == 1 and bool(seen.all()):
        if budget.sinks or budget.recent:
            scores = scores.detach().clone()
            scores[..., : budget.sinks] = torch.inf
            scores[..., max(0, tokens - budget.recent) :] = torch.inf
        return _equally_many(scores, budget.tokens(tokens))
    place = seen.cumsum(-1)  # from 1, of the tokens that the query sees
    there = place[..., -1:]
    forced = seen & ((place <= budget.sinks) | (place > there - budget.recent))
    scores = scores.masked_fill(~seen[:, None], -torch.inf).masked_fill(forced[:, None], torch.inf)
    wanted = _wanted(budget, there.squeeze(-1))
    least, most = (min(tokens, int(each)) for each in wanted.aminmax())
    if least == most:
        return _equally_many(scores, most)
    best = scores.topk(most, dim=-1)
    rank = torch.arange(most, device=scores.device)
    kept = (rank < wanted[:, None, :, None]) & (best.values > -torch.inf)
    return KeySelection(best.indices, kept.expand(batch, rows, new, most))


def _equally_many(scores: Float[Tensor, "batch rows new tokens"], count: int) -> KeySelection:
    """The best of each row that are above minus infinity, tokens in order."""
    _, winners = select_rows(scores.reshape(-1, scores.shape[-1]), count)
    indices = winners.view(*scores.shape[:3], count)
    return KeySelection(indices, scores.gather(-1, indices) > -torch.inf)


def _wanted(budget: KeyBudget, there: Int[Tensor, "batch new"]) -> Int[Tensor, "batch new"]:
    if budget.share is not None:
        wanted = (there.double() * budget.share).ceil().long()
    else:
        wanted = torch.full_like(there, budget.tokens(2**62))
    return torch.minimum(there, wanted.clamp_min(max(budget.sinks + budget.recent, 1)))
