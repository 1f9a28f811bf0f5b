"""A shared context that serves two tasks at once: needles in prose, and keys with their numbers.

After the multi-tasking group of SCBench (arXiv 2412.10319), without its summaries: the turns of the two parts take
turns, and their scores are reported apart.
"""

import random
from collections.abc import Sequence

from apportion.data.tasks.shared_context import (
    KEYS,
    SharedContext,
    needle_sentence,
    needle_turn,
    scattered,
    some_sentences,
)
from apportion.data.tasks.string_retrieval import number_sentence, number_turn
from apportion.errors import InputError


def needles_and_pairs(
    count: int,
    *,
    filler: Sequence[str],
    words: int = 400,
    needles: int = 3,
    pairs: int = 20,
    turns: int = 4,
    seed: int = 0,
) -> list[SharedContext]:
    """Contexts of prose with needles, then keys and their numbers; turns ask for either, by turns.

    Args:
        count: how many contexts.
        filler: texts to take the prose from.
        words: of prose in each, roughly.
        needles: sentences hidden in it.
        pairs: keys that follow the prose; none of them is a needle's.
        turns: questions about each context, half of them for needles, all for different keys.
        seed: of the draws.

    Raises:
        InputError: more questions than there are needles and pairs, too many keys; too little prose.
    """
    if turns < 1 or (turns + 1) // 2 > needles or turns // 2 > pairs or needles + pairs > len(KEYS):
        raise InputError(
            f"turns={turns}, needles={needles}, pairs={pairs}: half of the turns ask for needles and half for pairs, "
            f"each for another; needles + pairs <= {len(KEYS)}"
        )
    draws = random.Random(f"needles_and_pairs {seed}")
    made = []
    for _ in range(count):
        names = draws.sample(KEYS, needles + pairs)
        numbers = [str(number) for number in draws.sample(range(1000, 10000), needles + pairs)]
        told = list(zip(names, numbers, strict=True))
        hidden, listed = told[:needles], told[needles:]
        prose = scattered(draws, some_sentences(draws, filler, words), [needle_sentence(*each) for each in hidden])
        context = " ".join([prose, *(number_sentence(*each) for each in listed)])
        of_needles = [needle_turn(*each, part="needles") for each in draws.sample(hidden, (turns + 1) // 2)]
        of_pairs = [number_turn(*each, part="pairs") for each in draws.sample(listed, turns // 2)]
        asked = [turn for both in zip(of_needles, [*of_pairs, None], strict=False) for turn in both if turn is not None]
        made.append(SharedContext(context, tuple(asked)))
    return made
