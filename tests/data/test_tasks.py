from collections import Counter

import pytest

from apportion.data.tasks import TASKS, Prompt, PromptPairs, docstring, greater_than, ioi
from apportion.data.tasks.ioi import FRAMES, NAMES
from apportion.errors import InputError


def word(prompt: Prompt, role: str) -> str:
    start, end = prompt.roles[role]
    return prompt.text[start:end]


@pytest.mark.parametrize("make", TASKS.values())
def test_a_seed_gives_the_same_prompts_and_another_gives_others(make: object) -> None:
    assert make(20, seed=1) == make(20, seed=1)  # type: ignore[operator]
    assert make(20, seed=1) != make(20, seed=2)  # type: ignore[operator]
    assert len(make(20, seed=1)) == 20  # type: ignore[operator]
    with pytest.raises(InputError, match="pairs is 0"):
        make(0)  # type: ignore[operator]


@pytest.mark.parametrize("frame", range(len(FRAMES)))
def test_ioi_repeats_the_subject_and_its_counterfactual_repeats_nobody(frame: int) -> None:
    pairs = ioi(40, frame=frame)
    for clean, other in zip(pairs.clean, pairs.counterfactual, strict=True):
        assert word(clean, "S1") == word(clean, "S2") == f" {clean.attributes['S']}" == clean.distractors[0]
        assert word(clean, "IO") == f" {clean.attributes['IO']}" == clean.answers[0]
        assert (clean.text.index(word(clean, "IO")) < clean.text.index(word(clean, "S1"))) == (
            clean.attributes["Pos"] == "ABB"
        )
        assert len({word(other, role) for role in ("IO", "S1", "S2")}) == 3
        assert clean.text.replace(word(clean, "S2"), "") != other.text
        assert (other.answers, other.distractors) == (clean.answers, clean.distractors)
    assert 8 < sum(each.attributes["Pos"] == "ABB" for each in pairs.clean) < 32
    assert pairs.roles[-1] == "end"


@pytest.mark.parametrize("attribute", ["IO", "S", "Pos"])
def test_an_ioi_counterfactual_of_one_attribute_changes_that_and_no_other(attribute: str) -> None:
    for clean, other in zip(*_both(ioi(10, counterfactual=attribute)), strict=True):  # type: ignore[arg-type]
        changed = {name for name in clean.attributes if clean.attributes[name] != other.attributes[name]}
        assert changed == {attribute}
        assert other.answers == (f" {other.attributes['IO']}",)
        assert word(other, "S1") == word(other, "S2")


def _both(pairs: PromptPairs) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    return pairs.clean, pairs.counterfactual


def test_ioi_draws_from_the_names_it_is_given() -> None:
    own = NAMES[:4]
    assert {each.attributes["IO"] for each in ioi(50, names=own).clean} == set(own)
    with pytest.raises(InputError, match="2 names"):
        ioi(5, names=NAMES[:2])
    with pytest.raises(InputError, match="frame is 3"):
        ioi(5, frame=3)


def test_greater_than_asks_for_each_tens_digit_equally_often_and_its_counterfactual_allows_all() -> None:
    pairs = greater_than(32)
    assert Counter(each.attributes["tens"] for each in pairs.clean) == {str(digit): 4 for digit in range(1, 9)}
    for clean, other in zip(*_both(pairs), strict=True):
        tens = word(clean, "tens")
        assert clean.answers == tuple(str(digit) for digit in range(int(tens) + 1, 10))
        assert clean.distractors == tuple(str(digit) for digit in range(int(tens)))
        assert word(other, "tens") + word(other, "units") == "01"
        assert other.text.replace("01 to", f"{tens}{word(clean, 'units')} to") == clean.text
    assert pairs.metric == "probability_difference"


def test_docstring_describes_two_arguments_and_asks_for_the_third() -> None:
    for clean, other in zip(*_both(docstring(20)), strict=True):
        arguments = [word(clean, role) for role in ("first", "second", "third", "fourth", "fifth")]
        assert [word(clean, "first_described"), word(clean, "second_described")] == arguments[:2]
        assert clean.answers == (arguments[2],)
        assert set(clean.distractors) == set(arguments) - {arguments[2]}
        assert not any(f"{argument}," in other.text or f"{argument}:" in other.text for argument in arguments)
        assert clean.text.endswith("\n    :param")
    with pytest.raises(InputError, match="at least 20"):
        docstring(3, words=("name", "size"))


def test_pairs_must_be_pairs() -> None:
    prompt = Prompt("a", (" b",), (" c",))
    with pytest.raises(InputError, match="1 clean and 0 counterfactual"):
        PromptPairs("lonely", (prompt,), ())
    assert len(ioi(9).select(2, 5)) == 3
