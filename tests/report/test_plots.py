"""Pictures are written whole, the same each time, and leave matplotlib as it was."""

import numpy as np
import pytest

from apportion.features import ZipfFit
from apportion.report import ResultRow
from apportion.report.plots import ParetoPoint, bars_with_errors, density_rank, pareto, trade_offs, training_curves

ROWS = [ResultRow(name, metric, 0.2, 0.02, 3) for name in ("TokenChoice", "MutualChoice") for metric in ("FVU", "dead")]
LAW = ZipfFit(exponent=1.0, offset=0.0, scale=0.3, r_squared=0.99)
DENSITY = np.concatenate([0.3 / np.arange(1, 200), np.zeros(20)])
POINTS = [ParetoPoint(series, cost, cost / 50, 1.0, 0.05) for series in ("a", "b") for cost in (16, 32, 64)]
HISTORY = [{"step": step, "loss": 1 / (step + 1)} for step in range(50)]

DRAWN = {
    "bars": lambda path: bars_with_errors(path, ROWS, title="Equal budget"),
    "one-bar": lambda path: bars_with_errors(path, ROWS[:1]),
    "density": lambda path: density_rank(path, {"mutual": DENSITY}, {"mutual": LAW}),
    "pareto": lambda path: pareto(path, POINTS, cost="mean L0", quality="loss recovered", log_cost=True),
    "trade-offs": lambda path: trade_offs(path, {"loss recovered": POINTS, "dead": POINTS[:2]}, cost="L0"),
    "curves": lambda path: training_curves(path, {"a": HISTORY, "b": HISTORY}, ["loss"]),
}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_written_and_is_the_same_every_time(name, suffix, tmp_path):
    first, second = (DRAWN[name](tmp_path / f"{copy}{suffix}").read_bytes() for copy in "ab")
    assert first == second
    assert first.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


def test_plotting_leaves_the_users_style_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    DRAWN["pareto"](tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before


def test_an_unknown_format_and_an_empty_plot_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.png, \.svg or \.pdf"):
        DRAWN["bars"](tmp_path / "a.bmp")
    with pytest.raises(ValueError, match="rows is empty"):
        bars_with_errors(tmp_path / "a.png", [])
    with pytest.raises(ValueError, match="points is empty"):
        trade_offs(tmp_path / "a.png", {"dead": []}, cost="L0")
