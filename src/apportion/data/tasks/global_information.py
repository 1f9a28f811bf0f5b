"""Shared-context tasks whose answer is spread over the whole context: counts, orders, and many examples.

After Math.Find and ICL.ManyShot of SCBench (arXiv 2412.10319) and the aggregation tasks of RULER (arXiv 2404.06654).
"""

import random

from apportion.data.tasks.shared_context import KEYS, SharedContext, Turn
from apportion.errors import InputError

ORDINALS = ("most", "second most", "third most", "fourth most", "fifth most")
LABELS = ("alpha", "beta", "gamma", "delta")


def common_words(
    count: int, *, common: int = 5, often: int = 12, others: int = 40, seldom: int = 2, seed: int = 0
) -> list[SharedContext]:
    """Numbered lists in which some words come often and all others seldom; the one turn asks for those that do.

    Args:
        count: how many contexts.
        common: words that come ``often`` times.
        often: see there.
        others: words that come ``seldom`` times.
        seldom: see there.
        seed: of the draws.

    Raises:
        InputError: more words than there are; ``often`` is not above ``seldom``.
    """
    if not 1 <= common <= common + others <= len(KEYS) or not 0 < seldom < often:
        raise InputError(
            f"common={common}, others={others}, often={often}, seldom={seldom}: at most {len(KEYS)} words, and "
            "0 < seldom < often"
        )
    draws = random.Random(f"common_words {seed}")
    made = []
    for _ in range(count):
        words = draws.sample(KEYS, common + others)
        times = [often] * common + [seldom] * others
        turn = Turn(f" The {common} most common words are:", " " + " ".join(words[:common]), metric="fraction")
        made.append(SharedContext(_listed(draws, words, times), (turn,)))
    return made


def frequent_words(
    count: int, *, words: int = 300, kinds: int = 30, turns: int = 3, alpha: float = 2.0, seed: int = 0
) -> list[SharedContext]:
    """Lists whose words come as often as Zipf's law says; turns ask for the words of the first ranks.

    Args:
        count: how many contexts.
        words: of each list, roughly.
        kinds: different words.
        turns: ranks that are asked for, at most 5.
        alpha: the word of rank r comes in proportion to ``r ** -alpha``; ranks that are asked for differ by at least 1.
        seed: of the draws.

    Raises:
        InputError: too many kinds or turns.
    """
    if not 1 <= turns <= len(ORDINALS) or not turns < kinds <= len(KEYS):
        raise InputError(f"turns={turns}, kinds={kinds}: turns from 1 to {len(ORDINALS)}, below kinds <= {len(KEYS)}")
    total = sum(rank**-alpha for rank in range(1, kinds + 1))
    times = [max(1, round(words * rank**-alpha / total)) for rank in range(1, kinds + 1)]
    for rank in range(turns - 1, -1, -1):
        times[rank] = max(times[rank], times[rank + 1] + 1)
    draws = random.Random(f"frequent_words {seed}")
    made = []
    for _ in range(count):
        chosen = draws.sample(KEYS, kinds)
        asked = draws.sample(range(turns), turns)
        pairs = [Turn(f" The {ORDINALS[rank]} frequent word is", f" {chosen[rank]}") for rank in asked]
        made.append(SharedContext(_listed(draws, chosen, times), tuple(pairs)))
    return made


def math_find(count: int, *, numbers: int = 101, turns: int = 5, seed: int = 0) -> list[SharedContext]:
    """Lists of four-digit numbers, none twice; turns ask for the largest, the smallest, the next to them, the median.

    Args:
        count: how many contexts.
        numbers: in each; odd, so that there is a median.
        turns: questions about each, at most 5.
        seed: of the draws.

    Raises:
        InputError: an even number of numbers or too many, too many turns.
    """
    if numbers % 2 == 0 or not 5 <= numbers <= 9000 or not 1 <= turns <= 5:
        raise InputError(f"numbers={numbers}, turns={turns}: an odd number from 5 to 8999, and 1 to 5 turns")
    draws = random.Random(f"math_find {seed}")
    made = []
    for _ in range(count):
        drawn = draws.sample(range(1000, 10000), numbers)
        ordered = sorted(drawn)
        answers = {
            "largest": ordered[-1],
            "smallest": ordered[0],
            "second largest": ordered[-2],
            "second smallest": ordered[1],
            "median": ordered[numbers // 2],
        }
        asked = draws.sample(sorted(answers), turns)
        pairs = [Turn(f" The {each} number of the list is", f" {answers[each]}", "first_number") for each in asked]
        made.append(SharedContext("Numbers: " + ", ".join(map(str, drawn)) + ".", tuple(pairs)))
    return made


def many_shot(
    count: int, *, examples: int = 120, kinds: int = 30, turns: int = 5, seed: int = 0
) -> list[SharedContext]:
    """Many examples of words and their labels, which were drawn for the context; turns ask for labels of such words.

    Args:
        count: how many contexts.
        examples: in each.
        kinds: different words; each comes ``examples / kinds`` times, always with its own label.
        turns: questions about each, all for different words.
        seed: of the draws.

    Raises:
        InputError: more turns than kinds, more kinds than words or examples.
    """
    if not 1 <= turns <= kinds <= min(len(KEYS), examples):
        raise InputError(
            f"turns={turns}, kinds={kinds}, examples={examples}: turns <= kinds <= examples, kinds <= {len(KEYS)}"
        )
    draws = random.Random(f"many_shot {seed}")
    made = []
    for _ in range(count):
        label_of = {word: draws.choice(LABELS) for word in draws.sample(KEYS, kinds)}
        shown = [word for number, word in zip(range(examples), list(label_of) * (examples // kinds + 1), strict=False)]
        draws.shuffle(shown)
        context = "".join(f"Word: {word}\nLabel: {label_of[word]}\n\n" for word in shown)
        asked = draws.sample(sorted(label_of), turns)
        # Between turns the answer wants an end of its own.
        made.append(
            SharedContext(
                context.rstrip(), tuple(Turn(f"\n\nWord: {w}\nLabel:", f" {label_of[w]}", "label") for w in asked)
            )
        )
    return made


def _listed(draws: random.Random, words: list[str], times: list[int]) -> str:
    """The words as often as they come, in random order, numbered."""
    drawn = [word for word, often in zip(words, times, strict=True) for _ in range(often)]
    draws.shuffle(drawn)
    return " ".join(f"{number}. {word}" for number, word in enumerate(drawn, start=1)) + "."
