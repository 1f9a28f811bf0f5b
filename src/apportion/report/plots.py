"""Pictures for studies and for `apportion compare`, all in one style: matplotlib on the Agg canvas, to PNG or SVG.

Each function writes ``path`` (the suffix decides the format) and returns it. Nothing here touches matplotlib's global
state, so that a user's own figures and back end stay as they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from apportion.data.files import write_atomically
from apportion.features.mutual_feature_choice import ZipfFit
from apportion.report.tables import ResultRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours: told apart with every common colour vision, and in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
# Where the colours are used up they come again in other lines.
_LINES, _MARKERS = ("-", "--", ":"), ("o", "s", "^")
_MOST_INSIDE, _MOST_TICKS = 6, 12
_STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "apportion",
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class ParetoPoint:
    """One trained thing on a trade-off: its cost, its quality, and the standard errors of both."""

    series: str
    cost: float
    quality: float
    cost_stderr: float = 0.0
    quality_stderr: float = 0.0


def bars_with_errors(path: Path | str, rows: Sequence[ResultRow], *, title: str = "") -> Path:
    """One panel a metric, one bar a name, with standard errors (95 % would be about twice as long)."""
    if not rows:
        raise ValueError("rows is empty: there is nothing to plot")
    names = list(dict.fromkeys(row.name for row in rows))
    metrics = list(dict.fromkeys(row.metric for row in rows))
    height = 0.34 * len(names) + 1.2
    with _figure(path, (3.3 * len(metrics) + 1.4, height), len(metrics), title) as panels:
        for place, (panel, metric) in enumerate(zip(panels, metrics, strict=True)):
            found = {row.name: row for row in rows if row.metric == metric}
            for line, name in enumerate(names):
                if name not in found:
                    continue
                row = found[name]
                colour = _COLOURS[line % len(_COLOURS)]
                panel.barh(line, row.mean, height=0.66, color=colour, alpha=0.85)
                if row.stderr:
                    panel.errorbar(row.mean, line, xerr=row.stderr, color="#222222", capsize=3, linewidth=1.2)
            panel.set_yticks(range(len(names)), names if place == 0 else [""] * len(names))
            panel.set_ylim(len(names) - 0.5, -0.5)
            panel.grid(axis="y", visible=False)
            panel.tick_params(axis="y", length=0)
            panel.set_title(metric)
    return Path(path)


def density_rank(
    path: Path | str,
    densities: Mapping[str, Float[np.ndarray, " features"]],
    fits: Mapping[str, ZipfFit] | None = None,
    *,
    title: str = "",
) -> Path:
    """Feature density by rank on log-log axes, one curve a dictionary, its Zipf law dashed in the same colour."""
    if not densities:
        raise ValueError("densities is empty: there is nothing to plot")
    with _figure(path, (6.4, 4.4), 1, title) as (panel,):
        for line, (name, density) in enumerate(densities.items()):
            colour = _COLOURS[line % len(_COLOURS)]
            ordered = np.sort(density[density > 0])[::-1]
            ranks = np.arange(1, len(ordered) + 1)
            dead = len(density) - len(ordered)
            panel.plot(ranks, ordered, color=colour, label=f"{name} ({dead:,} dead)" if dead else name)
            if fits and name in fits and len(ordered):
                law = fits[name].expected(torch.arange(1, len(ordered) + 1, dtype=torch.float64)).numpy()
                visible = law >= ordered[-1] / 3
                label = f"Zipf, exponent {fits[name].exponent:.2f}"
                panel.plot(ranks[visible], law[visible], "--", color=colour, linewidth=1.1, alpha=0.8, label=label)
        panel.set(xscale="log", yscale="log", xlabel="rank of the feature", ylabel="share of tokens")
        panel.legend(loc="lower left")
    return Path(path)


def pareto(
    path: Path | str,
    points: Sequence[ParetoPoint],
    *,
    cost: str,
    quality: str,
    title: str = "",
    log_cost: bool = False,
) -> Path:
    """Quality against cost, one connected line a series, with standard errors both ways."""
    if not points:
        raise ValueError("points is empty: there is nothing to plot")
    with _figure(path, (6.4, 4.4), 1, title) as (panel,):
        _draw_trade_off(panel, points, list(dict.fromkeys(point.series for point in points)))
        panel.set(xlabel=cost, ylabel=quality, xscale="log" if log_cost else "linear")
        whole = {point.cost for point in points}
        if len(whole) <= _MOST_TICKS and all(float(each).is_integer() for each in whole) and not log_cost:
            panel.set_xticks(sorted(whole))
        many = len({point.series for point in points}) > _MOST_INSIDE
        # Many names would lie on the lines.
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5)) if many else panel.legend()
    return Path(path)


def trade_offs(path: Path | str, points: Mapping[str, Sequence[ParetoPoint]], *, cost: str, title: str = "") -> Path:
    """``pareto`` for several qualities side by side, by their names; a series has the same colour in all of them."""
    if not points or not all(points.values()):
        raise ValueError("points is empty: there is nothing to plot")
    series = list(dict.fromkeys(point.series for each in points.values() for point in each))
    with _figure(path, (4.2 * len(points) + 0.6, 3.8), len(points), title) as panels:
        for panel, (quality, own) in zip(panels, points.items(), strict=True):
            _draw_trade_off(panel, own, series)
            panel.set(xlabel=cost, title=quality)
        panels[0].legend()
    return Path(path)


def _draw_trade_off(panel: "Axes", points: Sequence[ParetoPoint], series: Sequence[str]) -> None:
    for name in dict.fromkeys(point.series for point in points):
        own = sorted((point for point in points if point.series == name), key=lambda point: point.cost)
        panel.errorbar(
            [point.cost for point in own],
            [point.quality for point in own],
            xerr=[point.cost_stderr for point in own],
            yerr=[point.quality_stderr for point in own],
            color=_COLOURS[series.index(name) % len(_COLOURS)],
            linestyle=_LINES[series.index(name) // len(_COLOURS) % len(_LINES)],
            marker=_MARKERS[series.index(name) // len(_COLOURS) % len(_MARKERS)],
            markersize=5,
            capsize=3,
            elinewidth=1.1,
            label=name,
        )


def training_curves(
    path: Path | str,
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    metrics: Sequence[str],
    *,
    title: str = "",
) -> Path:
    """One panel a metric, one line a run, over training steps."""
    if not histories or not metrics:
        raise ValueError("histories and metrics must not be empty: there is nothing to plot")
    with _figure(path, (4.2 * len(metrics) + 0.6, 3.4), len(metrics), title) as panels:
        for panel, metric in zip(panels, metrics, strict=True):
            for line, (run, history) in enumerate(histories.items()):
                kept = [(entry["step"], entry[metric]) for entry in history if "step" in entry and metric in entry]
                steps, values = np.array(kept, dtype=np.float64).reshape(-1, 2).T
                panel.plot(steps, values, color=_COLOURS[line % len(_COLOURS)], linewidth=1.4, label=run)
            panel.set(xlabel="step", title=metric)
        if len(histories) > 1:
            panels[0].legend()
    return Path(path)


@contextmanager
def _figure(path: Path | str, size: tuple[float, float], panels: int, title: str) -> Iterator[Sequence["Axes"]]:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise ValueError(f"path={str(path)!r}: the name must end in .png, .svg or .pdf")
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield (
            [axes for (axes,) in figure.subplots(panels, 1, squeeze=False)]
            if panels == 1
            else list(figure.subplots(1, panels))
        )
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        with write_atomically(path) as temporary:
            # Without a date the same data give the same bytes, and a repository sees no change where there is none.
            metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
            figure.savefig(temporary, format=kind, dpi=160, metadata=metadata)
