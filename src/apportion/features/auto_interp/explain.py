"""Who explains: a chat model that reads a feature's windows, or counts of their tokens."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from apportion.errors import InputError
from apportion.features.auto_interp.asking import Asker
from apportion.features.auto_interp.examples import FeatureExamples
from apportion.features.auto_interp.prompts import Explanation, explain_messages, is_refusal, read_explanation
from apportion.models.chat import ChatError, SamplingParams

STYLES = ("default", "activations", "contrastive", "contrastive-activations")
_EXPLANATION_TOKENS = 160


@runtime_checkable
class Explainer(Protocol):
    """What makes explanations."""

    @property
    def style(self) -> str:
        """Its name, for the record."""

    @property
    def needs(self) -> frozenset[str]:
        """Capabilities of a chat model that it asks for."""

    def explain(self, examples: FeatureExamples, ask: Asker) -> Explanation:
        """Explain a feature from its train windows.

        Raises:
            ChatError: there is no explanation.
        """


@dataclass(frozen=True)
class ChatExplainer:
    """A chat model reads the windows, the active tokens marked, and says in a sentence what they share.

    Args:
        style: ``default``; ``activations``: marked tokens are also listed with their strength, 1 to 10;
            ``contrastive``: windows without the feature are shown too; or both.
        temperature: of the answer.
        max_tokens: of the answer.
    """

    style: str = "default"
    temperature: float = 0.0
    max_tokens: int = _EXPLANATION_TOKENS
    needs: frozenset[str] = frozenset({"chat"})

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise InputError(f"style={self.style!r}: choose one of {', '.join(STYLES)}, or the judge `tokens`")

    def explain(self, examples: FeatureExamples, ask: Asker) -> Explanation:
        """See `Explainer`."""
        messages = explain_messages(
            examples.train,
            examples.largest,
            near_misses=examples.near_misses if "contrastive" in self.style else (),
            with_activations="activations" in self.style,
        )
        said = ask.generate(messages, SamplingParams(self.max_tokens, self.temperature))
        if said.refused or is_refusal(said.text):
            raise ChatError("refusal", said.text[:200])
        explanation = read_explanation(said.text)
        if explanation is None:
            raise ChatError("nonsense", "the answer holds no explanation")
        return explanation


class TokenShareExplainer:
    """No model at all: the tokens whose share among the active ones is furthest above their share of the text.

    A token's weight is ``share * log(share / background share)``, its part in the divergence of the active tokens from
    the text; the ``top`` of them are named. It is the deterministic explainer of the method sheet, a floor that any
    judge should pass.

    Args:
        background: how often each token occurs in the text, stripped of white space.
        top: tokens to name.
    """

    style = "tokens"
    needs: frozenset[str] = frozenset()

    def __init__(self, background: Mapping[str, int], top: int = 5) -> None:
        if top < 1:
            raise InputError(f"top={top}: must be at least 1")
        self.background, self.top = background, top
        self._total = max(1, sum(background.values()))

    @classmethod
    def from_texts(cls, tokens: Iterable[str], top: int = 5) -> "TokenShareExplainer":
        """Count the background from the tokens of a text."""
        return cls(Counter(word for token in tokens if (word := _word(token))), top)

    def explain(self, examples: FeatureExamples, ask: Asker) -> Explanation:
        """See `Explainer`; ``ask`` is not used.

        Raises:
            ChatError: of the kind ``nonsense``: all active tokens are white space.
        """
        counts = Counter(
            word
            for example in examples.train
            for place in np.flatnonzero(example.active).tolist()
            if (word := _word(example.token(place)))
        )
        total = sum(counts.values())
        if not total:
            raise ChatError("nonsense", "the active tokens are all white space")

        def weight(word: str) -> float:
            share = counts[word] / total
            return share * math.log(share / max(self.background.get(word, 0), 0.5) * self._total)

        best = sorted(counts, key=lambda word: (-weight(word), word))[: self.top]
        return Explanation("text about: " + ", ".join(best))


def _word(token: str) -> str:
    """What a token says, without white space and in lower case."""
    return re.sub(r"\s+", " ", token).strip().lower()
