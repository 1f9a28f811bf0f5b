"""Shared-context task of several hops: which variables hold a value, when most were set from other variables.

After Retr.MultiHop of SCBench (arXiv 2412.10319), which is RULER's variable tracking (Hsieh and others, 2024, arXiv
2404.06654): some chains of assignments, scattered over prose; a turn asks for one chain.
"""

import random
from collections.abc import Sequence
from itertools import pairwise

from apportion.data.tasks.shared_context import KEYS, SharedContext, Turn, scattered, some_sentences
from apportion.errors import InputError


def variable_tracking(
    count: int,
    *,
    filler: Sequence[str],
    words: int = 400,
    chains: int = 2,
    hops: int = 2,
    turns: int = 2,
    seed: int = 0,
) -> list[SharedContext]:
    """Contexts with "VAR apple = 4821." and "VAR ocean = VAR apple." in prose; turns ask who holds a value.

    Args:
        count: how many contexts.
        filler: texts to take the prose from.
        words: of prose in each, roughly.
        chains: values that are set and handed on.
        hops: how often each is handed on; a chain has ``hops + 1`` variables.
        turns: questions about each context, all for different chains.
        seed: of the draws.

    Raises:
        InputError: more turns than chains, more variables than there are names; too little prose.
    """
    if not 1 <= turns <= chains or chains * (hops + 1) > len(KEYS) or hops < 0:
        raise InputError(
            f"turns={turns}, chains={chains}, hops={hops}: 1 <= turns <= chains, and chains * (hops + 1) <= {len(KEYS)}"
        )
    draws = random.Random(f"variable_tracking {seed}")
    made = []
    for _ in range(count):
        prose = some_sentences(draws, filler, words)
        names = draws.sample(KEYS, chains * (hops + 1))
        values = [str(value) for value in draws.sample(range(1000, 10000), chains)]
        of_chain = [names[start : start + hops + 1] for start in range(0, len(names), hops + 1)]
        told = [_assignments(chain, value) for chain, value in zip(of_chain, values, strict=True)]
        # Chains are mixed, the steps of each stay in order.
        order = [which for which, steps in enumerate(told) for _ in steps]
        draws.shuffle(order)
        rest = [iter(steps) for steps in told]
        context = scattered(draws, prose, [next(rest[which]) for which in order])
        asked = draws.sample(range(chains), turns)
        made.append(SharedContext(context, tuple(_turn(of_chain[which], values[which]) for which in asked)))
    return made


def _assignments(names: Sequence[str], value: str) -> list[str]:
    first = f"VAR {names[0]} = {value}."
    return [first, *(f"VAR {after} = VAR {before}." for before, after in pairwise(names))]


def _turn(names: Sequence[str], value: str) -> Turn:
    return Turn(f" The variables that hold the value {value} are:", " " + " ".join(names), metric="fraction")
