from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.models import load
from apportion.models.sentences import SentenceEncoder
from apportion.models.spelling import speller


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path):
    return load(tiny_llama).tokenizer


@pytest.mark.parametrize("text", ["été << x >> 日本語 😀 end", "  def f(x):\n\treturn 1", ""])
def test_spelling_gives_the_text_back_and_tokens_tile_it(tokenizer, text):
    said = speller(tokenizer)(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert said.text == text
    covered = set()
    for start, stop in said.spans:
        assert 0 <= start < stop <= len(text)
        covered.update(range(start, stop))
    assert covered == set(range(len(text)))


@given(text=st.text(max_size=30))
def test_any_text_survives(tokenizer, text):
    text = text.encode("utf-8", "replace").decode()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert speller(tokenizer)(ids).text == text


def test_a_window_that_begins_within_a_character_shows_replacements(tokenizer):
    ids = tokenizer("日", add_special_tokens=False)["input_ids"]
    said = speller(tokenizer)(ids[1:])
    assert set(said.text) == {"�"}
    assert all(stop <= len(said.text) for _, stop in said.spans)


def test_special_tokens_say_nothing(tokenizer):
    said = speller(tokenizer)([tokenizer.eos_token_id, *tokenizer("ab", add_special_tokens=False)["input_ids"]])
    assert said.text == "ab"
    assert said.spans[0] == (0, 0)


def test_vectors_of_sentences_are_units_and_do_not_depend_on_the_batch(tiny_llama):
    texts = ["one", "two words", "a rather longer sentence than the others", ""]
    lm = load(tiny_llama)
    together = SentenceEncoder(lm)(texts)
    alone = SentenceEncoder(lm, batch_size=1)(texts)
    assert together.norm(dim=1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    assert (together - alone).abs().max() < 1e-4
