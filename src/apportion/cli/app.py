"""``apportion``: one module a command; each imports what is heavy only when it runs, so that ``--help`` is quick."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from apportion.cli import (
    bench_cache,
    circuit,
    compare,
    compare_dictionaries,
    compress,
    doctor,
    evaluate,
    explain,
    explore,
    fetch,
    finetune,
    generate,
    prune,
    report,
    steer,
    study,
    train,
)
from apportion.cli.errors import exit_code

app = typer.Typer(
    name="apportion",
    help="Sparsity in neural networks as one question: [bold]who gets the budget?[/bold]\n\n"
    "Start with: [cyan]apportion fetch smollm2[/cyan], then [cyan]apportion train smollm2 --out runs/first[/cyan]",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> bool:
    if wanted:
        from apportion import __version__

        print(f"apportion {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _apportion(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="APPORTION_DEBUG", help="Show the traceback of an error.")
    ] = False,
) -> None: ...


for command in (
    fetch.fetch,
    train.train,
    evaluate.evaluate,
    compare.compare,
    compare_dictionaries.compare_dictionaries,
    explain.explain,
    report.report,
    steer.steer,
    circuit.circuit,
    explore.explore,
    prune.prune,
    finetune.finetune,
    compress.compress,
    generate.generate,
    bench_cache.bench_cache,
    study.study,
    doctor.doctor,
):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code.

    0 is success, 2 bad input, 1 failure, 130 Ctrl-C.
    """
    sys.exit(exit_code(app, list(sys.argv[1:] if arguments is None else arguments)))
