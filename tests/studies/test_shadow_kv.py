"""The study of ShadowKV: its page bounds, and one run of all of it on little."""

import pytest
import torch

from apportion.keys import ComposedMemory
from apportion.models.key_memory import LayerFacts, Step
from apportion.studies import shadow_kv
from apportion.studies.workbench import Workbench


def test_page_bounds_are_above_every_product_in_the_page() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(1, 2, 11, 8, generator=generator), torch.randn(1, 4, 11, 8, generator=generator)
    real = torch.ones(1, 11, dtype=torch.bool)
    step = Step(queries, keys, keys, real, 1.0)
    selector = shadow_kv.PageBounds(6, 4)
    memory = ComposedMemory(LayerFacts(0, 4, 2, 8, 1), selector=selector)
    memory.take_in(step)
    memory.close()
    scores = selector.scores(step, memory.store)
    products = queries @ keys.repeat_interleave(2, 1).transpose(-1, -2)
    assert (scores >= products - 1e-5).all()
    first = torch.maximum(queries[0, 0, 0] * keys[0, 0, :4].amax(0), queries[0, 0, 0] * keys[0, 0, :4].amin(0)).sum()
    torch.testing.assert_close(scores[0, 0, 0, :4], first.expand(4))
    assert (scores[..., 8:] > 1e30).all(), "what fills no page is always read"


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
