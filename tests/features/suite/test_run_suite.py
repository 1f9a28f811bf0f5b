import pytest

from apportion.data.files import read_json
from apportion.errors import InputError
from apportion.features.evaluate import Metric
from apportion.features.suite import (
    EVALUATIONS,
    HEADLINES,
    NotApplicable,
    SuiteData,
    SuiteResult,
    run_suite,
    suite_names,
)


@pytest.fixture
def counted(monkeypatch):
    calls = []

    def one(subject, data, sizes, seed):
        calls.append("one")
        return SuiteResult("core", {"l0": Metric("l0", 3.0, float("nan"), 2, "how many")}, settings={"seed": seed})

    def none(subject, data, sizes, seed):
        calls.append("none")
        raise NotApplicable("the model knows nothing")

    monkeypatch.setitem(EVALUATIONS, "core", one)
    monkeypatch.setitem(EVALUATIONS, "ravel", none)
    return calls


def test_finished_evaluations_are_read_back_and_others_are_not(counted, subject, view, tmp_path, capsys):
    data = SuiteData(view)
    first = run_suite(subject, data, ["core", "ravel"], folder=tmp_path)
    again = run_suite(subject, data, ["core", "ravel"], folder=tmp_path)

    assert counted == ["one", "none"]
    assert again == first
    assert again["ravel"].not_applicable == "the model knows nothing"
    assert "core is done already" in capsys.readouterr().err
    run_suite(subject, data, ["core"], folder=tmp_path, seed=1)
    run_suite(subject, data, ["core"], folder=tmp_path, seed=1, decided_by={"dictionary": "another"})
    assert counted == ["one", "none", "one", "one"]
    assert read_json(tmp_path / "core.json")["decided_by"]["dictionary"] == "another"


def test_names_come_in_the_order_of_the_suite_and_unknown_ones_are_refused():
    assert suite_names("all") == list(EVALUATIONS) == list(HEADLINES)
    assert suite_names("tpp, core") == ["core", "tpp"]
    with pytest.raises(InputError, match="'mdl' is unknown"):
        suite_names("core,mdl")
    with pytest.raises(InputError, match="names no evaluation"):
        suite_names("")
