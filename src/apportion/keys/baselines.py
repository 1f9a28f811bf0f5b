"""What every comparison shows: dense attention, the best and the worst way to choose keys, and a window.

`OracleKeys` is the upper bound of all methods that read fewer keys, `WindowKeys` what they have to beat (StreamingLLM's
pattern without its forgetting), `RandomKeyChoice` the floor. All of them keep everything and choose for every query.
"""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from apportion.keys.memory import ComposedMemory
from apportion.keys.method import KeyMethod
from apportion.keys.selecting import SelectingMethod
from apportion.keys.selectors import Oracle, RandomKeys, Selector, SinksAndRecent
from apportion.models.key_memory import LayerFacts, LayerMemory


@dataclass(eq=False)
class DenseKeys(KeyMethod):
    """A plain cache, read whole."""

    slug: ClassVar[str] = "dense"

    @override
    def memory(self, facts: LayerFacts) -> LayerMemory:
        return ComposedMemory(facts)


@dataclass(eq=False)
class OracleKeys(SelectingMethod):
    """Each query head reads the keys with the largest products; finding them costs as much as reading them all.

    Attributes:
        dense_layers: see `SelectingMethod`; none, unlike there.
    """

    slug: ClassVar[str] = "oracle"
    dense_layers: int = 0

    @override
    def selector(self, facts: LayerFacts) -> Selector:
        return Oracle(self.budget, self.group)


@dataclass(eq=False)
class WindowKeys(SelectingMethod):
    """Each query reads the first tokens (4 unless the budget says otherwise) and the newest ones.

    Attributes:
        dense_layers: see `SelectingMethod`; none, unlike there.
    """

    slug: ClassVar[str] = "sinks_and_recent"
    dense_layers: int = 0

    @override
    def selector(self, facts: LayerFacts) -> Selector:
        return SinksAndRecent(self.budget)


@dataclass(eq=False)
class RandomKeyChoice(SelectingMethod):
    """Each query head reads keys drawn anew, its own among them.

    Attributes:
        dense_layers: see `SelectingMethod`; none, unlike there.
        seed: of the draws; each layer has draws of its own.
    """

    slug: ClassVar[str] = "random"
    dense_layers: int = 0
    seed: int = 0

    @override
    def selector(self, facts: LayerFacts) -> Selector:
        return RandomKeys(self.budget, self.seed * facts.layers + facts.layer)
