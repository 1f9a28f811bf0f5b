"""Quest: pages of tokens chosen by the bounds of their keys.

Tang, Zhao, Zhu, Xiao, Kasikci, Han 2024, *Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference*, arXiv
2406.10774.

What is allocated: pages of 16 tokens, to each query head. A page keeps the smallest and the largest value of every
channel of its keys; ``sum_c max(q_c min_c, q_c max_c)`` bounds the product of a query with any of its keys, and the
pages with the largest bounds are read.

=====================  =========================
token budget           ``budget``
page size              ``page``
m_i, M_i               ``PageSelector.bounds``
=====================  =========================

Departures. The page of the query's own token is always read, up to that token. The budget is in tokens, so that it
compares with other methods': the last page that fits in part is read in part. Query heads that share keys choose each
by themselves unless ``group`` says otherwise.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.budget import KeyBudget
from apportion.keys.selecting import SelectingMethod
from apportion.keys.selectors import Selector, TopKeys
from apportion.keys.stores import Store
from apportion.models.key_memory import LayerFacts, Step


class PageSelector(TopKeys):
    """The tokens of the pages whose bounds fit a query best, the query's own page first.

    Args:
        page: tokens of a page.
        budget: how many tokens.
        group: see `TopKeys`.
    """

    def __init__(self, page: int, budget: KeyBudget, group: str = "head") -> None:
        super().__init__(KeyBudget(budget.keys, budget.share, budget.sinks, max(1, budget.recent)), group)
        self.page = page
        self.bounds: Float[Tensor, "batch groups pages two_widths"] | None = None

    @override
    def extend(self, step: Step, store: Store) -> None:
        start = (store.length - step.new) // self.page * self.page
        keys, real = store.read()[0][:, :, start:], store.real[:, None, start:, None]
        missing = -keys.shape[2] % self.page
        low, high = (
            _full_page(keys.masked_fill(~real, fill), missing, fill).unflatten(2, (-1, self.page))
            for fill in (torch.finfo(keys.dtype).max, torch.finfo(keys.dtype).min)
        )
        newest = torch.cat([low.amin(3), high.amax(3)], dim=-1)
        self.bounds = newest if self.bounds is None else torch.cat([self.bounds[:, :, : start // self.page], newest], 2)

    @override
    def scores(self, step: Step, store: Store) -> Float[Tensor, "batch heads new tokens"]:
        assert self.bounds is not None
        low, high = self.bounds.repeat_interleave(step.group, dim=1).chunk(2, dim=-1)
        queries = store.queries(step.queries)
        # max(q min, q max) is q max where q is above 0, and q min elsewhere: two products for all pages at once.
        bound = queries.clamp_min(0) @ high.transpose(-1, -2) + queries.clamp_max(0) @ low.transpose(-1, -2)
        of_tokens = bound.repeat_interleave(self.page, dim=-1)[..., : store.length]
        place = torch.arange(store.length, device=bound.device)
        own = place[-step.new :, None] // self.page == place // self.page
        # Not infinite, since what the budget forces comes before the own page.
        return of_tokens.masked_fill(own, torch.finfo(bound.dtype).max)

    @override
    def bytes_held(self) -> int:
        return 0 if self.bounds is None else self.bounds.numel() * self.bounds.element_size()

    @override
    def bytes_scanned(self) -> int:
        return self.bytes_held()

    @override
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        if self.bounds is not None:
            self.bounds = self.bounds[rows.to(self.bounds.device)]


def _full_page(keys: Tensor, missing: int, fill: float) -> Tensor:
    """Tokens that do not count, up to a full page."""
    return torch.nn.functional.pad(keys, (0, 0, 0, missing), value=fill)


@dataclass(eq=False)
class Quest(SelectingMethod):
    """Pages chosen by bounds; nothing is fitted.

    Attributes:
        page: tokens of a page.
    """

    slug: ClassVar[str] = "quest"
    page: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page < 1:
            raise InputError(f"page={self.page}: at least 1 token")

    @override
    def selector(self, facts: LayerFacts) -> Selector:
        return PageSelector(self.page, self.budget, self.group)
