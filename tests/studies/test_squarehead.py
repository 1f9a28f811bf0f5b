"""The study of SquareHead: what counts, and one run of all of it on little."""

from pydoc_data.topics import topics

import pytest

from apportion.data import Document
from apportion.studies import squarehead
from apportion.studies.workbench import Workbench


@pytest.mark.slow
def test_the_smoke_run_measures_everything() -> None:
    finding = squarehead.run("smoke", [0], Workbench())
    found = {row.name: row.mean for row in finding.rows if row.metric == "bits per character"}
    errors = {row.name: row.mean for row in finding.rows if row.metric == "SQ"}
    assert errors["dense: teacher"] == 0
    assert errors["0.9 pruned: CE+SQ"] < min(errors["0.9 pruned: CE"], errors["0.9 pruned: CE+KL"])
    dense, pruned = found["dense: teacher"], found["0.9 pruned: not trained"]
    students = [found[f"0.9 pruned: {arm}"] for arm in squarehead._LOSSES]
    assert dense < min(students)
    assert max(students) < pruned - 0.3
    assert [each.part_of_verdict for each in finding.comparisons] == [True, True, False, False]
    assert "CE+KL 0." in finding.notes[1]
    assert "<svg" in finding.plots["recovery"]


def test_the_language_part_is_measured_and_counts(tiny_llama, monkeypatch):
    texts = [Document(name, text) for name, text in sorted(topics.items()) if len(text) > 2000][:20]
    monkeypatch.setattr(squarehead, "corpus", lambda name: texts)
    size = squarehead._LanguageSize(model=str(tiny_llama), steps=3, batch=2, context=16, held_out=3, rates=(1e-3, 3e-3))
    trial = squarehead._LanguageTrial(size, Workbench())
    rates = trial.best_rates()
    assert set(rates) == set(squarehead._LOSSES)
    found = trial.run(rates, 0)
    where = squarehead._language(size)
    losses = {name.removeprefix(f"{where}: "): figures["perplexity"] for name, figures in found.items()}
    assert losses["CE"] < losses["not trained"]
    assert set(losses) == {"dense", "not trained", *squarehead._LOSSES}
    train, tuned, judged = trial._texts(0)
    assert len(train.train) == 6
    assert len(tuned) == len(judged) == 3
    assert not any(bool((row == tuned).all(1).any()) for row in judged)

    measured = {name: {metric: [value] * 3 for metric, value in figures.items()} for name, figures in found.items()}
    of_language = squarehead._Size(sparsities=(), language=size)
    claims = squarehead._claims(of_language, measured)
    assert [each.part_of_verdict for each in claims] == [True, True, False, False]
    assert claims[0].mean == pytest.approx(losses["CE"] - losses["CE+SQ"])
