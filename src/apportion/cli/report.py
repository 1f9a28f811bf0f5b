"""``apportion report``: look at the features of a dictionary in a browser."""

import time
from pathlib import Path
from typing import Annotated

import typer

from apportion.cli import options as given
from apportion.cli.errors import about
from apportion.cli.output import answer, result_rows, show


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, or of a dictionary that one has written.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default report.html in the run's folder.", show_default=False)
    ] = None,
    explanations: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="What `apportion explain` wrote; default explanations in the run's folder.",
            show_default=False,
        ),
    ] = None,
    json: given.Json = False,
    device: given.Device = "cpu",
) -> None:
    """Write one HTML file with everything about a dictionary: plots, figures, and a page for every feature.

    It opens from the disk without a network. What was not evaluated yet is evaluated first.

    Example: [cyan]apportion report runs/first[/cyan] and open runs/first/report.html
    """
    import dataclasses

    from apportion.cli.reporting import write_run_report
    from apportion.data.files import check_writable, write_json
    from apportion.features.run import evaluate_dictionary, open_run, reopen_store, spliced_loss
    from apportion.models import load

    started = time.perf_counter()
    opened = open_run(run)
    place = out or run / "report.html"
    with about("--out" if out else "RUN"):
        check_writable(place.parent)
    prepared = reopen_store(opened, device=device)
    lm = load(prepared.source.model, prepared.source.model_dtype, device)
    if opened.evaluation is None:
        evaluation = evaluate_dictionary(opened.sae, prepared, spliced_loss(prepared, lm))
        if (run / "run.json").exists():
            write_json(run / "evaluation.json", evaluation)
        opened = dataclasses.replace(opened, evaluation=evaluation)
    write_run_report(place, opened, prepared, lm, explanations=explanations)
    if json:
        from apportion.studies import machine

        assert opened.evaluation is not None
        answer(
            {
                "command": "report",
                "run": str(run),
                "report": str(place),
                "bytes": place.stat().st_size,
                "features": opened.sae.n_features,
                "rows": [row.as_dict() for row in result_rows(run.name, opened.evaluation)],
                "seconds": round(time.perf_counter() - started, 2),
                "machine": machine(),
            }
        )
        return
    show(f"{place} ({place.stat().st_size / 2**20:.1f} MiB): open it in a browser")
