"""``apportion compare-dictionaries``: which features do two dictionaries share?"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apportion.cli import options as given
from apportion.cli.errors import about
from apportion.cli.output import answer, show, tell
from apportion.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from apportion.features.run import TrainedRun
    from apportion.models.activations import StoreView

_TOKENS_AT_ONCE = 4096


def compare_dictionaries(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="Folder of a run, or of a dictionary.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another of the same model and width.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page; default comparison.html in RUN_A's folder.", show_default=False),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Held-out tokens to compare activations and pick examples on.")
    ] = 50_000,
    hungarian_limit: Annotated[
        int, typer.Option(min=0, help="Features above which pairs are matched greedily, not by the best total.")
    ] = 6144,
    page: Annotated[bool, typer.Option(help="Write the page, with what features fire on.")] = True,
    json: given.Json = False,
    device: given.Device = "cpu",
) -> None:
    """Compare two dictionaries: their directions, one to one, and how partners fire on the same held-out tokens.

    Two seeds of one recipe share fewer features than one would like; this says which, how many, and shows what those
    without a partner fire on. Activations are compared where both read the same site.

    Example: [cyan]apportion compare-dictionaries runs/seed-0 runs/seed-1[/cyan] and open runs/seed-0/comparison.html
    """
    from apportion.data.files import check_writable
    from apportion.features.run import open_run
    from apportion.features.similarity import best_matches, compare_activations, one_to_one
    from apportion.report.comparison import Comparison, Side, comparison_figures, texts_of, write_comparison

    started = time.perf_counter()
    opened = [open_run(each, device) for each in (run_a, run_b)]
    place = out or run_a / "comparison.html"
    if page:
        with about("--out" if out else "RUN_A"):
            check_writable(place.parent)
    names = _names(run_a, run_b)
    notes = _check_alike(opened, names)
    a, b = (each.sae for each in opened)
    tell(f"matching {a.n_features:,} and {b.n_features:,} features")
    matching = one_to_one(a.decoder_weight, b.decoder_weight, hungarian_limit=hungarian_limit)
    if matching.method == "greedy":
        notes.append(
            f"Above {hungarian_limit:,} features pairs are matched greedily, the most alike first, instead of by the "
            "best total (--hungarian-limit)."
        )
    view = _held_out(opened, notes)
    activations = None
    if view is not None:
        tell(f"comparing activations on {min(tokens, view.n_tokens):,} held-out tokens")
        batches = ((x, x) for x in _batches(view, tokens, device))
        activations, _ = compare_activations(a, b, batches, matching)
    contexts: list[Any] = [None, None]
    texts: dict[int, str] = {}
    if page and view is not None:
        contexts, texts = _examples(opened, view, tokens, texts_of)
    data = Comparison(
        title=f"{names[0]} and {names[1]}",
        a=Side(names[0], _summary(opened[0]), contexts[0], best_matches(a.decoder_weight, b.decoder_weight)),
        b=Side(names[1], _summary(opened[1]), contexts[1], best_matches(b.decoder_weight, a.decoder_weight)),
        matching=matching,
        activations=activations,
        token_text=texts,
        notes=notes,
    )
    if page:
        write_comparison(place, data)
    figures = comparison_figures(data)
    if json:
        from apportion.report import ResultRow
        from apportion.studies import machine

        seeds = [each.settings.get("recipe", {}).get("seed") for each in opened]
        answer(
            {
                "command": "compare-dictionaries",
                "runs": [str(run_a), str(run_b)],
                "page": str(place) if page else None,
                "method": matching.method,
                "seeds": [seed for seed in seeds if seed is not None],
                "rows": [
                    ResultRow(" and ".join(names), name, float(value), None, 1).as_dict() for name, value, _ in figures
                ],
                "definitions": {name: says for name, _, says in figures},
                "notes": notes,
                "seconds": round(time.perf_counter() - started, 2),
                "machine": machine(),
            }
        )
        return
    show(_table(figures), "", *notes, *([f"{place}: open it in a browser"] if page else []))


def _names(run_a: Path, run_b: Path) -> list[str]:
    """The folders' names, with as much of their path as tells them apart."""
    parts = [each.resolve().parts for each in (run_a, run_b)]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if names[0] != names[1]:
            return names
    raise InputError(f"{run_a} and {run_b} are the same folder: give two dictionaries")


