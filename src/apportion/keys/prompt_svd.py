"""A store that keeps a prompt's keys as one low-rank factorisation, made for that prompt, and its values elsewhere.

The keys of all key-value heads side by side, before their rotary embedding, are ``factors @ basis`` (rank r): the best
fit of that rank there is. What is read of them is rebuilt and rotated by its own position. Exact are: outlier chunks,
the end of the prompt, and every later token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.keys.chunks import ChunkedStore, ChunkRule, ChunkSelection, ChunkTable, divide, order_of, tokens_of
from apportion.keys.selection import KeySelection
from apportion.keys.slow_memory import KeptTokens, SlowTokens, put, true_places
from apportion.keys.stores import Growing, RealTokens, Rotations, gather_tokens
from apportion.models.key_memory import Rotation, Step
from apportion.ops.chunk_attend import attend_chunks
from apportion.ops.low_rank_keys import low_rank_keys


@dataclass(frozen=True)
class Folding:
    """When tokens that came after the prompt join its factorisation.

    Attributes:
        every: so many tokens at a time, a multiple of the chunk's size; None for never.
        largest_residual: share of the new keys' squared norm that the basis may miss; above it the basis is found anew
            for everything so far, from the old keys as they can be rebuilt. 0 does so every time, 1 never.
    """

    every: int | None = None
    largest_residual: float = 0.1


class PromptSVDStore(ChunkedStore):
    """Keys in factors, values in slow memory, the rest exactly.

    Args:
        rank: of the factorisation; a prompt of fewer tokens, or narrower keys, have as many.
        rule: how the prompt is cut into chunks, and which are kept exactly.
        stays_exact: looks at the chunks and says whether the prompt is too short to be compressed.
        offload: keep values in slow memory.
        folding: of later tokens.
        layers: how many layers share one table of rotations; each counts its part.
    """

    def __init__(
        self,
        rank: int,
        rule: ChunkRule,
        stays_exact: Callable[[ChunkTable], bool],
        *,
        offload: bool = True,
        folding: Folding | None = None,
        layers: int = 1,
    ) -> None:
        self._rank, self._rule, self._stays_exact = rank, rule, stays_exact
        self._offload, self._folding, self._layers = offload, folding or Folding(), layers
        # Before closing: everything; afterwards what came after the chunks.
        self._keys, self._values, self._real = Growing(2), Growing(2), RealTokens()
        self._rotations = Rotations()
        # Of a prompt that came in one step: what other stores have found of it.
        self._derived: dict[Any, Tensor] | None = None
        self._later: list[Rotation | None] = []
        self._turned: tuple[Rotation, int, Rotation] | None = None  # all tokens', and how many of them are in factors
        self._compressed: _Compressed | None = None
        self.residual, self.refits = 0.0, 0
        """Share of the keys' squared norm that the basis missed when last used on new ones; bases found anew."""

    @override
    @property
    def length(self) -> int:
        return self.tail_start + self._keys.length

    @override
    @property
    def table(self) -> ChunkTable | None:
        return None if self._compressed is None else self._compressed.table

    @override
    @property
    def tail_start(self) -> int:
        return 0 if self._compressed is None else self._compressed.factors.shape[1]

    @override
    @property
    def real(self) -> Bool[Tensor, "batch tokens"]:
        return self._real.view

    @override
    @property
    def all_real(self) -> bool:
        return self._real.all

    @override
    def append(self, step: Step) -> None:
        self._derived = None if self.length else step.derived
        self._keys.append(step.keys)
        self._values.append(step.values)
        self._real.append(step)
        if not self.closed:
            self._rotations.append(step.rotation)
        elif self._compressed is not None and self._folding.every is not None:
            self._later.append(step.rotation)
            self._fold(self._compressed, self._folding.every)

    @override
    def close(self) -> None:
        self.closed = True
        keys = self._keys.view
        table = divide(keys, self.real, self._rule)
        end = int(table.starts.min())
        if self._stays_exact(table) or end == 0:
            self._rotations = Rotations()
            return
        rows = self._flat(keys[:, :, :end], 0)
        basis = self._principal_directions(rows)
        outlier_tokens = table.tokens(table.outliers)
        values = self._values.view
        kept = (SlowTokens if self._offload else KeptTokens)(values[:, :, :end].clone())
        self._compressed = _Compressed(
            table,
            (rows @ basis).to(keys.dtype),
            basis.transpose(1, 2).unflatten(2, keys.shape[1:2] + keys.shape[3:]).transpose(1, 2).to(keys.dtype),
            outlier_tokens,
            gather_tokens(keys, outlier_tokens),
            gather_tokens(values, outlier_tokens),
            kept,
        )
        self._cut(end)

    @override
    def read(
        self, tokens: Int[Tensor, "batch groups kept"] | None = None
    ) -> tuple[Float[Tensor, "batch groups kept key_width"], Float[Tensor, "batch groups kept value_width"]]:
        tail = self._keys.view, self._values.view
        now = self._compressed
        if now is None:
            return tail if tokens is None else (gather_tokens(tail[0], tokens), gather_tokens(tail[1], tokens))
        if tokens is None:
            keys = torch.cat([self._rebuilt(now), tail[0]], dim=2)
            keys = keys.scatter(2, now.outlier_tokens[..., None].expand_as(now.outlier_keys), now.outlier_keys)
            values = torch.cat([now.values.all(), tail[1]], dim=2)
            self.bytes_moved = now.values.moved
            return keys, values
        return self._read_some(now, tokens)

    @override
    def attend(self, step: Step, selection: ChunkSelection) -> Float[Tensor, "batch heads 1 value_width"] | None:
        now, size = self._compressed, self._rule.size
        wants_gradient = step.queries.requires_grad or self._keys.view.requires_grad
        if now is None or (wants_gradient and torch.is_grad_enabled()):
            return None
        values = now.values.where_they_are(selection.chunks * size, size)
        if values is None:
            return None
        self.bytes_moved = now.values.moved
        turned = self._rotation()
        cos, sin = (None, None) if turned is None else (turned.cos, turned.sin)
        return attend_chunks(
            step.queries[:, :, 0],
            selection.chunks,
            size,
            now.factors,
            now.basis,
            cos,
            sin,
            values,
            [now.outlier_keys, self._keys.view],
            [now.outlier_values, self._values.view],
            step.scaling,
            step.softcap,
        )[:, :, None]

    def _read_some(self, now: "_Compressed", tokens: Tensor) -> tuple[Tensor, Tensor]:
        in_tail = (tokens - self.tail_start).clamp_min(0)
        keys, values = gather_tokens(self._keys.view, in_tail), gather_tokens(self._values.view, in_tail)
        slots, is_outlier = now.outlier_slots(tokens)
        if slots is not None:
            keys = torch.where(is_outlier[..., None], gather_tokens(now.outlier_keys, slots), keys)
            values = torch.where(is_outlier[..., None], gather_tokens(now.outlier_values, slots), values)
        rest = (tokens < self.tail_start) & ~is_outlier
        places = true_places(rest)
        if places.shape[-1] == 0:
            return keys, values
        wanted = rest.gather(2, places)
        chosen = tokens.gather(2, places).masked_fill(~wanted, 0)
        turned = self._rotation()
        angles = (None, None) if turned is None else (turned.cos, turned.sin)
        keys = put(keys, places, rest, low_rank_keys(now.factors, now.basis, chosen, *angles))
        values = put(values, places, rest, now.values.read(chosen, wanted))
        self.bytes_moved = now.values.moved
        return keys, values

    @override
    def bytes_held(self) -> int:
        held = self._keys.bytes + self._values.bytes + self._rotations.bytes // self._layers
        return held if self._compressed is None else held + self._compressed.bytes

    @override
    def bytes_slow(self) -> int:
        return 0 if self._compressed is None else self._compressed.values.bytes_slow

    @override
    def bytes_of(self, tokens: int) -> int:
        exact = self._keys.length
        if self._compressed is not None:
            exact += self._compressed.outlier_tokens.shape[-1]
        exact = min(exact, tokens)
        return self._groups * (exact * self._of_exact + (tokens - exact) * self._of_rebuilt) + self._of_basis

    @override
    def bytes_of_lists(
        self, indices: Int[Tensor, "batch rows new chosen"], kept: Bool[Tensor, "batch rows new chosen"], groups: int
    ) -> int:
        now, (batch, rows) = self._compressed, indices.shape[:2]
        tokens = indices.reshape(batch, groups, -1)
        kept = kept.reshape(batch, groups, -1)
        if rows == groups and torch.equal(indices, indices[:, :, :1].expand_as(indices)):
            tokens, kept = indices[:, :, 0], kept.view(indices.shape).any(2)
        rest = torch.zeros_like(kept)
        if now is not None:
            rest = (tokens < self.tail_start) & ~now.outlier_slots(tokens)[1] & kept
        rebuilt = int(rest.sum())
        return (int(kept.sum()) - rebuilt) * self._of_exact + rebuilt * self._of_rebuilt + batch * self._of_basis

    @override
    def bytes_of_selection(self, selection: KeySelection, groups: int) -> int:
        if not isinstance(selection, ChunkSelection):
            return super().bytes_of_selection(selection, groups)
        of_list = selection.exact * self._of_exact + selection.in_chunks * self._of_rebuilt
        batch, lists = selection.chunks.shape[:2]
        return batch * (lists * of_list + self._of_basis)

    @override
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        self._derived = None
        for each in (self._keys, self._values, self._real, self._rotations):
            each.pick_rows(rows)
        self._later = [None if each is None else each.rows(rows) for each in self._later]
        if self._compressed is not None:
            self._compressed.pick_rows(rows)

    @property
    def _groups(self) -> int:
        return self._keys.view.shape[1]

    @property
    def _of_exact(self) -> int:
        """Bytes of a key and a value of one head."""
        keys, values = self._keys.view, self._values.view
        return keys.shape[-1] * keys.element_size() + values.shape[-1] * values.element_size()

    @property
    def _of_rebuilt(self) -> int:
        """Bytes that one head's rebuilt key, with the angles to turn it, and its value are made from."""
        if self._compressed is None:
            return self._of_exact
        values, factors, rotation = self._values.view, self._compressed.factors, self._rotations.all
        turned = 0 if rotation is None else 2 * rotation.cos.shape[-1] * rotation.cos.element_size()
        return values.shape[-1] * values.element_size() + factors.shape[-1] * factors.element_size() + turned

    @property
    def _of_basis(self) -> int:
        basis = None if self._compressed is None else self._compressed.basis
        return 0 if basis is None else basis[0].numel() * basis.element_size()

    def _rebuilt(self, now: "_Compressed") -> Float[Tensor, "batch groups tokens width"]:
        """All keys that are in factors."""
        keys, turned = now.factors[:, None] @ now.basis, self._rotation()
        return keys if turned is None else turned.apply(keys)

    def _rotation(self) -> Rotation | None:
        """Of the tokens that are in factors."""
        turned, count = self._rotations.all, self.tail_start
        if turned is None:
            return None
        if self._turned is None or self._turned[:2] != (turned, count):
            self._turned = turned, count, turned.at(slice(0, count))
        return self._turned[2]

    def _flat(self, keys: Float[Tensor, "batch groups some width"], start: int) -> Float[Tensor, "batch some all"]:
        """Keys from token ``start`` on, unrotated, those of all heads side by side, zero where there is padding."""
        here = slice(start, start + keys.shape[2])
        turned = self._rotations.all
        rows = keys.float() if turned is None else turned.at(here).undo(keys.float())
        return rows.transpose(1, 2).flatten(2) * self.real[:, here, None]

    def _principal_directions(self, rows: Float[Tensor, "batch end all"]) -> Float[Tensor, "batch all rank"]:
        """Of the prompt's keys, found once for all stores of the same prompt that end alike, whatever their ranks."""
        known, self._derived = self._derived, None
        if known is None:
            return principal_directions(rows, self._rank)
        name = ("principal directions of keys", rows.shape[1])
        if name not in known:
            known[name] = principal_directions(rows, rows.shape[2])
        return known[name][..., : self._rank]

    def _cut(self, count: int) -> None:
        """Drop the oldest exact tokens, which are kept elsewhere now."""
        for each in (self._keys, self._values):
            each.keep(each.view[:, :, count:].clone())

    def _fold(self, now: "_Compressed", every: int) -> None:
        size, local = self._rule.size, self._rule.local
        if self._keys.length < every + local * size:
            return
        if int((self.real.sum(-1) - now.table.counts * size).min()) < every + local * size:
            return
        for each in self._later:
            self._rotations.append(each)
        self._later = []
        start, keys, values = self.tail_start, self._keys.view, self._values.view
        more = now.table.counts[:, None, None] + torch.arange(every // size, device=keys.device)
        where = tokens_of(more, size, order_of(self.real)) - start
        of_chunks = gather_tokens(keys, where.expand(-1, keys.shape[1], -1)).unflatten(2, (-1, size))
        now.table = now.table.grown(of_chunks, self.real)
        count = int(now.table.starts.min()) - start
        self._join(now, self._flat(keys[:, :, :count], start))
        now.values.append(values[:, :, :count])
        self._cut(count)

    def _join(self, now: "_Compressed", rows: Float[Tensor, "batch more all"]) -> None:
        """Add keys to the factorisation."""
        basis = now.basis.float().transpose(1, 2).flatten(2).transpose(1, 2)  # [batch, all, rank]
        factors = rows @ basis
        self.residual = float(1 - factors.square().sum() / rows.square().sum().clamp_min(1e-30))
        old = now.factors.float()
        if self.residual > self._folding.largest_residual:
            self.refits += 1
            every = torch.cat([old @ basis.transpose(1, 2), rows], dim=1)
            basis = principal_directions(every, self._rank)
            now.factors = (every @ basis).to(now.factors.dtype)
            groups, width = now.basis.shape[1], now.basis.shape[3]
            now.basis = basis.transpose(1, 2).unflatten(2, (groups, width)).transpose(1, 2).to(now.basis.dtype)
        else:
            now.factors = torch.cat([now.factors, factors.to(now.factors.dtype)], dim=1)


@dataclass(eq=False)
class _Compressed:
    """What is kept of the chunks."""

    table: ChunkTable
    factors: Float[Tensor, "batch tokens rank"]
    basis: Float[Tensor, "batch groups rank width"]
    outlier_tokens: Int[Tensor, "batch groups outlying"]
    outlier_keys: Float[Tensor, "batch groups outlying width"]
    outlier_values: Float[Tensor, "batch groups outlying value_width"]
    values: KeptTokens

    @property
    def bytes(self) -> int:
        tensors = (self.factors, self.basis, self.outlier_tokens, self.outlier_keys, self.outlier_values)
        return self.table.bytes + self.values.bytes + sum(each.numel() * each.element_size() for each in tensors)

    def outlier_slots(
        self, tokens: Int[Tensor, "batch groups some"]
    ) -> tuple[Int[Tensor, "batch groups some"] | None, Bool[Tensor, "batch groups some"]]:
        """Where tokens stand among the outliers' (None without any), and whether they do."""
        if self.outlier_tokens.shape[-1] == 0:
            return None, torch.zeros_like(tokens, dtype=torch.bool)
        slots = torch.searchsorted(self.outlier_tokens, tokens.contiguous()).clamp_max(
            self.outlier_tokens.shape[-1] - 1
        )
        return slots, self.outlier_tokens.gather(2, slots) == tokens

    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        for name in ("factors", "basis", "outlier_tokens", "outlier_keys", "outlier_values"):
            setattr(self, name, getattr(self, name)[rows])
        self.table = self.table.pick_rows(rows)
        self.values.pick_rows(rows)


def principal_directions(
    rows: Float[Tensor, "batch tokens all"], rank: int
) -> Float[Tensor, "batch all rank_or_tokens"]:
    """The directions of the best fit of a rank, which ``rows @ directions @ directions.T`` is (Eckart and Young).

    They are the right singular vectors, largest first; where there are more rows than columns they are found as
    eigenvectors of the columns' products, in float64, which is much cheaper and gives the same.
    """
    tokens, width = rows.shape[1:]
    rank = min(rank, tokens, width)
    rows = rows.double()
    if tokens < width:
        found = torch.linalg.svd(rows, full_matrices=False).Vh.transpose(1, 2)
    else:
        found = torch.linalg.eigh(rows.transpose(1, 2) @ rows).eigenvectors.flip(-1)
    return found[..., :rank].float()
