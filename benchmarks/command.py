"""The command line of the benchmarks."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from apportion.data.files import write_json
from apportion.errors import InputError
from benchmarks.machine import ROOT, machine_slug
from benchmarks.registry import BENCHMARKS, chosen
from benchmarks.runner import Result, run

RESULTS = ROOT / "benchmarks" / "results"
PLOT = "plot"


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit code is 2 for bad input, 1 for a failure, 130 for Ctrl-C, as that of `apportion`."""
    given = _parser().parse_args(arguments)
    try:
        return _obey(given)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure apportion against the physical limit and other libraries, side by side in one run.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"benchmarks to run (default: all), or {PLOT!r}")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--rounds", type=int, help="of every race (default: the benchmark's own)")
    parser.add_argument("--threads", type=int, help="for everybody (default: as many as torch takes)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results; smoke: nowhere)")
    parser.add_argument("--budget-minutes", type=float, default=15.0, help="for everything together (default: 15)")
    parser.add_argument("--json", action="store_true", help="print the results on stdout as JSON instead of tables")
    parser.add_argument("--plots", action="store_true", help="afterwards write docs/performance.md and its plots")
    return parser


def _obey(given: argparse.Namespace) -> int:
    import benchmarks.all  # noqa: F401  fills the registry

    for name in ("rounds", "threads", "budget_minutes"):
        value = getattr(given, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if given.list:
        for each in BENCHMARKS.values():
            print(f"{each.name:12} {each.question}")
        return 0
    if given.names == [PLOT]:
        _write_page(given.out or RESULTS)
        return 0
    results = _run(given)
    if given.json:
        print(json.dumps(results[0] if len(results) == 1 else results, indent=2, ensure_ascii=False))
    if given.plots:
        _write_page(given.out or RESULTS)
    return 0


def _run(given: argparse.Namespace) -> list[Result]:
    import torch

    picked = chosen(given.names)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    out = given.out if given.out is not None or given.smoke else RESULTS

    def finished(result: Result) -> None:
        if not given.json:
            _show(result)
        if out is not None and result["skipped"] is None:
            path = out / f"{result['name']}-{result['date'][:10]}-{machine_slug()}.json"
            write_json(path, result)
            _say(f"  {path}")

    return run(
        picked, smoke=given.smoke, rounds=given.rounds, minutes=given.budget_minutes, say=_say, finished=finished
    )


def _show(result: Result) -> None:
    from rich.console import Console

    from benchmarks.tables import table

    # Wide enough for every table where the output is a file; a terminal has its own width.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    for race in result["races"]:
        console.print(table(result, race))
        console.print()


def _write_page(results: Path) -> None:
    from benchmarks.page import write_page

    _say(f"{write_page(results, ROOT / 'docs')}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
