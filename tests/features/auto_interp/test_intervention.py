"""Steering at equal divergence, and what a judge makes of it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from apportion.allocate import TokenChoice
from apportion.errors import InputError
from apportion.features import SparseAutoencoder
from apportion.features.auto_interp import (
    Asker,
    Example,
    Explanation,
    FeatureExamples,
    Intervention,
    InterventionSettings,
    tune_strength,
)
from apportion.features.steering import steer
from apportion.models import LanguageModel, load
from apportion.models.chat import CallableChat
from apportion.models.local_chat import LocalChat
from apportion.models.sampling import continue_texts, next_logits
from apportion.models.spelling import speller
from tiny_families import CAUSAL, tiny_model

SITE = "layers.1.residual"
SETTINGS = InterventionSettings(kl=0.5, explained=3, tested=6, candidates=2, tokens=3)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("goal", [0.1, 1.0, 3.0])
def test_strengths_are_found_for_any_law(power, goal):
    found = tune_strength(lambda strength: goal * (strength / 37) ** power, InterventionSettings(kl=goal))
    assert found.reached
    assert found.kl == pytest.approx(goal, rel=0.1)
    assert found.evaluations <= 10


def test_a_divergence_that_is_never_reached_is_said_so_with_the_nearest_strength():
    found = tune_strength(lambda strength: 0.01 * (1 - math.exp(-strength)), InterventionSettings(kl=1.0))
    assert not found.reached
    assert found.kl == pytest.approx(0.01, rel=0.05)
    assert not tune_strength(lambda strength: 0.0, InterventionSettings()).reached


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"kl": 0.0}, "kl=0.0"), ({"positions": "first"}, "positions='first'"), ({"tested": 1}, "tested")],
)
def test_settings_that_cannot_work_are_refused(changes, named):
    with pytest.raises(InputError, match=named):
        InterventionSettings(**changes)


@pytest.mark.parametrize("family", CAUSAL)
def test_logits_after_texts_of_unequal_length_are_those_of_each_alone(family):
    lm = LanguageModel(family, tiny_model(family), tokenizer=None)
    texts = [[5, 6, 7, 8, 9], [11, 12], [20, 21, 22]]
    found = next_logits(lm, texts)
    for text, row in zip(texts, found, strict=True):
        assert torch.allclose(row, lm.model(torch.tensor([text])).logits[0, -1].float(), atol=1e-4)


@pytest.fixture(scope="module")
def lm(tiny_llama: Path) -> LanguageModel:
    return load(tiny_llama)


@pytest.fixture(scope="module")
def dictionary(lm) -> SparseAutoencoder:
    return SparseAutoencoder(lm.d_model, 16, TokenChoice(2), seed=3).eval()


def test_steering_at_the_last_token_of_the_prompt_alone_or_from_there_on(lm, dictionary):
    places = {}

    def during_as(name):
        def begin(meant):
            places.setdefault(name, []).append(meant.sum(dim=1).tolist())
            return steer(lm, SITE, dictionary, {3: 5.0}, positions=meant)

        return begin

    texts = [[5, 6, 7, 8, 9], [11, 12, 13, 14]]
    drawn = {}
    for positions in ("last", "from_last"):
        generator = torch.Generator().manual_seed(0)
        drawn[positions] = continue_texts(lm, texts, 3, generator, during_as(positions), positions)
    assert places["last"] == [[1, 1]] * 3
    assert places["from_last"] == [[1, 1], [2, 2], [3, 3]]
    assert [text[0] for text in drawn["last"]] == [text[0] for text in drawn["from_last"]]
    assert all(len(text) == 3 for text in drawn["last"])


def examples_of(lm: LanguageModel, n: int = 8) -> FeatureExamples:
    spell = speller(lm.tokenizer)
    random = np.random.default_rng(0)
    windows = []
    for number in range(2 * n):
        said = spell(lm.tokenizer("some plain words to begin with " * 3)["input_ids"][number : number + 12])
        activations = np.zeros(12, dtype=np.float32)
        activations[random.integers(6, 12)] = 1.0
        windows.append(Example(number, said.text, said.spans, activations, "activating", 0))
    return FeatureExamples(3, 100, 0.01, 0.1, 1.0, tuple(windows[:n]), tuple(windows[n:]), ())


@pytest.mark.parametrize("positions", ["last", "from_last"])
def test_feature_and_random_direction_spend_the_same_and_are_scored(lm, dictionary, positions):
    judge = CallableChat(
        lambda messages: "plain words",
        likelihood=lambda prefix, texts: [[-0.1 * len(text) - len(set(prefix)) / 50] for text in texts],
    )
    settings = InterventionSettings(**{**SETTINGS.__dict__, "positions": positions})
    scorer = Intervention(lm, SITE, dictionary, settings)

    score = scorer.score(examples_of(lm), Explanation("words"), Asker(judge))

    extra = score.extra
    assert extra["reached"]
    assert extra["control_reached"]
    assert extra["kl"] == pytest.approx(0.5, rel=0.1)
    assert extra["control_kl"] == pytest.approx(0.5, rel=0.1)
    assert all(math.isfinite(extra[name]) for name in ("nats", "control_nats", "nats_of_explanation"))
    assert 0 <= score.auroc <= 1
    assert score.n == 6  # half of the tested passages, steered and clean


def test_the_best_candidate_is_chosen_on_one_half_and_scored_on_the_other(lm, dictionary):
    scorer = Intervention(lm, SITE, dictionary, SETTINGS, control=False)
    n = len(scorer._prompts(examples_of(lm))[1])

    class Forgetful(Asker):
        """Passages can be alike here; this one answers each anew."""

        asked = 0

        def score(self, prefix, continuations):
            self.asked += 1
            steered, in_first_half = self.asked <= n, (self.asked - 1) % n < n // 2
            # "good" looks good on the first half alone.
            gains = {" good": 1.0 if in_first_half else 0.1, " fair": 0.5}
            return [[gains.get(text, 0.0) if steered else 0.0] for text in continuations]

    answers = iter(["good", "fair"])
    ask = Forgetful(CallableChat(lambda messages: next(answers)))
    score = scorer.score(examples_of(lm), Explanation("words"), ask)
    assert ask.asked == 2 * n
    assert score.extra["explanation"] == "good"
    assert score.extra["nats"] == pytest.approx(0.1)
    assert score.extra["nats_of_explanation"] == 0.0
    assert score.auroc == 1.0


def test_without_prompts_there_is_no_score(lm, dictionary):
    examples = examples_of(lm, n=1)
    score = Intervention(lm, SITE, dictionary, SETTINGS).score(examples, Explanation("x"), Asker(LocalChat(lm)))
    assert score.failed == {"too few prompts": 1}


def test_a_judge_that_cannot_read_so_much_fails_the_score_not_the_feature(lm, dictionary):
    score = Intervention(lm, SITE, dictionary, SETTINGS).score(examples_of(lm), Explanation("x"), Asker(LocalChat(lm)))
    assert score.failed == {"too long": 1}


def test_the_questions_that_it_announces_are_those_that_it_asks(lm, dictionary):
    scorer = Intervention(lm, SITE, dictionary, SETTINGS)
    judge = CallableChat(lambda messages: "x", likelihood=lambda prefix, texts: [[-1.0]] * len(texts))
    ask = Asker(judge)
    scorer.score(examples_of(lm), Explanation("x"), ask)
    assert ask.usage.calls == scorer.questions(examples_of(lm)).calls == 2 * (2 + 2 * 6)
