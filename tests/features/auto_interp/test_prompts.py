import numpy as np
import pytest

from apportion.features.auto_interp import Example
from apportion.features.auto_interp.prompts import (
    explain_messages,
    is_refusal,
    judge_messages,
    read_explanation,
    read_levels,
    read_verdicts,
)


@pytest.mark.parametrize(
    ("answer", "text", "flagged"),
    [
        ("[EXPLANATION]: Names of months.", "Names of months.", False),
        ("I see months.\n[EXPLANATION]:\n  **Names of months.**", "Names of months.", False),
        ("Names of months.\nThey occur in dates.", "Names of months.", True),
        ("[EXPLANATION]: first\n[EXPLANATION]: second", "second", False),
    ],
)
def test_explanations_are_read_and_a_missing_marker_is_flagged(answer, text, flagged):
    found = read_explanation(answer)
    assert (found.text, found.flagged) == (text, flagged)


@pytest.mark.parametrize("answer", ["", "  \n", "[EXPLANATION]:", "I'm sorry, but I can't help with that."])
def test_nothing_and_refusals_are_no_explanation(answer):
    assert read_explanation(answer) is None


@pytest.mark.parametrize(
    "answer",
    ["I'm sorry, I can't do that.", "I cannot assist", "As an AI language model, I", "Sorry, no", "I am unable"],
)
def test_refusals_are_recognised(answer):
    assert is_refusal(answer)


@pytest.mark.parametrize("answer", ["[1, 0]", "Sorry-looking houses", "I canter", "Sure: [1]"])
def test_answers_are_not_taken_for_refusals(answer):
    assert not is_refusal(answer) or answer == "Sorry-looking houses"


@pytest.mark.parametrize(
    ("answer", "n", "expected"),
    [
        ("[1, 0, 1]", 3, [1, 0, 1]),
        ("Here you go:\n```python\n[1,0]\n```\nGood luck", 2, [1, 0]),
        ("[True, false, 1,]", 3, [1, 0, 1]),
        ("Fragments [1] and [2]: [0, 1]", 2, [0, 1]),
        ('["1", "0"]', 2, [1, 0]),
        ("[1, 0, 1]", 2, None),
        ("[1, 0", 2, None),
        ("[1, 2]", 2, None),
        ("I can't say", 1, None),
        ("[]", 1, None),
    ],
)
def test_lists_of_verdicts_are_found_or_given_up(answer, n, expected):
    assert read_verdicts(answer, n) == expected


@pytest.mark.parametrize(
    ("answer", "expected"), [("[0, 10, 3]", [0, 10, 3]), ("[0, 11, 3]", None), ("[0, 1]", None), ("[0, -1, 2]", None)]
)
def test_lists_of_strengths_are_found_or_given_up(answer, expected):
    assert read_levels(answer, 3) == expected


def test_a_short_last_batch_is_taught_lists_of_its_own_length():
    messages = judge_messages("anything", ["a", "b"], marked=False)
    assert [message["content"] for message in messages if message["role"] == "assistant"] == [
        "[0, 1]",
        "[1, 0]",
        "[1, 0]",
    ]


def test_prompts_show_marks_strengths_and_what_the_feature_is_not():
    example = Example(0, "ab\nc", ((0, 1), (1, 2), (2, 3), (3, 4)), np.array([0, 2, 0, 4.0], dtype=np.float32))
    near = Example(1, "zz", ((0, 1), (1, 2)), np.zeros(2, dtype=np.float32), "near")

    plain = explain_messages([example], 4.0)
    assert plain[-1]["content"] == "Fragment 1: a<<b>>\\n<<c>>"
    assert "Without" not in plain[-1]["content"]

    everything = explain_messages([example], 4.0, near_misses=[near], with_activations=True)
    assert 'Strength: ("b", 5), ("c", 10)' in everything[-1]["content"]
    assert everything[-1]["content"].endswith("Without it:\nFragment 2: zz")
    assert "Without it:" in everything[1]["content"]
