"""The study of supervised dictionaries, on less."""

from dataclasses import replace

import pytest

from apportion.studies import run
from apportion.studies import supervised_dictionaries as study
from apportion.studies.workbench import Workbench


def test_the_smoke_study_runs_the_toys_and_says_that_it_leaves_the_model_out(apportion_cache) -> None:
    finding = run("supervised_dictionaries", "smoke", seeds=1, progress=False)
    assert {row.name for row in finding.rows} >= {"occlusion: ratio 2", "over-splitting: ideal 2 features"}
    assert len(finding.comparisons) == 3
    assert any("toys only" in note for note in finding.notes)


@pytest.mark.slow
@pytest.mark.packaged
def test_the_model_half_measures_every_arm_and_weighs_edits_by_no_edit(monkeypatch) -> None:
    task = study._Task(names=3, repeats=2, test=4, selection=1, heads=1, n_features=16, steps=2, batch_size=16)
    small = replace(study._SIZES["smoke"], tasks=(task,), toys=study.Toys(steps=2, test=50, samples=50))
    monkeypatch.setitem(study._SIZES, "smoke", small)
    finding = study.run("smoke", [0], Workbench())
    found = {(row.name, row.metric): row.mean for row in finding.rows}
    for arm in task.arms:
        assert (f"IOI, frame 1: {arm}", "sufficiency") in found
    assert found["IOI, frame 1: supervised, MSE", "L0"] == 3
    no_edit = found["IOI, frame 1: no edit", "IO edit accuracy"]
    assert any("IO edits say nothing" in note for note in finding.notes) == (no_edit >= 0.9)
    assert finding.plots["edits-frame-1"].startswith("<?xml")
    assert sum(each.part_of_verdict for each in finding.comparisons) == 11
