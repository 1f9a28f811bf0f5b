"""Unlearning: choice, clamp and score, the stand-in, and data of one's own."""

import json
import sys
import types

import pytest
import torch

from apportion.allocate import Allocation
from apportion.data.facts import Question, city_questions, city_texts, everyday_questions
from apportion.errors import InputError
from apportion.features.suite import NotApplicable, evaluate_unlearning, read_unlearning_data, unlearning
from apportion.features.suite.unlearning import (
    answered_right,
    chosen_features,
    clamping_active,
    firing_rates,
    unlearning_score,
)
from apportion.models import capture


def test_features_that_the_retained_text_needs_are_left_alone():
    forget, retain = torch.tensor([0.5, 0.2, 0.0, 0.3]), torch.tensor([0.01, 0.0, 0.0, 0.0005])

    assert chosen_features(forget, retain, 0.001).tolist() == [3, 1]


def test_only_what_fires_is_clamped():
    codes = Allocation(torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1]), torch.tensor([1.0, 2.0, 3.0]), (2, 3))
    edited = clamping_active(torch.tensor([1, 2]), -25.0)(codes)

    assert edited.to_dense().tolist() == [[1, 0, -25], [0, -25, 0]]


def test_a_setting_with_side_effects_does_not_count():
    rows = [
        {"forget_accuracy": 0.1, "side_effect_accuracy": 0.98},
        {"forget_accuracy": 0.7, "side_effect_accuracy": 0.99},
    ]

    assert unlearning_score(rows) == pytest.approx(0.3)
    assert unlearning_score(rows[:1]) == 0


def test_firing_rates_leave_out_first_tokens_and_padding(lm, site, subject):
    texts = ["names are bound to objects", "x = y"]
    fires = []
    for text in texts:
        x = capture(lm, [site], lm.tokenizer(text, return_tensors="pt")["input_ids"])[site][0, 1:]
        fires.append(subject.sae.encode(x, "threshold").to_dense() > 0)

    torch.testing.assert_close(firing_rates(subject, [subject.sae], texts)[0], torch.cat(fires).float().mean(dim=0))


def test_the_likeliest_choice_is_the_answer(lm):
    questions = [
        Question("any", prompt, tuple(choices), 0)
        for prompt, choices in (("the name of", ["a", "b", "c"]), ("objects", ["d", "e", "f"]))
    ]
    for question, right in zip(questions, answered_right(lm, questions), strict=True):
        logits = lm.model(input_ids=lm.tokenizer(question.prompt, return_tensors="pt")["input_ids"]).logits[0, -1]
        tokens = [lm.tokenizer(f" {choice}")["input_ids"][0] for choice in question.choices]
        assert right == (int(logits[tokens].argmax()) == 0)


def test_what_a_model_does_not_know_it_cannot_forget(subject):
    with pytest.raises(NotApplicable, match=r"answers \d+% of the \d+ questions on what is to be forgotten"):
        evaluate_unlearning(subject)


def test_a_harmful_feature_is_found_and_scored(monkeypatch, subject):
    """Clamping anything makes the model wrong on what is to be forgotten, and on nothing else."""
    clamped = []
    state = {"on": False}

    class Clamp:
        def __enter__(self):
            state["on"] = True

        def __exit__(self, *_):
            state["on"] = False

    def edit(lm, site, sae, change):
        clamped.append(change)
        return Clamp()

    def answers(lm, questions, letters=False):
        return [not (state["on"] and question.subject == "cities") for question in questions]

    monkeypatch.setattr(unlearning, "edit_codes", edit)
    monkeypatch.setattr(unlearning, "answered_right", answers)
    rates = iter([[torch.rand(64)] * 2, [torch.zeros(64)] * 2])
    monkeypatch.setattr(unlearning, "firing_rates", lambda *_: next(rates))
    result = evaluate_unlearning(subject)

    assert result.figures["unlearning_score"].value == 1
    assert len(result.details["settings"]) == 16
    # Both thresholds choose the same features here, which are clamped once: 2 numbers x 4 values x 2 dictionaries.
    assert len(clamped) == 16


def test_the_stand_in_has_wrong_choices_and_right_ones_at_every_place():
    for question in [*city_questions(), *everyday_questions()]:
        assert len(set(question.choices)) == len(question.choices) == 4
        assert question.choices[question.answer] not in question.prompt.split()
    assert {question.answer for question in city_questions()} == {0, 1, 2, 3}
    assert len(city_texts()) > 100


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "forget.txt").write_text("one\n\ntwo\n")
    (tmp_path / "retain.txt").write_text("three")
    rows = [{"question": "q", "choices": ["a", "b"], "answer": 1, "about": about} for about in ("forget", "retain")]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_data_of_ones_own_are_read(folder):
    data = read_unlearning_data(folder)

    assert data.letters
    assert len(data.forget) == 2
    assert data.side_questions == [Question("retain", "q", ("a", "b"), 1)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("questions.jsonl", '{"question": "q"}', "line 1"),
        ("questions.jsonl", '{"question": "q", "choices": ["a", "b"], "answer": 5, "about": "forget"}', "index"),
        ("forget.txt", "\n", "holds no text"),
    ],
)
def test_data_that_are_not_as_described_are_refused(folder, name, content, said):
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=said):
        read_unlearning_data(folder)


def test_the_hubs_data_are_what_saebench_uses(monkeypatch):
    """With a hub that is made up: the forget corpus is given out on request only."""
    asked = []

    def load_dataset(identifier, config=None, split=None, streaming=False):
        asked.append((identifier, config, split))
        if identifier == "cais/wmdp-bio-forget-corpus":
            raise PermissionError("gated")
        if identifier == "Salesforce/wikitext":
            return [{"text": "short"}, {"text": "long " * 20}]
        return [{"question": f"{config}?", "choices": ["a", "b", "c", "d"], "answer": 2}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = read_unlearning_data("hf")

    assert asked[0] == ("cais/wmdp", "wmdp-bio", "test")
    assert data.forget_questions == [Question("wmdp-bio", "wmdp-bio?", ("a", "b", "c", "d"), 2)]
    assert len(data.side_questions) == 4
    assert data.forget == ["wmdp-bio? c"]
    assert data.retain == ["long " * 20]
    assert data.letters


def test_a_hub_that_does_not_answer_is_named(monkeypatch):
    def load_dataset(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match="no route to host"):
        read_unlearning_data("hf")
