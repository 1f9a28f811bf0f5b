"""The study of gradient SAEs: its constructed case, and one run of all of it on little."""

from pathlib import Path

import pytest

from apportion.studies import gradient_sae
from apportion.studies.workbench import Workbench


def test_gradients_find_what_the_head_reads() -> None:
    rows, comparisons, _ = gradient_sae._constructed([0, 1, 2], Workbench())
    assert [each.verdict for each in comparisons] == ["holds", "holds"]
    assert not any(each.part_of_verdict for each in comparisons)
    kl = [row.mean for row in rows if row.metric == "KL"]
    assert kl[0] == pytest.approx(2.15, rel=0.25)  # the method sheet's pilot
    assert kl[4] == pytest.approx(0.55, rel=0.35)


@pytest.mark.packaged
@pytest.mark.slow
def test_the_smoke_run_measures_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_sae, "cache_dir", lambda: tmp_path)
    finding = gradient_sae.run("smoke", [0, 1], Workbench())
    where = "smollm2 layers.28.residual, english"
    found = {(row.name, row.metric): row for row in finding.rows}
    for name in ("TopK", "beta 1"):
        for metric in ("CE increase", "KL", "KL moved by steering", "dead", "FVU", "mean effect of live features"):
            assert found[f"{where}: k=8, {name}", metric].n == 2
    assert f"{where}: random directions" in {row.name for row in finding.rows}
    counted = [each.claim for each in finding.comparisons if each.part_of_verdict]
    assert len(counted) == 3
    assert all("k=8, beta 1" in claim for claim in counted)
    assert "<svg" in finding.plots["betas-layers.28.residual-label"]
