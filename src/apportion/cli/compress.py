"""``apportion compress``: write a pruned model so that its files are as small as its zeros allow."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apportion.cli import options as given
from apportion.cli.errors import about
from apportion.cli.generate import size_text
from apportion.cli.output import answer, show
from apportion.errors import InputError

if TYPE_CHECKING:
    from apportion.weights.checkpoint import Saved

_FORMATS = ("auto", "bitmap", "csr", "nm", "block", "dense")
_DTYPES = ("float32", "bfloat16")


def compress(
    model: given.Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; its files are replaced.")],
    format: Annotated[
        str,
        typer.Option(
            help="auto (the smallest for each matrix), bitmap, csr, nm, block; dense writes a plain transformers model."
        ),
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="To store values in: float32, or bfloat16, which rounds a float32 model.")
    ] = "float32",
    json: given.Json = False,
) -> None:
    """Write a model whose weights were pruned so that zeros take no room, and say what that is worth.

    What is written is loaded by every command here as it is, into plain dense weights, bit for bit the same; `apportion
    generate DIR --sparse` keeps it packed. To go back: [cyan]apportion compress DIR --out PLAIN --format dense[/cyan]

    Example: [cyan]apportion compress runs/pruned --out runs/small --dtype bfloat16[/cyan]
    """
    import torch

    from apportion.models import load
    from apportion.weights.checkpoint import save_compressed, save_transformers

    if format not in _FORMATS:
        raise InputError(f"--format {format}: choose from {', '.join(_FORMATS)}")
    if dtype not in _DTYPES:
        raise InputError(f"--dtype {dtype}: choose from {', '.join(_DTYPES)}")
    if Path(model).expanduser().resolve() == out.expanduser().resolve():
        raise InputError(f"--out {out} is MODEL itself: write to another folder")
    from apportion.data.files import check_writable

    with about("--out"):
        check_writable(out)
    with about("MODEL"):
        lm = load(model, dtype)
    if format == "dense":
        with about("--out"):
            save_transformers(lm, out)
        file_bytes = sum(each.stat().st_size for each in out.glob("*.safetensors"))
        if json:
            answer({"command": "compress", "model": model, "out": str(out), "format": "dense", "bytes": file_bytes})
        else:
            show(f"Wrote {out}, a plain transformers model: {size_text(file_bytes)} of weights in {dtype}")
        return
    with about("--out"):
        saved = save_compressed(lm, out, format, getattr(torch, dtype))
    if json:
        answer(_content(model, out, format, dtype, saved))
        return
    _show(saved, dtype)


def _content(model: str, out: Path, format: str, dtype: str, saved: "Saved") -> dict[str, Any]:
    return {
        "command": "compress",
        "model": model,
        "out": str(out),
        "format": format,
        "dtype": dtype,
        "bytes": saved.bytes,
        "dense_bytes": saved.dense_bytes,
        "ratio": saved.dense_bytes / saved.bytes,
        "by_format": _by_format(saved),
        "weights": [
            {
                "name": each.name,
                "shape": list(each.shape),
                "zeros": 1 - each.nonzeros / max(1, each.shape[0] * each.shape[1]),
                "format": each.format,
                "bytes": each.bytes,
                "dense_bytes": each.dense_bytes,
                "by_format": each.by_format,
                "runs_dense": each.runs_dense or None,
            }
            for each in saved.weights
        ],
    }


def _by_format(saved: "Saved") -> dict[str, dict[str, int]]:
    """Bytes of all matrices in each format (dense where it cannot hold one), and how many it was chosen for."""
    names = [name for name in _FORMATS[1:] if any(name in each.by_format for each in saved.weights)]
    return {
        name: {
            "bytes": sum(each.by_format.get(name, each.by_format["dense"]) for each in saved.weights),
            "holds": sum(name in each.by_format for each in saved.weights),
            "chosen": sum(each.format == name for each in saved.weights),
        }
        for name in names
    }


def _show(saved: "Saved", dtype: str) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("format")
    for heading in ("matrices in it", "all in it", "of dense", "chosen for"):
        table.add_column(heading, justify="right", no_wrap=True)
    formats = _by_format(saved)
    dense = formats["dense"]["bytes"] if formats else 0
    for name, each in sorted(formats.items(), key=lambda item: item[1]["bytes"]):
        share = each["bytes"] / dense if dense else 1.0
        table.add_row(name, str(each["holds"]), size_text(each["bytes"]), f"{share:.1%}", str(each["chosen"]))
    places = sum(each.shape[0] * each.shape[1] for each in saved.weights)
    zeros = 1 - sum(each.nonzeros for each in saved.weights) / max(1, places)
    show(
        table,
        "",
        f"{zeros:.1%} of the {places:,} weights in {len(saved.weights)} matrices are zero; values are {dtype}",
        f"Wrote {saved.folder}: {size_text(saved.bytes)} of weights, dense {size_text(saved.dense_bytes)} "
        f"({saved.dense_bytes / saved.bytes:.2f} times as much)",
    )
    for reason, names in _running_dense(saved).items():
        more = "" if len(names) == 1 else f" and {len(names) - 1} more"
        show(f"Dense when it runs: {names[0]}{more}: {reason}")
    if zeros < 0.05:
        show("There is next to nothing to gain: prune the model first")


def _running_dense(saved: "Saved") -> dict[str, list[str]]:
    """Matrices that `apportion generate --sparse` does not keep packed, by the reason."""
    found: dict[str, list[str]] = {}
    for each in saved.weights:
        if each.runs_dense:
            found.setdefault(each.runs_dense, []).append(each.name)
    return found
