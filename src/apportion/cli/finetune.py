"""``apportion finetune``: a pruned model learns again what pruning made it forget, and stays as sparse."""

import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apportion.cli import options as given
from apportion.cli.errors import about
from apportion.cli.output import answer, finite, show, tell
from apportion.errors import InputError

if TYPE_CHECKING:
    from apportion.weights.finetune import Finetuned
    from apportion.weights.squarehead import Distillation

_LOSS, _TEXT, _TRAINING, _MACHINE = "Loss", "Text", "Training", "Machine and files"
_DONE, _STATE = "finetune.json", "training"
_STEPS = 200


def finetune(
    pruned: Annotated[
        str,
        typer.Argument(metavar="PRUNED", help="A folder with a pruned model, such as `apportion prune` writes."),
    ],
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The dense model that it was pruned from: smollm2, a folder, a Hugging Face id. Only ce needs none.",
            rich_help_panel=_LOSS,
            show_default=False,
        ),
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="squarehead (ce+sq, the paper's), or a sum of ce (right answers), kl (the teacher's predictions) and "
            "sq (its hidden states), such as ce, ce+kl or ce+0.5*kl+sq.",
            rich_help_panel=_LOSS,
        ),
    ] = "squarehead",
    temperature: Annotated[float, typer.Option(help="Of kl.", rich_help_panel=_LOSS)] = 1.0,
    eps: Annotated[
        float,
        typer.Option(help="Of sq; smaller lets layers with small activations count more.", rich_help_panel=_LOSS),
    ] = 2.0**-7,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of the finetuned model; default runs/PRUNED-LOSS-SEED.", show_default=False
        ),
    ] = None,
    json: given.Json = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the text.")] = 0,
    text: Annotated[
        str,
        typer.Option(help="english, code, a file, a folder or a glob pattern in quotes.", rich_help_panel=_TEXT),
    ] = "english",
    context: Annotated[int, typer.Option(min=2, help="Tokens a row.", rich_help_panel=_TEXT)] = 128,
    held_out: Annotated[
        int, typer.Option(min=1, help="Rows, of other files, to measure perplexity on.", rich_help_panel=_TEXT)
    ] = 32,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help=f"Optimiser steps; default {_STEPS}.", rich_help_panel=_TRAINING, show_default=False),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="The same, as tokens to learn from.", rich_help_panel=_TRAINING, show_default=False),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows a step; the paper has 32.", rich_help_panel=_TRAINING)
    ] = 4,
    learning_rate: Annotated[
        float,
        typer.Option(
            help="Peak. The paper has 3e-5 to 1e-4 for 7 billion parameters; small models bear more.",
            rich_help_panel=_TRAINING,
        ),
    ] = 1e-4,
    clip_norm: Annotated[
        float | None,
        typer.Option(
            help="Largest norm of the gradients of the weights that stay; default no limit.",
            rich_help_panel=_TRAINING,
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Of both networks' products: float32 or bfloat16.", rich_help_panel=_TRAINING)
    ] = "float32",
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps.", rich_help_panel=_TRAINING)] = 100,
    device: given.Device = "cpu",
) -> None:
    """Train a pruned model on text, its zeros held, by its dense teacher; perplexity before and after.

    Every linear layer with at least 10 % zeros keeps exactly these; all other weights learn. With squarehead they learn
    the next token, and to leave behind after each block the hidden states that the teacher does. What is written is an
    ordinary model folder, as sparse as the one given.

    It takes memory for five times the weights, and holds three times the weights in a checkpoint while it runs. Stop it
    whenever you like: the same command goes on where it was.

    Example: [cyan]apportion finetune runs/pruned --teacher smollm2 --text code --steps 200 --out runs/recovered[/cyan]
    """
    from apportion.data.files import check_writable
    from apportion.features.run import check_text
    from apportion.weights.squarehead import Distillation

    started = time.perf_counter()
    with about("--loss"):
        distillation = Distillation.parse(loss, temperature=temperature, eps=eps)
    if distillation.needs_teacher and teacher is None:
        raise InputError(f"--loss {loss} needs --teacher: name the dense model, such as smollm2, or use --loss ce")
    if steps is not None and tokens is not None:
        raise InputError(f"--steps {steps} and --tokens {tokens}: give one of them")
    if precision not in ("float32", "bfloat16"):
        raise InputError(f"--precision {precision}: one of float32, bfloat16")
    wanted = steps or (_STEPS if tokens is None else math.ceil(tokens / (batch_size * context)))
    place = out or given.default_out(pruned, loss.replace("*", "x"), str(seed))
    asked: dict[str, Any] = {
        "pruned": pruned,
        "teacher": teacher if distillation.needs_teacher else None,
        "distillation": vars(distillation),
        "text": text,
        "context": context,
        "held_out": held_out,
        "steps": wanted,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "clip_norm": clip_norm,
        "precision": precision,
        "seed": seed,
    }
    with about("--text"):
        check_text(text)
    with about("--out"):
        if place.resolve() == Path(pruned).resolve():
            raise InputError(f"{place} is the pruned model itself: choose another folder")
        check_writable(place)
        _check_place(place)
    found = _finished(place, asked)
    if found is None:
        result = _run(place, asked, distillation, checkpoint_every, device)
        found = {"asked": asked, **_figures(result), "seconds": round(time.perf_counter() - started, 2)}
        _keep(place, found)
    else:
        tell(f"{place} holds this very run, finished")
    _tell(found, place, json)


