"""``apportion prune``: a model in, a smaller-by-zeros one out, without training; and what it cost."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apportion.cli import options as given
from apportion.cli.errors import about
from apportion.cli.output import answer, show
from apportion.errors import InputError

if TYPE_CHECKING:
    from apportion.weights.pruned_checkpoint import PrunedCheckpoint

_METHOD, _TEXT, _MACHINE = "Method", "Text", "Machine and files"


def prune(
    model: given.Model,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="wanda, sparsegpt, dsnot, magnitude ...; `list` shows all.",
            rich_help_panel=_METHOD,
        ),
    ] = "wanda",
    pattern: Annotated[
        str,
        typer.Option(
            help="A sparsity such as 0.5; N:M such as 2:4 (2 of 4 stay); or blocks such as block:16 or block:16:0.7.",
            rich_help_panel=_METHOD,
        ),
    ] = "0.5",
    scope: Annotated[
        str,
        typer.Option(
            help="Which weights compete for a sparsity: those of a row (of an output), or of a layer. SparseGPT's are "
            "those of 128 columns.",
            rich_help_panel=_METHOD,
        ),
    ] = "row",
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Layers to prune, such as '*.mlp.*'; may be repeated.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES", help="Layers to leave dense; may be repeated.", rich_help_panel=_METHOD, show_default=False
        ),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(help="english, code, a file, a folder or a glob pattern in quotes.", rich_help_panel=_TEXT),
    ] = "english",
    evaluation: Annotated[
        str | None,
        typer.Option(
            help="Text to measure perplexity on; default every other document of the calibration text.",
            rich_help_panel=_TEXT,
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Windows of calibration text (the papers: 128).", rich_help_panel=_TEXT)
    ] = 32,
    context: Annotated[
        int, typer.Option(min=2, help="Tokens of a window (the papers: 2048).", rich_help_panel=_TEXT)
    ] = 512,
    evaluation_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to measure perplexity on, at least.", rich_help_panel=_TEXT)
    ] = 8192,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of windows.", rich_help_panel=_TEXT)] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the pruned model; default runs/MODEL-METHOD-PATTERN.",
            rich_help_panel=_MACHINE,
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Windows that go through a block together.", rich_help_panel=_MACHINE)
    ] = 4,
    json: given.Json = False,
    model_dtype: given.ModelDtype = "float32",
    device: given.Device = "cpu",
) -> None:
    """Prune a language model without training, layer by layer, and write it as an ordinary Hugging Face folder.

    A block is watched on the calibration text, pruned, and run again for the next one: only one block is on --device at
    a time. Stop it whenever you like: the same command goes on after the last block that was finished.

    Pruned weights are zeros: the folder is as large as before, and as fast. pruning.json beside the model has every
    layer's sparsity and error, and perplexity before and after on held-out text.

    Example: [cyan]apportion prune smollm2 --method sparsegpt --pattern 2:4 --out runs/two-of-four[/cyan]
    """
    from apportion.models import load
    from apportion.models.language import device_named
    from apportion.weights.one_shot_catalogue import CATALOGUE, one_shot_method
    from apportion.weights.patterns import parse_pattern
    from apportion.weights.pruned_checkpoint import Text, check_output_folder, prune_to_folder, read_windows

    if method == "list":
        _list({name: each.says for name, each in CATALOGUE.items()}, json)
        return
    started = time.perf_counter()
    with about("--method"):
        chosen = one_shot_method(method)
    if scope not in ("row", "layer"):
        raise InputError(f"--scope {scope}: use row or layer")
    with about("--pattern"):
        wanted = parse_pattern(pattern, scope)  # type: ignore[arg-type]
        if wanted.density >= 1:
            raise InputError(f"{pattern!r} keeps every weight: nothing would be pruned; use a sparsity such as 0.5")
        chosen.check(wanted)
    text = Text(calibration, evaluation, samples, context, evaluation_tokens, seed)
    for option, each in (("--calibration", calibration), ("--evaluation", evaluation)):
        if each is not None:
            from apportion.features.run import check_text

            with about(option):
                check_text(each)
    place = out or given.default_out(model, method, pattern.replace(":", "-"))
    with about("--out"):
        check_output_folder(place)
    with about("MODEL"):
        compute = device_named(device)
        # Blocks go to the device one by one; the rest stays here.
        lm = load(model, model_dtype, "cpu")
        if not lm.is_causal:
            raise InputError(f"{model} does not predict the next token: use a causal language model, such as smollm2")
    with about("--calibration" if evaluation is None else "--calibration and --evaluation"):
        windows = read_windows(lm, text)
    done = prune_to_folder(
        lm,
        windows,
        chosen,
        wanted,
        place,
        text=vars(text),
        include=include or ("*",),
        exclude=exclude or (),
        batch_size=batch_size,
        device=compute,
    )
    if json:
        from apportion.studies import machine

        content = done.to_json()
        content["seconds_of_blocks"] = content.pop("seconds")
        answer(
            {
                "command": "prune",
                "model": model,
                "out": str(place),
                "method": method,
                "pattern": str(wanted),
                "resumed_from": done.report.resumed_from,
                **content,
                "seconds": round(time.perf_counter() - started, 2),
                "machine": machine(),
            }
        )
        return
    _show(done, model)


def _show(done: "PrunedCheckpoint", model: str) -> None:
    from rich.table import Table
    from rich.text import Text as Plain

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layers", no_wrap=True)
    for heading in ("weights", "sparsity", "error of the output"):
        table.add_column(heading, justify="right", no_wrap=True)
    kinds: dict[str, list[Any]] = {}
    for each in done.report.layers:
        kinds.setdefault(".".join(each.name.split(".")[-2:]), []).append(each)
    for kind, layers in kinds.items():
        errors = [each.error for each in layers if each.error is not None]
        table.add_row(
            Plain(f"{len(layers)} x {kind}"),
            f"{sum(each.shape[0] * each.shape[1] for each in layers):,}",
            f"{sum(each.sparsity for each in layers) / len(layers):.1%}",
            f"{sum(errors) / len(errors):.4f}" if errors else "-",
        )
    show(
        table,
        "",
        Plain(
            f"{done.report.sparsity:.1%} of these weights are 0. Perplexity on {done.evaluated_tokens:,} held-out "
            f"tokens: {done.perplexity_before:.2f} before, {done.perplexity_after:.2f} after"
        ),
        Plain(f"{'It was finished before. ' if done.finished_before else ''}The model is in {done.folder}"),
    )


def _list(says: dict[str, str], json: bool) -> None:
    if json:
        answer({"command": "prune", "methods": [{"name": name, "says": each} for name, each in says.items()]})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("method", "what it does"):
        table.add_column(heading, no_wrap=heading == "method")
    for name, each in says.items():
        table.add_row(name, each)
    show(table)
