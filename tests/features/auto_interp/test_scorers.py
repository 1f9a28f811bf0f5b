"""Scorers with judges whose truth is known."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from apportion.errors import InputError
from apportion.features.auto_interp import (
    Asker,
    ChatExplainer,
    Detection,
    Embedding,
    Example,
    ExampleSettings,
    Explanation,
    FeatureExamples,
    Fuzzing,
    Simulation,
    Surprisal,
    TokenShareExplainer,
    collect_examples,
    explanation_similarity,
)
from apportion.features.auto_interp.neurons import TopNeurons
from apportion.features.auto_interp.oracle import ANYWHERE, RULES, RuleFeatures, marked_characters, oracle
from apportion.features.auto_interp.prompts import NULL_EXPLANATION, described_prefix
from apportion.models.chat import CallableChat, ChatError, Generation
from apportion.models.spelling import Spelled

LETTERS = "abc(def) q X1 "


def spell(ids) -> Spelled:
    words = [chr(token) for token in ids]
    ends = np.cumsum([0, *map(len, words)]).tolist()
    return Spelled("".join(words), tuple(pairwise(ends)))


@pytest.fixture(scope="module")
def rules() -> dict[str, FeatureExamples]:
    """Windows of letters, digits and brackets, with the features of the oracle's rules."""
    random = np.random.default_rng(0)
    alphabet = np.array([ord(each) for each in "abcdefghijklmnoprstuvwxyz        ABC0(]<>"])
    ids = random.choice(alphabet, size=(1500, 16))
    ids[random.random(ids.shape) < 0.02] = ord("q")
    features = RuleFeatures(ids, spell, np.arange(1500))
    settings = ExampleSettings(
        window=16, train=20, test=50, non_activating=50, quantiles=5, min_windows=1, split="context", pool=10**6
    )
    examples = collect_examples(features, features, settings=settings, progress=False)
    shown = {name: examples.of(number, spell) for number, name in enumerate(RULES)}
    return {name: each for name, each in shown.items() if len(each.test) == len(each.negatives) == 50}


def test_there_is_something_to_test(rules):
    assert {"digits", "the letter q", "capitalised words", "text inside parentheses"} <= set(rules)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_detection_scores_one_less_the_judges_errors(rules, noise):
    ask = Asker(oracle(noise))
    found = [Detection().score(shown, Explanation(name), ask).balanced_accuracy for name, shown in rules.items()]
    assert np.mean(found) == pytest.approx(1 - noise, abs=0.06)
    if noise == 0:
        assert found == [1.0] * len(rules)


def test_another_features_explanation_scores_about_a_half(rules):
    ask = Asker(oracle())
    found = [
        Detection().score(shown, Explanation(other), ask).balanced_accuracy
        for name, shown in rules.items()
        for other in rules
        if other != name
    ]
    assert np.mean(found) == pytest.approx(0.5, abs=0.08)


def test_only_fuzzing_at_silent_tokens_tells_the_tokens_from_the_window(rules):
    ask = Asker(oracle())
    for name, shown in rules.items():
        of_tokens, of_window = Explanation(name), Explanation(name + ANYWHERE)
        assert Detection().score(shown, of_window, ask).balanced_accuracy == 1.0
        assert Fuzzing().score(shown, of_tokens, ask).balanced_accuracy == 1.0
        assert Fuzzing(inactive=True).score(shown, of_tokens, ask).balanced_accuracy == 1.0
        inactive = Fuzzing(inactive=True).score(shown, of_window, ask)
        assert inactive.balanced_accuracy == 0.5
        assert set(inactive.by_source) == {"inactive"}


def test_fuzzing_marks_as_many_wrong_tokens_as_are_active_on_average(rules):
    shown = rules["capitalised words"]
    windows, texts = Fuzzing().shown(shown)
    n = math.ceil(np.mean([window.active.sum() for window in shown.test]))
    for window, text in zip(windows, texts, strict=True):
        if not window.activating:
            assert marked_characters(text, window.text).sum() == n


def judged(answer) -> Asker:
    return Asker(CallableChat(answer))


