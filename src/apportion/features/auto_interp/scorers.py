"""Who judges an explanation: scorers, each of which gives every window of the test a score.

| scorer | what it asks | what it needs |
|---|---|---|
| ``detection`` | which of five windows fit the explanation | a chat model |
| ``fuzzing`` | in which of five windows the marked tokens fit; wrong marks are where it is silent | a chat model |
| ``fuzzing-inactive`` | the same; wrong marks are on silent tokens of windows in which it fires | a chat model |
| ``simulation`` | how strong the feature is on every token | a chat model |
| ``surprisal`` | whether the explanation makes the window likelier | likelihoods |
| ``embedding`` | whether a sentence encoder finds explanation and window alike | an encoder |
| ``example-embedding`` | the same of five train windows, a control without explanation | an encoder |

``intervention``, which judges what a feature does rather than when it fires, is in ``intervention.py``.

Detection and fuzzing degrade by what the model can: with likelihoods each window is judged alone, by the log-odds of 1
over 0 less those under an explanation that says nothing (small models favour one answer whatever they read); with
log-probabilities of the answer's tokens by P(1) / (P(0) + P(1)); else by the 0 or 1 that was said.
"""

import dataclasses
import math
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from apportion.errors import InputError
from apportion.features.auto_interp.asking import Asker
from apportion.features.auto_interp.examples import FeatureExamples
from apportion.features.auto_interp.prompts import (
    NULL_EXPLANATION,
    Explanation,
    described_prefix,
    is_refusal,
    judge_messages,
    read_levels,
    read_verdicts,
    simulate_messages,
)
from apportion.features.auto_interp.scores import Score, summarise
from apportion.features.auto_interp.windows import Example, levels
from apportion.models.chat import ChatError, Generation, SamplingParams

_TOKENS_A_VERDICT = 6
_TOP_LOGPROBS = 5
_VECTORS_KEPT = 50_000


@runtime_checkable
class Scorer(Protocol):
    """What judges explanations."""

    @property
    def name(self) -> str:
        """For the record."""

    @property
    def needs(self) -> frozenset[str]:
        """Capabilities that the chat model must have."""

    def settings(self) -> dict[str, Any]:
        """What decides its scores, as JSON can hold it."""

    def score(self, examples: FeatureExamples, explanation: Explanation, ask: Asker) -> Score:
        """Judge an explanation by a feature's test windows.

        Raises:
            ChatError: the judge cannot be reached.
        """


class _Judging(ABC):
    """Detection and fuzzing: windows in, verdicts out."""

    name: str
    marked: bool
    needs = frozenset({"chat"})

    def __init__(self, per_prompt: int = 5, seed: int = 22, temperature: float = 0.0) -> None:
        if per_prompt < 1:
            raise InputError(f"per_prompt={per_prompt}: must be at least 1")
        self.per_prompt, self.seed, self.temperature = per_prompt, seed, temperature

    def settings(self) -> dict[str, Any]:
        """See `Scorer`."""
        return {"per_prompt": self.per_prompt, "seed": self.seed, "temperature": self.temperature}

    @abstractmethod
    def shown(self, examples: FeatureExamples) -> tuple[list[Example], list[str]]:
        """The windows to judge and their texts."""

    def score(self, examples: FeatureExamples, explanation: Explanation, ask: Asker) -> Score:
        """See `Scorer`."""
        windows, texts = self.shown(examples)
        # Both kinds mixed, or the judge would learn their order.
        order = np.random.default_rng([self.seed, examples.feature]).permutation(len(windows))
        scores: list[float | None] = [None] * len(windows)
        failed: dict[str, int] = {}
        alone = ask.can("score")
        step = 1 if alone else self.per_prompt
        for start in range(0, len(order), step):
            part = order[start : start + step].tolist()
            asked = [texts[place] for place in part]
            try:
                found = [self._log_odds(explanation, asked[0], ask)] if alone else self._asked(explanation, asked, ask)
            except ChatError as error:
                if error.passing:
                    raise
                failed[error.kind] = failed.get(error.kind, 0) + len(part)
                continue
            for place, value in zip(part, found, strict=True):
                scores[place] = value
        return summarise(
            windows,
            scores,
            threshold=0.0 if alone else 0.5,
            quantiles=_quantiles(examples),
            base_rate=examples.window_density,
            failed=failed,
        )

    def _asked(self, explanation: Explanation, texts: list[str], ask: Asker) -> list[float]:
        said = ask.generate(
            judge_messages(explanation.text, texts, marked=self.marked),
            SamplingParams(
                max_tokens=_TOKENS_A_VERDICT * len(texts) + 10,
                temperature=self.temperature,
                top_logprobs=_TOP_LOGPROBS if ask.can("logprobs") else 0,
            ),
        )
        verdicts = read_verdicts(said.text, len(texts))
        if verdicts is None:
            refused = said.refused or is_refusal(said.text)
            raise ChatError("refusal" if refused else "nonsense", said.text[:200])
        return _shares_of_one(said, len(texts)) or [float(verdict) for verdict in verdicts]

    def _log_odds(self, explanation: Explanation, text: str, ask: Asker) -> float:
        odds = []
        for said in (explanation.text, NULL_EXPLANATION):
            messages = judge_messages(said, [text], marked=self.marked)
            one, zero = ask.score(messages, ["[1]", "[0]"])
            odds.append(sum(one) - sum(zero))
        return odds[0] - odds[1]


