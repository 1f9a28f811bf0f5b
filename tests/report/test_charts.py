"""The summary plots draw the numbers they are given."""

import re
from xml.etree import ElementTree

import numpy as np
import torch

from apportion.features import ZipfFit
from apportion.report import ErrorByDifficulty
from apportion.report.charts import density_chart, difficulty_charts, training_charts, winners_chart


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_a_density_that_is_the_law_lies_on_the_law():
    law = ZipfFit(exponent=0.9, offset=3.0, scale=0.2, r_squared=0.99)
    chart = density_chart(law.expected(torch.arange(1.0, 1000.0, dtype=torch.float64)).numpy(), law)
    line = parsed(chart.svg).find("polyline[@class='law']").get("points").split()
    dots = [f"{dot.get('cx')},{dot.get('cy')}" for dot in parsed(chart.svg).iter("circle")]
    assert len(dots) > 50
    assert set(line) <= set(dots)
    assert "(rank + 3)^−0.90" in chart.note


def test_dead_features_are_counted_not_drawn():
    chart = density_chart(np.array([0.5, 0.0, 0.1, 0.0]), None)
    assert len(list(parsed(chart.svg).iter("circle"))) == 2
    assert "2 never fired" in chart.svg
    assert density_chart(np.zeros(4), None).note == "no feature ever fired"


def test_winners_bars_hold_every_token_but_the_last_two_per_mille():
    counts = np.zeros(400, dtype=np.int64)
    counts[20:45], counts[399] = 400, 3
    chart = winners_chart(counts)
    shares = [float(s) for s in re.findall(r"active: ([\d.]+)%", chart.svg)]
    assert sum(shares) == np.float64(100).round() or abs(sum(shares) - 100) < 2
    assert "3 tokens lie beyond the right edge, the furthest with 399" in chart.note
    assert winners_chart(np.array([48])).note.startswith("Mean 0.0")


def test_training_charts_skip_what_is_not_a_curve_and_thin_long_ones():
    history = [{"step": s, "loss": 1.0 / (s + 1), "name": "x", "late": 1.0} for s in range(3000)]
    history[5]["loss"] = float("nan")
    charts = training_charts(history)
    assert [chart.title for chart in charts] == ["loss", "late"]
    assert len(parsed(charts[0].svg).find("polyline").get("points").split()) == 240
    assert training_charts([{"step": 1, "loss": 2.0}]) == []
    assert training_charts([]) == []


def test_neighbouring_ticks_never_read_the_same():
    for values in (
        [32.0, 32.0, 32.01],
        [31.98, 32.02, 32.0],
        [5.0, 5.0, 5.0],
        [0.0, 1e-7, 2e-7],
        [0.0, 1e-15, 3e-15],
        [1.0, 4000.0, 2.0],
    ):
        (chart,) = training_charts([{"step": 10 * step, "x": value} for step, value in enumerate(values)])
        labels = [
            "".join(text.itertext()) for text in parsed(chart.svg).iter("text") if text.get("text-anchor") == "end"
        ]
        labels.remove("step")
        assert len(labels) >= 2
        assert len(set(labels)) == len(labels), labels


def test_text_in_charts_is_escaped():
    charts = training_charts([{"step": s, "<b>&": float(s)} for s in range(3)])
    found = ErrorByDifficulty("<i>", np.ones(3), np.ones(3), np.ones(3), np.ones(3))
    for chart in [*charts, *difficulty_charts(found)]:
        parsed(chart.svg)
        assert "<b>" not in chart.svg
        assert "<i>" not in chart.svg
