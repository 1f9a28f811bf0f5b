"""`write_report`: one HTML file that opens from the disk without a network.

Safety rests on three things. The page's policy (a Content-Security-Policy with hashes) runs the one script and the one
style sheet written here and nothing else, and forbids every way of turning text into HTML (Trusted Types). Corpus text
travels in base64 and is shown through ``textContent`` only. What the template prints itself is escaped by jinja2.
"""

import base64
import hashlib
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

from apportion.data.files import write_atomically
from apportion.report.charts import Chart, density_chart, difficulty_charts, training_charts, winners_chart
from apportion.report.data import Metric, ReportData
from apportion.report.payload import blocks, readable


def write_report(path: Path | str, data: ReportData) -> Path:
    """Write the report to ``path``, whole or not at all, and return the path.

    Raises:
        InputError: the folder cannot be written or the disk is full.
        ValueError: the data contradict themselves; names the part.
    """
    from jinja2 import Environment, StrictUndefined

    path = Path(path)
    templates = files("apportion.report") / "templates"
    style, script = ((templates / name).read_text(encoding="utf-8").strip() for name in ("report.css", "report.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((templates / "report.html.j2").read_text(encoding="utf-8"))
    stream = template.stream(
        title=readable(data.title),
        policy=_policy(script, style),
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
        version=_version(),
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


def _policy(script: str, style: str) -> str:
    def allowed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"

    return (
        f"default-src 'none'; script-src {allowed(script)}; style-src {allowed(style)}; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
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


def _version() -> str:
    try:
        return version("apportion")
    except PackageNotFoundError:
        return ""
