"""The study of DSnoT: what counts, and one run of all of it on little."""

import math
from collections import defaultdict

import pytest

from apportion.studies import dsnot
from apportion.studies.workbench import Workbench


def _verdicts(**losses: float) -> dict[str, tuple[str, bool]]:
    names = {"magnitude": dsnot._MAGNITUDE, "from_magnitude": dsnot._FROM_MAGNITUDE, "wanda": dsnot._WANDA}
    names |= {"swapped": dsnot._SWAPPED, "published": dsnot._PUBLISHED}
    measured: dsnot.Values = defaultdict(lambda: defaultdict(list))
    for name, loss in losses.items():
        measured[f"60 %: {names[name]}"]["loss"] = [loss + noise for noise in (0.0, 0.1, 0.2)]
    return {each.claim: (each.verdict, each.part_of_verdict) for each in dsnot._claims(measured)}


def test_magnitudes_and_the_number_of_swaps_count_and_beating_wanda_is_shown() -> None:
    found = _verdicts(magnitude=8.0, from_magnitude=5.0, wanda=4.0, swapped=3.9, published=4.2)
    assert found == {
        "60 %, mask of magnitudes: swaps lower the loss": ("holds", True),
        "60 %, Wanda's mask: swaps scaled to the width do better than 50 as published": ("holds", True),
        "60 %, Wanda's mask: swaps scaled to the width lower the loss": ("holds", False),
        "60 %, Wanda's mask: 50 swaps as published lower the loss": ("does not hold", False),
    }


@pytest.mark.packaged
@pytest.mark.slow
def test_the_smoke_run_measures_everything() -> None:
    finding = dsnot.run("smoke", [0], Workbench())
    found = {(row.name.removeprefix("60 %: "), row.metric): row.mean for row in finding.rows}
    assert found["dense", "loss"] < found["Wanda", "loss"] < found["magnitude", "loss"] + 0.5
    assert found["Wanda", "output error"] < found["magnitude", "output error"]
    assert found["Wanda, swaps", "mean error"] < found["Wanda", "mean error"]
    assert found["Wanda, mean-bias correction", "mean error"] < 1e-4
    assert found[dsnot._PUBLISHED, "swaps a row"] > found["Wanda, swaps", "swaps a row"] > 0
    assert all(math.isfinite(value) for value in found.values())
    assert "<svg" in finding.plots["losses"]
    assert finding.verdict != "holds", "one seed is never enough"


def test_the_model_is_dense_again_after_every_arm(monkeypatch) -> None:
    import copy

    import torch

    from apportion.models import LanguageModel
    from tiny_families import VOCABULARY, tiny_model

    lm = LanguageModel("tiny", copy.deepcopy(tiny_model("llama")), None)
    trial = dsnot._Trial(lm, dsnot._Size())
    draws = torch.Generator().manual_seed(0)
    texts = tuple(torch.randint(3, VOCABULARY, (3, 12), generator=draws) for _ in range(2))
    monkeypatch.setattr(trial, "_texts", lambda seed: texts)
    dense = trial.measured(None, 0.0, 0)
    losses = {name: trial.measured(name, 0.6, 0)["loss"] for name in dsnot._ARMS}
    assert trial.measured(None, 0.0, 0) == dense
    assert len(set(losses.values())) > len(losses) / 2
    assert lm.model.model.layers[0].mlp.down_proj.bias is None
