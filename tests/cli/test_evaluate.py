import shutil

import pytest

from apportion.data.files import read_json


def test_evaluate_gives_every_figure_with_its_standard_error_and_definition(finished, typed):
    answer = typed("evaluate", finished, "--contexts", "16", "--json").json

    fvu = answer["evaluation"]["metrics"]["fvu"]
    assert 0 < fvu["value"] < 1
    assert fvu["stderr"] > 0
    assert fvu["definition"]
    assert answer["evaluation"]["loss_contexts"] == 16
    assert {row["metric"] for row in answer["rows"]} >= {"fvu", "l0", "dead", "ce_loss_score", "ce_loss_score_mean"}
    assert answer["seeds"] == [0]


def test_evaluate_shows_a_table(finished, typed):
    out = typed("evaluate", finished, "--no-loss").out

    assert "squared error / squared distance from the mean" in out
    assert "held-out tokens" in out
    assert "ce_loss_score" not in out


def test_evaluate_audits_the_error(finished, typed):
    outcome = typed("evaluate", finished, "--contexts", "8", "--errors", "--json")

    assert outcome.code == 0, outcome.err
    found = outcome.json["errors"]["metrics"]
    assert found["fvu_nonlinear"]["value"] + found["fvu_linear"]["value"] == pytest.approx(found["fvu"]["value"])
    assert {"r2_error", "r2_squared_norm", "best_scale", "ce_share_linear", "ce_share_nonlinear"} <= set(found)
    assert {"r2_error", "fvu"} <= {row["metric"] for row in outcome.json["rows"] if row["name"].endswith(", error")}
    assert "what a linear map of x adds back" in typed("evaluate", finished, "--no-loss", "--errors").out


def test_evaluating_again_gives_what_training_gave(finished, typed):
    at_the_end = read_json(finished / "evaluation.json")["metrics"]["fvu"]

    assert typed("evaluate", finished, "--no-loss", "--json").json["evaluation"]["metrics"]["fvu"] == at_the_end


def test_a_dictionary_that_was_moved_away_from_its_run_can_be_evaluated(finished, typed, tmp_path):
    shutil.copytree(finished / "dictionary", tmp_path / "mine")

    answer = typed("evaluate", tmp_path / "mine", "--no-loss", "--json").json

    assert answer["evaluation"]["metrics"]["fvu"] == read_json(finished / "evaluation.json")["metrics"]["fvu"]


def test_activations_that_are_gone_are_harvested_again(finished, typed, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "run.json").write_text(
        (run / "run.json").read_text().replace(str(read_json(run / "run.json")["store_folder"]), str(tmp_path / "gone"))
    )
    monkeypatch.setenv("APPORTION_CACHE", str(tmp_path / "new cache"))

    outcome = typed("evaluate", run, "--no-loss", "--json")

    assert outcome.code == 0
    assert "harvesting into" in outcome.err
    assert outcome.json["evaluation"]["metrics"]["fvu"] == read_json(finished / "evaluation.json")["metrics"]["fvu"]


@pytest.mark.parametrize("content", [None, {}, {"run.json": '{"format": "other"}'}, {"config.json": "{}"}])
def test_what_is_neither_a_run_nor_a_dictionary_is_refused(content, typed, tmp_path):
    folder = tmp_path / "folder"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)

    outcome = typed("evaluate", folder)

    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert str(folder) in outcome.errors[0]


def test_an_unfinished_run_says_how_to_finish_it(interrupted, typed, tmp_path):
    interrupted(tmp_path / "run")

    outcome = typed("evaluate", tmp_path / "run")

    assert outcome.code == 2
    assert "run the same `apportion train` again" in outcome.errors[0]
