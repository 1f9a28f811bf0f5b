"""The study of SEA: one run of all of it on little."""

import pydoc_data.topics
from pathlib import Path

import pytest

from apportion.data.corpora import Document
from apportion.studies import sea
from apportion.studies.workbench import Workbench


@pytest.mark.slow
def test_the_smoke_run_measures_everything() -> None:
    finding = sea.run("smoke", [0, 1], Workbench())
    found = {(row.name, row.metric): row for row in finding.rows}
    keys = "keys per head and asked query"
    for arm in (sea.SEA, sea.ALONE, sea.WINDOW, sea.RANDOM, sea.ORACLE):
        assert found[f"recall: {arm}", "accuracy"].n == 2
        # Budgets are in columns: a key more or less for each head.
        assert found[f"recall: {arm}", keys].mean == pytest.approx(2, abs=0.5)
    for arm in (sea.PERFORMER, sea.DENSE, "teacher"):
        assert found[f"recall: {arm}", "accuracy"].n == 2
    read = "teacher's attention that is read"
    masses = {arm: found[f"recall: {arm}", read].mean for arm in (sea.ORACLE, sea.RANDOM)}
    assert masses[sea.ORACLE] > masses[sea.RANDOM]
    assert 0 < found[f"recall: {sea.SEA}", "weight of what is read"].mean < 1
    assert sum(each.part_of_verdict for each in finding.comparisons) == 5


@pytest.mark.slow
def test_a_layer_of_a_decoder_is_traced_and_judged(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topics = [text for text in pydoc_data.topics.topics.values() if len(text) > 500]
    monkeypatch.setattr(sea, "corpus", lambda name: [Document(str(place), text) for place, text in enumerate(topics)])
    size = sea._TraceSize(
        model=str(tiny_llama), layer=1, texts=2, tokens=48, columns=16, keys=8, steps=1, feature_factor=0.5
    )
    found = sea._on_trace(size, 0)
    read = {name.rpartition(": ")[2]: figures["attention that is read"] for name, figures in found.items()}
    assert set(read) == {sea.SEA, sea.BLIND, sea.WINDOW, sea.RANDOM, sea.ORACLE}
    assert all(0 < mass <= read[sea.ORACLE] for mass in read.values())
    assert all(figures["keys per head and query"] == pytest.approx(7.4, abs=0.5) for figures in found.values())
