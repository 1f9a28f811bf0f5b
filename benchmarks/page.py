"""``docs/performance.md`` and its plots, from the newest results: the page shows what a run printed, word for word."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from apportion.data.files import read_json, write_atomically
from apportion.errors import InputError
from apportion.report import ResultRow
from apportion.report.plots import ParetoPoint, bars_with_errors, pareto
from benchmarks.contenders import BARE
from benchmarks.registry import BENCHMARKS
from benchmarks.runner import Result
from benchmarks.tables import heading, markdown, overview

PAGE = "performance.md"
# More races than this are shown as one table of ratios.
_MOST_TABLES = 12
Race = dict[str, Any]


def write_page(results: Path, docs: Path) -> Path:
    """Rewrite the marked parts of the page and the plots they show; returns the page.

    Args:
        results: folder of the JSON files.
        docs: folder of the documentation.

    Raises:
        InputError: the page or one of its marks is missing, or a result is damaged.
    """
    newest = newest_results(results)
    page = docs / PAGE
    try:
        text = page.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{page} does not exist: it holds the marks between which results are written") from error
    images = docs / "images"
    for stale in images.glob("performance-*.svg"):
        stale.unlink()
    for name in BENCHMARKS:
        result = newest.get(name)
        text = between_marks(text, name, _section(result, images) if result else _not_measured(name), page)
    with write_atomically(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return page


def newest_results(folder: Path) -> dict[str, Result]:
    """The newest full result of every benchmark; smoke runs measure nothing and do not count."""
    newest: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json")):
        result = read_json(path)
        if not isinstance(result, dict) or not {"name", "date", "smoke", "races"} <= result.keys():
            raise InputError(f"{path} is not a result of a benchmark: remove it")
        if not result["smoke"] and result["date"] > newest.get(result["name"], {"date": ""})["date"]:
            newest[result["name"]] = result
    return newest


def between_marks(text: str, name: str, content: str, page: Path) -> str:
    """``text`` with what stands between the marks of ``name`` replaced."""
    begin, end = f"<!-- results: {name} -->", f"<!-- end: {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise InputError(f"{page} must have {begin} and {end} once, in this order")
    return pattern.sub(lambda _: f"{begin}\n\n{content.strip()}\n\n{end}", text)


def _not_measured(name: str) -> str:
    return f"*Not measured yet: run `python -m benchmarks {name}`, then `python -m benchmarks plot`.*"


def _section(result: Result, images: Path) -> str:
    lines = [_provenance(result), ""]
    for alternative, path in PLOTS.get(result["name"], lambda *_: [])(result, images):
        lines += [f"![{alternative}](images/{path.name})", ""]
    skipped: dict[str, str] = {}
    for race in result["races"]:
        if len(result["races"]) <= _MOST_TABLES:
            lines += [f"**{heading(result, race)}**", "", markdown(race), ""]
        skipped |= race["skipped"]
    if len(result["races"]) > _MOST_TABLES:
        lines += [overview(result["races"]), ""]
    lines += [f"- {label}: not measured, {reason}" for label, reason in skipped.items()]
    # The others measure the same steps.
    lines += _what_is_included(result["races"][0]) if result["name"] in ("step", "harvest", "report") else []
    return "\n".join(lines)


def _what_is_included(race: Race) -> list[str]:
    labels: dict[str, list[str]] = {}
    for case in race["cases"]:
        labels.setdefault(case["includes"], []).append(case["label"])
    return [f"- {'; '.join(those)}: {includes}" for includes, those in labels.items()]


def _provenance(result: Result) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return (
        f"*{result['date'][:10]}, commit {result['commit']}, {machine['cores']} cores of {machine['processor']}, "
        f"{result['threads']} threads; {versions}.*"
    )


def _bars(race: Race, path: Path, metric: str, value: Callable[[Race], float | None]) -> Path:
    found = [(case["label"], value(case)) for case in race["cases"]]
    rows = [ResultRow(label, metric, number) for label, number in found if number is not None]
    return bars_with_errors(path, rows)


def _step(result: Result, images: Path) -> Sequence[tuple[str, Path]]:
    path = _bars(
        result["races"][0], images / "performance-step.svg", f"time of a step / {BARE}", lambda case: case["ratio"]
    )
    return [("Time of a training step relative to the bare encoder product", path)]


def _memory(result: Result, images: Path) -> Sequence[tuple[str, Path]]:
    path = _bars(
        result["races"][0],
        images / "performance-memory.svg",
        "extra memory, MB",
        lambda case: case["median"]["extra bytes"] / 1e6,
    )
    return [("Peak extra memory of a training step", path)]


def _step_parts(result: Result, images: Path) -> Sequence[tuple[str, Path]]:
    rows = [
        ResultRow(part.removesuffix(" seconds"), case["label"].removeprefix("apportion ") + ", ms", 1000 * spent)
        for case in result["races"][0]["cases"]
        for part, spent in case["median"].items()
        if part.endswith(" seconds")
    ]
    path = bars_with_errors(images / "performance-step-parts.svg", rows)
    return [("Where a training step spends its time", path)]


def _scaling(result: Result, images: Path) -> Sequence[tuple[str, Path]]:
    usual = [race for race in result["races"] if race["varies"] is None]
    drawn = []
    for axis in dict.fromkeys(race["varies"] for race in result["races"] if race["varies"]):
        races = [race for race in result["races"] if race["varies"] == axis]
        everywhere = set.intersection(*({case["label"] for case in race["cases"]} for race in [*usual, *races]))
        points = [
            ParetoPoint(case["label"], race["shape"][axis], case["ratio"])
            for race in [*usual, *races]
            for case in race["cases"]
            if case["label"] in everywhere - {BARE}
        ]
        path = images / f"performance-scaling-{axis}.svg"
        pareto(path, points, cost=axis, quality=f"time of a step / {BARE}", log_cost=True)
        drawn.append((f"Relative time of a step by {axis}", path))
    return drawn


PLOTS: dict[str, Callable[[Result, Path], Sequence[tuple[str, Path]]]] = {
    "step": _step,
    "step_parts": _step_parts,
    "scaling": _scaling,
    "memory": _memory,
}