def test_a_judge_that_always_says_the_same_scores_exactly_a_half(rules):
    score = Detection().score(rules["digits"], Explanation("x"), judged(lambda messages: "[1, 1, 1, 1, 1]"))
    assert score.balanced_accuracy == score.auroc == 0.5


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("no idea", "nonsense"),
        ("[1, 0, 1", "nonsense"),
        ("I'm sorry, I can't judge that.", "refusal"),
        (Generation("", refused=True), "refusal"),
    ],
)
def test_answers_that_are_none_are_counted_and_never_dropped(rules, answer, kind):
    score = Detection().score(rules["digits"], Explanation("x"), judged(lambda messages: answer))
    assert score.failed == {kind: 100}
    assert score.n == 0
    assert score.balanced_accuracy is None
    assert [each[2] for each in score.windows] == [None] * 100


def test_a_short_last_batch_is_judged_like_the_others(rules):
    sizes = []

    def answer(messages):
        n = messages[-1]["content"].count("\nFragment ")
        sizes.append(n)
        return str([1] * n)

    score = Detection(per_prompt=7).score(rules["digits"], Explanation("x"), judged(answer))
    assert sorted(set(sizes)) == [2, 7]
    assert score.n == 100


def test_both_kinds_are_mixed_before_they_are_asked_about(rules):
    asked = []

    def answer(messages):
        asked.append(messages[-1]["content"])
        return "[0, 0, 0, 0, 0]"

    Detection().score(rules["digits"], Explanation("x"), judged(answer))
    mixed = [any(character.isdigit() for line in each.splitlines()[2:] for character in line[12:]) for each in asked]
    assert sum(mixed) > 15


def test_failures_that_may_pass_end_the_feature_and_others_do_not(rules):
    def busy(messages):
        raise ChatError("busy", "later")

    with pytest.raises(ChatError, match="later"):
        Detection().score(rules["digits"], Explanation("x"), judged(busy))

    def too_long(messages):
        raise ChatError("too long", "shorter, please")

    assert Detection().score(rules["digits"], Explanation("x"), judged(too_long)).failed == {"too long": 100}


def test_log_probabilities_become_shares(rules):
    class Sure(CallableChat):
        def __init__(self):
            super().__init__(self.said)
            self.capabilities = frozenset({"chat", "logprobs"})

        def said(self, messages):
            top = {"1": math.log(0.6), "0": math.log(0.2), "x": math.log(0.1)}
            tokens = ("[", "1", ",", " 0", ",", "1", ",", "1", ",", "1", "]")
            return Generation("[1, 0, 1, 1, 1]", tokens=tokens, top_logprobs=tuple(top for _ in tokens))

    score = Detection().score(rules["digits"], Explanation("x"), Asker(Sure()))
    assert [each[2] for each in score.windows] == pytest.approx([0.75] * 100)


def test_with_likelihoods_windows_are_judged_alone_against_an_empty_explanation(rules):
    def likelihood(prefix, continuations):
        question = prefix[-1]["content"]
        described, _, shown = question.partition("\n\n")
        says_one = "digits" in described and any(each.isdigit() for each in shown.partition(": ")[2])
        # This judge likes to say 1 whatever it reads.
        return [[-1.0 + 3 * says_one if text == "[1]" else -4.0] for text in continuations]

    ask = Asker(CallableChat(lambda messages: "", likelihood=likelihood))
    score = Detection().score(rules["digits"], Explanation("digits"), ask)
    assert score.balanced_accuracy == score.auroc == 1.0
    assert Detection().score(rules["digits"], Explanation(NULL_EXPLANATION), ask).auroc == 0.5


def test_surprisal_of_the_empty_explanation_is_nothing_and_a_helpful_one_helps(rules):
    def likelihood(prefix, continuations):
        helpful = prefix == described_prefix("digits")
        return [[-2.0 + (helpful and any(c.isdigit() for c in text))] * len(text) for text in continuations]

    ask = Asker(CallableChat(lambda messages: "", likelihood=likelihood))
    nothing = Surprisal().score(rules["digits"], Explanation(NULL_EXPLANATION), ask)
    assert {each[2] for each in nothing.windows} == {0.0}
    assert Surprisal().score(rules["digits"], Explanation("digits"), ask).auroc == 1.0


