"""The study of transcoders: its task is what it says, its baselines are what they are called, and it runs."""

import pytest
import torch

from apportion.studies import transcoder_circuits as study
from apportion.studies.transcoder_toy import Toy, build, draw, without
from apportion.studies.workbench import Workbench


def test_two_tokens_decide_the_answer() -> None:
    size = Toy()
    ids, answers, places = draw(size, 50, seed=3)
    for row in range(50):
        numbers = [place for place in range(size.length) if ids[row, place] < 2 * size.numbers]
        assert sorted(places[row].tolist()) == numbers
        first, second = ids[row, places[row]].tolist()
        assert first < size.numbers <= second < 2 * size.numbers
        assert int(answers[row]) == 2 * size.numbers + 17 + (first + second - size.numbers) % size.numbers
    assert ids[:, -1].eq(2 * size.numbers + 16).all()
    assert int(answers.max()) < size.vocabulary
    assert not ids.equal(draw(size, 50, seed=4)[0])


def test_taking_nothing_away_changes_nothing() -> None:
    size = Toy(steps=2)
    model = build(size, seed=0)
    ids, _, _ = draw(size, 1, seed=0)
    expected = model(input_ids=ids).logits[0, -1]
    torch.testing.assert_close(without(model, ids[0], {}, [], []), expected)


def test_a_linear_map_of_full_rank_is_least_squares() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=draw)
    y = x @ torch.randn(6, 5, generator=draw) + 0.1 * torch.randn(400, 5, generator=draw) + 3

    def error(rank: int) -> float:
        return float((study._reduced_rank(x, y, rank)(x) - y).square().sum())

    ones = torch.cat([x, torch.ones(400, 1)], dim=1)
    best = float((ones @ torch.linalg.lstsq(ones, y).solution - y).square().sum())
    assert error(5) == pytest.approx(best, rel=1e-3)
    assert error(1) > error(2) > error(5)


@pytest.mark.packaged
@pytest.mark.slow
def test_the_smoke_scale_measures_everything(tmp_path, monkeypatch) -> None:
    finding = study.run("smoke", [0, 1], Workbench(tmp_path / "bench.json"))
    names = {row.name for row in finding.rows}
    assert {name.split(": ")[1] for name in names} >= {"transcoder", "MLP-out autoencoder", "largest neurons"}
    exact = next(each for each in finding.comparisons if each.claim.startswith("exactness"))
    assert exact.verdict == "holds"
    assert finding.verdict in ("holds", "mixed", "does not hold")
