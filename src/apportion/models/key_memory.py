"""What an attention layer is given, and what it remembers: the words that the door and the keys room share.

Nothing here knows transformers; `apportion.models.key_door` is where a model's layers and these meet.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.ops.attend import attend


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotary embedding of some tokens: the first ``2 * half`` coordinates of a head turn in pairs.

    Coordinate ``i`` turns together with ``i + half``. Turning is an isometry but where a model stretches what it turns
    (YaRN and LongRoPE scale ``cos`` and ``sin``); ``undo`` gives the keys back as they were before it either way.

    Attributes:
        cos: of each token's angles; one row for all rows of a batch, or one for each.
        sin: likewise.
    """

    cos: Float[Tensor, "rows tokens half"]
    sin: Float[Tensor, "rows tokens half"]
    _joined: "list[weakref.ref[Rotation]]" = field(default_factory=list, init=False, repr=False)

    def apply(self, vectors: Float[Tensor, "batch heads tokens width"]) -> Float[Tensor, "batch heads tokens width"]:
        """The vectors as attention compares them."""
        return self._turn(vectors)

    def undo(self, vectors: Float[Tensor, "batch heads tokens width"]) -> Float[Tensor, "batch heads tokens width"]:
        """The vectors as they were before `apply`."""
        stretch = self.cos.square() + self.sin.square()
        return Rotation(self.cos / stretch, -self.sin / stretch).apply(vectors)

    def at(self, tokens: Int[Tensor, "*shape"] | slice) -> "Rotation":
        """Of some of the tokens: a slice, or indices ``[tokens]`` or ``[batch, tokens]``."""
        if isinstance(tokens, Tensor) and tokens.dim() == 2:
            rows = torch.arange(len(tokens), device=tokens.device)[:, None] if len(self.cos) > 1 else 0
            return Rotation(self.cos[rows, tokens], self.sin[rows, tokens])
        return Rotation(self.cos[:, tokens], self.sin[:, tokens])

    def rows(self, rows: Int[Tensor, " kept"]) -> "Rotation":
        """Of some rows of the batch."""
        return self if len(self.cos) == 1 else Rotation(self.cos[rows], self.sin[rows])

    def then(self, later: "Rotation") -> "Rotation":
        """Of these tokens, and of those that follow them.

        Asked for the same again it gives the same object, so that layers which turn alike hold one copy between them.
        """
        known = [each() for each in self._joined]
        if len(known) == 2 and known[0] is later and known[1] is not None:
            return known[1]
        count = max(len(self.cos), len(later.cos))
        pairs = zip((self.cos, self.sin), (later.cos, later.sin), strict=True)
        cos, sin = (
            torch.cat([here.expand(count, -1, -1), there.expand(count, -1, -1)], dim=1) for here, there in pairs
        )
        joined = Rotation(cos, sin)
        # Weak, or whoever keeps an early state of a cache would keep all later ones too.
        self._joined[:] = [weakref.ref(later), weakref.ref(joined)]
        return joined

    @property
    def bytes(self) -> int:
        """Of all tokens, once for all layers that share it."""
        return 2 * self.cos.numel() * self.cos.element_size()

    def _turn(self, vectors: Tensor) -> Tensor:
        half = self.cos.shape[-1]
        cos, sin = self.cos[:, None].to(vectors.dtype), self.sin[:, None].to(vectors.dtype)
        first, second, rest = vectors[..., :half], vectors[..., half : 2 * half], vectors[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


@dataclass(frozen=True, eq=False)
class Step:
    """What one attention layer was given in one forward pass: the newest tokens, queries and keys rotated.

    Attributes:
        queries: of all query heads.
        keys: of the key-value heads; query heads ``g * group .. (g + 1) * group - 1`` share key-value head ``g``.
        values: likewise.
        real: False for padding.
        scaling: of the products of queries and keys, before the softmax.
        softcap: products are squashed to ``softcap * tanh(product / softcap)`` where a model does so (Gemma 2).
        rotation: what queries and keys were rotated by; None for a model without rotary embedding.
        hidden: what the layer's projections were given; None where the layer does not say.
        module: the attention module, for methods of other libraries that want one; None where a step was made up.
        derived: what memories that are given the same step have found of it, by names of their own, so that several of
            them need not each find it; it must follow from the step alone.
    """

    queries: Float[Tensor, "batch heads new width"]
    keys: Float[Tensor, "batch groups new width"]
    values: Float[Tensor, "batch groups new value_width"]
    real: Bool[Tensor, "batch new"]
    scaling: float
    softcap: float | None = None
    rotation: Rotation | None = None
    hidden: Float[Tensor, "batch new d_model"] | None = None
    module: Any = None
    derived: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def new(self) -> int:
        """How many tokens a row has."""
        return self.keys.shape[2]

    @cached_property
    def all_real(self) -> bool:
        """Whether nothing is padding."""
        # One number needs no operation that looks at all, which decoding does in every layer.
        return bool(self.real) if self.real.numel() == 1 else bool(self.real.all())

    @property
    def group(self) -> int:
        """How many query heads share a key-value head."""
        return self.queries.shape[1] // self.keys.shape[1]

    def unrotated_keys(self) -> Float[Tensor, "batch groups new width"]:
        """The keys as they were before the rotary embedding."""
        return self.keys if self.rotation is None else self.rotation.undo(self.keys)

    def unrotated_queries(self) -> Float[Tensor, "batch heads new width"]:
        """The queries as they were before the rotary embedding."""
        return self.queries if self.rotation is None else self.rotation.undo(self.queries)


@dataclass(frozen=True)
class LayerFacts:
    """What a memory is told of the layer that it will serve.

    Attributes:
        layer: its number, from 0.
        heads: query heads.
        groups: key-value heads.
        width: of a head's keys.
        layers: how many layers the model has.
    """

    layer: int
    heads: int
    groups: int
    width: int
    layers: int


class LayerMemory(ABC):
    """What one attention layer remembers of the tokens that it has seen, and how its queries read it."""

    @property
    @abstractmethod
    def seen(self) -> int:
        """Tokens of each row so far, padding and forgotten ones included."""

    @property
    @abstractmethod
    def batch(self) -> int:
        """Rows of the newest tokens."""

    @abstractmethod
    def attend(self, step: Step) -> Float[Tensor, "batch heads new value_width"]:
        """Take in the newest tokens, and return what their queries read; each sees itself and what came before it."""

    @abstractmethod
    def close(self) -> None:
        """The prompt is complete: compress it now. Called again, it does nothing."""

    @abstractmethod
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows of the batch, in this order; a row may come more than once (beam search)."""

    def forget_newest(self, count: int) -> None:
        """As if the newest tokens had never come.

        Raises:
            InputError: this memory cannot go back.
        """
        raise InputError(
            f"{type(self).__name__} cannot take tokens back (count={count}): copy the cache before the tokens come "
            "(copy.deepcopy), and go on from the copy"
        )


MakeMemory = Callable[[LayerFacts], LayerMemory]


class Watcher(LayerMemory):
    """Exact attention that shows somebody what it was given; for passes without a cache.

    Args:
        show: called with every step; its ``hidden`` is cut from the graph.
    """

    seen, batch = 0, 1

    def __init__(self, show: Callable[[Step], None]) -> None:
        self._show = show

    @override
    def attend(self, step: Step) -> Float[Tensor, "batch heads new value_width"]:
        self._show(step if step.hidden is None else replace(step, hidden=step.hidden.detach()))
        return attend(step.queries, step.keys, step.values, step.scaling, step.softcap)

    @override
    def close(self) -> None:
        pass

    @override
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        pass
