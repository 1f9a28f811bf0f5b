"""``apportion compare``: several rules at equal budget, at one budget or along a sweep of them."""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apportion.cli import options as given
from apportion.cli.errors import about
from apportion.cli.output import answer, result_rows, show, tell
from apportion.errors import InputError

if TYPE_CHECKING:
    from apportion.features import Recipe, SparseAutoencoder
    from apportion.features.evaluate import SplicedLoss
    from apportion.features.run import TrainedRun
    from apportion.report import Metric, ResultRow
    from apportion.report.plots import ParetoPoint

_COMPARED = ("fvu", "cossim", "l0", "dead", "underused", "ce_loss_score", "ce_loss_score_mean", "ce_increase")
_PLOTTED = ("fvu", "ce_loss_score", "dead")
# What a sweep draws against the features used a token.
_TRADED = {"ce_loss_score": "loss recovered", "fvu": "FVU (normalised MSE)", "dead": "dead features"}
# How far from the budget a mean L0 may be before figures stop being comparable.
_SAME_BUDGET = 0.1


@dataclass(frozen=True)
class _Condition:
    """What is compared: a rule at a budget, or a dictionary that was brought along."""

    rule: str
    budget: float | None
    label: str

    def folder(self, place: Path, number: int) -> Path:
        """Where the run of a seed is kept; one at the same budget is found again by a sweep."""
        return place / self.rule / f"budget-{self.budget:g}" / f"seed-{number}"


