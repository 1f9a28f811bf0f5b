"""Verdicts are computed from measurements and nothing else."""

import pytest

from apportion.errors import InputError
from apportion.studies import (
    SYSTEMS,
    Comparison,
    Finding,
    Row,
    all_studies,
    by_condition,
    entry,
    last_finding,
    overall,
    run,
)
from apportion.studies.finding import Measured, collect_rows
from apportion.studies.run import write_results


def test_what_is_measured_is_collected_seed_by_seed():
    measured = Measured()
    measured.add({"dense": {"loss": 1.0}, "sparse": {"loss": 2.0, "zeros": 0.5}})
    measured.add({"dense": {"loss": 3.0}})
    assert measured == {"dense": {"loss": [1.0, 3.0]}, "sparse": {"loss": [2.0], "zeros": [0.5]}}
    assert collect_rows(measured) == [
        Row.of("dense", "loss", [1.0, 3.0]),
        Row.of("sparse", "loss", [2.0]),
        Row.of("sparse", "zeros", [0.5]),
    ]


@pytest.mark.parametrize(
    ("margins", "verdict"),
    [
        ([0.1, 0.11, 0.12], "holds"),
        ([-0.1, -0.11, -0.12], "does not hold"),
        ([0.1, -0.05, 0.2], "mixed"),
        ([0.1], "mixed"),
        ([-0.1], "does not hold"),
        ([0.0, 0.0, 0.0], "does not hold"),
        ([0.5, 0.5, 0.5], "holds"),
    ],
)
def test_a_comparison_holds_if_its_interval_excludes_zero(margins: list[float], verdict: str) -> None:
    assert Comparison.positive("better", margins).verdict == verdict


def test_the_interval_is_students() -> None:
    comparison = Comparison.positive("better", [1.0, 2.0, 3.0])
    assert comparison.mean == 2
    assert comparison.high - comparison.mean == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_the_overall_verdict_needs_all_and_ignores_supplements() -> None:
    good = Comparison.positive("a", [1, 1.1, 1.2])
    bad = Comparison.positive("b", [-1, -1.1, -1.2])
    unsure = Comparison.positive("c", [1, -1, 1])
    aside = Comparison.positive("d", [-1, -1.1, -1.2], part_of_verdict=False)
    assert overall([good, good, aside]) == "holds"
    assert overall([good, bad]) == "mixed"
    assert overall([unsure, bad]) == "mixed"
    assert overall([bad, bad]) == "does not hold"
    assert overall([]) == "does not hold"


def test_rows_carry_standard_errors() -> None:
    assert Row.of("x", "y", [1.0, 3.0]).stderr == pytest.approx(1.0)
    assert Row.of("x", "y", [1.0]).stderr is None


def test_conditions_show_their_methods_side_by_side() -> None:
    rows = [
        Row("a: b: mine", "fvu", 0.1, None, 1),
        Row("a: b: theirs", "fvu", 0.2, None, 1),
        Row("bare", "l0", 3, None, 1),
    ]
    assert by_condition(rows) == {
        "a: b": [Row("fvu", "mine", 0.1, None, 1), Row("fvu", "theirs", 0.2, None, 1)],
        "": [Row("l0", "bare", 3, None, 1)],
    }


def test_findings_survive_json() -> None:
    finding = Finding(
        "mutual_feature_choice",
        "c",
        [Row.of("a", "m", [1, 2])],
        [Comparison.positive("a", [1, 2])],
        [0, 1],
        3.0,
        "here",
        "smoke",
    )
    content = finding.to_json()
    assert content["verdict"] == finding.verdict
    assert {"slug", "verdict", "claim", "seeds", "rows", "seconds", "machine", "scale"} <= content.keys()
    assert Finding.from_json(content) == finding


def test_all_54_systems_are_listed_once(apportion_cache) -> None:
    rows = all_studies()
    assert len(rows) == 54
    assert len({row["slug"] for row in rows}) == 54
    states = {row["slug"]: row["verdict"] for row in rows}
    assert states["mutual_feature_choice"] == "not run"
    assert states["comet"] == "not built"
    assert SYSTEMS[0].slug == "mutual_feature_choice"


def test_wrong_names_and_scales_are_refused_with_a_hint() -> None:
    with pytest.raises(InputError, match="mutual_feature_choice"):
        entry("mutual_feature_choise")
    with pytest.raises(InputError, match="not built"):
        run("comet")
    with pytest.raises(InputError, match="scale"):
        run("mutual_feature_choice", "enormous")


def test_the_smoke_study_runs_and_is_kept_but_is_no_result(apportion_cache, tmp_path) -> None:
    finding = run("mutual_feature_choice", "smoke", seeds=2, progress=False)
    assert finding.seeds == [0, 1]
    assert finding.verdict in ("holds", "mixed", "does not hold")
    assert all(row.n == 2 for row in finding.rows)
    kept = apportion_cache / "findings" / "mutual_feature_choice" / "smoke" / "finding.json"
    assert kept.exists()
    assert last_finding("mutual_feature_choice") is None
    page = write_results(tmp_path).read_text()
    assert "| `mutual_feature_choice` | features |" in page
    assert "not run" in page


def test_the_page_keeps_what_another_machine_found(apportion_cache, tmp_path) -> None:
    kept = ["## mutual_feature_choice: mixed", "", "*paper*", "", "### How", "", "- Measured for hours elsewhere.", ""]
    (tmp_path / "results.md").write_text("\n".join(["# Results", "", "old words", "", *kept, "## All systems", ""]))
    page = write_results(tmp_path).read_text()
    assert "\n".join(kept) in page
    assert "old words" not in page
    assert page.count("## All systems") == 1
    row = next(line for line in page.splitlines() if line.startswith("| `mutual_feature_choice`"))
    assert row.endswith("| mixed |")
    assert write_results(tmp_path).read_text() == page
