"""The tasks made on the spot are tasks that the packaged model can do: else there would be reasons, not figures."""

import numpy as np
import pytest

from apportion.data.facts import CITY_PROMPTS, city_questions, everyday_questions
from apportion.features.suite.ravel import known_prompts
from apportion.features.suite.unlearning import answered_right
from apportion.models import load

pytestmark = [pytest.mark.packaged, pytest.mark.slow]


@pytest.fixture(scope="module")
def smollm2():
    return load("smollm2")


def test_smollm2_knows_the_cities_that_ravel_asks_about(smollm2):
    known = known_prompts(smollm2)

    for attribute in CITY_PROMPTS:
        assert sum(prompt.attribute == attribute for prompt in known) >= 20, attribute


def test_smollm2_knows_what_it_is_to_forget_and_what_it_is_to_keep(smollm2):
    assert np.mean(answered_right(smollm2, city_questions())) > 0.9
    assert np.mean(answered_right(smollm2, everyday_questions())) > 0.8