def _run(
    place: Path, asked: Mapping[str, Any], distillation: "Distillation", checkpoint_every: int, device: str
) -> "Finetuned":
    from apportion.data import corpus
    from apportion.models import load
    from apportion.models.saving import save_model
    from apportion.weights.finetune import FinetuneSettings, finetune, read_contexts

    settings = FinetuneSettings(
        steps=asked["steps"],
        batch_size=asked["batch_size"],
        learning_rate=asked["learning_rate"],
        clip_norm=asked["clip_norm"],
        precision=asked["precision"],
        seed=asked["seed"],
        checkpoint_every=checkpoint_every,
    )
    with about("PRUNED"):
        student = load(asked["pruned"], device=device)
    teacher = None
    if asked["teacher"] is not None:
        with about("--teacher"):
            teacher = load(asked["teacher"], device=device)
    with about("--text"):
        contexts = read_contexts(
            student,
            corpus(asked["text"]),
            context=asked["context"],
            train=settings.steps * settings.batch_size,
            held_out=asked["held_out"],
        )
    tell(f"{len(contexts.train)} rows to learn from, {len(contexts.held_out)} of other files to judge on")
    result = finetune(student, contexts, settings, place / _STATE, teacher=teacher, distillation=distillation)
    save_model(student, place)
    return result


def _check_place(place: Path) -> None:
    """Refuse a folder with other things in it, before anything expensive begins."""
    names = sorted(each.name for each in place.iterdir() if not each.name.startswith("."))
    if names and _DONE not in names and _STATE not in names:
        raise InputError(f"{place} is not empty ({', '.join(names[:3])}) and holds no such run: choose a new folder")


def _finished(place: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a finished run of these very settings found, if the folder holds one."""
    from apportion.data.files import read_json

    if not (place / _DONE).exists():
        return None
    found: dict[str, Any] = read_json(place / _DONE)
    other = [name for name, value in asked.items() if found.get("asked", {}).get(name, "absent") != value]
    if other:
        raise InputError(
            f"--out: {place} holds another finished run (its {', '.join(other)} differ): choose another folder"
        )
    return found


def _figures(result: "Finetuned") -> dict[str, Any]:
    before, after = result.weights_before, result.weights_after
    return finite(
        {
            "perplexity": {"before": result.before, "after": result.after, "teacher": result.teacher},
            "sparsity": {
                "before": before.sparsity,
                "after": after.sparsity,
                "of_all_parameters": after.sparsity_of_all,
            },
            "weights": {"kept_before": before.kept, "kept_after": after.kept, "prunable": after.prunable},
            "parameters": after.parameters,
            "resumed_from": result.training.resumed_from,
            "training_seconds": round(result.training.seconds, 2),
        }
    )


def _keep(place: Path, found: dict[str, Any]) -> None:
    from apportion.data.files import write_json

    write_json(place / _DONE, found)
    # Three times the weights each, of no use once the model is there.
    shutil.rmtree(place / _STATE / "checkpoints", ignore_errors=True)


def _tell(found: dict[str, Any], place: Path, json: bool) -> None:
    asked, perplexity, weights = found["asked"], found["perplexity"], found["weights"]
    if json:
        from apportion.studies import machine

        content = {name: value for name, value in found.items() if name != "asked"}
        answer({"command": "finetune", "out": str(place), **content, "settings": asked, "machine": machine()})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for heading in ("perplexity", "sparsity", "weights that are not 0"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, moment in (("as given", "before"), (f"after {asked['steps']} steps", "after")):
        table.add_row(
            name,
            _number(perplexity[moment]),
            f"{found['sparsity'][moment]:.2%}",
            f"{weights[f'kept_{moment}']:,} of {weights['prunable']:,}",
        )
    if asked["teacher"] is not None:
        table.add_row(f"its teacher, {Path(asked['teacher']).name}", _number(perplexity["teacher"]), "", "")
    show(
        table,
        "",
        "Sparsity is that of the layers with zeros; of all parameters it is "
        f"{found['sparsity']['of_all_parameters']:.2%}. Perplexity is on up to {asked['held_out']} rows of "
        f"{asked['context']} tokens, of files that it did not learn from.",
        f"The model is in {place}. Next:",
        f'  apportion generate {place} --prompt "..."',
    )


def _number(value: float | None) -> str:
    return "beyond numbers" if value is None else f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"
