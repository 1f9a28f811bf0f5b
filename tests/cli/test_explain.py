"""`apportion explain` and what `apportion report` shows of it."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.mock_judge import mock_judge

SMALL = ("--train", "4", "--test", "4", "--min-windows", "8", "--features", "+12")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_explains_without_any_model_and_goes_on_where_it_was(run, tiny_llama, typed):
    answer = typed("explain", run, *SMALL, "--encoder", tiny_llama, "--json").json

    summary = answer["summary"]
    assert summary["calls"] == 0
    assert sum(summary["status"].values()) == 12
    assert summary["status"]["explained"] > 3
    assert {row["name"] for row in answer["rows"]} == {"embedding"}
    lines = (run / "explanations" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 12

    again = typed("explain", run, *SMALL, "--encoder", tiny_llama, "--json").json
    assert again["summary"]["done"] == 0
    assert len((run / "explanations" / "results.jsonl").read_text(encoding="utf-8").splitlines()) == 12


def test_other_settings_in_the_same_folder_are_refused_by_name(run, tiny_llama, typed):
    typed("explain", run, *SMALL, "--encoder", tiny_llama)

    outcome = typed("explain", run, *SMALL, "--encoder", tiny_llama, "--choice", "top")

    assert outcome.code == 2
    assert 'examples.choice (there: "quantiles", this run: "top")' in outcome.errors[0]


def test_a_server_is_asked_only_with_leave(run, typed):
    server = ("--judge", "openai:nobody", "--base-url", "http://127.0.0.1:9/v1", "--scorers", "detection")

    outcome = typed("explain", run, *SMALL, *server)
    assert outcome.code == 2
    assert "--yes" in outcome.errors[0]

    dry = typed("explain", run, *SMALL, *server, "--price-in", "2", "--dry-run", "--json").json
    assert dry["estimate"]["calls"] > 0
    assert dry["estimate"]["cost"] > 0
    assert not (run / "explanations").exists()

    outcome = typed("explain", run, *SMALL, *server, "--price-in", "2", "--max-cost", "0.000001")
    assert outcome.code == 2
    assert "--max-cost" in outcome.errors[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--judge", "nobody"), "--judge nobody"),
        (("--features", "a-b"), "--features"),
        (("--features", "99999"), "--features"),
        (("--scorers", "taste"), "--scorers taste"),
        (("--scorers", "surprisal"), "needs score"),
        (("--style", "contrastive"), "--style contrastive"),
        (("--negatives", "others"), "negatives='others'"),
        (("--judge", "local:smollm2", "--style", "grand"), "--style"),
    ],
)
def test_bad_input_is_named_before_anything_is_asked(arguments, named, run, tiny_llama, typed, monkeypatch):
    arguments = [str(tiny_llama) if each == "smollm2" else each for each in arguments]
    arguments = [each.replace("local:smollm2", f"local:{tiny_llama}") for each in arguments]

    outcome = typed("explain", run, "--encoder", tiny_llama, *arguments)

    assert outcome.code == 2, outcome.err
    assert named in outcome.errors[0]


def test_a_server_explains_and_judges_and_its_failures_are_reported(run, typed):
    with mock_judge({"429": 0.2, "refusal": 0.1, "nonsense": 0.2}) as judge:
        server = ("--judge", "openai:mock", "--base-url", judge.url, "--scorers", "detection,fuzzing", "--yes")
        answer = typed("explain", run, *SMALL, "--negatives", "random,neighbour", *server, "--json").json
        asked = judge.stats()["answered"]

    summary = answer["summary"]
    assert summary["calls"] == asked == answer["estimate"]["calls"] or summary["failures"]
    assert set(summary["failures"]) <= {"refusal", "nonsense"}
    assert {"detection", "fuzzing"} == {row["name"] for row in answer["rows"]}
    assert {"auroc, random", "auroc, neighbour"} <= {row["metric"] for row in answer["rows"]}


def test_a_local_judge_that_cannot_read_so_much_says_so(run, tiny_llama, typed):
    local = ("--judge", f"local:{tiny_llama}", "--scorers", "detection", "--style", "contrastive-activations")
    summary = typed("explain", run, *SMALL, *local, "--json").json["summary"]
    assert set(summary["failures"]) == {"too long"}
    assert summary["status"]["no explanation"] > 0


def test_the_report_shows_what_was_explained(run, tiny_llama, typed):
    typed("explain", run, *SMALL, "--encoder", tiny_llama)

    assert typed("report", run, "--json").code == 0

    from apportion.report.payload import decode_block

    page = (run / "report.html").read_text(encoding="utf-8")
    block = page.split('id="block-list">')[1].split("<")[0]
    arrays, plain = decode_block(block)
    records = [json.loads(line) for line in (run / "explanations" / "results.jsonl").read_text().splitlines()]
    expected = {str(each["feature"]): each["explanation"] for each in records if each["status"] == "explained"}
    assert plain["labels"] == expected
    assert len(arrays["score"]) == 64


def test_explanations_of_another_dictionary_are_not_shown(run, tiny_llama, typed):
    typed("explain", run, *SMALL, "--encoder", tiny_llama)
    settings = run / "explanations" / "settings.json"
    settings.write_text(settings.read_text().replace('"dictionary": "', '"dictionary": "other'))

    outcome = typed("report", run)

    assert outcome.code == 2
    assert "another dictionary" in outcome.errors[0]