class Detection(_Judging):
    """Which windows fit the explanation, somewhere in them?"""

    name = "detection"
    marked = False

    def shown(self, examples: FeatureExamples) -> tuple[list[Example], list[str]]:
        """Test windows and negatives, plain."""
        windows = [*examples.test, *examples.negatives]
        return windows, [window.text for window in windows]


class Fuzzing(_Judging):
    """In which windows does the explanation fit the marked tokens?

    Args:
        inactive: wrong marks are put on silent tokens of the very windows in which the feature fires, which only an
            explanation of the right tokens can tell; by default on random tokens of windows without the feature. Either
            way as many as are active in a window on average, rounded up.
    """

    marked = True

    def __init__(self, inactive: bool = False, per_prompt: int = 5, seed: int = 22, temperature: float = 0.0) -> None:
        super().__init__(per_prompt, seed, temperature)
        self.inactive = inactive
        self.name = "fuzzing-inactive" if inactive else "fuzzing"

    def shown(self, examples: FeatureExamples) -> tuple[list[Example], list[str]]:
        """Test windows with their active tokens marked, and windows with wrong marks."""
        windows, texts = list(examples.test), [window.marked() for window in examples.test]
        if not windows:
            return windows, texts
        n = math.ceil(np.mean([window.active.sum() for window in windows]))
        random = np.random.default_rng([self.seed, examples.feature, 1])
        others = [dataclasses.replace(each, source="inactive", quantile=-1) for each in examples.test]
        for window in others if self.inactive else examples.negatives:
            silent = (window.activations == 0) & np.array([stop > start for start, stop in window.spans])
            places = np.flatnonzero(silent)
            if len(places):
                wrong = np.zeros(len(silent), dtype=np.bool_)
                wrong[random.choice(places, size=min(n, len(places)), replace=False)] = True
                windows.append(window)
                texts.append(window.marked(wrong))
        return windows, texts


class Simulation:
    """Guesses how strong the feature is on every token of a window, from 0 to 10 (Bills et al. 2023).

    The score of a window is the largest of its guesses; ``extra["pearson"]`` is the correlation of guesses and true
    strengths over the tokens of all windows, the score of the older method. One question a window.
    """

    name = "simulation"
    needs = frozenset({"chat"})

    def settings(self) -> dict[str, Any]:
        """See `Scorer`."""
        return {}

    def score(self, examples: FeatureExamples, explanation: Explanation, ask: Asker) -> Score:
        """See `Scorer`."""
        windows = [*examples.test, *examples.negatives]
        scores: list[float | None] = [None] * len(windows)
        failed: dict[str, int] = {}
        guessed, true = [], []
        for place, window in enumerate(windows):
            tokens = [window.token(number) for number in range(len(window.spans))]
            said = _or_failure(
                lambda tokens=tokens: ask.generate(  # type: ignore[misc]
                    simulate_messages(explanation.text, tokens), SamplingParams(4 * len(tokens) + 10)
                ),
                failed,
            )
            guess = None if said is None else read_levels(said.text, len(tokens))
            if guess is None:
                if said is not None:
                    kind = "refusal" if said.refused or is_refusal(said.text) else "nonsense"
                    failed[kind] = failed.get(kind, 0) + 1
                continue
            scores[place] = float(max(guess, default=0))
            guessed += guess
            true += levels(window.activations, examples.largest).tolist()
        varies = len(set(guessed)) > 1 and len(set(true)) > 1
        pearson = float(np.corrcoef(guessed, true)[0, 1]) if varies else None
        return summarise(
            windows,
            scores,
            threshold=None,
            quantiles=_quantiles(examples),
            base_rate=examples.window_density,
            failed=failed,
            extra={"pearson": pearson},
        )


