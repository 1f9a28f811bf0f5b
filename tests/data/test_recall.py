"""Multi-query associative recall."""

import pytest
import torch

from apportion.data.tasks.recall import Recall
from apportion.errors import InputError


def test_every_asked_key_was_given_with_the_value_that_is_the_answer() -> None:
    task = Recall(pairs=5, keys=9, values=4)
    texts = task.draw(50, seed=3)
    assert texts.shape == (50, task.length)
    for text, answers in zip(texts.tolist(), task.answers(texts).tolist(), strict=True):
        given = dict(zip(text[:10:2], text[1:10:2], strict=True))
        assert len(given) == 5
        assert set(given) <= set(range(9))
        assert set(given.values()) <= set(range(9, 13))
        asked = text[task.asked]
        assert sorted(asked) == sorted(given)
        assert [given[key] for key in asked] == answers
        assert text[11::2] == answers


def test_the_order_of_the_questions_is_not_that_of_the_pairs() -> None:
    texts = Recall().draw(20, seed=0)
    assert (texts[:, 0:32:2] == texts[:, 32::2]).float().mean() < 0.2


def test_a_seed_gives_the_same_texts_and_others_give_others() -> None:
    task = Recall()
    assert torch.equal(task.draw(4, 1), task.draw(4, 1))
    assert not torch.equal(task.draw(4, 1), task.draw(4, 2))
    assert task.chance == 1 / 32


def test_sizes_that_cannot_work_are_refused() -> None:
    with pytest.raises(InputError, match="pairs=10: from 1 to keys=9"):
        Recall(pairs=10, keys=9)
    with pytest.raises(InputError, match="values=0"):
        Recall(values=0)
