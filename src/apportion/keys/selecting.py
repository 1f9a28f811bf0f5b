"""Methods that keep everything and choose what is read: they share all settings but the score."""

from abc import abstractmethod
from dataclasses import dataclass, field

from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.budget import KeyBudget
from apportion.keys.memory import ComposedMemory
from apportion.keys.method import KeyMethod
from apportion.keys.selectors import GROUP_POLICIES, Selector
from apportion.keys.stores import Store
from apportion.models.key_memory import LayerFacts


@dataclass(eq=False)
class SelectingMethod(KeyMethod):
    """A key method that stores every token and lets a selector choose.

    Attributes:
        budget: keys that each query reads.
        group: how the query heads that share a key-value head agree; see `TopKeys`.
        dense_layers: the first layers of the model, which read everything: what goes wrong there goes wrong everywhere.
        prompt: ``dense``, or ``selected`` to choose for the prompt's queries too; see `ComposedMemory`.

    Raises:
        InputError: an unknown group policy or way to read the prompt, or less than no dense layers.
    """

    budget: KeyBudget = field(default_factory=lambda: KeyBudget(share=1 / 16))
    group: str = "head"
    dense_layers: int = 2
    prompt: str = "dense"

    def __post_init__(self) -> None:
        if self.group not in GROUP_POLICIES:
            raise InputError(f"group={self.group!r}: one of {', '.join(GROUP_POLICIES)}")
        if self.dense_layers < 0:
            raise InputError(f"dense_layers={self.dense_layers}: 0 or above")
        if self.prompt not in ("dense", "selected"):
            raise InputError(f"prompt={self.prompt!r}: dense or selected")

    @abstractmethod
    def selector(self, facts: LayerFacts) -> Selector:
        """What chooses in one layer."""

    def store(self, facts: LayerFacts) -> Store | None:
        """How one layer keeps its tokens; None for as they come."""
        return None

    @override
    def memory(self, facts: LayerFacts) -> ComposedMemory:
        if facts.layer < self.dense_layers:
            return ComposedMemory(facts, prompt=self.prompt)
        return ComposedMemory(facts, self.store(facts), self.selector(facts), self.prompt)
