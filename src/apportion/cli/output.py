"""What commands print: the answer on stdout, a table for people or one JSON object for scripts; the rest on stderr."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apportion.report import ResultRow

# Rich guesses 80 columns where there is no terminal, and would cut paths and numbers apart.
_COLUMNS_WITHOUT_TERMINAL = 160
HEADLINE = ("fvu", "l0", "dead", "underused", "ce_loss_score")


def answer(content: Mapping[str, Any]) -> None:
    """Print the one JSON object of ``--json``; what is not a number is null."""
    print(json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False), flush=True)


def show(*renderables: Any) -> None:
    """Print tables and text for people."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _COLUMNS_WITHOUT_TERMINAL, highlight=False)
    for each in renderables:
        console.print(each)


def tell(message: str) -> None:
    """Say how things go on, on stderr."""
    print(message, file=sys.stderr, flush=True)


def result_rows(name: str, evaluation: Mapping[str, Any], metrics: Sequence[str] | None = None) -> "list[ResultRow]":
    """The figures of an evaluation, in the order of ``metrics`` (all by default), under a name."""
    from apportion.report import ResultRow

    found = evaluation["metrics"]
    wanted = found if metrics is None else [metric for metric in metrics if metric in found]
    return [
        ResultRow(name, metric, _number(found[metric]["value"]), found[metric]["stderr"], found[metric]["n"])
        for metric in wanted
    ]


def metric_table(evaluation: Mapping[str, Any], metrics: Sequence[str] | None = None) -> Any:
    """One line a figure: value, standard error over documents, definition."""
    from rich.table import Table
    from rich.text import Text

    from apportion.report import format_with_error

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("± stderr", justify="right", no_wrap=True)
    table.add_column("what it is")
    for row in result_rows("", evaluation, metrics):
        value, error = format_with_error(row.mean, row.stderr)
        table.add_row(Text(row.metric), value, error, Text(evaluation["metrics"][row.metric]["definition"]))
    return table


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def finite(content: Any) -> Any:
    """JSON has no NaN and no infinity: what is not a number becomes null."""
    if isinstance(content, Mapping):
        return {str(name): finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
