"""The study of SCBench: what its claims are made of, and one run of all of it on little."""

from typing import Any

import pytest

from apportion.models import LanguageModel
from apportion.studies import scbench
from apportion.studies.workbench import Workbench
from tiny_families import tiny_model


def figures(first: float, later: float, request: float) -> dict[str, Any]:
    return {
        "multi_turn": {"turn 1": first, "later turns": later, "by turn": [first, later]},
        "multi_request": {"score": request, "turn 1": request, "share held": 1.0},
    }


def test_claims_are_about_what_falls_beyond_dense_attention() -> None:
    found = {
        "dense": figures(1.0, 0.9, 0.95),
        "snap_kv": figures(0.8, 0.1, 0.0),
        "quantized_4": figures(0.9, 0.85, 0.9),
        "oracle": figures(1.0, 0.75, 0.95),
    }
    lm = LanguageModel("tiny", tiny_model("llama"), None)
    asked = scbench._Asked(lm, scbench._SIZES["smoke"][0], Workbench())
    claims = asked._claims({"needles": [found, found]})
    margins = {claim.claim.removeprefix("1/4: "): claim.mean for claim in claims}
    assert margins == {
        "SnapKV falls after the turn whose question it has seen": pytest.approx(0.6),
        "SnapKV answers the first question worse if it is asked after the compression": pytest.approx(0.8),
        "equal bytes held: the 4-bit cache answers more requests than SnapKV": pytest.approx(0.9),
        "equal keys read: keys chosen for each query answer more requests than SnapKV": pytest.approx(0.95),
        "quantized_4 falls by less than 0.1 more than dense attention after the first turn": pytest.approx(0.15),
        "oracle falls by less than 0.1 more than dense attention after the first turn": pytest.approx(-0.05),
    }
    assert all(claim.part_of_verdict for claim in claims)


@pytest.mark.packaged
@pytest.mark.slow
def test_the_smoke_run_measures_everything() -> None:
    finding = scbench.run("smoke", [0, 1], Workbench())
    found = {(row.name, row.metric): row for row in finding.rows}
    for name in ("dense", "snap_kv", "quantized_4"):
        for metric in ("multi_request, score", "multi_turn, turn 1", "multi_turn, later turns"):
            assert found[f"needles, 1/4 of the bytes held: {name}", metric].n == 2
    assert found["needles, 1/4 of the keys read: oracle", "multi_request, share read"].mean == pytest.approx(
        0.25, abs=0.03
    )
    assert not any("bytes held: oracle" in name or "keys read: quantized" in name for name, _ in found)
    assert len(finding.comparisons) == 6
    assert "<svg" in finding.plots["turns-4"]
    assert any("SnapKV's window" in note for note in finding.notes)
