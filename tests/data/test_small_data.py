import pytest
import torch

from apportion.data.characters import VOCABULARY, characters, windows
from apportion.data.digits import digits
from apportion.errors import InputError


def test_digits_are_dealt_out_once():
    data = digits(seed=3)
    rows = torch.cat([part[0] for part in (data.train, data.validation, data.test)])
    assert rows.shape == (1797, 64)
    assert float(rows.max()) == 1
    again, other = digits(seed=3), digits(seed=4)
    assert torch.equal(again.train[1], data.train[1])
    assert not torch.equal(other.train[1], data.train[1])


def test_digits_leave_some_to_test_on():
    with pytest.raises(InputError, match="train=1700"):
        digits(train=1700)


def test_characters_are_the_same_every_time_and_in_the_vocabulary():
    data = characters(200_000)
    assert min(len(part) for part in (data.train, data.validation, data.test)) > 0
    assert int(data.train.max()) < VOCABULARY
    characters.cache_clear()
    assert torch.equal(characters(200_000).test, data.test)


def test_a_window_is_followed_by_what_is_to_be_predicted():
    assert windows(torch.arange(9), torch.tensor([0, 4]), 3).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_too_few_characters_are_refused():
    with pytest.raises(InputError, match="amount=10"):
        characters(10)
