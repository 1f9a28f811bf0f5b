"""The study of ShadowKV: one run of all of it on little."""

import pytest

from apportion.studies import shadow_kv
from apportion.studies.workbench import Workbench


@pytest.mark.packaged
@pytest.mark.slow
def test_the_smoke_run_measures_everything() -> None:
    finding = shadow_kv.run("smoke", [0], Workbench())
    found = {(row.name, row.metric): row for row in finding.rows}
    for name in (
        shadow_kv._OURS,
        shadow_kv._BARE,
        shadow_kv._PAGES,
        shadow_kv._WINDOW,
        "oracle of each head",
        "random",
    ):
        for where, metric in (
            ("selection, T=64", "mass"),
            ("needles, 60 words, 50.00% of keys", "exact match"),
            ("likelihood, T=64", "NLL above dense"),
        ):
            assert found[f"{where}: {name}", metric].n == 1
        assert found[f"selection, T=64: {name}", "keys read"].mean <= 64
    assert found["selection, T=64: oracle of each head", "mass"].mean > found["selection, T=64: random", "mass"].mean
    assert len([each for each in finding.comparisons if each.part_of_verdict]) == 3 + 1 + 3 + 1
    assert "<svg" in finding.plots["selection"]
