"""The study of ShadowKV: what counts, one run of all of it on little, and the parts that take it apart."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from apportion.keys.trace import exact_weights, part_of
from apportion.models.key_memory import LayerFacts, Rotation, Step
from apportion.studies import shadow_kv
from apportion.studies.shadow_kv_loss import PARTS, with_part
from apportion.studies.workbench import Workbench


def test_retrieval_counts_only_where_dense_attention_answers_enough_of_enough() -> None:
    many = shadow_kv._SIZES["default"]
    few = replace(many, contexts=4)

    def claims(size: shadow_kv._Size, dense: float, ours: float) -> list[tuple[str, bool]]:
        measured: shadow_kv.Measured = defaultdict(lambda: defaultdict(lambda: [0.5, 0.5, 0.5]))
        measured[f"needles, {size.words[0]} words: dense"]["exact match"] = [dense] * 3
        measured[f"{shadow_kv._cell(size.words[0], 1 / 8)}: ShadowKV"]["exact match"] = [ours] * 3
        found = shadow_kv._claims(size, measured)
        return [
            (each.verdict, each.part_of_verdict)
            for each in found
            if each.claim.startswith("needles") and "12.50%" in each.claim and "ShadowKV keeps" in each.claim
        ]

    assert claims(many, 0.9, 0.88) == [("holds", True)]
    assert claims(many, 0.9, 0.8) == [("does not hold", True)]
    assert claims(many, 0.7, 0.7) == [("holds", False)]
    assert claims(few, 0.9, 0.9) == [("holds", False)]


def test_parts_are_what_they_are_called() -> None:
    draw = torch.Generator().manual_seed(0)
    angles = torch.arange(80)[None, :, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    rotation = Rotation(angles.cos(), angles.sin())
    queries, keys, values = (torch.randn(1, heads, 80, 8, generator=draw) for heads in (4, 2, 2))
    step = Step(
        rotation.apply(queries), rotation.apply(keys), values, torch.ones(1, 80, dtype=torch.bool), 8**-0.5, None,
        rotation,
    )  # fmt: skip
    facts, weights, read = LayerFacts(0, 4, 2, 8, 1), exact_weights(step, 77), {}
    for part in ("", *PARTS):
        memory = with_part(part, 4, 1, 1, 28, facts)
        memory.take_in(part_of(step, 0, 77))
        memory.close()
        memory.attend(part_of(step, 77, 80))
        selection = memory.newest_selection
        assert selection is not None
        assert selection.indices.shape[1] == (4 if "query head" in part else 2)
        assert selection.kept.sum(-1).max() <= 28
        mask = selection.mask(80)
        read[part] = mask.repeat_interleave(4 // mask.shape[1], dim=1)
    for part in PARTS:
        same = torch.equal(read[part], read[""])
        assert same == part.startswith(("keys of full rank", "rank")), "the rank does not change what landmarks choose"
    mass = {part: float((weights * mask).sum()) for part, mask in read.items()}
    assert mass["chunks by exact weight"] > mass[""]
    assert torch.equal(read["chunks by exact weight"], read["chunks by exact weight, keys of full rank"])


@pytest.mark.packaged
@pytest.mark.slow
def test_the_smoke_run_measures_everything() -> None:
    finding = shadow_kv.run("smoke", [0], Workbench())
    found = {(row.name, row.metric): row for row in finding.rows}
    for name in (shadow_kv.OURS, shadow_kv.BARE, shadow_kv.PAGES, shadow_kv.WINDOW, shadow_kv.EACH, "random"):
        assert found[f"selection, T=64: {name}", "mass"].n == 1
        assert found[f"likelihood, T=64: {name}", "NLL above dense"].n == 1
        assert found[f"selection, T=64: {name}", "keys read"].mean <= 64
    cell = "needles, 60 words, 50.00% of keys"
    for name in (shadow_kv.OURS, shadow_kv.BESIDE, shadow_kv.MORE, shadow_kv.PAGES, shadow_kv.WINDOW, "random"):
        assert found[f"{cell}: {name}", "exact match"].n == 1
    for part in ("dense", shadow_kv.OURS, *PARTS):
        assert found[f"{cell}, taken apart: {part}", "answer NLL"].n == 1
    assert found["selection, T=64: oracle of each head", "mass"].mean > found["selection, T=64: random", "mass"].mean
    assert len([each for each in finding.comparisons if each.part_of_verdict]) == 3 + 1 + 3
    assert "<svg" in finding.plots["selection"]
