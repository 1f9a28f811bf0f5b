"""Docstring: a function with five arguments, of which its docstring has described two; the third is to be named.

The task of Heimersheim and Janiak 2023 (A circuit for Python docstrings in a 4-layer attention-only transformer), with
five arguments before which ``self`` stands.
"""

import numpy as np

from apportion.data.tasks.pairs import Prompt, PromptPairs, check_count, compose, drawn
from apportion.errors import InputError

# Names of arguments, functions and what descriptions are made of.
WORDS = (
    *("load", "size", "files", "last", "name", "path", "key", "value", "data", "text", "line", "code", "list"),
    *("mode", "type", "time", "user", "index", "count", "width", "height", "color", "group", "order", "state"),
    *("level", "point", "node", "field", "table", "image", "model", "result", "page", "title", "start", "end"),
    *("number", "length", "shape", "message", "event", "action", "target", "source", "parent", "child"),
    *("option", "label"),
)


def docstring(pairs: int, seed: int = 0, words: tuple[str, ...] = WORDS) -> PromptPairs:
    """Draw pairs of prompts; in the counterfactual all names are others, and the docstring's are not the function's.

    The answer is the third argument, the distractors are the other four. Attributes: ``first`` to ``fifth``, the
    arguments. Roles: these in the definition, ``first_described`` and ``second_described`` in the docstring, ``end``.

    Args:
        pairs: how many.
        seed: of the draw; the same seed gives the same pairs.
        words: to draw from; single tokens with their leading space.

    Raises:
        InputError: less than one pair, fewer than 20 words.
    """
    check_count(pairs)
    if len(words) < 20:
        raise InputError(f"{len(words)} words: at least 20 are needed, so that no name occurs twice in a prompt")
    generator = np.random.default_rng(np.random.SeedSequence([seed, 0xD0C]))
    clean, other = [], []
    for _ in range(pairs):
        drawn_words = drawn(generator, words, 20)
        arguments, strangers, elsewhere, rest = (
            drawn_words[:5],
            drawn_words[5:10],
            drawn_words[10:12],
            drawn_words[12:],
        )
        clean.append(_prompt(arguments, arguments, arguments[:2], rest))
        other.append(_prompt(arguments, strangers, elsewhere, rest))
    return PromptPairs("docstring", tuple(clean), tuple(other))


def _prompt(asked: list[str], arguments: list[str], described: list[str], rest: list[str]) -> Prompt:
    ordinals = ("first", "second", "third", "fourth", "fifth")
    function, summary, first_words, second_words = rest[0], rest[1:4], rest[4:6], rest[6:8]
    pieces: list[str | tuple[str, str]] = [f"def {function}(self"]
    for ordinal, argument in zip(ordinals, arguments, strict=True):
        pieces += [",", (ordinal, f" {argument}")]
    pieces += [f'):\n    """{" ".join(summary)}\n\n    :param', ("first_described", f" {described[0]}")]
    pieces += [f": {' '.join(first_words)}\n    :param", ("second_described", f" {described[1]}")]
    text, roles = compose(*pieces, f": {' '.join(second_words)}\n    :param")
    return Prompt(
        text=text,
        answers=(f" {asked[2]}",),
        distractors=tuple(f" {asked[index]}" for index in (0, 1, 3, 4)),
        roles=roles,
        attributes=dict(zip(ordinals, arguments, strict=True)),
    )
