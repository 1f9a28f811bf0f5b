"""``apportion compare``: several rules at equal budget."""

import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apportion.cli import options as given
from apportion.cli.errors import about
from apportion.cli.output import answer, result_rows, show, tell
from apportion.errors import InputError

if TYPE_CHECKING:
    from apportion.features import Recipe
    from apportion.features.evaluate import SplicedLoss
    from apportion.features.run import TrainedRun
    from apportion.report import Metric, ResultRow

_COMPARED = ("fvu", "cossim", "l0", "dead", "underused", "ce_loss_score", "ce_loss_score_mean", "ce_increase")
_PLOTTED = ("fvu", "ce_loss_score", "dead")
# How far from the budget a mean L0 may be before figures stop being comparable.
_SAME_BUDGET = 0.1


def compare(
    model: given.Model,
    rules: Annotated[
        str, typer.Option(help="Names of rules with commas between them, see `train`.")
    ] = "topk,mutual,feature",
    seeds: Annotated[int, typer.Option(min=1, help="Dictionaries a rule.")] = 1,
    site: given.SiteName = None,
    features: given.Features = None,
    budget: given.Budget = 32,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default runs/MODEL-SITE-compare.", show_default=False)
    ] = None,
    report: Annotated[
        str | None,
        typer.Option(
            metavar="RULE", help="Whose features report.html shows, or none; default mutual.", show_default=False
        ),
    ] = None,
    seed: given.Seed = 0,
    json: given.Json = False,
    text: given.Text = "english",
    dataset: given.Dataset = None,
    tokens: given.Tokens = 1_000_000,
    context: given.Context = 128,
    held_out: given.HeldOut = 0.2,
    store: given.Store = None,
    store_dtype: given.StoreDtype = "bfloat16",
    epochs: given.Epochs = 3,
    steps: given.Steps = None,
    batch_size: given.BatchSize = None,
    learning_rate: given.LearningRate = None,
    auxiliary: given.Auxiliary = None,
    precision: given.Precision = "float32",
    checkpoint_every: given.CheckpointEvery = None,
    tensorboard: given.TensorBoard = False,
    model_dtype: given.ModelDtype = "float32",
    device: given.Device = "cpu",
) -> None:
    """Train dictionaries by several rules at equal budget, features, steps and data, and compare them.

    Writes a table, a plot, compare.json and the report of one of them. Stop it whenever you like: the same command goes
    on where it was; with more --seeds or --rules it adds what is missing.

    Example: [cyan]apportion compare smollm2 --rules topk,mutual,feature --seeds 3 --out runs/rules[/cyan]
    """
    from apportion.features.run import (
        check_run_folder,
        check_writable,
        evaluate_dictionary,
        make_recipe,
        spliced_loss,
        train_run,
    )

    started = time.perf_counter()
    names = _rules(rules)
    shown = _reported(report, names)

    def recipe(rule: str, number: int, width: int, train_tokens: int) -> "Recipe":
        return make_recipe(
            rule,
            width=width,
            train_tokens=train_tokens,
            n_features=features,
            budget=budget,
            steps=steps,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            auxiliary=auxiliary,
            precision=precision,
            seed=number,
        )

    def check(width: int) -> None:
        for rule in names:
            recipe(rule, seed, width, tokens)

    def folder_of(rule: str, number: int) -> Path:
        return place / rule / f"seed-{number}"

    numbers = list(range(seed, seed + seeds))
    # What needs no model is checked before one is loaded; a width to fit the budget stands in for the model's.
    check(max(1, int(budget) + 1))
    if out is not None:
        place = out
        with about("--out"):
            check_writable(out)
            for rule in names:
                for number in numbers:
                    if folder_of(rule, number).exists():
                        check_run_folder(folder_of(rule, number))
    data = given.DataOptions(
        model, site, text, dataset, tokens, context, store_dtype, model_dtype, held_out, store, device
    )
    lm, prepared = data.prepare(check)
    place = out or given.default_out(model, prepared.source.site, "compare")
    settings: dict[str, Any] = {"tensorboard": tensorboard}
    if checkpoint_every is not None:
        settings["checkpoint_every"] = checkpoint_every

    @functools.cache
    def loss() -> "SplicedLoss | None":
        # Three of its four passes through the model are the same for all dictionaries.
        return spliced_loss(prepared, lm)

    runs: dict[tuple[str, int], TrainedRun] = {}
    for number in numbers:
        for rule in names:
            tell(f"\n{rule}, seed {number}")
            done = train_run(
                folder_of(rule, number),
                prepared,
                recipe(rule, number, prepared.train.width, prepared.train.n_tokens),
                judge=lambda sae: evaluate_dictionary(sae, prepared, loss(), device=device),
                device=device,
                **settings,
            )
            runs[rule, number] = done
    rows = _rows(runs, names, numbers)
    for row in rows:
        if row.metric == "l0" and abs(row.mean - budget) > _SAME_BUDGET * budget:
            tell(
                f"warning: {row.name} uses {row.mean:.3g} features a token, not {budget:g}: its other figures do not "
                "compare; rules without a budget are steered to it slowly: give more --steps"
            )
    _plot(place, rows)
    page = None
    if shown is not None:
        from apportion.cli.reporting import write_run_report

        chosen = runs[shown, seed]
        chosen = dataclasses.replace(chosen, sae=chosen.sae.to("cpu"))
        page = write_run_report(place / "report.html", chosen, prepared, lm, _as_metrics(rows))
    content = _content(place, runs, rows, numbers, prepared.source, round(time.perf_counter() - started, 2))
    from apportion.data.files import write_json

    write_json(place / "compare.json", content)
    if json:
        answer(content)
        return
    from apportion.report import result_table

    over = f"{seeds} seeds" if seeds > 1 else "documents"
    show(result_table(rows), "", f"Standard errors over {over}. Plot: {place / 'comparison.png'}")
    if page is not None:
        show(f"The features of {shown}: {page}")