class Surprisal:
    """Does reading the explanation first make a window likelier than reading one that says nothing?

    The score is the gain in mean log-probability a token, in nats; the model needs to follow no instruction. Where the
    judge is the model whose features are explained, it judges itself: say so.
    """

    name = "surprisal"
    needs = frozenset({"score"})

    def settings(self) -> dict[str, Any]:
        """See `Scorer`."""
        return {}

    def score(self, examples: FeatureExamples, explanation: Explanation, ask: Asker) -> Score:
        """See `Scorer`."""
        windows = [window for window in (*examples.test, *examples.negatives) if window.text]
        texts = [window.text for window in windows]
        failed: dict[str, int] = {}
        scores: list[float | None] = [None] * len(windows)
        means = [
            _or_failure(lambda said=said: ask.score(described_prefix(said), texts), failed)  # type: ignore[misc]
            for said in (explanation.text, NULL_EXPLANATION)
        ]
        if means[0] is not None and means[1] is not None:
            scores = [float(np.mean(own) - np.mean(null)) for own, null in zip(means[0], means[1], strict=True)]
        failed = {kind: len(windows) for kind in failed}
        return summarise(
            windows,
            scores,
            threshold=0.0,
            quantiles=_quantiles(examples),
            base_rate=examples.window_density,
            failed=failed,
        )


class Embedding:
    """Are explanation and window alike to a sentence encoder? Their cosine is the score.

    Args:
        encode: unit vectors of texts, such as an `apportion.models.SentenceEncoder`.
        by_examples: the query is the mean of the vectors of ``n`` train windows instead (their weakest to strongest,
            evenly): what an explanation could tell an encoder, and a control that needs none.
        n: how many.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, encode: Callable[[Sequence[str]], Tensor], by_examples: bool = False, n: int = 5) -> None:
        if n < 1:
            raise InputError(f"n={n}: must be at least 1")
        self.name = "example-embedding" if by_examples else "embedding"
        self._encode, self._by_examples, self._n = encode, by_examples, n
        self._lock = threading.Lock()
        self._vectors: OrderedDict[str, Tensor] = OrderedDict()

    def settings(self) -> dict[str, Any]:
        """See `Scorer`."""
        own = {"examples": self._n} if self._by_examples else {}
        return {"encoder": getattr(self._encode, "name", "callable"), **own}

    def score(self, examples: FeatureExamples, explanation: Explanation, ask: Asker) -> Score:
        """See `Scorer`; ``ask`` is not used."""
        windows = [*examples.test, *examples.negatives]
        vectors = self.vectors([window.text for window in windows])
        if self._by_examples:
            train = examples.train
            chosen = np.linspace(0, len(train) - 1, min(self._n, len(train))).round().astype(int)
            query = self.vectors([train[place].text for place in chosen.tolist()]).mean(dim=0)
        else:
            query = self._encode([explanation.text])[0]
        cosine = torch.nn.functional.cosine_similarity(vectors, query[None], dim=1)
        return summarise(
            windows,
            list(map(float, cosine)),
            threshold=None,
            quantiles=_quantiles(examples),
            base_rate=examples.window_density,
        )

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Vectors of texts; windows that several features share are encoded once."""
        with self._lock:
            missing = list(dict.fromkeys(text for text in texts if text not in self._vectors))
            if missing:
                for text, vector in zip(missing, self._encode(missing), strict=True):
                    self._vectors[text] = vector
            found = torch.stack([self._vectors[text] for text in texts]) if texts else torch.zeros(0, 1)
            while len(self._vectors) > _VECTORS_KEPT:
                self._vectors.popitem(last=False)
        return found


def _or_failure(ask: Callable[[], Any], failed: dict[str, int]) -> Any:
    """What was asked for, or None where the judge failed for good; why is counted."""
    try:
        return ask()
    except ChatError as error:
        if error.passing:
            raise
        failed[error.kind] = failed.get(error.kind, 0) + 1
        return None


def _shares_of_one(said: Generation, n: int) -> list[float] | None:
    """P(1) / (P(0) + P(1)) at each place of the list, or None where the model did not tell."""
    found = []
    for token, top in zip(said.tokens, said.top_logprobs, strict=False):
        if token.strip() not in ("0", "1"):
            continue
        mass = {"0": 0.0, "1": 0.0}
        for other, value in top.items():
            if other.strip() in mass:
                mass[other.strip()] += math.exp(value)
        total = mass["0"] + mass["1"]
        found.append(mass["1"] / total if total > 0 else float(token.strip()))
    return found if len(found) == n else None


def _quantiles(examples: FeatureExamples) -> int:
    return 1 + max((window.quantile for window in (*examples.test, *examples.train)), default=-1)
