"""The study of attention-output dictionaries: its circuit, and its parts at the smallest scale."""

import torch

from apportion.studies.attention_output_sae import CLAIM, _Repeats, run
from apportion.studies.workbench import Workbench


def test_blocks_repeat_and_induction_sources_are_the_tokens_that_followed_before() -> None:
    text = _Repeats.draw(20, seed=0)
    for row, block in enumerate(text.block.tolist()):
        assert text.ids[row, block:].equal(text.ids[row, :-block])
    texts, positions = text.known.nonzero(as_tuple=True)
    sources = text.induction_sources(texts, positions)
    # Every induction source is a copy of the next token, not behind this one.
    found = sources.nonzero()
    assert text.ids[texts[found[:, 0]], found[:, 1]].equal(text.ids[texts, positions + 1][found[:, 0]])
    assert (found[:, 1] <= positions[found[:, 0]]).all()
    assert sources.any(dim=1).all()


def test_the_smallest_scale_runs_the_whole_circuit() -> None:
    torch.manual_seed(0)
    finding = run("smoke", [0], Workbench())
    assert finding.claim == CLAIM
    names = {row.name for row in finding.rows}
    assert {"circuit", "circuit: TopK", "circuit: L1 with resampling", "circuit: random directions"} <= names
    exact = next(row for row in finding.rows if row.name == "circuit: TopK" and row.metric.startswith("worst error"))
    assert exact.mean < 1e-5
    assert all("localisation" not in each.claim for each in finding.comparisons), "never evidence"
    assert "<svg" in finding.plots["what-and-where"]