def _check_alike(opened: "list[TrainedRun]", names: list[str]) -> list[str]:
    """Refuse what cannot be compared; what can be, with a caveat, gives a note."""
    sources = [each.settings.get("source", {}) for each in opened]
    prints = [each.settings.get("provenance", {}).get("store", {}).get("model") for each in opened]
    if None not in prints and prints[0] != prints[1]:
        raise InputError(
            f"{names[0]} is of {sources[0].get('model')}, {names[1]} of {sources[1].get('model')}: directions of two "
            "models do not lie in one space"
        )
    sites = [each.get("site") for each in sources]
    if sites[0] != sites[1]:
        return [
            f"{names[0]} reads {sites[0]}, {names[1]} reads {sites[1]}: their directions are compared, their "
            "activations are not."
        ]
    return []


def _held_out(opened: "list[TrainedRun]", notes: list[str]) -> "StoreView | None":
    """Text that neither has seen, as far as that is known: the first one's test part."""
    from apportion.features.run import reopen_store

    sources = [each.settings.get("source", {}) for each in opened]
    if not all(sources) or sources[0]["site"] != sources[1]["site"]:
        return None
    same = all(sources[0].get(name) == sources[1].get(name) for name in ("text", "tokens", "context", "held_out"))
    if not same:
        notes.append("They were trained on different text: the second may have seen what the first held out.")
    return reopen_store(opened[0]).test


def _batches(view: "StoreView", tokens: int, device: str) -> "Iterator[Tensor]":
    import torch

    stop = min(tokens, view.n_tokens)
    for start in range(0, stop, _TOKENS_AT_ONCE):
        yield view.read(torch.arange(start, min(start + _TOKENS_AT_ONCE, stop))).to(device)


def _examples(
    opened: "list[TrainedRun]", view: "StoreView", tokens: int, texts_of: Any
) -> tuple[list[Any], dict[int, str]]:
    from apportion.features.contexts import collect_contexts
    from apportion.models import load
    from apportion.report import token_texts

    class _Part:
        """The first contexts of a view."""

        n_contexts = max(1, min(view.n_contexts, tokens * view.n_contexts // max(view.n_tokens, 1)))
        contexts = staticmethod(view.contexts)

    found = [collect_contexts(each.sae, _Part(), top=3, quantiles=0, per_quantile=0, window=(14, 8)) for each in opened]
    tokenizer = load(opened[0].settings["source"]["model"]).tokenizer
    return list(found), texts_of(found, token_texts(tokenizer))


def _summary(run: "TrainedRun") -> dict[str, str | int | float]:
    source, recipe = run.settings.get("source", {}), run.settings.get("recipe", {})
    facts: dict[str, Any] = {
        "model": source.get("model"),
        "site": source.get("site"),
        "text": source.get("text"),
        "rule": recipe.get("rule", {}).get("name", type(run.sae.rule).__name__),
        "features": run.sae.n_features,
        "steps": recipe.get("steps"),
        "seed": recipe.get("seed"),
    }
    metrics = (run.evaluation or {}).get("metrics", {})
    facts |= {name: metrics[name]["value"] for name in ("fvu", "l0", "dead", "ce_loss_score") if name in metrics}
    return {name: value for name, value in facts.items() if value is not None}


def _table(figures: list[tuple[str, float, str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("figure", "left"), ("value", "right"), ("what it says", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, value, says in figures:
        table.add_row(Text(name), f"{value:,}" if isinstance(value, int) else f"{value:.3f}", Text(says))
    return table
