"""What is stored of a token: the second axis of a key method, called `Store` here and compressor elsewhere.

A store is exact until it is closed (the prompt is complete), since prefill attention reads exact keys and values; then
it keeps what its method keeps. It serves one layer.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.keys.selection import KeySelection
from apportion.models.key_memory import Rotation, Step


class Growing:
    """A tensor that grows along one dimension, without copying all of it every time.

    Args:
        dim: the dimension of the tokens.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.length = 0
        self._room: Tensor | None = None
        self._view: Tensor | None = None  # of all tokens, once somebody asked for it

    def append(self, newest: Tensor) -> None:
        """Add some tokens at the end."""
        if self._room is None:
            self.keep(newest)
        elif newest.requires_grad or self._room.requires_grad:
            self.keep(torch.cat([self.view, newest], dim=self.dim))
        else:
            room, start = self.more(newest.shape[self.dim])
            room.narrow(self.dim, start, newest.shape[self.dim]).copy_(newest)

    def more(self, count: int) -> tuple[Tensor, int]:
        """Room for so many tokens at the end, which whoever asks will write at once: in what, and from where on."""
        assert self._room is not None, "nothing was appended yet"
        start, length = self.length, self.length + count
        if length > self._room.shape[self.dim]:
            shape = list(self._room.shape)
            shape[self.dim] = max(length, 64 + start * 5 // 4)
            room = self._room.new_empty(shape)
            room.narrow(self.dim, 0, start).copy_(self.view)
            self._room = room
        self.length, self._view = length, None
        return self._room, start

    @property
    def view(self) -> Tensor:
        """All tokens so far; a view that the next `append` leaves valid."""
        assert self._room is not None, "nothing was appended yet"
        if self._view is None:
            self._view = self._room.narrow(self.dim, 0, self.length)
        return self._view

    def keep(self, tensor: Tensor) -> None:
        """Have this content instead."""
        self._room, self._view, self.length = tensor, None, tensor.shape[self.dim]

    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows of the batch, in this order."""
        if self._room is not None:
            self.keep(self.view[rows.to(self._room.device)])

    def forget_newest(self, count: int) -> None:
        """Drop tokens from the end."""
        # A copy, since the next tokens will be written over the dropped ones, which somebody may still look at.
        self.keep(self.view.narrow(self.dim, 0, self.length - count).clone())

    @property
    def bytes(self) -> int:
        """Of the tokens so far; room kept for later ones is not counted."""
        if self._room is None:
            return 0
        of_token = self._room.numel() // max(1, self._room.shape[self.dim])
        return of_token * self.length * self._room.element_size()


class RealTokens:
    """Which tokens so far are no padding. As long as all are, only how many there are is kept."""

    def __init__(self) -> None:
        self.all = True
        """Whether nothing is padding."""
        self._one, self._shape = torch.ones(1, 1, dtype=torch.bool), (1, 0)
        self._mask = Growing(1)

    def append(self, step: Step) -> None:
        """Take in the newest tokens."""
        if self.all and step.all_real:
            if not self._shape[1]:
                self._one = self._one.to(step.real.device)
            self._shape = len(step.real), self._shape[1] + step.new
            return
        if self.all and self._shape[1]:
            self._mask.keep(self.view)
        self.all = False
        self._mask.append(step.real)

    @property
    def view(self) -> Bool[Tensor, "batch tokens"]:
        """Of all tokens."""
        return self._one.expand(self._shape) if self.all else self._mask.view

    def keep(self, real: Bool[Tensor, "batch tokens"]) -> None:
        """Have these instead."""
        self.all, self._mask = bool(real.all()), Growing(1)
        if self.all:
            self._one, self._shape = self._one.to(real.device), (real.shape[0], real.shape[1])
        else:
            self._mask.keep(real)

    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows of the batch, in this order."""
        self.keep(self.view[rows.to(self.view.device)])


class Store(ABC):
    """What one layer keeps of its tokens.

    Keys and queries may be stored and compared in a space of the store's own: `queries` takes a query there, and
    `outputs` brings a mix of stored values back. Tokens are numbered from 0 as they came; a store that evicts numbers
    what is left.
    """

    closed = False
    lies_ready = False
    """Whether `read` of everything costs nothing: keys and values lie as attention reads them."""
    bytes_moved = 0
    """What reading has fetched from slow memory so far."""

    @property
    @abstractmethod
    def length(self) -> int:
        """How many tokens can be read."""

    @abstractmethod
    def append(self, step: Step) -> None:
        """Take in the newest tokens."""

    @abstractmethod
    def close(self) -> None:
        """The prompt is complete: keep what the method keeps."""

    @abstractmethod
    def read(
        self, tokens: Int[Tensor, "batch groups kept"] | None = None
    ) -> tuple[Float[Tensor, "batch groups kept key_width"], Float[Tensor, "batch groups kept value_width"]]:
        """Keys, rotated, and values of some tokens of each key-value head, or of all."""

    @property
    @abstractmethod
    def real(self) -> Bool[Tensor, "batch tokens"]:
        """Which of the readable tokens are no padding."""

    @property
    def all_real(self) -> bool:
        """Whether none of the readable tokens is padding."""
        return bool(self.real.all())

    @abstractmethod
    def bytes_held(self) -> int:
        """What the stored content occupies."""

    @abstractmethod
    def bytes_of(self, tokens: int) -> int:
        """What reading that many tokens of every key-value head of one row touches."""

    @abstractmethod
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows of the batch, in this order."""

    def bytes_slow(self) -> int:
        """Of `bytes_held`, what is in slow memory."""
        return 0

    def bytes_of_lists(
        self, indices: Int[Tensor, "batch rows new chosen"], kept: Bool[Tensor, "batch rows new chosen"], groups: int
    ) -> int:
        """What reading some lists of tokens touches: a list is read once, be it one head's or a key-value head's."""
        return self.bytes_of(1) * int(kept.sum()) // groups

    def bytes_of_selection(self, selection: KeySelection, groups: int) -> int:
        """The same of a selection."""
        return self.bytes_of_lists(selection.indices, selection.kept, groups)

    def queries(self, queries: Float[Tensor, "batch heads new width"]) -> Float[Tensor, "batch heads new key_width"]:
        """The queries in the space of the stored keys."""
        return queries

    def outputs(self, mixed: Float[Tensor, "batch heads new value_width"]) -> Float[Tensor, "batch heads new width"]:
        """A mix of stored values in the space of the model's values."""
        return mixed


class ExactStore(Store):
    """Every key and value as it came: a plain cache."""

    lies_ready = True

    def __init__(self) -> None:
        self.keys, self.values, self._real = Growing(2), Growing(2), RealTokens()

    @override
    @property
    def length(self) -> int:
        return self.keys.length

    @override
    def append(self, step: Step) -> None:
        self.keys.append(step.keys)
        self.values.append(step.values)
        self._real.append(step)

    @override
    def close(self) -> None:
        self.closed = True

    @override
    def read(
        self, tokens: Int[Tensor, "batch groups kept"] | None = None
    ) -> tuple[Float[Tensor, "batch groups kept key_width"], Float[Tensor, "batch groups kept value_width"]]:
        keys, values = self.keys.view, self.values.view
        if tokens is None:
            return keys, values
        return gather_tokens(keys, tokens), gather_tokens(values, tokens)

    @override
    @property
    def real(self) -> Bool[Tensor, "batch tokens"]:
        return self._real.view

    @override
    @property
    def all_real(self) -> bool:
        return self._real.all

    @override
    def bytes_held(self) -> int:
        return self.keys.bytes + self.values.bytes

    @override
    def bytes_of(self, tokens: int) -> int:
        keys, values = self.keys.view, self.values.view
        of_token = keys.shape[3] * keys.element_size() + values.shape[3] * values.element_size()
        return keys.shape[1] * of_token * tokens

    @override
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        for each in (self.keys, self.values, self._real):
            each.pick_rows(rows)

    @override
    def bytes_of_selection(self, selection: KeySelection, groups: int) -> int:
        return self.bytes_of(1) * selection.total // groups

    def keep_tokens(self, tokens: Int[Tensor, "batch groups kept"], real: Bool[Tensor, "batch kept"]) -> None:
        """Evict all but some tokens of each key-value head, oldest first; ``real``: which of them are no padding."""
        keys, values = self.read(tokens)
        self.keys.keep(keys)
        self.values.keep(values)
        self._real.keep(real)


class Rotations:
    """The rotary embedding of all tokens so far, for stores that keep keys as they were before it.

    A model rotates all layers of a kind alike: they hold one copy between them (see ``Rotation.then``), unless rows of
    a batch with positions of their own are picked.
    """

    def __init__(self) -> None:
        self.all: Rotation | None = None

    @property
    def bytes(self) -> int:
        """Of the one copy."""
        return 0 if self.all is None else self.all.bytes

    def append(self, rotation: Rotation | None) -> None:
        """Add those of the newest tokens; a model without rotary embedding has none."""
        if rotation is not None:
            self.all = rotation if self.all is None else self.all.then(rotation)

    def apply(
        self, keys: Float[Tensor, "batch groups kept width"], tokens: Int[Tensor, "batch groups kept"] | None = None
    ) -> Float[Tensor, "batch groups kept width"]:
        """Rotate unrotated keys of all tokens, or of some of each key-value head, by their own positions."""
        if self.all is None:
            return keys
        if tokens is None:
            return self.all.apply(keys)
        batch, groups, kept, width = keys.shape
        rotation = self.all
        if len(rotation.cos) == 1:
            rotation = Rotation(rotation.cos.expand(batch, -1, -1), rotation.sin.expand(batch, -1, -1))
        flat = tokens.reshape(batch, groups * kept)
        turned = rotation.at(flat).apply(keys.reshape(batch, 1, groups * kept, width))
        return turned.view(batch, groups, kept, width)

    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows of the batch, in this order."""
        if self.all is not None:
            self.all = self.all.rows(rows)


def gather_tokens(
    stored: Float[Tensor, "batch groups tokens width"], tokens: Int[Tensor, "batch groups kept"]
) -> Float[Tensor, "batch groups kept width"]:
    """Some tokens of each key-value head."""
    # Whole rows are copied, which takes half the time of ``gather``.
    batch, groups = (torch.arange(size, device=tokens.device) for size in tokens.shape[:2])
    return stored[batch[:, None, None], groups[:, None], tokens]
