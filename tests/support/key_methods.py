"""Key methods for the tests of what all methods share."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from apportion.keys import ComposedMemory, DoubleSparsity, KeyBudget, KeyMethod, Loki, Quest, SparQ
from apportion.keys.catalogue import method_named
from apportion.keys.cskv import CSKV
from apportion.keys.kvpress_adapter import KvPress
from apportion.keys.matryoshka_kv import MatryoshkaKV
from apportion.keys.quantized import QuantizedKeys
from apportion.keys.seer_attention import GateRecipe, SeerAttention
from apportion.keys.selectors import Oracle
from apportion.keys.shadow_kv import ShadowKV
from apportion.keys.streaming_llm import StreamingLLM
from apportion.models.key_memory import LayerFacts, LayerMemory


@dataclasses.dataclass(eq=False)
class Keeps(KeyMethod):
    """A method for these tests: the oracle's keys."""

    slug: ClassVar[str] = "keeps_for_tests"
    budget: KeyBudget = dataclasses.field(default_factory=lambda: KeyBudget(keys=4))

    def memory(self, facts: LayerFacts) -> LayerMemory:
        return ComposedMemory(facts, selector=Oracle(self.budget))


@dataclasses.dataclass(eq=False)
class NeedsFit(Keeps):
    slug: ClassVar[str] = "needs_fit_for_tests"
    needs_fit: ClassVar[bool] = True

    def fit(self, model: Any, texts: Any, **options: Any) -> "NeedsFit":
        self.fitted = {"layer.0.basis": torch.eye(3), "layer.10.basis": torch.zeros(2)}
        self.fitted_to = model.fingerprint
        return self


@dataclasses.dataclass
class ShortKeys:
    """An object with the interface of a kvpress press; kvpress itself cannot be installed beside our transformers."""

    compression_ratio: float = 0.5

    def score(
        self, module: Any, hidden_states: Any, keys: torch.Tensor, values: torch.Tensor, attentions: Any, kwargs: Any
    ) -> torch.Tensor:
        assert attentions is None
        assert module is not None
        assert hidden_states.shape[1] == keys.shape[2]
        return -keys.norm(dim=-1)


# Of the catalogue; the others are these with other settings, or cannot have a budget for everything.
ROOMY = ("dense", "sinks_and_recent", "random", "streaming_llm", "snap_kv", "knorm")

# Every method with a budget for everything, fitted to a tiny model where it needs that: it must equal dense attention.
EVERYTHING: dict[str, Callable[[Any], KeyMethod]] = {
    "oracle": lambda lm: Keeps(budget=KeyBudget(share=1.0)),
    "seer_attention, sparsity 0": lambda lm: SeerAttention(size=4, width=8, sparsity=0.0, recipe=GateRecipe(steps=1)),
    "seer_attention, threshold 0": lambda lm: SeerAttention(size=4, width=8, threshold=0.0, recipe=GateRecipe(steps=1)),
    # Through the gate and the kernel of blocks, where the two above take the short way.
    "seer_attention, all blocks": lambda lm: SeerAttention(size=4, width=8, blocks=99, recipe=GateRecipe(steps=1)),
    "seer_attention, decode": lambda lm: SeerAttention(
        size=4, width=8, decode=True, budget=KeyBudget(share=1.0), recipe=GateRecipe(steps=1)
    ),
    "matryoshka_kv": lambda lm: MatryoshkaKV(share=1.0),
    "cskv": lambda lm: CSKV(key_density=1.0, value_density=1.0, window=4),
    "cskv, no window": lambda lm: CSKV(key_density=1.0, value_density=1.0, window=0),
    "double sparsity": lambda lm: DoubleSparsity(budget=KeyBudget(share=1.0), dense_layers=0, prompt="selected"),
    "quest": lambda lm: Quest(budget=KeyBudget(share=1.0), dense_layers=0, prompt="selected"),
    "sparq": lambda lm: SparQ(budget=KeyBudget(share=1.0), dense_layers=0, prompt="selected"),
    "loki": lambda lm: Loki(budget=KeyBudget(share=1.0), dense_layers=0, prompt="selected"),
    "shadow_kv": lambda lm: ShadowKV(budget=KeyBudget(share=1.0), rank_share=1.0, chunk=2, local=1, outliers=2),
    "shadow_kv, folding": lambda lm: ShadowKV(
        budget=KeyBudget(share=1.0), rank_share=1.0, chunk=2, local=1, outliers=1, fold=4, largest_residual=0.0
    ),
    **{name: lambda lm, name=name: method_named(name, KeyBudget(share=1.0)) for name in ROOMY},
    "streaming_llm, window in the prompt": lambda lm: StreamingLLM(KeyBudget(keys=200, sinks=2), prompt="selected"),
    "quantized, all exact": lambda lm: QuantizedKeys(residual=10_000),
    "kvpress": lambda lm: KvPress(ShortKeys(compression_ratio=0.0)),
}
