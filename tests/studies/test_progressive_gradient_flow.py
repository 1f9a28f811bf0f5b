"""The study of progressive gradient flow: what counts, and one short run of every arm."""

from collections import defaultdict
from dataclasses import replace

import pytest

from apportion.studies import progressive_gradient_flow as study
from apportion.studies.workbench import Workbench


def test_only_high_sparsity_counts_against_sr_ste():
    size = study._SIZES["default"]
    measured: study.Values = defaultdict(lambda: defaultdict(lambda: [0.5, 0.5, 0.5]))
    claims = study._claims(size, measured)
    against = {
        each.claim: each.part_of_verdict for each in claims if "exponential is more accurate than SR" in each.claim
    }
    assert list(against.values()) == [False, False, True, True]
    assert sum(each.part_of_verdict for each in claims) == 3 + 2 + 1
    for pattern in ("1:16", "1:32"):
        measured[f"{pattern}: {study._EXPONENTIAL}"]["accuracy"] = [0.6, 0.61, 0.6]
    won = [each.verdict for each in study._claims(size, measured) if each.claim in against]
    assert won == ["does not hold", "does not hold", "holds", "holds"]


def test_geometric_windows_are_only_tried_where_they_fit():
    assert [study._fits("SdGf geometric", each) for each in ("2:4", "1:8", "1:16")] == [True, True, False]
    assert study._fits("SdGf stepwise", "1:32")


def test_every_arm_is_judged_as_a_binary_network(monkeypatch: pytest.MonkeyPatch):
    seen = []
    judge = study.judged

    def look(network, data):
        if type(network[2]).__name__ == "Linear":
            seen.append(int((network[2].weight != 0).reshape(-1, 8).sum(dim=1).max()))
        return judge(network, data)

    monkeypatch.setattr(study, "judged", look)
    monkeypatch.setitem(study._SIZES, "smoke", replace(study._SIZES["smoke"], patterns=("1:8",), steps=10))
    finding = study.run("smoke", [0], Workbench())
    assert seen == [8] + [1] * 9  # the dense one, one-shot and eight recipes; random masks stay masks
    found = {(row.name, row.metric): row.mean for row in finding.rows}
    assert ("1:8: SdGf geometric", "accuracy") in found
    assert found["1:8: STE", "training compute of the layers"] == pytest.approx((1 / 8 + 2) / 3)
    assert found["1:8: MdGf exponential", "training compute of the layers"] > 0.9
    assert finding.verdict == "mixed" or finding.verdict == "does not hold"
    assert finding.plots["accuracy"].startswith("<?xml")
