"""A shared context that serves two tasks at once: needles in prose or functions in code, and keys with their numbers.

After the multi-tasking group of SCBench (arXiv 2412.10319), Mix.Sum+NIAH without its summaries and Mix.RepoQA+KV: the
turns of the two parts take turns, and their scores are reported apart.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

from apportion.data.tasks.repo_qa import ANSWERS, function_turn, short_functions
from apportion.data.tasks.shared_context import (
    KEYS,
    SharedContext,
    Turn,
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
        made.append(SharedContext(context, _by_turns(of_needles, of_pairs)))
    return made


def functions_and_pairs(
    count: int, *, functions: int = 10, pairs: int = 20, turns: int = 4, answer: str = "source", seed: int = 0
) -> list[SharedContext]:
    """Contexts of short functions of the standard library with keys and their numbers in comments between them.

    Args:
        count: how many contexts.
        functions: in each, all with different descriptions.
        pairs: keys, each in a comment of its own.
        turns: questions about each context, half of them for functions, all for different ones.
        answer: to a question for a function, see `repo_qa`.
        seed: of the draws.

    Raises:
        InputError: more questions than there are functions and pairs, more of either than there are; an unknown answer.
    """
    known = short_functions()
    if turns < 1 or not (turns + 1) // 2 <= functions <= len(known) or not turns // 2 <= pairs <= len(KEYS):
        raise InputError(
            f"turns={turns}, functions={functions}, pairs={pairs}: half of the turns ask for functions and half for "
            f"pairs, each for another; functions <= {len(known)}, pairs <= {len(KEYS)}"
        )
    if answer not in ANSWERS:
        raise InputError(f"answer={answer!r}: {' or '.join(ANSWERS)}")
    draws = random.Random(f"functions_and_pairs {seed}")
    made = []
    for _ in range(count):
        chosen = draws.sample(sorted(known), functions)
        numbers = [str(number) for number in draws.sample(range(1000, 10000), pairs)]
        told = list(zip(draws.sample(KEYS, pairs), numbers, strict=True))
        # Lines of their own between functions, so that no function is longer for them.
        blocks = [known[each] for each in chosen] + [f"# {number_sentence(*each)}" for each in told]
        draws.shuffle(blocks)
        of_functions = [
            function_turn(each, known[each], answer, part="functions")
            for each in draws.sample(chosen, (turns + 1) // 2)
        ]
        of_pairs = [_commented(number_turn(*each, part="pairs")) for each in draws.sample(told, turns // 2)]
        made.append(SharedContext("\n\n\n".join(blocks) + "\n\n\n", _by_turns(of_functions, of_pairs)))
    return made


def _commented(turn: Turn) -> Turn:
    return replace(turn, question=f"\n#{turn.question}")


def _by_turns(first: Sequence[Turn], second: Sequence[Turn]) -> tuple[Turn, ...]:
    """One of the first, one of the second, and so on; there are as many of both, or one more of the first."""
    return tuple(turn for both in zip_longest(first, second) for turn in both if turn is not None)