def compare(
    model: given.Model,
    rules: Annotated[
        str, typer.Option(help="Names of rules with commas between them, see `train`.")
    ] = "topk,mutual,feature",
    seeds: Annotated[int, typer.Option(min=1, help="Dictionaries a rule.")] = 1,
    site: given.SiteName = None,
    features: given.Features = None,
    budget: Annotated[
        str,
        typer.Option(help="Features a token may use, on average; several with commas between them draw the trade-off."),
    ] = "32",
    also: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Measure this dictionary of the same model and site, too: apportion's, SAELens' or sparsify's; may be "
            "given several times.",
            show_default=False,
        ),
    ] = None,
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

    Writes a table, a plot, compare.json and the report of one of them; with several budgets also tradeoff.png, what
    each rule recovers of the model's loss, its error and its dead features against the features used. Stop it whenever
    you like: the same command goes on where it was; with more --seeds, --rules or budgets it adds what is missing.

    Example: [cyan]apportion compare smollm2 --rules topk,mutual,feature --seeds 3 --out runs/rules[/cyan]

    A trade-off: [cyan]apportion compare smollm2 --rules topk,mutual,jumprelu --budget 16,32,64 --seeds 3[/cyan]
    """
    from apportion.data.files import check_writable
    from apportion.features.run import (
        check_run_folder,
        evaluate_dictionary,
        make_recipe,
        spliced_loss,
        train_run,
    )

    started = time.perf_counter()
    names = _rules(rules)
    budgets = _budgets(budget)
    brought = _brought(also or [], names)
    shown = _reported(report, names)
    conditions = [_Condition(rule, each, _label(rule, each, budgets)) for each in budgets for rule in names]

    def recipe(condition: _Condition, number: int, width: int, train_tokens: int) -> "Recipe":
        assert condition.budget is not None
        return make_recipe(
            condition.rule,
            width=width,
            train_tokens=train_tokens,
            n_features=features,
            budget=condition.budget,
            steps=steps,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            auxiliary=auxiliary,
            precision=precision,
            seed=number,
        )

    def check(width: int) -> None:
        for condition in conditions:
            recipe(condition, seed, width, tokens)

    numbers = list(range(seed, seed + seeds))
    # What needs no model is checked before one is loaded; a width to fit the budget stands in for the model's.
    check(max(1, int(max(budgets)) + 1))
    if out is not None:
        with about("--out"):
            check_writable(out)
            for condition in conditions:
                for number in numbers:
                    if condition.folder(out, number).exists():
                        check_run_folder(condition.folder(out, number))
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

    judged = functools.partial(evaluate_dictionary, prepared=prepared, device=device)
    with about("--also"):
        for name, sae in brought.items():
            if sae.d_in != prepared.train.width:
                raise InputError(
                    f"the dictionary {name} takes activations of width {sae.d_in}, {prepared.source.site} has "
                    f"{prepared.train.width}: give one of the same model and site"
                )
    runs: dict[tuple[_Condition, int], TrainedRun] = {}
    for number in numbers:
        for condition in conditions:
            tell(f"\n{condition.label}, seed {number}")
            runs[condition, number] = train_run(
                condition.folder(place, number),
                prepared,
                recipe(condition, number, prepared.train.width, prepared.train.n_tokens),
                judge=lambda sae: judged(sae, loss=loss()),
                device=device,
                **settings,
            )
    evaluations = {condition: [runs[condition, number].evaluation for number in numbers] for condition in conditions}
    for name, sae in brought.items():
        tell(f"\n{name}")
        evaluations[_Condition(name, None, name)] = [judged(sae.to(device), loss=loss())]
    rows = _rows(evaluations)
    for row in rows:
        wanted = next((each.budget for each in conditions if each.label == row.name), None)
        if row.metric == "l0" and wanted is not None and abs(row.mean - wanted) > _SAME_BUDGET * wanted:
            tell(
                f"warning: {row.name} uses {row.mean:.3g} features a token, not {wanted:g}: its other figures do not "
                "compare; rules without a budget are steered to it slowly: give more --steps"
            )
    pictures = _plots(place, rows, list(evaluations), several=len(budgets) > 1 or bool(brought))
    page = None
    if shown is not None:
        from apportion.cli.reporting import write_run_report

        chosen = runs[next(each for each in conditions if each.rule == shown), seed]
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
    show(result_table(rows), "", f"Standard errors over {over}. {pictures}")
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


def _budgets(text: str) -> list[float]:
    try:
        budgets = [float(each) for each in text.split(",") if each.strip()]
    except ValueError:
        budgets = []
    if not budgets:
        raise InputError(f"--budget {text!r}: give a number, or several with commas between them, such as 16,32,64")
    if len(set(budgets)) < len(budgets):
        raise InputError(f"--budget {text}: a budget is there twice")
    return sorted(budgets)


def _label(rule: str, budget: float, budgets: Sequence[float]) -> str:
    return rule if len(budgets) == 1 else f"{rule} at {budget:g}"


def _brought(folders: Sequence[Path], rules: Sequence[str]) -> "dict[str, SparseAutoencoder]":
    """Dictionaries by the names that tables give them."""
    from apportion.features.formats import read_dictionary

    found: dict[str, SparseAutoencoder] = {}
    with about("--also"):
        for folder in folders:
            # A run keeps its dictionary in a folder of its own.
            inner = folder / "dictionary"
            name = folder.resolve().name
            if name in found or name in rules:
                raise InputError(f"{folder}: {name} is the name of something else that is compared: rename the folder")
            found[name] = read_dictionary(inner if inner.is_dir() else folder)
    return found


def _rows(evaluations: "Mapping[_Condition, Sequence[Any]]") -> "list[ResultRow]":
    """One row a condition and metric: over seeds if there are several, else with the error over documents."""
    from apportion.report import ResultRow
    from apportion.studies import Row

    rows: list[ResultRow] = []
    for condition, of_seeds in evaluations.items():
        by_metric = [{row.metric: row for row in result_rows(condition.label, each, _COMPARED)} for each in of_seeds]
        if len(by_metric) == 1:
            rows += by_metric[0].values()
            continue
        for metric in by_metric[0]:
            over = Row.of(condition.label, metric, [each[metric].mean for each in by_metric if metric in each])
            rows.append(ResultRow(condition.label, metric, over.mean, over.stderr, over.n))
    return rows


def _plots(place: Path, rows: "list[ResultRow]", conditions: Sequence[_Condition], several: bool) -> str:
    """Draw; says where."""
    from apportion.report.plots import bars_with_errors, trade_offs

    plotted = [row for row in rows if row.metric in _PLOTTED]
    names = ["comparison"]
    points = _points(rows, conditions)
    if several and points:
        names.append("tradeoff")
    for suffix in ("png", "svg"):
        bars_with_errors(place / f"comparison.{suffix}", plotted, title="Equal budget, features, steps and data")
        if "tradeoff" in names:
            trade_offs(place / f"tradeoff.{suffix}", points, cost="features used a token (L0)")
    return f"Plot{'s' * (len(names) > 1)}: {', '.join(str(place / f'{name}.png') for name in names)}"


def _points(rows: "Sequence[ResultRow]", conditions: Sequence[_Condition]) -> "dict[str, list[ParetoPoint]]":
    """For each quality that a sweep draws, where every condition lies."""
    from apportion.report.plots import ParetoPoint

    found = {(row.name, row.metric): row for row in rows}
    points: dict[str, list[ParetoPoint]] = {}
    for metric, title in _TRADED.items():
        for condition in conditions:
            used, quality = found.get((condition.label, "l0")), found.get((condition.label, metric))
            if used is None or quality is None:
                continue
            point = ParetoPoint(condition.rule, used.mean, quality.mean, used.stderr or 0.0, quality.stderr or 0.0)
            points.setdefault(title, []).append(point)
    return points


def _as_metrics(rows: "list[ResultRow]") -> "list[Metric]":
    from apportion.report import Metric

    what = "for comparison: another dictionary, on the same data"
    return [Metric(f"{row.metric}, {row.name}", row.mean, row.stderr, row.n, what) for row in rows]


def _content(
    place: Path,
    runs: "Mapping[tuple[_Condition, int], TrainedRun]",
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
                    "rule": condition.rule,
                    "budget": condition.budget,
                    "seed": number,
                    "folder": str(run.folder),
                    "training_seconds": run.seconds,
                    **_recipe(run),
                }
                for (condition, number), run in runs.items()
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
