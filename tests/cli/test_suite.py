import json
import shutil

import pytest

from apportion.data.files import read_json


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def labelled(tmp_path):
    path = tmp_path / "mine.jsonl"
    words = {"names": "a name is bound to", "numbers": "0 1 2 3 4 5", "signs": "( ) [ ] { } = ="}
    rows = [{"text": f"{text} {n}", "label": label} for label, text in words.items() for n in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_suite_gives_figures_controls_and_reasons(run, typed):
    outcome = typed("evaluate", run, "--suite", "core,ravel,absorption,unlearning", "--json")
    suite = outcome.json["suite"]

    assert suite["core"]["figures"]["kl_div_score"]["value"] is not None
    assert "kl_div_score" in suite["core"]["controls"]["random dictionary"]
    assert {row["metric"] for row in outcome.json["rows"]} >= {"core/kl_div_score", "core/l0"}
    for name in ("ravel", "absorption", "unlearning"):
        assert suite[name]["not_applicable"], name
        assert suite[name]["figures"] == {}
    assert "suite 1/4: core" in outcome.err
    assert read_json(run / "suite" / "core.json")["name"] == "core"


def test_a_suite_that_was_interrupted_goes_on(run, typed):
    typed("evaluate", run, "--suite", "ravel", "--json")
    outcome = typed("evaluate", run, "--suite", "ravel,unlearning")

    assert "ravel is done already" in outcome.err
    assert "unlearning took" in outcome.err
    assert "not applicable" in outcome.out
    assert "knows too little about cities" in outcome.out


def test_classes_of_ones_own_are_probed(run, typed, labelled):
    outcome = typed("evaluate", run, "--suite", "sparse_probing,tpp", "--labelled", labelled, "--seed", "1")

    assert outcome.code == 0, outcome.err
    assert "sae_top_1_test_accuracy" in outcome.out
    assert "tpp_threshold_5_total_metric" in outcome.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--suite", "core,nothing"), "'nothing' is unknown"),
        (("--suite", "core", "--suite-size", "huge"), "--suite-size huge"),
        (("--suite", "core", "--labelled", "not-there.jsonl"), "--labelled not-there.jsonl"),
        (("--suite", "core", "--unlearning-data", "not-there"), "--unlearning-data"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_computed(options, said, finished, typed):
    outcome = typed("evaluate", finished, *options)

    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert said in outcome.errors[0]
