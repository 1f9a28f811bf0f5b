"""A study that was interrupted goes on after what it had measured."""

import json
from pathlib import Path

import pytest

from apportion.studies import mutual_feature_choice, run
from apportion.studies.workbench import Workbench, workbench


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "measured.json"


def never() -> float:
    raise AssertionError("measured again")


def test_what_was_measured_is_recalled_after_an_interruption(path: Path) -> None:
    first = Workbench(path)
    assert first.measure("fvu", {"rate": 0.1}, lambda: {"fvu": 0.25}) == {"fvu": 0.25}
    said: list[str] = []
    second = Workbench(path, said.append)
    assert second.measure("fvu", {"rate": 0.1}, never) == {"fvu": 0.25}
    assert second.measure("fvu", {"rate": 0.2}, lambda: 3.0) == 3.0
    assert second.measure("l0", {"rate": 0.1}, lambda: 4.0) == 4.0
    assert "going on after 1 measurements" in said[0]
    assert second.seconds >= json.loads(path.read_text())["seconds"]


def test_other_code_starts_over(path: Path) -> None:
    Workbench(path).measure("fvu", None, lambda: 1.0)
    path.write_text(path.read_text().replace('"torch": "', '"torch": "other '))
    said: list[str] = []
    assert Workbench(path, said.append).measure("fvu", None, lambda: 2.0) == 2.0
    assert "the code has changed" in said[0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"identity": {}}'])
def test_a_damaged_file_starts_over(path: Path, content: str) -> None:
    path.write_text(content)
    said: list[str] = []
    assert Workbench(path, said.append).measure("fvu", None, lambda: 2.0) == 2.0
    assert "starting over" in said[0]


def test_without_a_file_nothing_is_kept(tmp_path: Path) -> None:
    bench = Workbench()
    assert bench.measure("fvu", None, lambda: 1.0) == 1.0
    assert bench.measure("fvu", None, never) == 1.0
    bench.clear()
    assert not list(tmp_path.iterdir())


def test_progress_is_a_line_each_where_there_is_no_terminal(path: Path, capsys) -> None:
    with workbench("a study", path) as bench:
        bench.measure("[red] fvu", None, lambda: 1.0)
    assert capsys.readouterr().err == "[0:00] [red] fvu\n"


def test_an_interrupted_study_ends_like_an_undisturbed_one(apportion_cache, monkeypatch) -> None:
    undisturbed = run("mutual_feature_choice", "smoke", seeds=1, progress=False)
    measure, calls = mutual_feature_choice._World.measure, []

    def stop_at_the_fourth(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(mutual_feature_choice._World, "measure", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run("mutual_feature_choice", "smoke", seeds=1, progress=False)
    resumed = run("mutual_feature_choice", "smoke", seeds=1, progress=False)
    assert len(calls) == 8  # seven measurements, of which the fourth was begun twice
    assert resumed.rows == undisturbed.rows
    assert not (apportion_cache / "findings" / "mutual_feature_choice" / "smoke" / "measured.json").exists()
