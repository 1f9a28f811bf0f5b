"""The study of BDWP: what counts, and one short run of every arm."""

from collections import defaultdict
from dataclasses import replace

import pytest

from apportion.studies import bdwp as study
from apportion.studies.workbench import Workbench
from apportion.weights.bdwp import Bdwp


def test_multiply_adds_are_counted_over_all_layers():
    # 64-256-256-256-10: the first layer needs two products, the others three.
    first, middle, last = 2 * 64 * 256, 2 * 256 * 256, 3 * 256 * 10
    assert study._macs(None) == first + 3 * middle + last
    assert study._macs(Bdwp(2, 8)) == first + 1.5 * middle + last
    assert study._macs(Bdwp(2, 8, "sr_ste")) == study._macs(Bdwp(2, 8, "sdwp")) == first + 2.25 * middle + last


def test_only_2_of_8_and_the_lower_speed_up_count():
    size = study._SIZES["default"]
    measured: study.Values = defaultdict(lambda: defaultdict(lambda: [0.9, 0.9, 0.9]))
    simulated = {f"2:8: {name}, batch 512": {"speed-up": 1.6} for name in size.networks}
    counted = [each for each in study._claims(size, measured, simulated) if each.part_of_verdict]
    assert [each.verdict for each in counted] == ["holds", "does not hold", "holds"]
    assert all("2:8" in each.claim for each in counted)


def test_the_smoke_run_measures_everything(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(study._SIZES, "smoke", replace(study._SIZES["smoke"], steps=20, networks=("ResNet-9, 32",)))
    finding = study.run("smoke", [0], Workbench())
    found = {(row.name, row.metric): row.mean for row in finding.rows}
    assert found["2:8: BDWP", "multiply-adds"] == found["2:8: dense, as many multiply-adds as BDWP", "multiply-adds"]
    cosine = found["2:8: BDWP", "gradient of the first N:M layer's input, cosine"]
    assert 0.2 < cosine < 1
    network = "2:8: ResNet-9, 32, batch 512"
    assert 1.5 < found[network, "speed-up"] < found[network, "speed-up of the products"] < 2
    shares = [mean for (name, metric), mean in found.items() if name == network and metric.startswith("share of")]
    assert sum(shares) == pytest.approx(1)
    assert min(mean for (_, metric), mean in found.items() if metric.endswith("times the cycles")) >= 1
    assert finding.plots["speed-up"].startswith("<?xml")
