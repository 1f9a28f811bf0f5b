"""Prompts in pairs: one that says what the answer is, and one that hides just that and keeps everything else.

They are plain text: which tokens they become is asked of a tokenizer in `apportion.models.prompts`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from apportion.errors import InputError

MetricName = Literal["logit_difference", "probability_difference"]


@dataclass(frozen=True)
class Prompt:
    """A text that a model is to continue with one token.

    Attributes:
        text: what the model reads.
        answers: continuations that count as right, as text with their leading space.
        distractors: continuations that a model would give which has understood the form and not the content.
        roles: by name, the span of characters of a word that matters. ``end``, the last token, goes without saying.
        attributes: by name, what varies from prompt to prompt, such as the indirect object.
    """

    text: str
    answers: tuple[str, ...]
    distractors: tuple[str, ...]
    roles: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptPairs:
    """Prompts of one task, each with its counterfactual.

    Attributes:
        name: of the task.
        clean: prompts whose answer can be told (the positives).
        counterfactual: for each the same prompt with the information removed or changed (the negatives).
        metric: how an answer is judged: by the logit of the best answer minus that of the best distractor, or by the
            probability of all answers minus that of all distractors.

    Raises:
        InputError: no prompts, or not as many of both.
    """

    name: str
    clean: tuple[Prompt, ...]
    counterfactual: tuple[Prompt, ...]
    metric: MetricName = "logit_difference"

    def __post_init__(self) -> None:
        if not self.clean or len(self.clean) != len(self.counterfactual):
            raise InputError(
                f"{self.name} has {len(self.clean)} clean and {len(self.counterfactual)} counterfactual prompts: "
                "every clean prompt needs its counterfactual, and there must be at least one"
            )

    def __len__(self) -> int:
        return len(self.clean)

    def select(self, start: int, stop: int) -> "PromptPairs":
        """The pairs from ``start`` to before ``stop``."""
        return replace(self, clean=self.clean[start:stop], counterfactual=self.counterfactual[start:stop])

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that every prompt has, ``end`` last."""
        shared = set.intersection(*(set(each.roles) for each in (*self.clean, *self.counterfactual)))
        return (*(role for role in self.clean[0].roles if role in shared), "end")


def compose(*pieces: str | tuple[str, str]) -> tuple[str, dict[str, tuple[int, int]]]:
    """A text from pieces, of which ``(role, word)`` ones are remembered: the text, and where each role's word lies."""
    text, roles = "", {}
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        role, word = piece
        roles[role] = (len(text), len(text) + len(word))
        text += word
    return text, roles


def check_count(pairs: int) -> None:
    """Refuse less than one pair."""
    if pairs < 1:
        raise InputError(f"pairs is {pairs}: ask for at least one")


def drawn(generator: np.random.Generator, words: tuple[str, ...], count: int) -> list[str]:
    """``count`` different words."""
    return [words[index] for index in generator.choice(len(words), count, replace=False)]
