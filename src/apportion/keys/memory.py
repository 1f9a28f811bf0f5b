"""A layer's memory made of a store and a selector."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.budget import Usage
from apportion.keys.chunks import ChunkedStore, ChunkSelection
from apportion.keys.selection import KeySelection, WholeLists
from apportion.keys.selectors import Selector
from apportion.keys.stores import ExactStore, Store
from apportion.models.key_memory import LayerFacts, LayerMemory, Step
from apportion.ops.attend import attend, attend_masked, attend_selected

MakeComposed = Callable[[LayerFacts], "ComposedMemory"]


class ComposedMemory(LayerMemory):
    """What a store keeps, read as a selector says.

    Until the memory is closed, queries read everything exactly: the prompt's own attention is dense. It closes by
    itself when the first single token comes, or when `close` is called; from then on stores compress and selectors
    choose, also for a later turn of several tokens.

    Args:
        facts: the layer.
        store: None for an exact one.
        selector: None to read everything.
        prompt: ``dense``, or ``selected`` to let the selector choose for the prompt's queries too (how perplexity under
            a selection is measured in one pass).
    """

    def __init__(
        self, facts: LayerFacts, store: Store | None = None, selector: Selector | None = None, prompt: str = "dense"
    ) -> None:
        if prompt not in ("dense", "selected"):
            raise InputError(f"prompt={prompt!r}: dense or selected")
        self.facts, self.prompt = facts, prompt
        self.store = ExactStore() if store is None else store
        self.selector = selector
        self._usage, self._plain = Usage(), 0
        self.newest_selection: KeySelection | None = None
        self._seen, self._batch, self._padded = 0, 1, False

    @override
    @property
    def seen(self) -> int:
        return self._seen

    @override
    @property
    def batch(self) -> int:
        return self._batch

    @property
    def usage(self) -> Usage:
        """What reading and storing have cost so far."""
        found = self._usage
        if self._plain:
            # Of the newest state: summed up here, when somebody asks, rather than at every token.
            found.bytes_held_dense = self._plain
            found.bytes_held = self.store.bytes_held() + (self.selector.bytes_held() if self.selector else 0)
            found.bytes_slow, found.bytes_moved = self.store.bytes_slow(), self.store.bytes_moved
        return found

    @override
    def close(self) -> None:
        if not self.store.closed:
            self.store.close()
            if self.selector is not None:
                self.selector.close(self.store)

    @override
    def attend(self, step: Step) -> Float[Tensor, "batch heads new value_width"]:
        if step.new == 1 and self._seen:
            self.close()
        self.take_in(step)
        chooses = self.selector is not None and (self.store.closed or self.prompt == "selected")
        selection = self.selector.select(step, self.store) if chooses else None  # type: ignore[union-attr]
        self.newest_selection = selection
        if isinstance(selection, ChunkSelection) and isinstance(self.store, ChunkedStore):
            mixed = self.store.attend(step, selection)
            if mixed is not None:
                self._account(step, selection)
                return mixed
        common = None
        ready = self.store.lies_ready and step.new == 1
        if selection is not None and not ready and selection.indices.shape[1] == self.facts.groups:
            common = selection.common()
        queries = self.store.queries(step.queries)
        if selection is None:
            keys, values = self.store.read()
            real = self.store.real if self._padded else None
            mixed = attend(queries, keys, values, step.scaling, step.softcap, real)
        elif common is not None:
            # All heads of a key-value head read one list: a store reads, and rebuilds, nothing else.
            keys, values = self.store.read(common)
            tokens = torch.arange(keys.shape[2], device=keys.device).expand(*selection.indices.shape)
            mixed = attend_selected(queries, keys, values, tokens, selection.kept, step.scaling, step.softcap)
        elif not ready and step.new * selection.indices.shape[-1] > self.store.length:
            # Many queries, whose lists are together longer than what is stored: it is read once, under a mask.
            keys, values = self.store.read()
            mask = selection.mask(self.store.length)
            mixed = attend_masked(queries, keys, values, mask, step.scaling, step.softcap)
        else:
            keys, values = self.store.read()
            kept = None if isinstance(selection, WholeLists) else selection.kept
            mixed = attend_selected(queries, keys, values, selection.indices, kept, step.scaling, step.softcap)
        self._account(step, selection)
        return self.store.outputs(mixed)

    def take_in(self, step: Step) -> None:
        """Remember tokens whose queries nobody asks for: those of a prompt that was read by another memory."""
        self._batch = len(step.keys)
        self._padded = self._padded or not step.all_real
        self._seen += step.new
        self.store.append(step)
        if self.selector is not None:
            self.selector.extend(step, self.store)

    @override
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        self._batch = len(rows)
        self.store.pick_rows(rows)
        if self.selector is not None:
            self.selector.pick_rows(rows)

    def _account(self, step: Step, selection: KeySelection | None) -> None:
        batch, groups, _, width = step.keys.shape
        self._plain = 2 * self._seen * batch * groups * width * step.keys.element_size()
        if not self.store.closed:
            return
        usage, queries = self._usage, batch * step.queries.shape[1] * step.new
        usage.steps += 1
        usage.queries += queries
        usage.keys_there += queries * self._seen
        usage.bytes_dense += self._plain
        if selection is not None and self.selector is not None:
            usage.keys_read += selection.total * (step.queries.shape[1] // selection.lists)
            usage.bytes_read += self.store.bytes_of_selection(selection, self.facts.groups)
            usage.bytes_read += self.selector.bytes_scanned()
        else:
            usage.keys_read += queries * self.store.length
            usage.bytes_read += batch * self.store.bytes_of(self.store.length)
