"""What the study of ShadowKV compares, at a number of keys read, and the settings that it chooses from."""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from apportion.keys import ComposedMemory, KeyBudget
from apportion.keys.memory import MakeComposed
from apportion.keys.quest import PageSelector
from apportion.keys.selectors import Oracle, RandomKeys, SinksAndRecent
from apportion.models.key_memory import LayerFacts
from apportion.studies.shadow_kv_loss import PARTS, with_part

OURS, BARE, PAGES, WINDOW = "ShadowKV", "ShadowKV without outliers", "page bounds (Quest)", "sinks and recent"
EACH, APART = "oracle of each head", "taken apart"
MORE_PART = "rank 60 of 192"
BESIDE, MORE = f"{OURS}, all but chunks on top", f"{OURS}, {MORE_PART}"
MakeAt = Callable[..., ComposedMemory]
"""Given a number of keys and a layer; ShadowKV's also what its budget counts, and which part of it is replaced."""


def _shadow(
    chunk: int, outliers: int, local: int, keys: int, facts: LayerFacts, counted: str = "all", part: str = ""
) -> ComposedMemory:
    return with_part(part, chunk, outliers, local, keys, facts, counted)


def _pages(page: int, keys: int, facts: LayerFacts) -> ComposedMemory:
    return ComposedMemory(facts, selector=PageSelector(page, KeyBudget(keys=keys)))


def _window(sinks: int, keys: int, facts: LayerFacts) -> ComposedMemory:
    return ComposedMemory(facts, selector=SinksAndRecent(KeyBudget(keys=keys, sinks=sinks)))


_CHUNKS = {
    f"chunks of {chunk}, {outliers} outliers, {local} local": (chunk, outliers, local)
    for chunk, outliers, local in ((8, 3, 3), (8, 1, 1), (4, 3, 3), (4, 1, 1))
}
_BARE_CHUNKS = {f"chunks of {chunk}, {local} local": (chunk, 0, local) for chunk, local in ((8, 3), (8, 1), (4, 3))}
OPTIONS: dict[str, dict[str, MakeAt]] = {
    OURS: {setting: partial(_shadow, *each) for setting, each in _CHUNKS.items()},
    BARE: {setting: partial(_shadow, *each) for setting, each in _BARE_CHUNKS.items()},
    PAGES: {f"pages of {page}": partial(_pages, page) for page in (4, 8, 16)},
    WINDOW: {f"{sinks} sinks": partial(_window, sinks) for sinks in (1, 4, 16)},
}


def _possible(keys: int) -> dict[str, dict[str, MakeAt]]:
    """The settings that leave something to choose at a budget."""
    rules = _CHUNKS | _BARE_CHUNKS

    def fits(setting: str) -> bool:
        chunk, outliers, local = rules.get(setting, (0, 0, 0))
        return chunk * (outliers + local + 1) <= keys

    return {name: {at: make for at, make in each.items() if fits(at)} for name, each in OPTIONS.items()}


def methods_at(keys: int, chosen: Mapping[str, str], seed: int) -> dict[str, MakeComposed]:
    """Every method at a budget, with its chosen setting."""
    budget = KeyBudget(keys=keys)
    tuned = {name: partial(OPTIONS[name][setting], keys) for name, setting in chosen.items()}
    return {
        EACH: lambda facts: ComposedMemory(facts, selector=Oracle(budget)),
        "oracle of each key-value head": lambda facts: ComposedMemory(facts, selector=Oracle(budget, "max of softmax")),
        **tuned,
        "random": lambda facts: ComposedMemory(facts, selector=RandomKeys(budget, seed)),
    }


def every_option(keys: int) -> dict[str, MakeComposed]:
    """All settings of all methods at a budget, by method and setting."""
    return {
        f"{name}: {setting}": partial(make, keys)
        for name, each in _possible(keys).items()
        for setting, make in each.items()
    }


def least(losses: Mapping[str, float]) -> dict[str, str]:
    """The setting of the least loss of each method."""
    return {
        name: min(each, key=lambda setting: losses.get(f"{name}: {setting}", torch.inf))
        for name, each in OPTIONS.items()
    }


def taken_apart(where: str, keys: int, setting: str) -> dict[str, MakeComposed]:
    """ShadowKV with one part replaced after the other, but for what is among the methods in any case."""
    make = OPTIONS[OURS][setting]
    return {f"{where}, {APART}: {part}": partial(make, keys, part=part) for part in PARTS if part != MORE_PART}
