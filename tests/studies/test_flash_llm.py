"""The study of Flash-LLM: one run of all of it on little."""

import pytest

from apportion.studies import flash_llm
from apportion.studies.workbench import Workbench


@pytest.mark.packaged
@pytest.mark.slow
def test_the_smoke_run_measures_everything() -> None:
    finding = flash_llm.run("smoke", [0], Workbench())
    found = {(row.name, row.metric): row.mean for row in finding.rows}
    for where in (flash_llm._SMALL, flash_llm._LARGE):
        for sparsity in (0.5, 0.8, 0.9):
            name = f"{where}, {sparsity:.0%} zeros"
            assert found[name, "bytes beyond the formula"] == 0
            assert found[name, "bytes of dense"] == pytest.approx(1 - sparsity + 1 / 32, abs=0.01)
            for count in (1, 64):
                for arm in (flash_llm._DENSE, flash_llm._CSR, flash_llm._LSCD, flash_llm._OURS):
                    assert found[name, f"{count} columns, ms: {arm}"] > 0
                    assert found[name, f"{count} columns, error: {arm}"] < 1e-5
    assert len([each for each in finding.comparisons if each.part_of_verdict]) == 2 * 5 + 1
    assert any("Break-even" in note for note in finding.notes)
    assert "<svg" in finding.plots["gain"]
