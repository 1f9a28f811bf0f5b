"""Absorption where it is planted, and the reasons why there may be no result."""

import pytest
import torch

from apportion.features.suite import NotApplicable, absorption, evaluate_absorption
from apportion.features.suite.absorption import main_features, word_absorption, word_activations
from apportion.features.suite.units import DictionaryUnits
from apportion.models import capture

LETTERS = 22


@pytest.fixture
def words(monkeypatch, subject, planted):
    """Letter i is dimension i. It misses every fourth word, whose own feature (i + LETTERS) says it instead."""
    draw = torch.Generator().manual_seed(0)
    axes = torch.zeros(2 * LETTERS, 64)
    for letter in range(LETTERS):
        axes[letter, letter] = 1.0
        # Absorbers: half the letter, half the word.
        axes[LETTERS + letter, letter] = axes[LETTERS + letter, LETTERS + letter] = 0.5**0.5

    def made(lm, train, test, seed):
        labels = torch.arange(LETTERS).repeat_interleave(40), torch.arange(LETTERS).repeat_interleave(20)
        return (list(range(len(labels[0]))), labels[0]), (list(range(len(labels[1]))), labels[1])

    def activations(lm, site, prefix, ids):
        labels = made(None, 0, 0, 0)[0 if len(ids) == 40 * LETTERS else 1][1]
        x = 0.02 * torch.randn(len(ids), 64, generator=draw)
        x[torch.arange(len(ids)), labels] += 3
        absorbed = torch.arange(len(ids)) % 4 == 0
        x[absorbed, LETTERS + labels[absorbed]] += 3
        return x

    class Units(DictionaryUnits):
        def __init__(self):
            self.directions = axes

        def encode(self, x):
            letters, own = x[:, :LETTERS], x[:, LETTERS : 2 * LETTERS]
            silent = own > 1
            return torch.cat([letters.clamp(min=0) * (letters > 1) * ~silent, 3 * 2**0.5 * silent], dim=1)

    monkeypatch.setattr(absorption, "first_letter_words", made)
    monkeypatch.setattr(absorption, "_prefix", lambda *_: [])
    monkeypatch.setattr(absorption, "word_activations", activations)
    monkeypatch.setattr(type(subject), "dictionary", lambda _: Units())
    monkeypatch.setattr(absorption, "DictionaryUnits", lambda _: Units())
    return subject


def test_planted_absorption_is_found(words):
    result = evaluate_absorption(words)
    letter = result.details["letters"]["a"]

    assert letter["num_probe_true_positives"] == 20
    # The letter's feature is silent on a quarter of the words, where one other feature says all of it.
    main = letter["num_split_features"]
    assert main in (1, 2)
    if main == 1:
        assert letter["full_absorption_rate"] == pytest.approx(0.25)
        assert letter["mean_absorption_fraction"] == pytest.approx(0.25, abs=0.02)
    else:
        # The absorber itself counts as one of the letter's features.
        assert letter["full_absorption_rate"] == 0
    assert "caution" in result.details


@pytest.mark.parametrize(
    ("codes", "fraction", "full"),
    [
        ([2.0, 0.0, 0.0], 0.0, False),  # the main feature says all of it
        ([0.0, 3.0, 0.0], 1.0, True),  # another feature says it
        ([1.0, 2.0, 0.0], 1 / 2, False),  # both: 1 is main, 1 of the others is missing from it
        ([0.0, 0.0, 3.0], 0.0, False),  # what fires has nothing to do with the letter
    ],
)
def test_absorption_of_a_word_by_hand(codes, fraction, full):
    directions = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    found = word_absorption(torch.tensor([2.0, 1.0]), torch.tensor(codes), directions, torch.tensor([5.0, 0.0]), [0])

    assert found == (pytest.approx(fraction), full)


def test_a_feature_is_main_as_long_as_it_raises_f1():
    assert main_features([0.5, 0.6, 0.62, 0.9], [7, 3, 5, 1]) == [7, 3]
    assert main_features([0.5], [7]) == [7]


def test_words_after_a_cached_prefix_have_the_activations_of_the_whole_text(lm, site):
    prefix, words = [5, 9, 11, 40], [7, 8, 300]
    whole = [capture(lm, [site], torch.tensor([[*prefix, word]]))[site][0, -1] for word in words]

    torch.testing.assert_close(word_activations(lm, site, prefix, words), torch.stack(whole), rtol=1e-4, atol=1e-5)


def test_a_vocabulary_without_words_says_so(subject):
    with pytest.raises(NotApplicable, match="words of one token for only"):
        evaluate_absorption(subject)


def test_letters_that_cannot_be_read_off_give_a_reason(monkeypatch, words):
    monkeypatch.setattr(absorption, "word_activations", lambda lm, site, prefix, ids: torch.randn(len(ids), 64))
    with pytest.raises(NotApplicable, match=r"only \d+ of 26 letters"):
        evaluate_absorption(words)
