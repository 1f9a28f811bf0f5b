"""The study of routing attention: one run of all of it on little."""

import pytest

from apportion.studies import routing_transformer
from apportion.studies.workbench import Workbench


@pytest.mark.slow
def test_the_smoke_run_measures_everything() -> None:
    finding = routing_transformer.run("smoke", [0, 1], Workbench())
    found = {(row.name.removeprefix("recall: "), row.metric): row for row in finding.rows}
    arms = ["full attention", "local heads", "random routing", "routing, strictly causal", "routing, the paper's"]
    assert {arm for arm, _ in found} == set(arms)
    for arm in arms:
        assert 0 <= found[arm, "accuracy"].mean <= 1
        assert found[arm, "accuracy"].n == 2
    # No arm is compared with fewer keys than routing.
    keys = {arm: found[arm, "keys per query"].mean for arm in arms}
    assert keys["full attention"] == 8.5
    assert keys["routing, strictly causal"] <= keys["local heads"] < keys["full attention"]
    heard = "earlier positions that hear of the last token"
    assert found["routing, strictly causal", heard].mean == 0
    assert found["full attention", heard].mean == 0
    assert found["routing, the paper's", heard].mean > 0
    assert ("random routing", heard) not in found
    assert found["routing, strictly causal", "tokens in no cluster"].mean == 0
    assert sum(each.part_of_verdict for each in finding.comparisons) == 3
    assert "<svg" in finding.plots["learning"]
