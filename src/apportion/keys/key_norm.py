"""Eviction by the keys alone: short keys (Knorm), or keys unlike the mean key (KeyDiff), are kept.

Devoto, Zhao, Scardapane, Minervini, *A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression*, 2024,
arXiv 2406.11430; Park, Jones, Morse, Goel, Lee, Lott, *KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context
LLM Inference in Resource-Constrained Environments*, 2025, arXiv 2504.15364.

Allocated are the tokens left of a prompt, for each key-value head: those whose key has the smallest norm (small keys
get large attention weights in many models), or the smallest cosine with the mean of the normalised keys. No query is
looked at, so the choice cannot depend on a question. Tokens that come after the prompt are all kept.

Departures: Knorm's paper leaves the first layers whole, here every layer has the same budget; KeyDiff's evicts block by
block as a prompt comes in, here once, when the prompt is closed.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.budget import KeyBudget
from apportion.keys.eviction import EvictingStore
from apportion.keys.memory import ComposedMemory
from apportion.keys.method import KeyMethod
from apportion.models.key_memory import LayerFacts, LayerMemory


@dataclass(eq=False)
class KeyNorm(KeyMethod):
    """Eviction by the keys alone; see the module's docstring.

    Attributes:
        budget: tokens kept of the prompt.
        by: ``norm`` (Knorm) or ``difference`` (KeyDiff).

    Raises:
        InputError: ``by`` is neither.
    """

    slug: ClassVar[str] = "key_norm"
    budget: KeyBudget = field(default_factory=lambda: KeyBudget(share=0.5))
    by: str = "norm"

    def __post_init__(self) -> None:
        if self.by not in ("norm", "difference"):
            raise InputError(f"by={self.by!r}: norm or difference")

    @override
    def memory(self, facts: LayerFacts) -> LayerMemory:
        return ComposedMemory(facts, _KeyScored(self.budget, self.by))


class _KeyScored(EvictingStore):
    def __init__(self, budget: KeyBudget, by: str) -> None:
        super().__init__(budget)
        self.by = by

    @override
    def scores(self) -> Float[Tensor, "batch groups tokens"]:
        keys = self.keys.view
        if self.by == "norm":
            return -keys.norm(dim=-1)
        directions = torch.nn.functional.normalize(keys, dim=-1)
        # Padding has keys too, which say nothing about the text.
        mean = (directions * self.real[:, None, :, None]).sum(2, keepdim=True)
        return -torch.nn.functional.cosine_similarity(keys, mean, dim=-1)
