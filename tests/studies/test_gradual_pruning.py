"""The study of gradual pruning: one run of all of it on little."""

import pytest

from apportion.studies import gradual_pruning as study
from apportion.studies.workbench import Workbench


@pytest.mark.slow
def test_the_smoke_run_measures_everything_at_equal_budgets() -> None:
    finding = study.run("smoke", [0], Workbench())
    found = {(row.name, row.metric): row.mean for row in finding.rows}
    for condition, metric in (("digits, 90% sparse", "accuracy"), ("characters, 90% sparse", "bits per character")):

        def of(arm: str, what: str, condition: str = condition) -> float:
            return found[f"{condition}: {arm}", what]

        for arm in (study.DENSE, study.AT_ONCE, study.RETRAINED, study.LINEAR, study.CUBIC, study.RANDOM):
            assert of(arm, metric) > 0
        pruned = {of(arm, "nonzeros") for arm in (study.AT_ONCE, study.RETRAINED, study.LINEAR, study.RANDOM)}
        assert pruned == {of(study.CUBIC, "nonzeros")}
        # A width more would not fit, so the thin networks are just below what they are compared with.
        assert 0.85 < of(study.THIN, "nonzeros") / of(study.CUBIC, "nonzeros") <= 1
        assert 0.85 < of(study.THIN_BYTES, "kB") / of(study.CUBIC, "kB") <= 1
        assert of(study.DENSE, "nonzeros") > 3 * of(study.CUBIC, "nonzeros")
    assert found["digits, 90% sparse: " + study.DENSE, "accuracy"] > 0.7
    assert sum(each.part_of_verdict for each in finding.comparisons) == 5
    assert set(finding.plots) == {"digits", "characters"}
