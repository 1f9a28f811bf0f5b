"""The report's summary plots as SVG: crisp at any size, and drawn in the page's own colours, light or dark.

Colours live in the page's style sheet under the class names used here (``axis``, ``grid``, ``curve``, ``law``, ...).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from jaxtyping import Float, Int

from apportion.features.mutual_feature_choice import ZipfFit
from apportion.report.data import ErrorByDifficulty

_MOST_CURVE_POINTS = 240


@dataclass(frozen=True)
class Chart:
    """A drawn plot with its words.

    Attributes:
        title: what is plotted.
        note: one line below it: how to read it, or the number it comes down to.
        svg: the drawing; every text in it is escaped.
    """

    title: str
    note: str
    svg: str


def training_charts(history: Sequence[Mapping[str, float]], most: int = 6) -> list[Chart]:
    """One small chart for each number in the training log, in the order in which they first appear."""
    names: dict[str, None] = {}
    for entry in history:
        names |= dict.fromkeys(name for name, value in entry.items() if isinstance(value, int | float))
    charts: list[Chart] = []
    for name in names:
        if name in ("step", "seconds"):
            continue
        kept = [(entry["step"], entry[name]) for entry in history if "step" in entry and name in entry]
        steps, values = np.array(kept, dtype=np.float64).reshape(-1, 2).T
        finite = np.isfinite(values)
        steps, values = steps[finite], values[finite]
        if len(steps) < 2 or len(charts) == most:
            continue
        steps, low, mean, high = _thinned(steps, values)
        # A range of several powers of ten is a flat line with a cliff on a linear axis.
        logarithmic = bool(values.min() > 0 and values.max() / values.min() > 30)
        plot = _Plot(370, 180, (0, steps[-1]), _padded(low.min(), high.max(), logarithmic), log_y=logarithmic)
        band = plot.band(steps, low, high) if len(values) > len(steps) else ""
        svg = plot.drawn(band + plot.line(steps, mean, "curve"), x_label="step")
        charts.append(Chart(name.replace("_", " "), f"ends at {_short(values[-1])}", svg))
    return charts


def density_chart(density: Float[np.ndarray, " features"], zipf: ZipfFit | None) -> Chart:
    """Density by rank on logarithmic axes, with the fitted law."""
    ordered = np.sort(density[density > 0])[::-1]
    never = len(density) - len(ordered)
    if not len(ordered):
        return Chart("Feature density by rank", "no feature ever fired", _Plot(590, 300, (0, 1), (0, 1)).drawn(""))
    ranks = np.unique(np.geomspace(1, len(ordered), 260).round().astype(int))
    x = ranks.astype(np.float64)
    plot = _Plot(
        590, 300, (1, max(len(density), 2)), (ordered[-1] / 1.6, min(1.0, ordered[0] * 1.6)), log_x=True, log_y=True
    )
    inside = ""
    if zipf is not None:
        law = zipf.expected(torch.from_numpy(x)).numpy()
        visible = (law >= plot.y_range[0]) & (law <= plot.y_range[1])
        inside += plot.line(x[visible], law[visible], "law")
    inside += plot.dots(
        x, ordered[ranks - 1], "dot", [f"rank {r}: {_share(d)}" for r, d in zip(ranks, ordered[ranks - 1], strict=True)]
    )
    if never:
        inside += plot.rule_at(len(ordered), f"{never:,} never fired")
    note = f"{len(ordered):,} of {len(density):,} features fired."
    if zipf is not None:
        shift = f" + {zipf.offset:g}" if zipf.offset else ""
        note += f" Dashed: the fitted Zipf law, density ∝ (rank{shift})^−{zipf.exponent:.2f}."
    return Chart("Feature density by rank", note, plot.drawn(inside, x_label="rank", y_label="share of tokens"))


def winners_chart(winners_per_token: Int[np.ndarray, " counts"]) -> Chart:
    """How many features are active on a token."""
    total = max(int(winners_per_token.sum()), 1)
    counts = np.arange(len(winners_per_token))
    mean = float((counts * winners_per_token).sum() / total)
    spread = math.sqrt(float(((counts - mean) ** 2 * winners_per_token).sum() / total))
    # A few tokens with hundreds of features would squeeze everybody else into a corner.
    stop = int(np.searchsorted(np.cumsum(winners_per_token), 0.998 * total)) + 1
    width = max(1, math.ceil(stop / 60))
    n_bars = math.ceil(stop / width)
    shown = np.zeros(n_bars * width, dtype=np.int64)
    shown[:stop] = winners_per_token[:stop]
    edges, heights = np.arange(n_bars) * width, shown.reshape(n_bars, width).sum(axis=1)
    shares = heights / total
    plot = _Plot(590, 300, (-0.5, float(edges[-1] + width) - 0.5), (0, float(shares.max()) * 1.08 or 1.0))
    hints = [
        (f"{e} active" if width == 1 else f"{e}–{e + width - 1} active") + f": {_share(s)} of tokens"
        for e, s in zip(edges, shares, strict=True)
    ]
    inside = plot.bars(edges - 0.5, edges + width - 0.5, shares, hints) + plot.rule_at(mean, f"mean {mean:.1f}")
    beyond = int(winners_per_token[stop:].sum())
    note = f"Mean {mean:.1f}, standard deviation {spread:.1f}."
    if beyond:
        note += f" {beyond:,} tokens lie beyond the right edge, the furthest with {len(winners_per_token) - 1}."
    return Chart(
        "Active features per token", note, plot.drawn(inside, x_label="active features (L0)", y_label="share of tokens")
    )


def similarity_chart(
    title: str, similarity: Float[np.ndarray, " features"], note: str = "", x_label: str = "cosine", bars: int = 40
) -> Chart:
    """How many features are how like their match; what lies below the axis is counted in its first bar."""
    low = 0.0 if similarity.min(initial=0.0) >= 0 else -1.0
    edges = np.linspace(low, 1, bars + 1)
    counts, _ = np.histogram(np.clip(similarity, low, 1), edges)
    plot = _Plot(590, 240, (low, 1.0), (0, float(max(counts.max(), 1)) * 1.08))
    hints = [
        f"{left:.2f} to {right:.2f}: {count:,} features"
        for left, right, count in zip(edges, edges[1:], counts, strict=False)
    ]
    inside = plot.bars(edges[:-1], edges[1:], counts.astype(np.float64), hints)
    if len(similarity):
        middle = float(np.median(similarity))
        inside += plot.rule_at(middle, f"median {middle:.2f}")
    return Chart(title, note, plot.drawn(inside, x_label=x_label, y_label="features"))


def difficulty_charts(found: ErrorByDifficulty) -> list[Chart]:
    """Error and budget by groups of token difficulty, side by side on the same groups."""
    group = np.arange(1, len(found.error) + 1, dtype=np.float64)
    charts = []
    for title, mean, stderr, y_label in (
        ("Error by token difficulty", found.error, found.error_stderr, "error / variance"),
        ("Budget by token difficulty", found.winners, found.winners_stderr, "active features"),
    ):
        top = float((mean + 2 * stderr).max())
        plot = _Plot(590, 240, (0.5, len(group) + 0.5), (0, top * 1.08 or 1.0), x_ticks=list(group))
        hints = [f"group {int(g)}: {_short(m)} ± {_short(s)}" for g, m, s in zip(group, mean, stderr, strict=True)]
        inside = (
            plot.line(group, mean, "curve")
            + plot.error_bars(group, mean, stderr)
            + plot.dots(group, mean, "dot", hints, 3.2)
        )
        note = f"Tokens in {len(group)} equal groups by {found.difficulty}; bars: standard error."
        charts.append(Chart(title, note, plot.drawn(inside, x_label="easiest → hardest", y_label=y_label)))
    return charts


class _Plot:
    """A frame with scales, to which marks are added in data coordinates."""

    def __init__(
        self,
        width: int,
        height: int,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        *,
        log_x: bool = False,
        log_y: bool = False,
        x_ticks: list[float] | None = None,
    ) -> None:
        self.width, self.height = width, height
        self.left, self.right, self.top, self.bottom = 50, 12, 14, 40
        self.x_range, self.y_range, self.log_x, self.log_y = x_range, y_range, log_x, log_y
        self.x_ticks = x_ticks or (_log_ticks(*x_range) if log_x else _linear_ticks(*x_range, width // 72))
        self.y_ticks = _log_ticks(*y_range) if log_y else _linear_ticks(*y_range, height // 50)

    def x(self, value: float) -> float:
        return self.left + _position(value, self.x_range, self.log_x) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        return (
            self.height
            - self.bottom
            - _position(value, self.y_range, self.log_y) * (self.height - self.top - self.bottom)
        )

    def line(self, xs: np.ndarray, ys: np.ndarray, kind: str) -> str:
        points = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs, ys, strict=True))
        return f'<polyline class="{kind}" points="{points}"/>'

    def band(self, xs: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
        there = [f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs, high, strict=True)]
        back = [f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs[::-1], low[::-1], strict=True)]
        return f'<polygon class="band" points="{" ".join(there + back)}"/>'

    def dots(self, xs: np.ndarray, ys: np.ndarray, kind: str, hints: list[str], radius: float = 2.2) -> str:
        return "".join(
            f'<circle class="{kind}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius}">'
            f"<title>{escape(hint)}</title></circle>"
            for x, y, hint in zip(xs, ys, hints, strict=True)
        )

    def bars(self, lefts: np.ndarray, rights: np.ndarray, heights: np.ndarray, hints: list[str]) -> str:
        floor = self.y(self.y_range[0])
        drawn = []
        for left, right, height, hint in zip(lefts, rights, heights, hints, strict=True):
            x, top = self.x(left), self.y(height)
            width = max(self.x(right) - x - 1, 0.5)
            drawn.append(
                f'<rect class="bar" x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{floor - top:.1f}">'
                f"<title>{escape(hint)}</title></rect>"
            )
        return "".join(drawn)

    def error_bars(self, xs: np.ndarray, ys: np.ndarray, errors: np.ndarray) -> str:
        return "".join(
            f'<line class="error" x1="{self.x(x):.1f}" x2="{self.x(x):.1f}" '
            f'y1="{self.y(y - e):.1f}" y2="{self.y(y + e):.1f}"/>'
            for x, y, e in zip(xs, ys, errors, strict=True)
        )

    def rule_at(self, value: float, words: str) -> str:
        x = self.x(value)
        # Words to the left of a rule in the right half, so that they stay inside the frame.
        right_half = x > self.width / 2
        anchor, shift = ("end", -6) if right_half else ("start", 6)
        return (
            f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{self.top}" y2="{self.height - self.bottom}"/>'
            f'<text class="said" x="{x + shift:.1f}" y="{self.top + 11}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def drawn(self, inside: str, *, x_label: str = "", y_label: str = "") -> str:
        floor, right = self.height - self.bottom, self.width - self.right
        parts = []
        for tick in self.y_ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text class="tick" x="{self.left - 7}" y="{y + 3.5:.1f}" text-anchor="end">'
                f"{_tick(tick, self.y_ticks, self.log_y)}</text>"
            )
        for tick in self.x_ticks:
            x = self.x(tick)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>')
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{floor + 16}" text-anchor="middle">'
                f"{_tick(tick, self.x_ticks, self.log_x)}</text>"
            )
        parts.append(f'<line class="axis" x1="{self.left}" x2="{right}" y1="{floor}" y2="{floor}"/>')
        parts.append(inside)
        if x_label:
            parts.append(
                f'<text class="name" x="{right}" y="{self.height - 6}" text-anchor="end">{escape(x_label)}</text>'
            )
        if y_label:
            parts.append(f'<text class="name" x="{self.left}" y="{9}" text-anchor="start">{escape(y_label)}</text>')
        return f'<svg viewBox="0 0 {self.width} {self.height}" role="img">{"".join(parts)}</svg>'


def _position(value: float, bounds: tuple[float, float], logarithmic: bool) -> float:
    low, high = bounds
    if logarithmic:
        value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
    return (min(max(value, low), high) - low) / ((high - low) or 1.0)


def _linear_ticks(low: float, high: float, about: int) -> list[float]:
    span = (high - low) or 1.0
    raw = span / max(about, 2)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw)
    first = math.ceil(low / step)
    ticks = [
        round(step * i, 12 - math.floor(math.log10(step))) for i in range(first, math.floor(high / step + 1e-9) + 1)
    ]
    return ticks if len(ticks) > 1 else _linear_ticks(low, high, 2 * about)


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    every = max(1, math.ceil((last - first + 1) / 7))
    ticks = [10.0**exponent for exponent in range(first, last + 1, every)]
    if len(ticks) >= 2:
        return ticks
    finer = [m * 10.0**e for e in range(first - 1, last + 2) for m in (1, 2, 5)]
    return [tick for tick in finer if low <= tick <= high] or [low]


def _tick(value: float, ticks: list[float], logarithmic: bool) -> str:
    if logarithmic and (value >= 1e5 or value < 1e-3):
        exponent = round(math.log10(value))
        return f'10<tspan dy="-4" font-size="8">{str(exponent).replace("-", "−")}</tspan>'
    if logarithmic or len(ticks) < 2 or value == 0:
        return _short(value)
    # As many decimals as tell neighbours apart.
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return _short(value) if decimals > 4 or abs(value) >= 1e6 else f"{value:,.{decimals}f}".replace("-", "−")


def _short(value: float) -> str:
    if value != 0 and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.1e}".replace("-", "−")
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return digits.replace("-", "−")


def _share(value: float) -> str:
    return f"{value:.1%}" if value >= 0.01 else f"1 in {1 / value:,.0f}" if value > 0 else "0"


def _padded(low: float, high: float, logarithmic: bool) -> tuple[float, float]:
    if logarithmic:
        return low / 1.2, high * 1.2
    # A curve that hardly moves should look as if it hardly moved.
    span = max(high - low, 0.02 * abs(high)) or 1.0
    spare = (span - (high - low)) / 2
    bottom = low - spare - 0.06 * span
    return bottom if low < 0 or bottom > 0 else 0.0, high + spare + 0.08 * span


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """At most a few hundred points: last step, minimum, mean and maximum of each stretch."""
    if len(steps) <= _MOST_CURVE_POINTS:
        return steps, values, values, values
    cuts = np.linspace(0, len(steps), _MOST_CURVE_POINTS + 1).astype(int)
    starts, stops = cuts[:-1], cuts[1:]
    mean = np.add.reduceat(values, starts) / (stops - starts)
    return steps[stops - 1], np.minimum.reduceat(values, starts), mean, np.maximum.reduceat(values, starts)
