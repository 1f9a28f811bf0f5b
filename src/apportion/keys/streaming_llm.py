"""StreamingLLM: the first tokens and the newest ones; all others are forgotten.

Xiao, Tian, Chen, Han, Lewis, *Efficient Streaming Language Models with Attention Sinks*, 2023, arXiv 2309.17453.

Allocated are the tokens that a layer remembers, the same for all heads and whatever their content: the first
``budget.sinks`` of the text, on which models park attention, and the newest, in a window that slides. A query reads
its own window also when several tokens come at once, so that chunks of any size give the same result.

Departures: keys keep the positions of their tokens (the paper counts positions within the cache, so that a model may go
on past its trained length, which this method does not offer). The prompt's own attention is dense unless
``prompt="selected"``, which gives the paper's (SCBench's A-shape).
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from apportion.keys.budget import KeyBudget
from apportion.keys.eviction import keep_best
from apportion.keys.memory import ComposedMemory
from apportion.keys.method import KeyMethod
from apportion.keys.selection import KeySelection
from apportion.keys.selectors import Selector, visible
from apportion.keys.stores import ExactStore, Store
from apportion.models.key_memory import LayerFacts, LayerMemory, Step


@dataclass(eq=False)
class StreamingLLM(KeyMethod):
    """Sinks and a sliding window; see the module's docstring.

    Attributes:
        budget: tokens remembered, of which ``sinks`` (at least 1) are the first; the rest slides.
        prompt: ``dense`` or ``selected``, see `ComposedMemory`.
    """

    slug: ClassVar[str] = "streaming_llm"
    budget: KeyBudget = field(default_factory=lambda: KeyBudget(keys=1024, sinks=4))
    prompt: str = "dense"

    @override
    def memory(self, facts: LayerFacts) -> LayerMemory:
        store = _WindowStore(self.budget)
        return ComposedMemory(facts, store, _Window(), prompt=self.prompt)


class _WindowStore(ExactStore):
    """Forgets, before new tokens come, what none of them can read."""

    def __init__(self, budget: KeyBudget) -> None:
        super().__init__()
        self.budget = budget
        self.gone: Tensor | None = None  # real tokens forgotten, of each row

    @override
    def append(self, step: Step) -> None:
        if self.closed:
            self._forget(coming=1)
        super().append(step)
        if self.gone is None:
            self.gone = torch.zeros(len(step.real), dtype=torch.int64, device=step.real.device)

    @override
    def close(self) -> None:
        super().close()
        if self.length:
            self._forget(coming=0)

    def capacity(self, seen: int) -> int:
        """Tokens that a query reads which could see that many if nothing were forgotten."""
        return self.budget.tokens(seen)

    def _forget(self, coming: int) -> None:
        assert self.gone is not None
        there = self.real.sum(-1)
        seen = (there + self.gone).tolist()
        room = torch.tensor([self.capacity(count + coming) - coming for count in seen], device=there.device)
        wanted = torch.minimum(there, room.clamp_min(0))
        if int((there - wanted).max()) <= 0:
            return
        self.gone = self.gone + there - wanted
        places = torch.arange(self.length, device=there.device, dtype=torch.float32)
        scores = places.expand(len(there), self.keys.view.shape[1], -1)
        keep_best(self, scores, wanted, sinks=self.budget.sinks)

    @override
    def pick_rows(self, rows: Tensor) -> None:
        super().pick_rows(rows)
        if self.gone is not None:
            self.gone = self.gone[rows.to(self.gone.device)]


class _Window(Selector):
    """What each of several queries still reads of a store whose newest query's window is all that is left."""

    @override
    def select(self, step: Step, store: Store) -> KeySelection | None:
        assert isinstance(store, _WindowStore)
        assert store.gone is not None
        seen = visible(step, store)
        place = seen.cumsum(-1)
        there = place[..., -1]
        capacity = torch.tensor(
            [[store.capacity(count) for count in row] for row in (there + store.gone[:, None]).tolist()],
            device=there.device,
        )
        if bool((capacity >= there).all()):
            return None
        recent = there - (capacity - store.budget.sinks)
        mask = seen & ((place <= store.budget.sinks) | (place > recent[..., None]))
        return KeySelection.of_mask(mask[:, None].expand(-1, step.keys.shape[1], -1, -1))
