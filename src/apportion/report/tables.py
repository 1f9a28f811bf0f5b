"""Result rows as tables, for the terminal (rich) and for Markdown: one line a name, one column a metric."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class ResultRow:
    """One measured number: what was measured (``name``), which ``metric``, mean, standard error and sample count."""

    name: str
    metric: str
    mean: float
    stderr: float | None = None
    n: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row as in ``--json`` answers."""
        return asdict(self)


def format_with_error(mean: float, stderr: float | None) -> tuple[str, str]:
    """Mean and standard error as text, both to the decimal place of the error's second significant digit.

    Without a (finite, positive) error the mean gets four significant digits and the error is an empty text.
    """
    if not math.isfinite(mean):
        return str(mean), ""
    if stderr is None or not math.isfinite(stderr) or stderr <= 0:
        return _plain(mean), ""
    decimals = 1 - math.floor(math.log10(stderr))
    if decimals > 8:
        return f"{mean:.4e}", f"{stderr:.1e}"
    if decimals <= 0:
        return f"{mean:,.0f}", f"{stderr:,.0f}"
    return f"{mean:,.{decimals}f}", f"{stderr:.{decimals}f}"


def result_table(rows: Sequence[ResultRow], title: str = "") -> "Table":
    """A rich table: one line a name, one column a metric, ``mean ± standard error`` in the cells."""
    from rich.table import Table
    from rich.text import Text

    names, metrics, cells = _grid(rows)
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for metric in metrics:
        # Headings may wrap, numbers may not.
        widest = max(len(cells.get((name, metric), "–")) for name in names)
        table.add_column(Text(metric), justify="right", min_width=widest)
    for name in names:
        # Text rather than str: a name such as "[red]" is a name, not markup.
        table.add_row(Text(name), *(Text(cells.get((name, metric), "–")) for metric in metrics))
    return table


def result_markdown(rows: Sequence[ResultRow]) -> str:
    """The same table in Markdown, ending with a newline."""
    names, metrics, cells = _grid(rows)
    lines = ["| | " + " | ".join(map(_escaped, metrics)) + " |", "|---|" + "---:|" * len(metrics)]
    for name in names:
        lines.append(f"| {_escaped(name)} | " + " | ".join(cells.get((name, metric), "–") for metric in metrics) + " |")
    return "\n".join(lines) + "\n"


def _grid(rows: Sequence[ResultRow]) -> tuple[list[str], list[str], dict[tuple[str, str], str]]:
    names = list(dict.fromkeys(row.name for row in rows))
    metrics = list(dict.fromkeys(row.metric for row in rows))
    cells: dict[tuple[str, str], str] = {}
    for row in rows:
        if (row.name, row.metric) in cells:
            raise ValueError(f"rows: {row.metric!r} of {row.name!r} is given twice; a table has one place for it")
        mean, error = format_with_error(row.mean, row.stderr)
        cells[row.name, row.metric] = f"{mean} ± {error}" if error else mean
    return names, metrics, cells


def _plain(value: float) -> str:
    if value == 0 or 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.3e}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
