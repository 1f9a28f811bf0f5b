"""``apportion study``: does a paper's claim hold?"""

from pathlib import Path
from typing import Annotated, Any

import typer

from apportion.cli import options as given
from apportion.cli.errors import about
from apportion.cli.output import answer, show, tell
from apportion.errors import InputError


def study(
    slug: Annotated[
        str | None, typer.Argument(metavar="[SLUG]", help="Which, such as mutual_feature_choice.", show_default=False)
    ] = None,
    list_all: Annotated[
        bool, typer.Option("--list", help="List all 54 with their verdicts (as without SLUG).")
    ] = False,
    scale: Annotated[str, typer.Option(help="smoke (seconds), default (minutes), long or gpu.")] = "default",
    seeds: Annotated[int, typer.Option(min=1, help="How many; three or more for a verdict.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    write: Annotated[bool, typer.Option("--write", help="Write what this machine found into --docs.")] = False,
    docs: Annotated[Path, typer.Option(metavar="DIR", help="Where results.md is written.")] = Path("docs"),
    json: given.Json = False,
) -> None:
    """Measure a published claim against its baseline at equal budget; the verdict is computed.

    Example: [cyan]apportion study mutual_feature_choice --scale smoke[/cyan]
    """
    from apportion import studies

    if slug is None or list_all:
        if write:
            tell(f"wrote {_write(docs)}")
        entries = studies.all_studies()
        if json:
            answer({"studies": entries})
        else:
            show(_list(entries))
        return
    if scale not in ("smoke", "default", "long", "gpu"):
        raise InputError(f"--scale {scale}: one of smoke, default, long, gpu")
    if write:
        from apportion.data.files import check_writable

        with about("--docs"):
            check_writable(docs)
    finding = studies.run(slug, scale, list(range(seed, seed + seeds)), True)
    if write:
        tell(f"wrote {_write(docs)}")
    if json:
        answer(finding.to_json())
        return
    _show(finding)


def _write(docs: Path) -> Path:
    from apportion import studies

    with about("--docs"):
        return studies.write_results(docs)


def _list(entries: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("study", "room", "verdict", "paper"):
        table.add_column(heading, no_wrap=heading != "paper")
    for entry in entries:
        table.add_row(entry["slug"], entry["room"], entry["verdict"], entry["paper"])
    return table


def _show(finding: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    from apportion.report import ResultRow, result_table
    from apportion.studies import by_condition

    claims = Table(box=None, pad_edge=False, header_style="bold")
    claims.add_column("claim")
    for heading in ("margin", "95 % interval", "seeds", "verdict"):
        claims.add_column(heading, justify="right", no_wrap=True)
    for each in finding.comparisons:
        counted = "" if each.part_of_verdict else " (not counted)"
        interval = f"{each.low:.4g} to {each.high:.4g}"
        claims.add_row(Text(each.claim + counted), f"{each.mean:.4g}", interval, str(each.n), each.verdict)
    show(Text(finding.claim), "", claims, "")
    for condition, rows in by_condition(finding.rows).items():
        cells = [ResultRow(row.name, row.metric, row.mean, row.stderr, row.n) for row in rows]
        show(result_table(cells, title=condition), "")
    show(*(Text(f"- {note}") for note in finding.notes))
    show(
        Text(f"{finding.slug}: {finding.verdict}", style="bold"),
        Text(f"scale {finding.scale}, seeds {finding.seeds}, {finding.seconds:.0f} s on {finding.machine}"),
    )
