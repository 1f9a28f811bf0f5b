"""Tasks in which several questions share one context: needles in prose.

Further tasks of the kind are in the same form: a context, and turns of a question and its answer, all plain text whose
parts are joined as they are. The sentence that a question repeats up to its answer is what an induction head completes,
which even small models do.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from apportion.errors import InputError

KEYS = [
    "apple",
    "anchor",
    "basket",
    "candle",
    "castle",
    "cherry",
    "circle",
    "copper",
    "cotton",
    "dragon",
    "engine",
    "falcon",
    "feather",
    "forest",
    "garden",
    "ginger",
    "hammer",
    "harbor",
    "helmet",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "lantern",
    "lemon",
    "magnet",
    "marble",
    "meadow",
    "mirror",
    "needle",
    "nickel",
    "ocean",
    "orange",
    "orchid",
    "paddle",
    "pebble",
    "pencil",
    "pepper",
    "pillow",
    "planet",
    "pocket",
    "rabbit",
    "ribbon",
    "saddle",
    "salmon",
    "shadow",
    "silver",
    "spider",
    "sponge",
    "square",
    "summer",
    "sunset",
    "tablet",
    "temple",
    "ticket",
    "timber",
    "tunnel",
    "turtle",
    "velvet",
    "violin",
    "walnut",
    "window",
    "winter",
    "yellow",
]


@dataclass(frozen=True)
class Turn:
    """A question about a context, and the answer that is right.

    Attributes:
        question: what follows the context or the turn before, including the space or line break before the answer's
            place where there is one.
        answer: what follows the question; begins with a space where the model's next token would.
        metric: how a text that a model wrote is scored, a name of `apportion.data.tasks.metrics.METRICS`.
        part: of a task that mixes several, which of them the turn belongs to; their scores are never averaged.
    """

    question: str
    answer: str
    metric: str = "contained"
    part: str = ""


@dataclass(frozen=True)
class SharedContext:
    """A context and the turns about it, in order.

    Attributes:
        context: what all turns share.
        turns: at least one.
    """

    context: str
    turns: tuple[Turn, ...]


def needles(
    count: int, *, filler: Sequence[str], words: int = 600, keys: int = 4, turns: int = 1, seed: int = 0
) -> list[SharedContext]:
    """Contexts of prose with "The special magic number for KEY is NUMBER." in several places; turns ask for numbers.

    Args:
        count: how many contexts.
        filler: texts to take the prose from; each context begins somewhere else in them.
        words: of prose in each, roughly.
        keys: needles in each.
        turns: questions about each, all for different keys.
        seed: of the draws.

    Raises:
        InputError: more turns than keys or more keys than there are words for them; too little prose.
    """
    if not 1 <= turns <= keys <= len(KEYS):
        raise InputError(f"turns={turns}, keys={keys}: 1 <= turns <= keys <= {len(KEYS)}")
    draws = random.Random(seed)
    made = []
    for _ in range(count):
        sentences = some_sentences(draws, filler, words)
        chosen = draws.sample(KEYS, keys)
        numbers = [str(number) for number in draws.sample(range(1000, 10000), keys)]
        for key, number in zip(chosen, numbers, strict=True):
            sentences.insert(_place(draws, sentences), needle_sentence(key, number))
        asked = draws.sample(range(keys), turns)
        pairs = [needle_turn(chosen[which], numbers[which]) for which in asked]
        made.append(SharedContext(" ".join(sentences), tuple(pairs)))
    return made


def many_values(
    count: int,
    *,
    filler: Sequence[str],
    words: int = 600,
    keys: int = 2,
    values: int = 3,
    turns: int = 1,
    seed: int = 0,
) -> list[SharedContext]:
    """Contexts of prose with "One of the special magic numbers for KEY is NUMBER."; turns ask for all of a key.

    RULER's needles of several values (Hsieh and others, 2024, arXiv 2404.06654). The answer has them as they come.

    Args:
        count: how many contexts.
        filler: texts to take the prose from.
        words: of prose in each, roughly.
        keys: in each.
        values: numbers of each key.
        turns: questions about each, all for different keys.
        seed: of the draws.

    Raises:
        InputError: more turns than keys, more keys than there are words for them, no values; too little prose.
    """
    if not 1 <= turns <= keys <= len(KEYS) or not 1 <= values <= 9000 // keys:
        raise InputError(
            f"turns={turns}, keys={keys}, values={values}: 1 <= turns <= keys <= {len(KEYS)}, values at least 1, and "
            "9000 numbers for all"
        )
    draws = random.Random(f"many_values {seed}")
    made = []
    for _ in range(count):
        sentences, chosen = some_sentences(draws, filler, words), draws.sample(KEYS, keys)
        numbers = [str(number) for number in draws.sample(range(1000, 10000), keys * values)]
        told = list(zip(chosen * values, numbers, strict=True))
        draws.shuffle(told)
        hidden = [f"One of the special magic numbers for {key} is {number}." for key, number in told]
        pairs = []
        for asked in draws.sample(chosen, turns):
            answer = " ".join(number for key, number in told if key == asked)
            pairs.append(Turn(f" All the special magic numbers for {asked} are:", f" {answer}", metric="fraction"))
        made.append(SharedContext(scattered(draws, sentences, hidden), tuple(pairs)))
    return made


def needle_sentence(key: str, number: str) -> str:
    """A needle."""
    return f"The special magic number for {key} is {number}."


def needle_turn(key: str, number: str, part: str = "") -> Turn:
    """The question that a needle answers."""
    return Turn(f" The special magic number for {key} is", f" {number}", part=part)


def some_sentences(draws: random.Random, filler: Sequence[str], words: int) -> list[str]:
    """A stretch of prose from somewhere in the filler, as sentences.

    Raises:
        InputError: there is too little prose.
    """
    prose = " ".join(" ".join(text.split()) for text in filler).split(" ")
    if len(prose) < words:
        raise InputError(f"words={words}: the filler has {len(prose)}; give more texts")
    start = draws.randrange(len(prose) - words + 1)
    return _sentences(prose[start : start + words])


def scattered(draws: random.Random, sentences: Sequence[str], told: Sequence[str]) -> str:
    """Prose with other sentences between its own, these in the order in which they were given."""
    places = sorted(_place(draws, sentences) for _ in told)
    mixed = list(sentences)
    for place, each in reversed(list(zip(places, told, strict=True))):
        mixed.insert(place, each)
    return " ".join(mixed)


def _place(draws: random.Random, sentences: Sequence[str]) -> int:
    # Not at the very end, where every method reads.
    return draws.randrange(max(1, len(sentences) * 9 // 10))


def _sentences(words: Sequence[str]) -> list[str]:
    """Words joined up to each full stop; the last sentence is given one if it has none."""
    sentences: list[str] = []
    current: list[str] = []
    for word in words:
        current.append(word)
        if word.endswith((".", "!", "?")):
            sentences.append(" ".join(current))
            current = []
    if current:
        sentences.append(" ".join(current) + ".")
    return sentences
