from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.features.auto_interp import Example, mark, unmark
from apportion.features.auto_interp.windows import levels


def spans_of(words: list[str]) -> tuple[tuple[int, int], ...]:
    ends = np.cumsum([0, *map(len, words)]).tolist()
    return tuple(pairwise(ends))


def marked(words: list[str], chosen: list[int]) -> str:
    return mark("".join(words), spans_of(words), np.isin(np.arange(len(words)), chosen))


def test_neighbours_share_a_pair_of_markers():
    assert marked(["a", " b", " c", " d"], [1, 2]) == "a<< b c>> d"
    assert marked(["a", " b", " c", " d"], [0, 2]) == "<<a>> b<< c>> d"
    assert marked(["a", " b"], []) == "a b"


@pytest.mark.parametrize("text", ["a << b", "x<<", "<<<", ">>", "<\\<", "1 < 2 > 0", "a>>>b<<<c", "<", "\\"])
def test_markers_in_the_text_itself_are_escaped(text):
    words = list(text)
    for chosen in ([], [0], [len(words) - 1], list(range(len(words)))):
        assert unmark(marked(words, chosen)) == text


@given(words=st.lists(st.text(alphabet="<>\\ab ", max_size=4), max_size=8), seed=st.integers(0, 99))
def test_taking_the_markers_off_gives_the_text_back(words, seed):
    chosen = np.flatnonzero(np.random.default_rng(seed).random(len(words)) < 0.5).tolist()
    assert unmark(marked(words, chosen)) == "".join(words)


def test_active_tokens_are_those_above_three_tenths_of_the_windows_maximum():
    words = ["a", "b", "c", "d"]
    example = Example(0, "abcd", spans_of(words), np.array([0.0, 1.0, 0.31, 0.3], dtype=np.float32))
    assert example.active.tolist() == [False, True, True, False]
    assert example.marked() == "a<<bc>>d"
    silent = Example(0, "abcd", spans_of(words), np.zeros(4, dtype=np.float32), "random")
    assert not silent.active.any()
    assert not silent.activating


def test_levels_run_from_silence_to_ten_and_tiny_is_one():
    found = levels(np.array([0.0, 1e-6, 0.5, 1.0], dtype=np.float32), 1.0)
    assert found.tolist() == [0, 1, 5, 10]
    assert levels(np.zeros(3, dtype=np.float32), 0.0).tolist() == [0, 0, 0]
