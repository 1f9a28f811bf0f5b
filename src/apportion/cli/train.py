"""``apportion train``: from a model and a text to a judged dictionary."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apportion.cli import options as given
from apportion.cli.errors import about
from apportion.cli.output import HEADLINE, answer, metric_table, result_rows, show
from apportion.errors import InputError

if TYPE_CHECKING:
    from apportion.features import Recipe


def train(
    model: given.Model,
    site: given.SiteName = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Train a transcoder: what it makes of --site, such as layers.9.mlp_out of layers.9.mlp_in.",
            show_default=False,
        ),
    ] = None,
    skip: Annotated[
        bool, typer.Option("--skip", help="Give the transcoder a linear path beside its features.")
    ] = False,
    rule: Annotated[
        str,
        typer.Option(help="topk, mutual (batchtopk), matryoshka, feature, feature-uniform, relu, jumprelu or gated."),
    ] = "mutual",
    features: given.Features = None,
    budget: given.Budget = 32,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the run; default runs/MODEL-SITE-RULE-SEED.", show_default=False),
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
    gradient_weight: Annotated[
        float | None,
        typer.Option(
            metavar="BETA",
            help="Let the loss's gradients help to choose features (gradient SAE); 0.1 to 3, 1 doubles the score of a "
            "feature of average effect.",
            show_default=False,
        ),
    ] = None,
    gradient_target: Annotated[
        str, typer.Option(help="Whose loss with --gradient-weight: of the true next tokens (label), or sampled ones.")
    ] = "label",
    checkpoint_every: given.CheckpointEvery = None,
    tensorboard: given.TensorBoard = False,
    model_dtype: given.ModelDtype = "float32",
    device: given.Device = "cpu",
    mesh: given.MeshShape = None,
) -> None:
    """Harvest a model's activations, train a sparse dictionary of them and measure how good it is.

    Stop it whenever you like: the same command goes on where it was, and ends with the very same weights.

    Several processes share all of it: [cyan]torchrun --nproc-per-node 4 -m apportion train smollm2 ...[/cyan]

    Example: [cyan]apportion train smollm2 --site layers.9.residual --rule topk --tokens 200000 --out runs/topk[/cyan]
    """
    from apportion.features import GradientScore, TranscoderSettings
    from apportion.features.distributed import check_over_mesh
    from apportion.features.job import join_job
    from apportion.features.run import (
        check_run_folder,
        check_transcoder,
        evaluate_dictionary,
        make_recipe,
        rule_name,
        spliced_loss,
        train_run,
    )

    started = time.perf_counter()
    rule = rule_name(rule)

    def recipe(width: int, train_tokens: int) -> "Recipe":
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
            seed=seed,
        )

    # What needs no model is checked before one is loaded; a width to fit the budget stands in for the model's.
    planned = recipe(max(1, int(budget) + 1), tokens)
    score = None if gradient_weight is None else GradientScore(gradient_weight)
    if score is not None and not planned.has_budget:
        raise InputError(
            f"--gradient-weight and --rule {rule}: gradients help to share out a budget; use topk or mutual"
        )
    job = join_job(mesh, device)
    if skip and target is None:
        raise InputError("--skip is for transcoders: give --target too, such as layers.9.mlp_out")
    if target is not None and score is not None:
        raise InputError(
            "--gradient-weight and --target: gradients weigh the features of dictionaries, not of transcoders"
        )
    if target is not None:
        check_transcoder(job, planned)
    if job.mesh is not None:
        check_over_mesh(planned)
    if out is not None:
        with about("--out"):
            check_run_folder(out)
    data = given.DataOptions(
        model,
        site,
        text,
        dataset,
        tokens,
        context,
        store_dtype,
        model_dtype,
        held_out,
        store,
        job.device,
        gradients=None if score is None else gradient_target,
        target=target,
    )
    lm, prepared = data.prepare(lambda width: recipe(width, tokens), job)
    what = prepared.source.site if target is None else f"{prepared.source.site}-to-{target}{'-skip' if skip else ''}"
    place = out or given.default_out(model, what, rule, str(seed))
    settings: dict[str, Any] = {"tensorboard": tensorboard}
    if checkpoint_every is not None:
        settings["checkpoint_every"] = checkpoint_every
    run = train_run(
        place,
        prepared,
        recipe(prepared.train.width, prepared.train.n_tokens),
        score=score,
        judge=lambda sae: evaluate_dictionary(sae, prepared, spliced_loss(prepared, lm), device=job.device),
        device=job.device,
        job=job,
        transcoder=None if target is None else TranscoderSettings(skip=skip),
        **settings,
    )
    job.leave()
    if not job.first:
        return
    assert run.evaluation is not None
    if json:
        from apportion.studies import machine

        answer(
            {
                "command": "train",
                "run": str(place),
                "dictionary": str(place / "dictionary"),
                "store": str(prepared.store.folder),
                "rule": rule,
                "seeds": [seed],
                "steps": run.settings["recipe"]["steps"],
                "resumed_from": run.resumed_from,
                "rows": [row.as_dict() for row in result_rows(rule, run.evaluation)],
                "seconds": round(time.perf_counter() - started, 2),
                "machine": machine(),
                "settings": {name: run.settings[name] for name in ("recipe", "source")},
            }
        )
        return
    show(
        metric_table(run.evaluation, HEADLINE),
        "",
        f"The dictionary is in {place / 'dictionary'}. Next:",
        f"  apportion evaluate {place}",
        f"  apportion report {place}",
        *([] if target is None else [f'  apportion circuit {place} --prompt "..."']),
    )
