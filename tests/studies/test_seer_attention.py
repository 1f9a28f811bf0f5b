"""The study of SeerAttention: one run of all of it on little."""

import pytest

from apportion.studies import seer_attention
from apportion.studies.workbench import Workbench


@pytest.mark.packaged
@pytest.mark.slow
def test_the_smoke_run_measures_everything() -> None:
    finding = seer_attention.run("smoke", [0], Workbench())
    found = {(row.name, row.metric): row for row in finding.rows}
    mass = {
        name: found[f"all layers: {name}", "mass in 2 blocks"].mean
        for name in ("oracle", "gate", "mean-pooled", "columns and diagonals", "first and recent", "random")
    }
    assert max(mass.values()) == mass["oracle"] < 1
    assert "layer 3: gate, first and own forced" in {name for name, _ in found}
    for name in ("oracle", "gate", "mean-pooled", "first and recent", "random"):
        assert "nats lost at 75% left out" in {metric for row, metric in found if row == f"all layers: {name}"}
    by_count = found["all layers: gate", "keys read at 75% left out"].mean
    by_threshold = found["all layers: gate, by threshold", "keys read at 75% left out"].mean
    assert by_threshold == pytest.approx(by_count, rel=0.2)
    counted = [each.claim for each in finding.comparisons if each.part_of_verdict]
    assert len(counted) == 4 + 2 + 1 + 3
    most = "nats lost at 90% left out"
    arms = {row.removeprefix("all layers: ") for row, metric in found if metric == most}
    forced = {f"{name}, first and own forced" for name in ("gate", "mean-pooled")}
    assert arms == {"oracle", "gate", "mean-pooled", "first and recent", "columns and diagonals"} | forced
