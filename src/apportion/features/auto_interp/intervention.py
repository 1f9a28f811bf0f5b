"""Does the explanation say what a feature *does*? Intervention scoring: steer, let the model write, ask what changed.

The feature's direction is added at the last token of some texts, cut where the feature first fires, with the strength
at which the next-token distribution moves by a given Kullback-Leibler divergence: every feature spends the same
budget, and so does the control, a random direction. What the model writes then is read by a judge: how much likelier
is the explanation after steered passages than after clean ones, in nats?

Ours: the texts are windows (32 tokens by default) rather than 64 tokens. Of several candidate explanations the best one
is chosen on half of the test passages and scored on the other half; the paper takes the best score on the passages that
it reports, which flatters by selection.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.errors import InputError
from apportion.features.auto_interp.asking import Asker, Usage
from apportion.features.auto_interp.examples import FeatureExamples
from apportion.features.auto_interp.prompts import Explanation
from apportion.features.auto_interp.scores import Score, auroc
from apportion.features.auto_interp.windows import Example
from apportion.features.dictionary import SparseAutoencoder
from apportion.features.steering import steer
from apportion.models import LanguageModel, Site
from apportion.models.chat import ChatError, Message, SamplingParams
from apportion.models.sampling import During, continue_texts, next_logits

_SHORTEST_PROMPT = 4
_TOKENS_SHOWN = 5
_TOKENS_A_QUESTION = 200


@dataclass(frozen=True)
class InterventionSettings:
    """How a feature is steered; the defaults are those of the paper's code.

    Args:
        kl: mean divergence of the next-token distribution that steering shall cost, in nats; the paper has 0.1, 0.33, 1
            and 3.
        tolerance: of that, relative.
        iterations: attempts at most.
        start, lowest, highest: of the strength.
        explained: prompts that candidates are made from.
        tested: prompts that they are judged on.
        candidates: explanations tried.
        tokens: written after each prompt.
        positions: steer at the ``last`` token of the prompt, or ``from_last`` on.
        seed: of what is sampled.
    """

    kl: float = 1.0
    tolerance: float = 0.1
    iterations: int = 10
    start: float = 100.0
    lowest: float = 1e-3
    highest: float = 1e4
    explained: int = 10
    tested: int = 30
    candidates: int = 5
    tokens: int = 8
    positions: str = "last"
    seed: int = 22

    def __post_init__(self) -> None:
        if not self.kl > 0 or not 0 < self.lowest < self.start < self.highest:
            raise InputError(
                f"kl={self.kl}, start={self.start}: kl must be above 0, and start between lowest and highest"
            )
        if self.positions not in ("last", "from_last"):
            raise InputError(f"positions={self.positions!r}: last or from_last")
        if self.tested < 2 or min(self.explained, self.candidates, self.tokens, self.iterations) < 1:
            raise InputError("tested must be at least 2; explained, candidates, tokens and iterations at least 1")


@dataclass(frozen=True)
class Tuned:
    """A strength and the divergence that it costs; ``reached``: it is within the tolerance of what was asked."""

    strength: float
    kl: float
    reached: bool
    evaluations: int


def tune_strength(divergence: Callable[[float], float], settings: InterventionSettings) -> Tuned:
    """Find the strength that costs ``settings.kl``.

    Until the goal lies between two strengths, the logarithm of the strength is moved half-way to the bound; then it is
    interpolated between their logarithms. Strengths that never get there are returned as they are, ``reached`` false.

    Args:
        divergence: what a strength costs.
        settings: goal, tolerance, bounds.
    """
    low, high = (math.log(settings.lowest), None), (math.log(settings.highest), None)
    below: tuple[float, float | None] = low
    above: tuple[float, float | None] = high
    at, best = math.log(settings.start), Tuned(settings.start, math.nan, False, 0)
    for evaluation in range(1, settings.iterations + 1):
        strength = math.exp(at)
        kl = divergence(strength)
        tried = Tuned(strength, kl, abs(kl / settings.kl - 1) <= settings.tolerance, evaluation)
        if tried.reached:
            return tried
        if math.isnan(best.kl) or abs(_log(kl) - _log(settings.kl)) < abs(_log(best.kl) - _log(settings.kl)):
            best = tried
        if kl < settings.kl:
            below = (at, kl)
        else:
            above = (at, kl)
        if below[1] and above[1]:
            share = (_log(settings.kl) - _log(below[1])) / (_log(above[1]) - _log(below[1]))
            # Away from the ends, or a curved line is crept along.
            at = below[0] + min(max(share, 0.05), 0.95) * (above[0] - below[0])
        else:
            at = (below[0] + above[0]) / 2
    return Tuned(best.strength, best.kl, False, settings.iterations)


def _log(value: float) -> float:
    return math.log(max(value, 1e-12))


class Intervention:
    """Scores what steering with a feature does to what the model writes.

    ``auroc`` tells steered from clean passages by how likely they make the explanation. ``extra`` holds ``nats`` (the
    paper's score), ``control_nats`` (of a random direction of the same divergence, with candidates of its own),
    ``explanation`` (of the output, the best candidate), ``nats_of_explanation`` (of the explanation that the other
    scorers judge), ``strength``, ``kl``, ``reached``, and the same of the control.

    Args:
        lm: the model whose feature it is.
        site: of the dictionary.
        dictionary: it reads and writes there.
        settings: see there.
        control: also steer with a random direction.
        exclusive: held while the model is steered; give `LocalChat.exclusive` where the judge is the same model.
    """

    name = "intervention"
    needs = frozenset({"score"})

    def __init__(
        self,
        lm: LanguageModel,
        site: Site | str,
        dictionary: SparseAutoencoder,
        settings: InterventionSettings | None = None,
        *,
        control: bool = True,
        exclusive: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.lm, self.site, self.dictionary = lm, site, dictionary
        self.options, self.control = settings or InterventionSettings(), control
        self._exclusive = exclusive or threading.Lock()
        directions = SparseAutoencoder(
            dictionary.d_in, dictionary.n_features, dictionary.rule, d_out=dictionary.d_out, seed=self.options.seed
        )
        directions.input_scale.copy_(dictionary.input_scale)
        self._random = directions.to(lm.device)

    def settings(self) -> dict[str, Any]:
        """See `Scorer`."""
        return {**asdict(self.options), "control": self.control, "model": self.lm.fingerprint}

    def questions(self, examples: FeatureExamples) -> Usage:
        """What it will ask, about: candidates, and two passages a prompt, of the feature and of the control."""
        settings, sides = self.options, 1 + self.control
        calls = settings.candidates + 2 * min(settings.tested, len(examples.test))
        return Usage(sides * calls, sides * calls * _TOKENS_A_QUESTION, sides * settings.candidates * 20)

    def score(self, examples: FeatureExamples, explanation: Explanation, ask: Asker) -> Score:
        """See `Scorer`."""
        explained, tested = self._prompts(examples)
        if len(explained) < 1 or len(tested) < 2:
            return Score(failed={"too few prompts": 1})
        try:
            extra, scores = self._judged(self.dictionary, examples.feature, explained, tested, explanation, ask)
            if self.control:
                control, _ = self._judged(self._random, examples.feature, explained, tested, None, ask)
                extra |= {f"control_{name}": value for name, value in control.items()}
        except ChatError as error:
            if error.passing:
                raise
            return Score(failed={error.kind: 1})
        steered, clean = scores
        return Score(
            auroc=auroc(np.array(steered), np.array(clean)),
            n=len(steered) + len(clean),
            extra=extra,
            windows=[["steered", -1, value] for value in steered] + [["clean", -1, value] for value in clean],
        )

    def _prompts(self, examples: FeatureExamples) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids up to the first on which the feature fires: for candidates, and for the test."""
        tokenizer = self.lm.tokenizer

        def cut(windows: Sequence[Example], wanted: int) -> list[list[int]]:
            found = []
            for window in windows:
                first = int(np.argmax(window.activations > 0))
                ids = tokenizer(window.text[: window.spans[first][1]], add_special_tokens=False)["input_ids"]
                if len(ids) >= _SHORTEST_PROMPT:
                    found.append(ids)
            return found[:wanted]

        return cut(examples.train, self.options.explained), cut(examples.test, self.options.tested)

    def _judged(
        self,
        dictionary: SparseAutoencoder,
        feature: int,
        explained: list[list[int]],
        tested: list[list[int]],
        explanation: Explanation | None,
        ask: Asker,
    ) -> tuple[dict[str, Any], tuple[list[float], list[float]]]:
        settings = self.options
        with self._exclusive, torch.no_grad():
            clean = next_logits(self.lm, tested).log_softmax(dim=-1)

            def divergence(strength: float) -> float:
                steered = next_logits(self.lm, tested, self._during(dictionary, feature, strength))
                return float((clean.exp() * (clean - steered.log_softmax(dim=-1))).sum(dim=-1).mean())

            tuned = tune_strength(divergence, settings)
            during = self._during(dictionary, feature, tuned.strength)
            risen = self._risen(explained, during)
            passages = []
            for kind in (during, None):
                generator = torch.Generator().manual_seed(settings.seed)
                new = continue_texts(self.lm, tested, settings.tokens, generator, kind, settings.positions)
                passages.append([self.lm.tokenizer.decode(old + more) for old, more in zip(tested, new, strict=True)])
        candidates = self._candidates(explained, risen, ask)
        texts = [*candidates, *([explanation.text] if explanation else [])]
        likelihood = [
            [[sum(each) for each in ask.score(_passage(passage), [f" {text}" for text in texts])] for passage in part]
            for part in passages
        ]
        steered, unsteered = (np.array(part) for part in likelihood)  # [passages, texts]
        gain = steered - unsteered
        half = len(tested) // 2
        best = int(np.argmax(gain[:half, : len(candidates)].mean(axis=0)))
        extra: dict[str, Any] = {
            "nats": float(gain[half:, best].mean()),
            "explanation": candidates[best],
            "strength": tuned.strength,
            "kl": tuned.kl,
            "reached": tuned.reached,
        }
        if explanation:
            extra["nats_of_explanation"] = float(gain[:, -1].mean())
        return extra, (steered[half:, best].tolist(), unsteered[half:, best].tolist())

    def _during(self, dictionary: SparseAutoencoder, feature: int, strength: float) -> During:
        def begin(meant: Tensor) -> AbstractContextManager[None]:
            return steer(self.lm, self.site, dictionary, {feature: strength}, positions=meant)

        return begin

    def _risen(self, prompts: list[list[int]], during: During) -> list[list[tuple[str, float]]]:
        """For each prompt the tokens whose probability rises most, and by how much."""
        rise = next_logits(self.lm, prompts, during).softmax(dim=-1) - next_logits(self.lm, prompts).softmax(dim=-1)
        best = rise.topk(_TOKENS_SHOWN)
        return [
            [(self.lm.tokenizer.decode([token]), value) for token, value in zip(tokens, values, strict=True)]
            for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def _candidates(self, prompts: list[list[int]], risen: list[list[tuple[str, float]]], ask: Asker) -> list[str]:
        """What a chat model makes of the tokens that rose; without one the tokens themselves."""
        settings = self.options
        total: dict[str, float] = {}
        for tokens in risen:
            for token, value in tokens:
                total[token.strip()] = total.get(token.strip(), 0.0) + value
        words = [word for word in sorted(total, key=lambda word: -total[word]) if word]
        plain = "words like " + ", ".join(words[:_TOKENS_SHOWN])
        if not ask.can("chat"):
            return [plain]
        texts = [self.lm.tokenizer.decode(prompt) for prompt in prompts]
        messages = intervention_messages(texts, risen)
        said = [
            ask.generate(messages, SamplingParams(20, 0.7, "\n", settings.seed + number)).text.strip()
            for number in range(settings.candidates)
        ]
        return [text for text in dict.fromkeys(said) if text] or [plain]


_EXPLAIN = """A feature of a language model was made stronger at the end of some texts. For each text you see the tokens
that the model then found more probable as the next one, with the rise of their probability.
Say in a few words what the feature makes the model write. Answer with those words alone."""
_TAUGHT: tuple[tuple[tuple[tuple[str, Mapping[str, float]], ...], str], ...] = (
    (
        (
            ("The recipe begins with", {" butter": 0.12, " cream": 0.09, " milk": 0.08}),
            ("On the table stood", {" cheese": 0.11, " milk": 0.1, " butter": 0.03}),
        ),
        "food made from milk",
    ),
    (
        (
            ("She looked at the sky and", {" suddenly": 0.2, " then": 0.05, " at": 0.02}),
            ("def load(path):", {" suddenly": 0.03, " abruptly": 0.02, " at": 0.01}),
        ),
        "adverbs for sudden events",
    ),
)


def intervention_messages(texts: Sequence[str], risen: Sequence[Sequence[tuple[str, float]]]) -> list[Message]:
    """The conversation that asks what a feature makes the model write."""

    def shown(pairs: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> str:
        return "\n\n".join(
            f"Text: {text}\nMore probable: " + ", ".join(f'"{token}" (+{value:.2f})' for token, value in tokens)
            for text, tokens in pairs
        )

    messages: list[Message] = [{"role": "system", "content": _EXPLAIN}]
    for fragments, answer in _TAUGHT:
        question = shown([(text, list(tokens.items())) for text, tokens in fragments])
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": shown(list(zip(texts, risen, strict=True)))}]


def _passage(text: str) -> str:
    """What stands before an explanation whose likelihood is asked for."""
    taught = (
        ("He opened the fridge: milk, butter, cream and more milk.", "food made from milk"),
        ("Suddenly, all at once, without warning, it fell.", "adverbs for sudden events"),
    )
    parts = [f"Passage: {shown}\nThe passage holds an unusual amount of: {answer}\n" for shown, answer in taught]
    return "\n".join([*parts, f"Passage: {' '.join(text.split())}\nThe passage holds an unusual amount of:"])
