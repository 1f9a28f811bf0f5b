"""One prompt for several methods and questions: caches that are forked, compared bit for bit, and accounted for."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.keys.budget import Usage
from apportion.keys.memory import ComposedMemory
from apportion.models.key_door import memories_of, with_memories
from apportion.models.key_memory import LayerFacts, LayerMemory, Step


class Fan(LayerMemory):
    """One prompt for several memories: attention is dense and computed once, all of them take the tokens in.

    Args:
        facts: the layer.
        made: memories whose prompt attention is dense; see `reads_prompts_densely`.
    """

    def __init__(self, facts: LayerFacts, made: Sequence[ComposedMemory]) -> None:
        self.plain, self.made = ComposedMemory(facts), list(made)

    @override
    @property
    def seen(self) -> int:
        return self.plain.seen

    @override
    @property
    def batch(self) -> int:
        return self.plain.batch

    @override
    def attend(self, step: Step) -> Float[Tensor, "batch heads new value_width"]:
        for each in self.made:
            each.take_in(step)
        return self.plain.attend(step)

    @override
    def close(self) -> None:
        return None

    @override
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        for each in (self.plain, *self.made):
            each.pick_rows(rows)


def reads_prompts_densely(memory: LayerMemory) -> bool:
    """Whether a memory's prompt attention is exact, so that several can share one."""
    # A class that extends the composed memory may do anything with a prompt.
    return type(memory) is ComposedMemory and memory.prompt == "dense"


def share_read(memories: Sequence[LayerMemory]) -> float:
    """Keys that the queries of the newest step read, as a share of those that they could see, in one row."""
    shares = []
    for memory in memories:
        selection = memory.newest_selection if isinstance(memory, ComposedMemory) else None
        if selection is None:
            shares.append(1.0)
            continue
        rows, new = selection.kept.shape[1:3]
        there = rows * (memory.seen * new - new * (new - 1) // 2)
        shares.append(float(selection.kept[0].sum()) / there)
    return sum(shares) / len(shares)


def copied(cache: Any) -> Any:
    """A cache that goes on from this one and leaves it as it is."""
    return with_memories(cache, copy.deepcopy(memories_of(cache)))


def usage_of(cache: Any) -> Usage:
    """What the memories of a cache have cost so far."""
    return Usage.total(each.usage for each in memories_of(cache) if isinstance(each, ComposedMemory))


def digest_of(cache: Any) -> str:
    """A hash of every tensor that the memories of a cache hold: equal for caches that are the same bit for bit."""
    return digest_of_tensors(memories_of(cache))


def digest_of_tensors(thing: Any) -> str:
    """A hash of every tensor within something, in the order of attributes' names; modules are left out."""
    digest = hashlib.sha256()
    _add(digest, thing, set())
    return digest.hexdigest()


def _add(digest: Any, thing: Any, seen: set[int]) -> None:
    if isinstance(thing, Tensor):
        digest.update(str(tuple(thing.shape)).encode())
        digest.update(thing.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Mapping):
        thing = list(thing.values())
    elif hasattr(thing, "__dict__") and not isinstance(thing, type | torch.nn.Module):
        thing = [value for _, value in sorted(vars(thing).items())]
    if isinstance(thing, list | tuple):
        for each in thing:
            _add(digest, each, seen)
