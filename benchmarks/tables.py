"""Results as tables: the same cells in the terminal and on the page."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.runner import Result

if TYPE_CHECKING:
    from rich.table import Table

# A table with more columns than this is turned on its side.
_MOST_COLUMNS = 8


def shown(quantity: str, value: float) -> str:
    """A measured value with the unit that its name's ending stands for."""
    if quantity.endswith("bytes"):
        return f"{value / 1e6:,.1f} MB"
    if quantity.endswith("seconds"):
        if value < 1e-4:
            return f"{1e6 * value:,.1f} µs"
        return f"{value:,.2f} s" if value >= 10 else f"{1000 * value:,.1f} ms"
    return f"{value:,.0f}"


def cells(race: dict[str, Any]) -> list[list[str]]:
    """Headings and rows of a race: median, quartiles and ratio of what it is about, medians of all else."""
    main = race["quantity"]
    others = list(dict.fromkeys(name for case in race["cases"] for name in case["median"] if name != main))
    rows = [["", "median", "quartiles", f"× {race['baseline']}"]]
    rows[0] += [name.removesuffix(" bytes").removesuffix(" seconds") for name in others]
    for case in race["cases"]:
        low, high = (shown(main, value) for value in case["quartiles"][main])
        ratio = "–" if case["ratio"] is None else f"{case['ratio']:.2f}"
        row = [case["label"], shown(main, case["median"][main]), f"{low} – {high}", ratio]
        row += [shown(name, case["median"][name]) if name in case["median"] else "–" for name in others]
        rows.append(row)
    return rows if len(rows[0]) <= _MOST_COLUMNS + 2 else [list(column) for column in zip(*rows, strict=True)]


def heading(result: Result, race: dict[str, Any]) -> str:
    """What a race's table is about."""
    shape = ", ".join(f"{name} {size:,}" for name, size in race["shape"].items())
    return f"{race['title']} ({shape}; {race['rounds']} rounds, {result['threads']} threads)"


def table(result: Result, race: dict[str, Any]) -> "Table":
    """A race for the terminal."""
    from rich.table import Table
    from rich.text import Text

    headings, *rows = cells(race)
    drawn = Table(title=heading(result, race), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(headings):
        drawn.add_column(Text(name), justify="right" if place else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*map(Text, row))
    return drawn


def markdown(race: dict[str, Any]) -> str:
    """A race for the page."""
    headings, *rows = cells(race)
    lines = [f"| {' | '.join(headings)} |", "|---|" + "---:|" * (len(headings) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def overview(races: Sequence[dict[str, Any]]) -> str:
    """Many races of one kind as a single table: the baseline's median of each, and the others' ratios to it."""
    labels = list(dict.fromkeys(case["label"] for race in races for case in race["cases"]))
    baseline = races[0]["baseline"]
    others = [label for label in labels if label != baseline]
    rows = []
    for race in races:
        of = {case["label"]: case for case in race["cases"]}
        ratios = (of[label]["ratio"] if label in of else None for label in others)
        cells = ["–" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        rows.append([race["title"], shown(race["quantity"], of[baseline]["median"][race["quantity"]]), *cells])
    lines = [f"| | {baseline} | {' | '.join(f'{label}, ×' for label in others)} |", "|---|" + "---:|" * len(labels)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
