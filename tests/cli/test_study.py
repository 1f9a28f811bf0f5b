import json

import pytest

from apportion import studies
from apportion.studies import Comparison, Finding, Row


@pytest.fixture
def fake_study(monkeypatch):
    """A study that takes no time; returns what it was asked for."""
    asked = {}

    def run(slug, scale, seeds, progress):
        asked.update(slug=slug, scale=scale, seeds=seeds)
        return Finding(
            slug=slug,
            claim="less error at equal budget",
            rows=[Row.of("mutual", "fvu", [0.1, 0.2]), Row.of("topk", "fvu", [0.3, 0.4])],
            comparisons=[Comparison.positive("mutual below topk", [0.2, 0.21, 0.2])],
            seeds=seeds,
            seconds=1.0,
            machine="here",
            scale=scale,
            notes=["[red] is not a colour here"],
        )

    monkeypatch.setattr(studies, "run", run)
    return asked


def test_all_studies_are_listed_with_their_verdicts(typed):
    listed = typed("study", "--list", "--json").json["studies"]

    assert len(listed) == 54
    assert {"slug", "room", "paper", "built", "verdict"} <= set(listed[0])
    assert "not built" in typed("study").out


def test_a_study_answers_with_its_finding(fake_study, typed):
    answer = typed("study", "mutual_feature_choice", "--scale", "smoke", "--seeds", "2", "--seed", "5", "--json").json

    assert fake_study == {"slug": "mutual_feature_choice", "scale": "smoke", "seeds": [5, 6]}
    assert {"slug", "verdict", "claim", "seeds", "rows", "seconds", "machine", "scale"} <= set(answer)
    assert answer["verdict"] == "holds"


def test_a_study_shows_claims_rows_notes_and_verdict(fake_study, typed):
    out = typed("study", "mutual_feature_choice").out

    for part in ("less error at equal budget", "mutual below topk", "0.150", "[red] is not", "holds"):
        assert part in out


def test_results_are_written_where_docs_says(fake_study, typed, tmp_path):
    outcome = typed("study", "--write", "--docs", tmp_path / "docs", "--json")

    assert outcome.code == 0
    assert (tmp_path / "docs" / "results.md").exists()
    assert json.loads(outcome.out)["studies"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("no_such_study",), "no_such_study"),
        (("comet",), "not built"),
        (("mutual_feature_choice", "--scale", "huge"), "huge"),
    ],
)
def test_what_cannot_be_studied_is_bad_input(arguments, named, typed):
    outcome = typed("study", *arguments)

    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert named in outcome.errors[0]
