"""SparQ: tokens scored by a query's own largest channels.

Ribar, Chelombiev, Hudlass-Galley, Blake, Luschi, Orr 2023, *SparQ Attention: Bandwidth-Efficient LLM Inference*, arXiv
2312.04985.

What is allocated: k tokens to each query, and r channels to score them by, which every query chooses anew: those where
it is largest itself. What the tokens left out would have added is made up for by the mean of all values: the output is
``alpha * attention + (1 - alpha) * mean value``, alpha being the share of the estimated weights on the chosen tokens.

=======================  =======================================================
k                        ``budget``
r                        ``width // group_factor``; compression 8 has width / 8
s^                       `QueryChannelSelector.scores`, before the softmax
alpha, mean of V         `MeanValueMemory`
=======================  =======================================================

Departures. Query heads that share keys choose channels and tokens each by themselves unless ``group`` says how they
agree on tokens (the paper sums over them). No second, transposed copy of the keys is kept, which would make reading
channels fast and takes half of the cache again. No window of recent tokens is forced unless the budget says so. The
first layers read everything, as in the other methods here.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.budget import KeyBudget
from apportion.keys.memory import ComposedMemory
from apportion.keys.selecting import SelectingMethod
from apportion.keys.selection import KeySelection
from apportion.keys.selectors import TopKeys, visible
from apportion.keys.stores import Store
from apportion.models.key_memory import LayerFacts, Step


class QueryChannelSelector(TopKeys):
    """The tokens whose keys fit a query best in the query's own largest channels.

    Args:
        channels: r, of each query.
        budget: how many tokens.
        group: see `TopKeys`.
    """

    def __init__(self, channels: int, budget: KeyBudget, group: str = "head") -> None:
        super().__init__(budget, group)
        self.channels = channels
        self.covered: Float[Tensor, "batch heads new 1"] | None = None
        self._estimate: Float[Tensor, "batch heads new tokens"] | None = None
        self._scanned = 0

    @override
    def select(self, step: Step, store: Store) -> KeySelection | None:
        selection = super().select(step, store)
        self.covered = None if selection is None else self._covered(selection, step, store)
        return selection

    @override
    def scores(self, step: Step, store: Store) -> Float[Tensor, "batch heads new tokens"]:
        queries, keys = store.queries(step.queries), store.read()[0]
        self._scanned = queries.shape[0] * queries.shape[1] * store.length * self.channels * keys.element_size()
        largest = queries.abs().topk(self.channels, dim=-1)
        # All channels but the largest count as 0: the same products as of gathered channels.
        kept = torch.zeros_like(queries).scatter(-1, largest.indices, queries.gather(-1, largest.indices))
        products = kept @ keys.repeat_interleave(step.group, dim=1).transpose(-1, -2)
        # Fewer channels make smaller products: the softmax is as sharp as of all of them if they are scaled up.
        share = largest.values.sum(-1, keepdim=True) / queries.abs().sum(-1, keepdim=True).clamp_min(1e-20)
        self._estimate = products * step.scaling / share.sqrt().clamp_min(1e-10)
        return self._estimate

    @override
    def bytes_scanned(self) -> int:
        return self._scanned

    def _covered(self, selection: KeySelection, step: Step, store: Store) -> Float[Tensor, "batch heads new 1"]:
        """The share of the estimated attention weights on the chosen tokens."""
        assert self._estimate is not None
        weights = self._estimate.masked_fill(~visible(step, store)[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        read = selection.mask(store.length)
        return (weights * read.repeat_interleave(weights.shape[1] // read.shape[1], dim=1)).sum(-1, keepdim=True)


class MeanValueMemory(ComposedMemory):
    """Gives the weight that is estimated to be on tokens left out to the mean of all values."""

    selector: QueryChannelSelector
    _sum: Float[Tensor, "batch groups 1 value_width"] | None = None
    _count: Int[Tensor, "batch 1"] | None = None

    @override
    def attend(self, step: Step) -> Float[Tensor, "batch heads new value_width"]:
        mean = self._mean_value(step).repeat_interleave(step.group, dim=1)
        mixed = super().attend(step)
        if self.newest_selection is None or self.selector.covered is None:
            return mixed
        return torch.lerp(mean, mixed, self.selector.covered.to(mixed.dtype))

    @override
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        super().pick_rows(rows)
        if self._sum is not None and self._count is not None:
            self._sum, self._count = self._sum[rows], self._count[rows]

    def _mean_value(self, step: Step) -> Float[Tensor, "batch groups new value_width"]:
        """Of what each of the newest tokens sees; takes them in."""
        sums = (step.values.float() * step.real[:, None, :, None]).cumsum(2)
        counts = step.real.cumsum(1)
        if self._sum is not None and self._count is not None:
            sums, counts = sums + self._sum, counts + self._count
        self._sum, self._count = sums[:, :, -1:], counts[:, -1:]
        return (sums / counts.clamp_min(1)[:, None, :, None]).to(step.values.dtype)


@dataclass(eq=False)
class SparQ(SelectingMethod):
    """Tokens chosen by each query's own largest channels; nothing is fitted.

    Attributes:
        group_factor: width of a head over channels that a query is scored by, d / r.
        mean_value: make up for what is left out.
    """

    slug: ClassVar[str] = "sparq"
    group_factor: int = 8
    mean_value: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_factor < 1:
            raise InputError(f"group_factor={self.group_factor}: 1 (all channels) or above, such as 8")

    @override
    def selector(self, facts: LayerFacts) -> QueryChannelSelector:
        if self.group_factor > facts.width:
            raise InputError(f"group_factor={self.group_factor}: a head has {facts.width} channels; none is left")
        return QueryChannelSelector(facts.width // self.group_factor, self.budget, self.group)

    @override
    def memory(self, facts: LayerFacts) -> ComposedMemory:
        if facts.layer < self.dense_layers or not self.mean_value:
            return super().memory(facts)
        return MeanValueMemory(facts, self.store(facts), self.selector(facts), self.prompt)
