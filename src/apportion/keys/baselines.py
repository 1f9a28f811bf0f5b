"""What every comparison shows: dense attention, the best and the worst way to choose keys, and a window.

`OracleKeys` is the upper bound of all methods that read fewer keys, `WindowKeys` what they have to beat (StreamingLLM's
pattern without its forgetting), `RandomKeyChoice` the floor. All of them keep everything and choose for every query.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from typing_extensions import override

from apportion.keys.budget import KeyBudget
from apportion.keys.memory import ComposedMemory
from apportion.keys.method import KeyMethod
from apportion.keys.selectors import Oracle, RandomKeys, SinksAndRecent
from apportion.models.key_door import LayerFacts, LayerMemory


@dataclass(eq=False)
class DenseKeys(KeyMethod):
    """A plain cache, read whole."""

    slug: ClassVar[str] = "dense"

    @override
    def memory(self, facts: LayerFacts) -> LayerMemory:
        return ComposedMemory(facts)


@dataclass(eq=False)
class OracleKeys(KeyMethod):
    """Each query head reads the keys with the largest products; finding them costs as much as reading them all."""

    slug: ClassVar[str] = "oracle"
    budget: KeyBudget = field(default_factory=lambda: KeyBudget(share=1 / 16))

    @override
    def memory(self, facts: LayerFacts) -> LayerMemory:
        return ComposedMemory(facts, selector=Oracle(self.budget))


@dataclass(eq=False)
class WindowKeys(KeyMethod):
    """Each query reads the first tokens (4 unless the budget says otherwise) and the newest ones."""

    slug: ClassVar[str] = "sinks_and_recent"
    budget: KeyBudget = field(default_factory=lambda: KeyBudget(share=1 / 16))

    @override
    def memory(self, facts: LayerFacts) -> LayerMemory:
        return ComposedMemory(facts, selector=SinksAndRecent(self.budget))


@dataclass(eq=False)
class RandomKeyChoice(KeyMethod):
    """Each query head reads keys drawn anew, its own among them.

    Attributes:
        budget: how many.
        seed: of the draws; each layer has draws of its own.
    """

    slug: ClassVar[str] = "random"
    budget: KeyBudget = field(default_factory=lambda: KeyBudget(share=1 / 16))
    seed: int = 0

    @override
    def memory(self, facts: LayerFacts) -> LayerMemory:
        return ComposedMemory(facts, selector=RandomKeys(self.budget, self.seed * facts.layers + facts.layer))
