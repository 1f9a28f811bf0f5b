"""SnapKV: of a prompt, each key-value head keeps the tokens that the prompt's last queries look at.

Li, Huang, Yang, Venkitesh, Locatelli, Ye, Cai, Lewis, Chen, *SnapKV: LLM Knows What You are Looking for Before
Generation*, 2024, arXiv 2404.14469 (section 4). With ``pyramid=True``: Cai and others, *PyramidKV*, 2024,
arXiv 2406.02069, which gives lower layers more of the same total.

Allocated are the tokens that are left of a prompt, for each key-value head: the last ``window`` ones, and those with
the largest attention weight from them, averaged over these queries and smoothed along the text, so that neighbours of a
wanted token stay too. Tokens that come after the prompt are all kept.

``window`` is the paper's L_obs, ``kernel`` its kernel size, ``budget`` its capacity; ``beta`` is PyramidKV's.

Departures: the query heads of a key-value head are averaged and share one list (the paper's code copies keys for every
query head first); the budget may be a share of the prompt. The prompt is what was seen when it was closed: close it
before the question, and the method knows nothing of the question, which is what SCBench asks.
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
from apportion.models.key_memory import LayerFacts, LayerMemory, Step
from apportion.ops.attend import causal, reference


@dataclass(eq=False)
class SnapKV(KeyMethod):
    """Eviction by what the prompt's last queries look at; see the module's docstring.

    Attributes:
        budget: tokens kept of the prompt; where that is less than ``window``, the newest of them.
        window: last tokens of the prompt, whose queries decide and which are kept.
        kernel: tokens over which weights are averaged; odd.
        pyramid: lower layers keep more, higher ones less, of the same total.
        beta: how steep: the last layer keeps ``(capacity - window) / beta`` tokens beside the window.

    Raises:
        InputError: a window below 1, an even kernel, a beta below 1.
    """

    slug: ClassVar[str] = "snap_kv"
    budget: KeyBudget = field(default_factory=lambda: KeyBudget(keys=4096))
    window: int = 32
    kernel: int = 5
    pyramid: bool = False
    beta: int = 20

    def __post_init__(self) -> None:
        if self.window < 1:
            raise InputError(f"window={self.window}: at least 1 query must look at the prompt")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError(f"kernel={self.kernel}: an odd number, such as 5")
        if self.beta < 1:
            raise InputError(f"beta={self.beta}: at least 1")

    @override
    def memory(self, facts: LayerFacts) -> LayerMemory:
        return ComposedMemory(facts, _ObservedStore(self, facts))


class _ObservedStore(EvictingStore):
    def __init__(self, method: SnapKV, facts: LayerFacts) -> None:
        super().__init__(method.budget)
        self.method, self.facts = method, facts
        self._queries: Tensor | None = None  # of the window, until the prompt is closed
        self._scaling: float = 1.0
        self._softcap: float | None = None

    @override
    def append(self, step: Step) -> None:
        super().append(step)
        if self.closed:
            return
        queries = step.queries if self._queries is None else torch.cat([self._queries, step.queries], dim=2)
        # A copy: a view would hold all of the prompt's queries.
        self._queries = queries[:, :, -self.method.window :].clone()
        self._scaling, self._softcap = step.scaling, step.softcap

    @override
    def close(self) -> None:
        super().close()
        self._queries = None

    @override
    def capacity(self, tokens: int) -> int:
        capacity = super().capacity(tokens)
        if not self.method.pyramid or capacity >= tokens:
            return capacity
        return pyramid_capacity(capacity, tokens, self.facts, self.method.window, self.method.beta)

    @override
    def scores(self) -> Float[Tensor, "batch groups tokens"]:
        assert self._queries is not None
        keys = self.keys.view
        batch, groups, tokens, width = keys.shape
        window = self._queries.shape[2]
        queries = self._queries.view(batch, groups, -1, window, width)
        seen = causal(window, tokens, keys.device) & self.real[:, None, None, None, :]
        weights = reference.weigh(queries @ keys[:, :, None].transpose(-1, -2), seen, self._scaling, self._softcap)
        asks = self.real[:, None, None, -window:, None]
        before = (weights * asks)[..., : tokens - window].mean(dim=(2, 3))
        if before.shape[-1]:
            kernel = self.method.kernel
            before = torch.nn.functional.avg_pool1d(before, kernel, stride=1, padding=kernel // 2)
        # Weights are at most 1: the window comes first, its newest token before all.
        places = 2 + torch.arange(window, device=keys.device, dtype=before.dtype)
        return torch.cat([before, places.expand(batch, groups, window)], dim=-1)

    @override
    def pick_rows(self, rows: Tensor) -> None:
        super().pick_rows(rows)
        if self._queries is not None:
            self._queries = self._queries[rows.to(self._queries.device)]


def pyramid_capacity(capacity: int, tokens: int, facts: LayerFacts, window: int, beta: int) -> int:
    """What a layer keeps of a prompt, falling evenly from the first layer to the last (PyramidKV, section 4.2).

    Args:
        capacity: the mean over layers.
        tokens: of the prompt.
        facts: the layer.
        window: tokens that every layer keeps.
        beta: see `SnapKV`.
    """
    if capacity <= window or facts.layers == 1:
        return capacity
    least = (capacity - window) // beta
    most = 2 * (capacity - window) - least
    if most > tokens - window:
        most = tokens - window
        least = 2 * (capacity - window) - most
    return window + most - round(facts.layer * (most - least) / (facts.layers - 1))
