"""Shared-context tasks of exact retrieval: values of keys, and lines by how they begin and end.

After Retr.KV and Retr.Prefix-Suffix of SCBench (Li and others, 2024, arXiv 2412.10319, section 3), with words and
four-digit numbers for its UUIDs and random strings, so that small models can be judged too.
"""

import random
from collections.abc import Sequence

from apportion.data.tasks.shared_context import KEYS, SharedContext, Turn
from apportion.errors import InputError

FORMS = ("sentence", "json")
MOST_PAIRS = len(KEYS) ** 2


def key_value(
    count: int, *, pairs: int = 60, turns: int = 5, form: str = "sentence", seed: int = 0
) -> list[SharedContext]:
    """Contexts of nothing but keys and their numbers; turns ask for numbers.

    Args:
        count: how many contexts.
        pairs: keys in each.
        turns: questions about each, all for different keys.
        form: ``sentence`` ("The number of the apple is 4821."), which small models can do, or ``json``, the paper's.
        seed: of the draws.

    Raises:
        InputError: more turns than pairs, more pairs than there are names, an unknown form.
    """
    if form not in FORMS:
        raise InputError(f"form={form!r}: one of {', '.join(FORMS)}")
    if not 1 <= turns <= pairs <= MOST_PAIRS:
        raise InputError(f"turns={turns}, pairs={pairs}: 1 <= turns <= pairs <= {MOST_PAIRS}")
    draws = random.Random(f"key_value {seed}")
    made = []
    for _ in range(count):
        names = distinct_names(draws, pairs)
        numbers = [str(number) for number in draws.sample(range(1000, 10000), pairs)]
        asked = draws.sample(range(pairs), turns)
        if form == "json":
            context = "{" + ", ".join(f'"{name}": "{n}"' for name, n in zip(names, numbers, strict=True)) + "}\n"
            made.append(SharedContext(context, tuple(Turn(f'"{names[i]}":', f' "{numbers[i]}"') for i in asked)))
            continue
        context = " ".join(number_sentence(name, n) for name, n in zip(names, numbers, strict=True))
        made.append(SharedContext(context, tuple(number_turn(names[i], numbers[i]) for i in asked)))
    return made


def prefix_suffix(
    count: int, *, lines: int = 40, length: int = 6, turns: int = 5, seed: int = 0
) -> list[SharedContext]:
    """Contexts of lines of random words; turns give the first two and the last two words of a line and ask for it.

    Args:
        count: how many contexts.
        lines: in each; no two begin and end alike.
        length: words of a line, at least 5.
        turns: questions about each, all for different lines.
        seed: of the draws.

    Raises:
        InputError: more turns than lines, lines that are too short.
    """
    if not 1 <= turns <= lines:
        raise InputError(f"turns={turns}, lines={lines}: 1 <= turns <= lines")
    if length < 5:
        raise InputError(f"length={length}: at least 5 words, two of them at either end")
    draws = random.Random(f"prefix_suffix {seed}")
    made = []
    for _ in range(count):
        chosen: dict[tuple[str, ...], list[str]] = {}
        while len(chosen) < lines:
            words = draws.choices(KEYS, k=length)
            chosen.setdefault((*words[:2], *words[-2:]), words)
        texts = [" ".join(words) for words in chosen.values()]
        made.append(
            SharedContext(
                "\n".join(texts) + "\n", tuple(_line_turn(texts[i]) for i in draws.sample(range(lines), turns))
            )
        )
    return made


def distinct_names(draws: random.Random, count: int) -> list[str]:
    """Names that all differ: single words, or pairs of words where there are more names than words."""
    if count <= len(KEYS):
        return draws.sample(KEYS, count)
    pairs = draws.sample(range(len(KEYS) ** 2), count)
    return [f"{KEYS[number // len(KEYS)]} {KEYS[number % len(KEYS)]}" for number in pairs]


def number_sentence(name: str, number: str) -> str:
    """A sentence that gives a name its number."""
    return f"The number of the {name} is {number}."


def number_turn(name: str, number: str, part: str = "") -> Turn:
    """The question that `number_sentence` answers."""
    return Turn(f" The number of the {name} is", f" {number}", part=part)


def _line_turn(text: str) -> Turn:
    words: Sequence[str] = text.split()
    question = f'The line that begins with "{" ".join(words[:2])}" and ends with "{" ".join(words[-2:])}" is:'
    return Turn(f"\n{question}", f" {text}")
