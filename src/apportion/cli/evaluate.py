"""``apportion evaluate``: how good is a dictionary?"""

import time
from pathlib import Path
from typing import Annotated

import typer

from apportion.cli import options as given
from apportion.cli.output import answer, metric_table, result_rows, show, tell
from apportion.errors import InputError

_SUITE = "Suite"


def evaluate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, or of a dictionary that one has written.")
    ],
    loss: Annotated[
        bool, typer.Option(help="Also run the model with the reconstruction in place of the activation.")
    ] = True,
    contexts: given.LossContexts = 64,
    store: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Measure on these activations instead of the run's own.", show_default=False),
    ] = None,
    errors: Annotated[
        bool,
        typer.Option("--errors", help="Also audit the error: how much is linear in the activation, and what it costs."),
    ] = False,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="SAEBench's evaluations instead: all, or some of core,sparse_probing,scr,tpp,ravel,absorption,"
            "unlearning.",
            show_default=False,
            rich_help_panel=_SUITE,
        ),
    ] = None,
    suite_size: Annotated[
        str, typer.Option(metavar="SIZE", help="How much they look at: quick or full.", rich_help_panel=_SUITE)
    ] = "quick",
    seed: Annotated[int, typer.Option(min=0, help="Of what they draw.", rich_help_panel=_SUITE)] = 0,
    labelled: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Your own classes to probe for: JSON Lines with text and label.",
            show_default=False,
            rich_help_panel=_SUITE,
        ),
    ] = None,
    unlearning_data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|hf",
            help="What to unlearn: a folder with forget.txt, retain.txt and questions.jsonl, or hf for WMDP and MMLU.",
            show_default=False,
            rich_help_panel=_SUITE,
        ),
    ] = None,
    json: given.Json = False,
    device: given.Device = "cpu",
) -> None:
    """Measure a dictionary on held-out documents, each figure with its standard error and its definition.

    What is measured is what the dictionary does in use: every token alone, by calibrated thresholds.

    Example: [cyan]apportion evaluate runs/first --contexts 128[/cyan]

    Example: [cyan]apportion evaluate runs/first --suite sparse_probing,tpp[/cyan]
    """
    from apportion.data.files import write_json
    from apportion.features.run import evaluate_dictionary, open_run, reopen_store, spliced_loss
    from apportion.models import load

    started = time.perf_counter()
    if suite is not None:
        if errors:
            raise InputError("--errors and --suite are two evaluations: ask for one at a time")
        from apportion.cli.suite import run_suite_of
        from apportion.features.suite import suite_names

        run_suite_of(
            run,
            open_run(run, device),
            names=suite_names(suite),
            size=suite_size,
            seed=seed,
            labelled=labelled,
            unlearning_data=unlearning_data,
            store=store,
            json=json,
            device=device,
        )
        return
    opened = open_run(run, device)
    prepared = reopen_store(opened, store, device=device)
    source = prepared.source
    spliced = None
    if loss:
        spliced = spliced_loss(prepared, load(source.model, source.model_dtype, device), contexts)
        if spliced is None:
            tell(f"{source.model} predicts no next token, so it has no loss to recover")
    evaluation = evaluate_dictionary(opened.sae, prepared, spliced, device=device)
    # A quick look, or one at other text, must not replace what the run is known for.
    if loss and store is None and (run / "run.json").exists():
        write_json(run / "evaluation.json", evaluation)
    audit = None
    if errors:
        from apportion.features.dark_matter import audit_run

        tell("auditing the error on held-out tokens")
        audit = audit_run(opened.sae, prepared.calibration, prepared.test, spliced, device=device)
        for warning in audit.warnings:
            tell(f"warning: {warning}")
    rows = result_rows(run.name, evaluation)
    if audit is not None:
        rows += result_rows(f"{run.name}, error", audit.to_json())
    if json:
        from apportion.studies import machine

        answer(
            {
                "command": "evaluate",
                "run": str(run),
                "seeds": [opened.settings["recipe"]["seed"]],
                "rows": [row.as_dict() for row in rows],
                "evaluation": evaluation,
                "errors": None if audit is None else audit.to_json(),
                "seconds": round(time.perf_counter() - started, 2),
                "machine": machine(),
            }
        )
        return
    documents = evaluation["metrics"]["fvu"]["n"]
    show(
        metric_table(evaluation),
        "",
        f"{evaluation['tokens']:,} held-out tokens; standard errors over {documents} documents",
        *([] if audit is None else ["", metric_table(audit.to_json())]),
    )
