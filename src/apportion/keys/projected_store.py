"""A store that keeps the leading coordinates of keys and values, in a basis of each head's own."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.stores import ExactStore, Growing, Store, gather_tokens
from apportion.models.key_memory import Step


class HeadSpace:
    """Where the keys, or the values, of one layer are stored.

    Heads whose rank is below the layer's largest have zero columns here and in what is read, but nothing in what is
    kept: `pack` puts the coordinates of all heads side by side.

    Args:
        basis: of each key-value head, orthogonal, basis vectors in columns, the most important first.
        mean: what is subtracted before and added afterwards.
        ranks: how many coordinates each head keeps.

    Raises:
        InputError: a rank is below 0 or above the width, or there is not one for each head.
    """

    def __init__(
        self, basis: Float[Tensor, "groups d d"], mean: Float[Tensor, "groups d"], ranks: Sequence[int]
    ) -> None:
        groups, width = basis.shape[:2]
        if len(ranks) != groups:
            raise InputError(f"ranks={list(ranks)}: one for each of {groups} key-value heads")
        if min(ranks) < 0 or max(ranks) > width:
            raise InputError(f"ranks={list(ranks)}: from 0 to {width}, the width of a head")
        self.mean, self.ranks = mean, list(ranks)
        # One column stays where nothing is kept, since attention needs some width.
        self.padded = max(1, *ranks)
        self.kept = torch.arange(self.padded) < torch.tensor(self.ranks)[:, None]
        self.columns = basis[..., : self.padded] * self.kept[:, None].to(basis)
        self._places = None if all(rank == self.padded for rank in ranks) else self.kept.flatten().nonzero().flatten()

    @property
    def numbers(self) -> int:
        """That are kept of a token."""
        return sum(self.ranks)

    def project(
        self, vectors: Float[Tensor, "batch heads new d"], *, centred: bool = True
    ) -> Float[Tensor, "batch heads new padded"]:
        """Coordinates of vectors of key-value heads, or of query heads (which are not centred)."""
        self._move_to(vectors)
        grouped = vectors.unflatten(1, (len(self.ranks), -1))
        if centred:
            grouped = grouped - self.mean[:, None, None]
        return (grouped @ self.columns[:, None]).flatten(1, 2)

    def restore(self, mixed: Float[Tensor, "batch heads new padded"]) -> Float[Tensor, "batch heads new d"]:
        """What coordinates stand for, the mean included; heads as in `project`."""
        self._move_to(mixed)
        grouped = mixed.unflatten(1, (len(self.ranks), -1))
        return (grouped @ self.columns.mT[:, None] + self.mean[:, None, None]).flatten(1, 2)

    def pack(self, coordinates: Float[Tensor, "batch groups new padded"]) -> Float[Tensor, "batch new numbers"]:
        """All heads side by side, without the padding."""
        flat = coordinates.transpose(1, 2).flatten(2)
        return flat if self._places is None else flat[..., self._places.to(flat.device)]

    def unpack(self, packed: Float[Tensor, "batch new numbers"]) -> Float[Tensor, "batch groups new padded"]:
        """Undo `pack`; a view where all heads keep the same number."""
        flat = packed
        if self._places is not None:
            empty = packed.new_zeros(*packed.shape[:2], self.kept.numel())
            flat = empty.index_copy(2, self._places.to(packed.device), packed)
        return flat.unflatten(2, (len(self.ranks), self.padded)).transpose(1, 2)

    def _move_to(self, vectors: Tensor) -> None:
        """Once: the model's device and dtype are not known before its first tokens."""
        self.columns, self.mean = self.columns.to(vectors), self.mean.to(vectors)


class ProjectedStore(Store):
    """Keys and values in the coordinates of a `HeadSpace` each; queries are compared there, outputs brought back.

    Args:
        keys: where keys, rotated, are stored.
        values: where values are stored.
        project_prompt: from the first token on, so that the prompt's own attention reads coordinates too; otherwise
            the prompt stays exact until the store is closed.
        bring_back: False leaves outputs in the coordinates, for a model whose output projection reads those.
    """

    def __init__(
        self, keys: HeadSpace, values: HeadSpace, *, project_prompt: bool = False, bring_back: bool = True
    ) -> None:
        self._key_space, self._value_space, self._bring_back = keys, values, bring_back
        self._prompt = None if project_prompt else ExactStore()
        self._keys, self._values, self._real = Growing(1), Growing(1), Growing(1)
        self._centred = True
        self.closed = project_prompt

    @override
    @property
    def length(self) -> int:
        return self._keys.length if self._prompt is None else self._prompt.length

    @override
    def append(self, step: Step) -> None:
        # A constant on all products of a query drops out of the softmax, but not out of a soft cap before it.
        self._centred = step.softcap is None
        if self._prompt is not None:
            self._prompt.append(step)
        else:
            self._keep(step.keys, step.values, step.real)

    @override
    def close(self) -> None:
        prompt, self._prompt, self.closed = self._prompt, None, True
        if prompt is not None and prompt.length:
            self._keep(*prompt.read(), prompt.real)

    @override
    def read(
        self, tokens: Int[Tensor, "batch groups kept"] | None = None
    ) -> tuple[Float[Tensor, "batch groups kept key_width"], Float[Tensor, "batch groups kept value_width"]]:
        if self._prompt is not None:
            return self._prompt.read(tokens)
        keys, values = self._key_space.unpack(self._keys.view), self._value_space.unpack(self._values.view)
        if tokens is None:
            return keys, values
        return gather_tokens(keys, tokens), gather_tokens(values, tokens)

    @override
    @property
    def real(self) -> Bool[Tensor, "batch tokens"]:
        return self._real.view if self._prompt is None else self._prompt.real

    @override
    def bytes_held(self) -> int:
        """Of the coordinates; the bases belong to the model and serve all its caches."""
        return self._keys.bytes + self._values.bytes if self._prompt is None else self._prompt.bytes_held()

    @override
    def bytes_of(self, tokens: int) -> int:
        if self._prompt is not None:
            return self._prompt.bytes_of(tokens)
        return sum(each.view.shape[2] * each.view.element_size() * tokens for each in (self._keys, self._values))

    @override
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        if self._prompt is not None:
            self._prompt.pick_rows(rows)
        for each in (self._keys, self._values, self._real):
            each.pick_rows(rows)

    @override
    def queries(self, queries: Float[Tensor, "batch heads new width"]) -> Float[Tensor, "batch heads new key_width"]:
        return self._key_space.project(queries, centred=False) if self.closed else queries

    @override
    def outputs(self, mixed: Float[Tensor, "batch heads new value_width"]) -> Float[Tensor, "batch heads new width"]:
        return self._value_space.restore(mixed) if self.closed and self._bring_back else mixed

    def _keep(
        self,
        keys: Float[Tensor, "batch groups new width"],
        values: Float[Tensor, "batch groups new width"],
        real: Bool[Tensor, "batch new"],
    ) -> None:
        self._keys.append(self._key_space.pack(self._key_space.project(keys, centred=self._centred)))
        self._values.append(self._value_space.pack(self._value_space.project(values)))
        self._real.append(real)
