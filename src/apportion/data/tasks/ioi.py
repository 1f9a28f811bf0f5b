"""Indirect object identification: "Mary and John went to the store, John gave a drink to" -> " Mary".

The task of Wang et al. 2022 (arXiv 2211.00593); attributes and edits of one attribute as in Makelov et al. 2024
(arXiv 2405.08366). The words are single tokens, with their leading space, of SmolLM2 and of most tokenizers of English.
"""

from typing import Literal

import numpy as np

from apportion.data.tasks.pairs import Prompt, PromptPairs, check_count, compose, drawn
from apportion.errors import InputError

NAMES = (
    *("Mary", "John", "Tom", "James", "Sarah", "Alice", "Bob", "David", "Mark", "Anna", "Paul", "Peter", "Laura"),
    *("Emma", "Jack", "Kate", "Michael", "Daniel", "Lucy", "George", "Sam", "Ben", "Max", "Leo", "Rose", "Grace"),
    *("Adam", "Eric", "Kevin", "Brian", "Linda", "Susan", "Karen", "Lisa", "Robert", "William", "Charles", "Henry"),
    *("Jane", "Martin", "Simon", "Luke"),
)
PLACES = ("store", "park", "school", "office", "hospital", "garden", "station", "house")
OBJECTS = ("book", "ring", "drink", "ball", "computer", "bone", "gift", "letter")

# What stands before the first name, between the names and the place, and around the object.
FRAMES = (
    ("Then,", " had a lot of fun at the ", ".", " gave a ", " to"),
    ("When", " went to the ", ",", " gave a ", " to"),
    ("Then,", " were working at the ", ".", " decided to give a ", " to"),
)
Counterfactual = Literal["three_names", "IO", "S", "Pos"]


def ioi(
    pairs: int,
    seed: int = 0,
    frame: int = 0,
    counterfactual: Counterfactual = "three_names",
    names: tuple[str, ...] = NAMES,
    places: tuple[str, ...] = PLACES,
    objects: tuple[str, ...] = OBJECTS,
) -> PromptPairs:
    """Draw pairs of prompts of one frame; half of them, drawn by chance, name the indirect object first.

    Attributes: ``IO`` and ``S``, the names of indirect object and subject, and ``Pos``, ``ABB`` where the indirect
    object comes first and ``BAB`` where it comes second. Roles: ``IO``, ``S1``, ``S2`` and ``end``.

    Args:
        pairs: how many.
        seed: of the draw; the same seed gives the same pairs.
        frame: which of ``FRAMES``; one is used at a time so that all prompts have the same length in tokens.
        counterfactual: ``three_names``: someone else gives, so that no name is told from another (the answers stay
            those of the clean prompt). ``IO``, ``S``, ``Pos``: this one attribute is changed (and the answers with it).
        names: to draw from.
        places: to draw from.
        objects: to draw from.

    Raises:
        InputError: an unknown frame or counterfactual, less than one pair, fewer than three names.
    """
    check_count(pairs)
    if not 0 <= frame < len(FRAMES):
        raise InputError(f"frame is {frame}: there are {len(FRAMES)}, counted from 0")
    if counterfactual not in ("three_names", "IO", "S", "Pos"):
        raise InputError(f"counterfactual {counterfactual!r} is unknown: choose three_names, IO, S or Pos")
    if len(names) < 3 or not places or not objects:
        raise InputError(f"{len(names)} names, {len(places)} places, {len(objects)} objects: 3, 1 and 1 are needed")
    generator = np.random.default_rng(np.random.SeedSequence([seed, frame, 0x101]))
    clean, other = [], []
    for _ in range(pairs):
        indirect, subject, third = drawn(generator, names, 3)
        first = bool(generator.integers(2))
        scene = (drawn(generator, places, 1)[0], drawn(generator, objects, 1)[0])
        clean.append(_prompt(frame, (indirect, subject, subject), first, scene))
        changed = {
            "three_names": (indirect, subject, third),
            "IO": (third, subject, subject),
            "S": (indirect, third, third),
            "Pos": (indirect, subject, subject),
        }[counterfactual]
        other.append(_prompt(frame, changed, first != (counterfactual == "Pos"), scene))
    return PromptPairs(f"IOI, frame {frame}", tuple(clean), tuple(other))


def _prompt(frame: int, people: tuple[str, str, str], indirect_first: bool, scene: tuple[str, str]) -> Prompt:
    """A prompt about the indirect object, the other of the two who are named first, and who gives."""
    indirect, subject, giver = people
    opening, going, stop, giving, to = FRAMES[frame]
    pair = [("IO", f" {indirect}"), ("S1", f" {subject}")]
    first, second = pair if indirect_first else pair[::-1]
    text, roles = compose(opening, first, " and", second, f"{going}{scene[0]}{stop}", ("S2", f" {giver}"), giving)
    return Prompt(
        text=f"{text}{scene[1]}{to}",
        answers=(f" {indirect}",),
        distractors=(f" {subject}",),
        roles=roles,
        attributes={"IO": indirect, "S": subject, "Pos": "ABB" if indirect_first else "BAB"},
    )
