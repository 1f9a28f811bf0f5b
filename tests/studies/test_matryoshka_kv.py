"""The study of MatryoshkaKV: one run of all of it on little."""

import math

import pytest

from apportion.studies import matryoshka_kv
from apportion.studies.workbench import Workbench


@pytest.mark.packaged
@pytest.mark.slow
def test_the_smoke_run_measures_everything() -> None:
    finding = matryoshka_kv.run("smoke", [0], Workbench())
    found = {(row.name, row.metric): row.mean for row in finding.rows}
    for name in ("random", "PCA", "MatryoshkaKV", "fixed rank", "MatryoshkaKV, greedy ranks"):
        assert math.isfinite(found[f"50.0% kept: {name}", "NLL increase"])
    assert found["25.0% kept: MatryoshkaKV", "top-1 agreement"] <= 1
    assert found["50.0% kept: MatryoshkaKV, greedy ranks", "bytes held"] == pytest.approx(0.5)
    ranks = [found["50.0% kept: MatryoshkaKV, greedy ranks", f"kept of {kind}"] for kind in ("keys", "values")]
    assert sum(ranks) / 2 == pytest.approx(0.5)
    errors = [found[f"layer 10, 50.0% kept: {name}", "relative error"] for name in ("random", "PCA")]
    assert errors[0] > errors[1]
    counted = [each.claim for each in finding.comparisons if each.part_of_verdict]
    assert len(counted) == 3 + 3 + 1 + 1
    assert finding.verdict == "mixed"
    assert "<svg" in finding.plots["likelihood"]
