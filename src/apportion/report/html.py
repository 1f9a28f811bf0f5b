"""`write_report`: one HTML file that opens from the disk without a network.

Safety rests on three things. The page's policy (a Content-Security-Policy with hashes) runs the one script and the one
style sheet written here and nothing else, and forbids every way of turning text into HTML (Trusted Types). Corpus text
travels in base64 and is shown through ``textContent`` only. What the template prints itself is escaped by jinja2.
"""

import base64
import hashlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from apportion.data.files import write_atomically
from apportion.report.charts import Chart, density_chart, difficulty_charts, training_charts, winners_chart
from apportion.report.data import Metric, ReportData
from apportion.report.payload import blocks, readable

if TYPE_CHECKING:
    from jinja2 import Template

# Pages that other commands write beside a report, which it then links to.
BESIDE = {"explore.html": "Prompts", "circuit.html": "Circuit", "comparison.html": "Comparison"}


def write_report(path: Path | str, data: ReportData) -> Path:
    """Write the report to ``path``, whole or not at all, and return the path.

    Raises:
        InputError: the folder cannot be written or the disk is full.
        ValueError: the data contradict themselves; names the part.
    """
    path = Path(path)
    style, script = (read_templates(each) for each in (("report.css",), ("page.js", "report.js")))
    stream = template("report.html.j2").stream(
        title=readable(data.title),
        policy=page_policy(script, style),
        style=style,
        script=script,
        summary=[(readable(str(name)), readable(_fact(value))) for name, value in data.summary.items()],
        metrics=[_metric_row(metric) for metric in data.metrics],
        charts=[_readable_chart(chart) for chart in _charts(data)],
        curves=[_readable_chart(chart) for chart in training_charts(data.history)],
        n_features=data.contexts.n_features,
        n_dead=int((data.contexts.fires == 0).sum()),
        n_tokens=data.contexts.n_tokens,
        has_explanations=bool(data.explanations),
        has_lens=data.lens is not None,
        version=page_version(),
        beside={page: name for page, name in BESIDE.items() if (path.parent / page).exists()},
        blocks=blocks(data),
    )
    with write_atomically(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for piece in stream:
            file.write(piece)
    return path


def _charts(data: ReportData) -> list[Chart]:
    charts = [
        density_chart(data.contexts.density, data.zipf),
        winners_chart(data.contexts.winners_per_token),
    ]
    if data.error_by_difficulty is not None:
        charts += difficulty_charts(data.error_by_difficulty)
    return charts


def _readable_chart(chart: Chart) -> Chart:
    return Chart(readable(chart.title), readable(chart.note), readable(chart.svg))


def read_templates(names: Sequence[str]) -> str:
    """Some of the files beside the templates, one after the other."""
    folder = files("apportion.report") / "templates"
    return "\n".join((folder / name).read_text(encoding="utf-8").strip() for name in names)


def template(name: str) -> "Template":
    """A template whose every variable is escaped, and must be given."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(read_templates([name]))


def page_policy(script: str, style: str, may_ask: bool = False) -> str:
    """The Content-Security-Policy of a page that runs this script and this style sheet and nothing else.

    Args:
        script: of the page; empty where it has none, and none may run.
        style: its style sheet.
        may_ask: whether it may send requests to where it came from.
    """

    def allowed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"

    running = f"script-src {allowed(script)}; " if script else ""
    asking = "connect-src 'self'; " if may_ask else ""
    return (
        f"default-src 'none'; {running}style-src {allowed(style)}; "
        f"{asking}base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _metric_row(metric: Metric) -> dict[str, str]:
    from apportion.report.tables import format_with_error

    value, error = format_with_error(metric.value, metric.stderr)
    return {
        "name": readable(metric.name),
        "value": value,
        "stderr": error,
        "n": "" if metric.n is None else f"{metric.n:,}",
        "help": readable(metric.help),
    }


def _fact(value: str | int | float) -> str:
    if isinstance(value, (bool, str)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def page_version() -> str:
    """The version that a page says it was written by; empty for a copy that is not installed."""
    try:
        return version("apportion")
    except PackageNotFoundError:
        return ""
