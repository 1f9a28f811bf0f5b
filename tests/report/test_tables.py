"""Numbers as they are printed."""

import io

import pytest

from apportion.report import ResultRow, format_with_error, result_markdown, result_table

ROWS = [
    ResultRow("TokenChoice", "FVU", 0.18632, 0.0031, 3),
    ResultRow("TokenChoice", "dead", 12.0),
    ResultRow("[red]MutualChoice", "FVU", 0.12789, 0.0012, 3),
]


@pytest.mark.parametrize(
    ("mean", "stderr", "expected"),
    [
        (0.18632, 0.0031, ("0.1863", "0.0031")),
        (0.18632, 0.031, ("0.186", "0.031")),
        (1234.5, 12.0, ("1,234", "12")),
        (1234.5, 220.0, ("1,234", "220")),
        (3.25, 0.95, ("3.25", "0.95")),
        (0.5, None, ("0.5", "")),
        (0.5, 0.0, ("0.5", "")),
        (0.5, float("nan"), ("0.5", "")),
        (float("nan"), 0.1, ("nan", "")),
        (123456.0, None, ("123,456", "")),
        (1e-12, 2e-13, ("1.0000e-12", "2.0e-13")),
    ],
)
def test_mean_and_error_share_their_last_decimal(mean, stderr, expected):
    assert format_with_error(mean, stderr) == expected


def test_markdown_has_one_line_a_name_and_one_column_a_metric():
    assert result_markdown(ROWS) == (
        "| | FVU | dead |\n|---|---:|---:|\n"
        "| TokenChoice | 0.1863 ± 0.0031 | 12 |\n| [red]MutualChoice | 0.1279 ± 0.0012 | – |\n"
    )


def test_markdown_escapes_what_would_break_the_table():
    assert "a\\|b c" in result_markdown([ResultRow("a|b\nc", "x", 1.0)])


def test_terminal_table_prints_names_as_they_are():
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=100).print(result_table(ROWS, title="Equal budget"))
    assert "[red]MutualChoice" in out.getvalue()
    assert "0.1279 ± 0.0012" in out.getvalue()


def test_a_number_given_twice_is_refused():
    with pytest.raises(ValueError, match="given twice"):
        result_markdown([ROWS[0], ROWS[0]])
