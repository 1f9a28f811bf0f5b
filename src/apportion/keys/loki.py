"""Loki: tokens scored in the leading principal directions of the keys.

Singhania, Singh, He, Feizi, Bhatele 2024, *Loki: Low-rank Keys for Efficient Sparse Attention*, arXiv 2406.02542.

What is allocated: k tokens to each query, found in the first d_f of d coordinates of a basis in which keys vary most
first. Keys are stored in that basis, which is a rotation: products in all coordinates are exact, and nothing is kept
twice.

=============  ==========================================
k_f, d_f       ``budget``, ``1 / group_factor``
P              `Loki.fit`: of each layer and key-value head
=============  ==========================================

Departures. Directions are always those of rotated keys (the paper also tries keys before the rotary embedding). Query
heads that share keys choose each by themselves unless ``group`` says otherwise. The first layers read everything, as in
the other methods here, which the paper does not ask for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.budget import KeyBudget
from apportion.keys.selecting import SelectingMethod
from apportion.keys.selectors import TopKeys
from apportion.keys.stores import ExactStore, Store
from apportion.keys.trace import encode_texts, watch_steps
from apportion.models import LanguageModel
from apportion.models.key_door import layer_facts
from apportion.models.key_memory import LayerFacts, Step


class KeyCovariance:
    """How the keys of each key-value head of a layer vary, padding left out."""

    def __init__(self) -> None:
        self._products: Tensor | None = None
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, step: Step) -> None:
        """Take in the tokens of a step; in which order and in how many parts does not matter."""
        keys = step.keys.double() * step.real[:, None, :, None]
        products, total = torch.einsum("bgtc,bgtd->gcd", keys, keys), keys.sum(dim=(0, 2))
        self._products = products if self._products is None else self._products + products
        self._sum = total if self._sum is None else self._sum + total
        self._count += int(step.real.sum())

    @property
    def basis(self) -> Float[Tensor, "groups width width"]:
        """Orthonormal columns, the direction in which keys vary most first.

        Raises:
            InputError: there was no token.
        """
        if self._products is None or self._sum is None or not self._count:
            raise InputError("calibration had no token that is no padding: give texts")
        mean = self._sum / self._count
        covariance = self._products / self._count - mean[:, :, None] * mean[:, None, :]
        return torch.linalg.eigh(covariance).eigenvectors.flip(-1).float()


class RotatedStore(ExactStore):
    """Every key and value, keys in a basis of their key-value head's own.

    Args:
        basis: orthonormal columns.
    """

    def __init__(self, basis: Float[Tensor, "groups width width"]) -> None:
        super().__init__()
        self.basis = basis

    @override
    def append(self, step: Step) -> None:
        self.keys.append(step.keys @ self.basis.to(step.keys))
        self.values.append(step.values)
        self._real.append(step)

    @override
    def queries(self, queries: Float[Tensor, "batch heads new width"]) -> Float[Tensor, "batch heads new key_width"]:
        basis = self.basis.to(queries)
        return queries @ basis.repeat_interleave(queries.shape[1] // len(basis), dim=0)

    @override
    def bytes_held(self) -> int:
        return super().bytes_held() + self.basis.numel() * self.basis.element_size()


class LeadingSelector(TopKeys):
    """The tokens whose keys fit a query best in the first coordinates of the store's basis.

    Args:
        coordinates: how many.
        budget: how many tokens.
        group: see `TopKeys`.
    """

    def __init__(self, coordinates: int, budget: KeyBudget, group: str = "head") -> None:
        super().__init__(budget, group)
        self.coordinates = coordinates
        self._scanned = 0

    @override
    def scores(self, step: Step, store: Store) -> Float[Tensor, "batch heads new tokens"]:
        keys = store.read()[0][..., : self.coordinates]
        self._scanned = keys.numel() * keys.element_size()
        queries = store.queries(step.queries)[..., : self.coordinates]
        return queries @ keys.repeat_interleave(step.group, dim=1).transpose(-1, -2) * step.scaling

    @override
    def bytes_scanned(self) -> int:
        return self._scanned


@dataclass(eq=False)
class Loki(SelectingMethod):
    """Tokens chosen in the leading principal directions of the keys, which `fit` finds.

    Attributes:
        group_factor: width of a head over coordinates that tokens are scored by.
    """

    slug: ClassVar[str] = "loki"
    needs_fit: ClassVar[bool] = True
    budget: KeyBudget = field(default_factory=lambda: KeyBudget(share=1 / 4))
    group_factor: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_factor < 1:
            raise InputError(f"group_factor={self.group_factor}: 1 (all coordinates) or above, such as 4")

    @override
    def fit(  # type: ignore[override]
        self, model: LanguageModel, texts: Sequence[str], *, tokens: int = 512
    ) -> "Loki":
        """Find the basis of every key-value head.

        Args:
            model: a decoder.
            texts: calibration texts.
            tokens: of each at most.

        Raises:
            InputError: no texts, or too short ones.
        """
        found = {each.layer: KeyCovariance() for each in layer_facts(model)}
        watch_steps(model, encode_texts(model, texts, tokens), lambda layer, step: found[layer].add(step))
        self.fitted = {f"layer.{layer}.basis": covariance.basis for layer, covariance in found.items()}
        self.fitted_to = model.fingerprint
        return self

    @override
    def check(self, model: Any) -> None:
        super().check(model)
        for facts in layer_facts(model):
            self._basis(facts)

    @override
    def store(self, facts: LayerFacts) -> Store:
        return RotatedStore(self._basis(facts))

    @override
    def selector(self, facts: LayerFacts) -> LeadingSelector:
        if self.group_factor > facts.width:
            raise InputError(f"group_factor={self.group_factor}: a head has {facts.width} coordinates; none is left")
        return LeadingSelector(facts.width // self.group_factor, self.budget, self.group)

    def _basis(self, facts: LayerFacts) -> Float[Tensor, "groups width width"]:
        basis = self.of_layer(facts.layer).get("basis")
        found = None if basis is None else tuple(basis.shape)
        if basis is None or found != (facts.groups, facts.width, facts.width):
            raise InputError(
                f"layer {facts.layer} has {facts.groups} key-value heads of width {facts.width}, but the basis is "
                f"{'of no such layer' if found is None else found}: it is another model's; fit to this one"
            )
        return basis
