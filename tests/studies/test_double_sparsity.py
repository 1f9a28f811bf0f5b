"""The study of Double Sparsity: what counts, and one run of all of it on little."""

from collections import defaultdict
from dataclasses import replace

import pytest

from apportion.studies import double_sparsity
from apportion.studies.workbench import Workbench


def _made_up(size: double_sparsity._Size, found: float, dense: float) -> double_sparsity.Measured:
    measured: double_sparsity.Measured = defaultdict(lambda: defaultdict(lambda: [0.5, 0.5, 0.5]))
    for words in size.words:
        measured[f"needles in {words} words: dense"]["found"] = [dense] * 3
        for share in size.shares:
            measured[f"{double_sparsity._needles(words, share)}: Double Sparsity"]["found"] = [found] * 3
    return measured


def test_needles_count_only_where_dense_attention_finds_enough_of_enough() -> None:
    many = double_sparsity._SIZES["default"]
    few = replace(many, prompts=4)

    def needle_claims(size: double_sparsity._Size, found: float, dense: float) -> list[tuple[str, bool]]:
        claims = double_sparsity._claims(size, 3, _made_up(size, found, dense))
        return [(each.verdict, each.part_of_verdict) for each in claims if "needles" in each.claim]

    assert needle_claims(few, 1.0, 1.0)[0] == ("holds", False)
    assert needle_claims(many, 1.0, 1.0)[0] == ("holds", True)
    assert needle_claims(many, 0.9, 1.0)[0] == ("does not hold", True)
    assert needle_claims(many, 0.7, 0.7) == []


@pytest.mark.packaged
@pytest.mark.slow
def test_the_smoke_run_measures_everything() -> None:
    finding = double_sparsity.run("smoke", [0], Workbench())
    found = {(row.name, row.metric): row.mean for row in finding.rows}
    kept = {name.removeprefix("trace, T=16: "): mean for (name, metric), mean in found.items() if "kept" in metric}
    assert kept["oracle"] == max(kept.values())
    assert kept["SparQ, r=16"] > kept["DS qk, r=16, 4 bits"] > kept["random channels, r=16"] > kept["random keys"]
    assert kept["DS qk, r=16, 16 bits"] > kept["sinks and recent"]
    assert found["text, T=8: oracle", "loss added"] < found["text, T=8: sinks and recent", "loss added"]
    assert found["needles in 40 words: dense", "found"] == 1
    assert 0.1 < found["prefetch: layer 3", "guessed"] <= 1
    assert any(each.part_of_verdict for each in finding.comparisons)
    assert finding.verdict == "mixed", "one seed is never enough"
