"""Tokens that come one by one, read in one pass: for likelihoods of a text under a method that compresses.

A method whose window slides gives every token other codes to read, and other exact keys. Which ones is known
beforehand, so that all tokens of a text can be read at once, each under a mask of its own. It is the same sum as token
by token, several times faster, and holds somewhat more while it is taken.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.compressed_store import CompressedStore
from apportion.keys.memory import ComposedMemory
from apportion.keys.method import KeyMethod
from apportion.models.key_memory import LayerFacts, Step
from apportion.ops.attend import attend_masked


class OneByOne(ComposedMemory):
    """A layer's codes, read by each token of a step as if it came alone.

    Args:
        facts: the layer.
        store: of codes, with a sliding window.
        turn: whether the first step after the prompt is a turn instead, whose tokens are exact to each other.

    Raises:
        InputError: the window goes in blocks; groups of tokens are quantised together that are longer than the window,
            so that how a token is read depends on when.
    """

    def __init__(self, facts: LayerFacts, store: CompressedStore, *, turn: bool = False) -> None:
        super().__init__(facts, store)
        window, quantiser = store.window, store.codes["keys"].quantiser
        if window.kind != "sliding":
            raise InputError(f"a window of kind {window.kind!r}: tokens are read at once only if it is sliding")
        group = 0 if quantiser is None else quantiser.group or 0
        if group > window.size:
            raise InputError(
                f"groups of {group} tokens are quantised together and a window has {window.size}: it must be "
                "at least as long for tokens to be read at once"
            )
        self._codes, self._turn = store, turn

    @override
    def attend(self, step: Step) -> Float[Tensor, "batch heads new value_width"]:
        store = self._codes
        if not store.closed or self._turn or step.new == 1:
            self._turn = self._turn and not store.closed
            return super().attend(step)
        # As many as a step of one token would have found.
        before = [each.view[:, :, max(0, each.length - store.window.size) :] for each in (store.keys, store.values)]
        self.take_in(step)
        exact = [torch.cat(parts, dim=2) for parts in zip(before, (step.keys, step.values), strict=True)]
        keys, values, reads = store.read_each(step.new, *exact)
        mixed = attend_masked(store.queries(step.queries), keys, values, reads, step.scaling, step.softcap)
        self._account(step, None)
        return store.outputs(mixed)


def one_by_one(method: KeyMethod, facts: LayerFacts, *, turn: bool = False) -> OneByOne:
    """A layer's memory of a method that compresses to codes; see `OneByOne`.

    Raises:
        InputError: see there; or the method compresses otherwise.
    """
    memory = method.memory(facts)
    if not isinstance(memory, ComposedMemory) or not isinstance(memory.store, CompressedStore):
        raise InputError(f"{method.slug} keeps no joint codes: only these are read at once")
    return OneByOne(facts, memory.store, turn=turn)