def test_simulation_correlates_strengths_with_guesses(rules):
    shown = rules["digits"]

    def answer(messages):
        lines = messages[-1]["content"].splitlines()[2:]
        return str([8 if line.partition(": ")[2].isdigit() else 0 for line in lines])

    score = Simulation().score(shown, Explanation("digits"), judged(answer))
    assert score.auroc == 1.0
    assert score.extra["pearson"] > 0.8
    nonsense = Simulation().score(shown, Explanation("digits"), judged(lambda messages: "?"))
    assert nonsense.failed == {"nonsense": 100}


def letters(texts) -> torch.Tensor:
    """How often each letter of ``LETTERS`` is in a text, plus a little."""
    counts = torch.tensor([[0.01 + text.count(letter) for letter in LETTERS] for text in texts])
    return torch.nn.functional.normalize(counts, dim=1)


def test_embedding_compares_explanation_and_window_and_encodes_a_window_once(rules):
    encoded = []

    def encode(texts):
        encoded.extend(texts)
        return letters(texts)

    scorer = Embedding(encode)
    own = scorer.score(rules["the letter q"], Explanation("q"), Asker(None))
    assert own.auroc == 1.0
    assert scorer.score(rules["the letter q"], Explanation("X"), Asker(None)).auroc < 0.8
    windows = [text for text in encoded if text not in ("q", "X")]
    assert len(windows) == len(set(windows))
    control = Embedding(letters, by_examples=True).score(rules["the letter q"], Explanation("X"), Asker(None))
    assert control.auroc > 0.7


def test_token_shares_name_what_stands_out(rules):
    explainer = TokenShareExplainer.from_texts(list("abcdefgh" * 100 + "q0"), top=2)
    found = explainer.explain(rules["the letter q"], Asker(None))
    assert found.text.startswith("text about: q")
    assert explainer.explain(rules["the letter q"], Asker(None)) == found


def test_chat_explanations_are_asked_for_in_the_style_that_was_chosen(rules):
    asked = []

    def answer(messages):
        asked.append(messages)
        return "[EXPLANATION]: The letter q."

    for style in ("default", "activations"):
        assert ChatExplainer(style).explain(rules["the letter q"], judged(answer)) == Explanation("The letter q.")
    assert "Strength" not in asked[0][-1]["content"]
    assert '("q", ' in asked[1][-1]["content"]
    with pytest.raises(InputError, match="style='odd'"):
        ChatExplainer("odd")
    with pytest.raises(ChatError, match="sorry") as refused:
        ChatExplainer().explain(rules["the letter q"], judged(lambda messages: "I'm sorry, no."))
    assert refused.value.kind == "refusal"


def test_the_same_question_of_one_feature_is_asked_once(rules):
    asked, noted = [], {}

    def answer(messages):
        asked.append(messages)
        return "[1, 1, 1, 1, 1]"

    ask = Asker(CallableChat(answer), note=noted.__setitem__)
    Detection().score(rules["digits"], Explanation("x"), ask)
    first = len(asked)
    Detection().score(rules["digits"], Explanation("x"), Asker(CallableChat(answer), known=noted))
    assert len(asked) == first == len(noted) == 20


def test_dictionaries_are_matched_by_their_explanations():
    first, second = {3: "aaa", 5: "qqq", 7: "XXX"}, {0: "X", 1: "q", 2: "a", 9: "("}
    found = explanation_similarity(first, second, letters)
    assert dict(zip(found.first.tolist(), found.second.tolist(), strict=True)) == {3: 2, 5: 1, 7: 0}
    assert found.mean > 0.95 > found.chance
    with pytest.raises(InputError, match="explain"):
        explanation_similarity({}, second, letters)


def test_top_neurons_spend_the_same_on_every_token():
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    plain = TopNeurons(16, 3).encode(x)
    assert plain.winners_per_row().tolist() == [3] * 20
    dense = plain.to_dense()
    assert torch.equal(dense[dense > 0], x.abs()[dense > 0])
    turned = TopNeurons(16, 16, rotation=1).encode(x).to_dense()
    assert torch.allclose(turned.norm(dim=1), x.norm(dim=1), atol=1e-4)
    with pytest.raises(InputError, match="k=17"):
        TopNeurons(16, 17)


def test_an_example_without_active_tokens_is_left_unmarked():
    assert Example(0, "abc", ((0, 3),), np.zeros(1, dtype=np.float32)).marked() == "abc"
