"""The study of soups: one run of all of it on little."""

import pytest

from apportion.studies import sparse_model_soups as study
from apportion.studies.workbench import Workbench


@pytest.mark.slow
def test_the_smoke_run_measures_everything() -> None:
    finding = study.run("smoke", [0], Workbench())
    found = {(row.name.removeprefix("90% sparse: "), row.metric): row for row in finding.rows}
    for arm in (study.IMP, study.LONGER, study.BEST, study.SEEDS, study.DECAYS, study.GREEDY, study.REPRUNED):
        assert found[arm, "accuracy"].n == 2
        assert found[arm, "sparsity"].mean == pytest.approx(0.9, abs=1e-4)
    # Different masks make an average denser, one mask does not.
    assert found[study.NAIVE, "sparsity"].mean < 0.895
    assert found["dense", "sparsity"].mean == 0
    assert found[f"{study.DECAYS}, branches' mean", "distance from the soup"].mean > 0
    assert found["dense", "accuracy"].mean > 0.8
    assert sum(each.part_of_verdict for each in finding.comparisons) == 5
    assert "<svg" in finding.plots["accuracy"]
