"""RAVEL: the mask's arithmetic, planted disentanglement, and reasons for no result."""

import pytest
import torch

from apportion.data.facts import CITY_PROMPTS, cities
from apportion.features.suite import NotApplicable, evaluate_ravel, ravel
from apportion.features.suite.ravel import Pair, Prompt, answers_with, interchanged, learned_mask, paired, temperatures
from apportion.features.suite.units import ActivationUnits
from apportion.models import capture, splice


def prompts(answers):
    return [
        Prompt(attribute, entity, (3 + number, 4, 5 + place), 1, answer, 10 + number, 1)
        for place, (attribute, by_entity) in enumerate(answers.items())
        for number, (entity, answer) in enumerate(by_entity.items())
    ]


KNOWN = prompts(
    {
        "Country": {"Paris": "France", "Rome": "Italy", "Lyon": "France"},
        "Language": {"Paris": "French", "Rome": "Italian", "Lyon": "French"},
    }
)


def test_pairs_differ_in_the_answer_and_ask_both_prompts_the_same():
    train, held_out = paired(KNOWN, "Country", 20, seed=0)

    assert len(train) == 28
    assert len(held_out) == 12
    for pair in train + held_out:
        base, source = KNOWN[pair.base], KNOWN[pair.source]
        assert base.answer != source.answer
        assert base.attribute == source.attribute == ("Country" if pair.cause else "Language")


def test_masked_units_come_from_the_source_and_no_error_is_kept():
    units = ActivationUnits(3)
    units.directions = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    units.offset = torch.tensor([0.5, 0.0, 0.0])
    codes = torch.tensor([[1.0, 1.0, 1.0], [4.0, 5.0, 6.0]])
    found = interchanged(codes, [Pair(0, 1, True)], torch.tensor([0.0, 1.0, 0.5]), units)

    assert found.tolist() == [[1.5, 10.0, 10.5]]


def test_the_temperature_falls_to_a_ten_thousandth():
    steps = temperatures(5)

    assert steps[0] == 1
    assert steps[-1] == pytest.approx(1e-4)
    assert steps[2] == pytest.approx(1e-2)


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [(" France. It", "France", True), (" Fr", "France", True), (" Germany", "France", False), ("", "France", False)],
)
def test_answers_are_compared_by_their_beginning(said, answer, right):
    assert answers_with(said, answer) is right


def test_the_mask_moves_towards_units_that_make_the_sources_answer_likelier(lm, site):
    """One step by hand: the sign of theta is that of minus the gradient."""
    known = [Prompt("A", "x", (30, 31, 32), 1, "a", 50, 1), Prompt("A", "y", (60, 61, 62), 1, "b", 80, 1)]
    units = ActivationUnits(32)
    codes = torch.stack([capture(lm, [site], torch.tensor([prompt.ids]))[site][0, 1] for prompt in known])
    pair = Pair(0, 1, True)
    theta = learned_mask(lm, site, known, [pair], codes, units, epochs=1)

    mask = torch.full((32,), 0.5, requires_grad=True)

    def replace(x):
        out = x.clone()
        out[0, 1] = interchanged(codes, [pair], mask, units)[0]
        return out

    with splice(lm, site, replace):
        loss = -lm.model(input_ids=torch.tensor([known[0].ids])).logits[0, -1].log_softmax(-1)[80]
    (gradient,) = torch.autograd.grad(loss, mask)

    assert torch.equal(theta.sign(), -gradient.sign())


def test_a_planted_feature_disentangles_and_a_mask_finds_it(monkeypatch, subject):
    """The judged answer is whichever entity's dimension is the larger one, so that masks can be judged by hand."""
    monkeypatch.setattr(ravel, "known_prompts", lambda _: many())
    monkeypatch.setattr(ravel, "entity_activations", lambda lm, site, prompts: torch.randn(len(prompts), 32))
    monkeypatch.setattr(ravel, "learned_mask", lambda *_, **__: torch.ones(64))
    seen = []

    def judge(lm, site, prompts, pairs, changed):
        seen.append(len(pairs))
        return 0.75, 0.5

    monkeypatch.setattr(ravel, "_judge", judge)
    monkeypatch.setattr(type(subject), "units", lambda self: {"": self.dictionary()})
    result = evaluate_ravel(subject, pairs=10)

    assert result.figures["disentanglement_score"].value == 0.625
    assert result.figures["mean_num_masked"].value == 64
    assert seen == [6] * 4


def many():
    return prompts({name: {f"{name}{n}": f"{name}{n % 3}" for n in range(9)} for name in ("Country", "Language")})


def test_a_model_that_knows_no_cities_gets_a_reason(subject):
    with pytest.raises(NotApplicable, match="knows too little about cities"):
        evaluate_ravel(subject)


def test_a_site_that_does_not_decide_the_answer_gets_a_reason(monkeypatch, subject):
    monkeypatch.setattr(ravel, "known_prompts", lambda _: many())
    monkeypatch.setattr(ravel, "_judge", lambda *_: (0.0, 1.0))
    with pytest.raises(NotApplicable, match="whole activation"):
        evaluate_ravel(subject)


def test_every_city_has_every_attribute():
    found = cities()

    assert len({city for city, _ in found}) == len(found) > 50
    assert all(set(facts) == set(CITY_PROMPTS) for _, facts in found)
    assert "Rome" not in dict(found)


@pytest.fixture
def own_answers(monkeypatch, lm):
    """Made-up prompts whose right answer is what the model says, so that it knows them all."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(260, 380, (24, 6), generator=draw)
    with torch.no_grad():
        targets = lm.model(input_ids=ids).logits[:, -1].argmax(dim=1).tolist()
    known = [
        Prompt(
            ("Country", "Language")[n % 2], f"{n}", tuple(ids[n].tolist()), 5, lm.tokenizer.decode([token]), token, 1
        )
        for n, token in enumerate(targets)
    ]
    assert len({prompt.answer for prompt in known}) > 4
    monkeypatch.setattr(ravel, "known_prompts", lambda _: known)
    return known


def test_ravel_runs_from_prompts_to_figures(own_answers, subject):
    result = evaluate_ravel(subject, pairs=10)

    assert set(result.controls) == {"random dictionary", "activations"}
    for figures in (result.figures, *result.controls.values()):
        assert 0 <= figures["cause_score"].value <= 1
        assert figures["disentanglement_score"].n == 2
    assert set(result.details["whole_activation"]) == {"Country", "Language"}


def test_exchanging_every_dimension_is_exchanging_the_whole_activation(monkeypatch, own_answers, subject):
    monkeypatch.setattr(ravel, "learned_mask", lambda *args, **_: torch.ones(args[4].shape[1]))
    result = evaluate_ravel(subject, pairs=10)

    for name, found in result.details["attributes"]["activations"].items():
        assert found["cause_score"] == result.details["whole_activation"][name]
        assert found["num_masked"] == 32
