"""Reports, tables and plots: what people look at.

- `write_report` writes one self-contained HTML file from a `ReportData`; `build_report` makes the latter.
- `tables` and `plots` show result rows in the terminal, in Markdown and as pictures.
"""

from apportion.report.build import build_report, error_by_difficulty, explained_features, token_texts
from apportion.report.data import ErrorByDifficulty, ExplainedFeature, Metric, ReportData, ScorerFigures
from apportion.report.html import write_report
from apportion.report.tables import ResultRow, format_with_error, result_markdown, result_table

__all__ = [
    "ErrorByDifficulty",
    "ExplainedFeature",
    "Metric",
    "ReportData",
    "ResultRow",
    "ScorerFigures",
    "build_report",
    "error_by_difficulty",
    "explained_features",
    "format_with_error",
    "result_markdown",
    "result_table",
    "token_texts",
    "write_report",
]
