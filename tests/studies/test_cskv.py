"""The study of CSKV: one run of all of it on little."""

import pytest

from apportion.studies import cskv
from apportion.studies.workbench import Workbench


@pytest.mark.packaged
@pytest.mark.slow
def test_the_smoke_run_measures_everything() -> None:
    finding = cskv.run("smoke", [0, 1], Workbench())
    found = {(row.name, row.metric): row for row in finding.rows}
    assert all(row.n == 2 for row in finding.rows)
    closed, random = (
        found[f"rebuilding: {name}", "relative error of keys at 20%"].mean
        for name in ("closed form", "random directions")
    )
    assert closed < 0.5 < random
    assert random == pytest.approx(0.897, abs=0.02), "a random fifth of the directions: the method sheet's pilot"
    label = "closed form (K 0.2, V 0.6, window 32)"
    assert found[f"reading on: {label}", "bytes held, share"].n == 2
    assert found["reading on: plain cache", "NLL"].mean > 0
    for name in ("plain cache", label, "4 sinks and 64 recent keys"):
        assert 0 <= found[f"needles: {name}", "answered right"].mean <= 1
    trained = found["training: ASVD, alpha 0.5, trained", "error on calibration text"].mean
    assert trained > found["training: closed form", "error on calibration text"].mean
    counted = [each for each in finding.comparisons if each.part_of_verdict]
    assert len(counted) == 10
    assert "<svg" in finding.plots["reading-on"]
