"""The study of Sparse-IFT: what counts, equal costs, and one run of all of it on little."""

import pytest

from apportion.studies import sparse_ift
from apportion.studies.workbench import Workbench


def test_the_smoke_run_measures_everything_at_equal_cost() -> None:
    finding = sparse_ift.run("smoke", [0], Workbench())
    found = {(row.name, row.metric): row.mean for row in finding.rows}
    # All sparse arms cost what the dense one does; the dense controls cost more.
    for task, cost in (("digits", 656), ("characters", None)):
        equal = found[f"{task}: dense", "multiply-adds"]
        assert cost in (None, equal)
        for (name, metric), value in found.items():
            if name.startswith(task) and metric == "multiply-adds":
                larger = "twice" in name or "widest" in name
                assert value > equal if larger else value == equal, name
        assert found[f"{task}: dense, twice the multiply-adds", "multiply-adds"] <= 2 * equal
    assert found["digits: Wide 0.9, RigL", "realised sparsity"] == pytest.approx(1 - 406 / 2225)
    step = "cost of a training step, the dense network's being 1"
    assert found["digits: Wide 0.9, static", step] == 1 < found["digits: Wide 0.9, RigL", step] < 1.2
    assert found["digits: dense", step] == 1
    counting = [each.claim for each in finding.comparisons if each.part_of_verdict]
    assert any("Wide 0.75: RigL is better than masks that stay" in each for each in counting)
    assert not any("SET" in each for each in counting)
    assert finding.verdict == "mixed", "one seed is never enough"
    assert set(finding.plots) == {"digits", "characters"}


def test_rates_are_chosen_on_networks_that_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str]] = []
    size = sparse_ift._SIZES["smoke"].digits
    task = sparse_ift._Digits(sparse_ift.replace(size, rates=(1e-3, 1e-2), tuning=2))

    def train(task, arm, rate, seed, device):
        seen.append((seed, "train"))
        return sparse_ift._build(task, arm, seed)[0]

    def figure(network, part):
        seen.append((seen[-1][0], part))
        return 0.5

    monkeypatch.setattr(sparse_ift, "_train", train)
    monkeypatch.setattr(task, "figure", figure)
    measured = sparse_ift._measure(task, sparse_ift._Arm("dense"), [0, 1, 2], "cpu")
    validated = {seed for seed, what in seen if what == "validation"}
    tested = {seed for seed, what in seen if what == "test"}
    assert tested == {0, 1, 2}
    assert len(validated) == 2
    assert not validated & tested
    assert measured["figures"] == [0.5] * 3
