"""``apportion bench-cache``: what key methods are worth when several questions share one context (SCBench)."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apportion.cli import keys as room
from apportion.cli import options as given
from apportion.cli.errors import about
from apportion.cli.generate import size_text
from apportion.cli.output import answer, show, tell
from apportion.errors import InputError

if TYPE_CHECKING:
    from apportion.keys import KeyMethod
    from apportion.keys.scbench_results import Session, Summary

_ASKED, _MACHINE = "What is asked", "Machine and files"


def bench_cache(
    model: given.Model,
    methods: Annotated[
        str,
        typer.Option(
            help="Names with commas between; `apportion generate MODEL --method list` shows all.",
            rich_help_panel=room.METHOD,
        ),
    ] = "dense,oracle,sinks_and_recent,streaming_llm,snap_kv,quantized_4",
    budget: room.Budget = None,
    keys: room.Keys = None,
    fit: room.Fit = None,
    saved: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="A method with what was fitted, from here, as it is; may be repeated.",
            rich_help_panel=room.METHOD,
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Names with commas between; `list` shows all.", rich_help_panel=_ASKED)
    ] = "needles,key_value",
    contexts: Annotated[int, typer.Option(min=1, help="Contexts of each task.", rich_help_panel=_ASKED)] = 5,
    turns: Annotated[int, typer.Option(min=1, help="Questions about each.", rich_help_panel=_ASKED)] = 5,
    words: Annotated[int, typer.Option(min=20, help="Words of a context, roughly.", rich_help_panel=_ASKED)] = 300,
    modes: Annotated[
        str,
        typer.Option(help="Of multi_request, multi_turn and query_aware, with commas between.", rich_help_panel=_ASKED),
    ] = "multi_request,multi_turn",
    write: Annotated[
        bool,
        typer.Option("--write", help="Let the model write its answers, and score the text.", rich_help_panel=_ASKED),
    ] = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Feed answers at once: some times faster, without figures of a step.",
            rich_help_panel=_ASKED,
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the contexts.", rich_help_panel=_ASKED)] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep results here, a file a context: an interrupted run goes on, methods can be added.",
            rich_help_panel=_MACHINE,
            show_default=False,
        ),
    ] = None,
    json: given.Json = False,
    model_dtype: given.ModelDtype = "float32",
    device: given.Device = "cpu",
) -> None:
    """Ask several questions about one context, of several key methods, and compare what is left of the answers.

    In multi_request the context is compressed alone, and every question is answered from that same cache; in multi_turn
    the first question is part of the prompt, and right answers and further questions follow it. A method that forgets
    can look perfect as long as it has seen the question: query_aware shows that on purpose.

    Methods that forget save bytes held; methods that choose save bytes read and hold everything. Compare them within
    one column, not across. Scores mean little where dense attention itself is below 0.8.

    Example: [cyan]apportion bench-cache smollm2 --methods dense,snap_kv,oracle --budget 1/8 --out runs/scbench[/cyan]
    """
    from apportion.data.tasks.cache_suite import SUITE, task_named
    from apportion.keys.scbench import Protocol, check_session
    from apportion.keys.scbench_results import Session, summarise
    from apportion.keys.scbench_runs import run_bench
    from apportion.models import load

    if tasks == "list":
        _list({name: each.says for name, each in SUITE.items()}, json)
        return
    wanted = room.budget_of(budget, keys, "1/8")
    chosen = _methods(methods, saved or [], wanted)
    with about("--tasks"):
        kinds = {name: task_named(name) for name in _names(tasks)}
    with about("--modes"):
        new_tokens = max(each.new_tokens for each in kinds.values())
        protocol = Protocol(_names(modes), steps=not quick, generate=write, new_tokens=new_tokens)
    if out is not None:
        from apportion.data.files import check_writable

        with about("--out"):
            check_writable(out)
    with about("MODEL"):
        lm = load(model, model_dtype, device)
    with about("--tasks"):
        sessions = [
            Session(name, number, content)
            for name, each in kinds.items()
            for number, content in enumerate(each.make(contexts, words, turns, seed))
        ]
    with about("--words"):
        for session in sessions:
            check_session(lm, session)
    ready = {name: room.fitted(name, method, lm, fit) for name, method in chosen.items()}
    started = time.perf_counter()
    made_by = {"words": words, "turns": turns, "seed": seed, "dtype": model_dtype}
    with about("--out") if out is not None else _nothing():
        records = run_bench(lm, sessions, ready, protocol, folder=out, made_by=made_by, say=_progress(sessions))
    summaries = summarise(records)
    if json:
        answer(_content(model, ready, summaries, time.perf_counter() - started, out))
        return
    for title, rows in _tables(summaries).items():
        show(_table(title, rows), "")
    show(*_notes(summaries))


def _methods(methods: str, saved: Sequence[Path], budget: Any) -> "dict[str, KeyMethod]":
    from apportion.keys.catalogue import method_named

    with about("--methods"):
        chosen = {name: method_named(name, budget) for name in _names(methods)}
    for folder in saved:
        method = room.saved_method(folder, None)
        name = method.slug if method.slug not in chosen else f"{method.slug} ({folder.name})"
        chosen[name] = method
    return chosen


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(each.strip() for each in text.split(",") if each.strip()))
    if not names:
        raise InputError(f"{text!r}: names with commas between")
    return names


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def _progress(sessions: "Sequence[Session]") -> Any:
    places = {f"{each.task}, session {each.number}": place for place, each in enumerate(sessions, start=1)}

    def say(message: str) -> None:
        tell(f"[{places[message.split(':')[0]]}/{len(sessions)}] {message}")

    return say


def _content(
    model: str, methods: "dict[str, KeyMethod]", summaries: "Sequence[Summary]", seconds: float, out: Path | None
) -> dict[str, Any]:
    from apportion.report import ResultRow
    from apportion.studies import machine

    rows = [ResultRow(_name(each), "score", each.score, each.stderr, each.sessions).as_dict() for each in summaries]
    return {
        "command": "bench-cache",
        "model": model,
        "methods": {name: {"method": each.slug, "settings": each.settings()} for name, each in methods.items()},
        "rows": rows,
        "summaries": [each.as_dict() for each in summaries],
        "out": None if out is None else str(out),
        "seconds": round(seconds, 2),
        "machine": machine(),
    }


def _name(summary: "Summary") -> str:
    task = f"{summary.task} ({summary.part})" if summary.part else summary.task
    return f"{task}, {summary.mode}: {summary.method}"


def _tables(summaries: "Sequence[Summary]") -> "dict[str, list[Summary]]":
    tables: dict[str, list[Summary]] = {}
    for each in summaries:
        tables.setdefault(_name(each).rpartition(": ")[0], []).append(each)
    return tables


def _table(title: str, rows: "Sequence[Summary]") -> Any:
    from rich.table import Table

    turns = max(len(each.by_turn) for each in rows)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("method", no_wrap=True)
    headings = ["score", *(f"turn {turn + 1}" for turn in range(turns)), "nll", "keys read", "cache held", "of dense"]
    for heading in [*headings, "read a step", "tokens/s", "prompt s", "compress s", "reusable"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for each in rows:
        by_turn = [*each.by_turn, *[None] * (turns - len(each.by_turn))]
        figures = each.figures
        reusable = figures.get("reusable")
        table.add_row(
            each.method,
            f"{each.score:.2f}",
            *("-" if score is None else f"{score:.2f}" for score in by_turn),
            f"{figures['nll']:.2f}",
            _shown(figures.get("share_read"), "{:.1%}"),
            size_text(figures["bytes_held"]),
            f"{figures['share_held']:.1%}",
            size_text(figures["bytes_per_step"]) if "bytes_per_step" in figures else "-",
            _shown(figures.get("tokens_per_second"), "{:.1f}"),
            f"{figures['prefill_seconds']:.2f}",
            f"{figures['compress_seconds']:.3f}",
            "-" if reusable is None else "yes" if reusable else "no",
        )
    return table


def _shown(figure: float | None, how: str) -> str:
    return "-" if figure is None else how.format(figure)


def _notes(summaries: "Sequence[Summary]") -> list[Any]:
    from rich.text import Text

    weak = sorted({each.task for each in summaries if each.method == "dense" and each.score < 0.8})
    if not weak:
        return []
    return [Text(f"Dense attention is below 0.8 on {', '.join(weak)}: what others lose there says little")]


def _list(says: dict[str, str], json: bool) -> None:
    if json:
        answer({"command": "bench-cache", "tasks": [{"name": name, "says": each} for name, each in says.items()]})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("task", "what is asked"):
        table.add_column(heading, no_wrap=heading == "task")
    for name, each in says.items():
        table.add_row(name, each)
    show(table)