def _rules(text: str) -> list[str]:
    from apportion.features.run import rule_name

    with about("--rules"):
        names = [rule_name(each.strip()) for each in text.split(",") if each.strip()]
    if not names:
        raise InputError(f"--rules {text!r} names no rule: give some, such as topk,mutual,feature")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"--rules {text}: {twice[0]} is there twice (batchtopk is another name of mutual)")
    return names


def _reported(wanted: str | None, names: list[str]) -> str | None:
    from apportion.features.run import rule_name

    if wanted == "none":
        return None
    if wanted is None:
        return "mutual" if "mutual" in names else names[0]
    with about("--report"):
        name = rule_name(wanted)
        if name not in names:
            raise InputError(f"{wanted} is not among the rules compared, {', '.join(names)}")
    return name


def _rows(runs: "Mapping[tuple[str, int], TrainedRun]", names: list[str], numbers: list[int]) -> "list[ResultRow]":
    """One row a rule and metric: over seeds if there are several, else with the error over documents."""
    from apportion.report import ResultRow
    from apportion.studies import Row

    rows: list[ResultRow] = []
    for rule in names:
        of_seeds = [_by_metric(rule, runs[rule, number]) for number in numbers]
        if len(of_seeds) == 1:
            rows += of_seeds[0].values()
            continue
        for metric in of_seeds[0]:
            values = [each[metric].mean for each in of_seeds if metric in each]
            over = Row.of(rule, metric, values)
            rows.append(ResultRow(rule, metric, over.mean, over.stderr, over.n))
    return rows


def _by_metric(rule: str, run: "TrainedRun") -> "dict[str, ResultRow]":
    assert run.evaluation is not None
    return {row.metric: row for row in result_rows(rule, run.evaluation, _COMPARED)}


def _plot(place: Path, rows: "list[ResultRow]") -> None:
    from apportion.report.plots import bars_with_errors

    plotted = [row for row in rows if row.metric in _PLOTTED]
    for suffix in ("png", "svg"):
        bars_with_errors(place / f"comparison.{suffix}", plotted, title="Equal budget, features, steps and data")


def _as_metrics(rows: "list[ResultRow]") -> "list[Metric]":
    from apportion.report import Metric

    what = "for comparison: another rule at equal budget, features, steps and data"
    return [Metric(f"{row.metric}, {row.name}", row.mean, row.stderr, row.n, what) for row in rows]


def _content(
    place: Path,
    runs: "Mapping[tuple[str, int], TrainedRun]",
    rows: "list[ResultRow]",
    numbers: list[int],
    source: Any,
    seconds: float,
) -> dict[str, Any]:
    from apportion.cli.output import finite
    from apportion.studies import machine

    content: dict[str, Any] = finite(
        {
            "command": "compare",
            "out": str(place),
            "seeds": numbers,
            "rows": [row.as_dict() for row in rows],
            "runs": [
                {
                    "rule": rule,
                    "seed": number,
                    "folder": str(run.folder),
                    "training_seconds": run.seconds,
                    **_recipe(run),
                }
                for (rule, number), run in runs.items()
            ],
            "source": dataclasses.asdict(source),
            "seconds": seconds,
            "machine": machine(),
        }
    )
    return content


def _recipe(run: "TrainedRun") -> dict[str, Any]:
    recipe = run.settings["recipe"]
    return {name: recipe[name] for name in ("n_features", "steps", "batch_size", "auxiliary")}
