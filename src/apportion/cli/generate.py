"""``apportion generate``: prompt in, text out, by a key method; what it cost, and where dense attention differs."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apportion.cli import keys as room
from apportion.cli import options as given
from apportion.cli.errors import about
from apportion.cli.output import answer, show
from apportion.errors import InputError

if TYPE_CHECKING:
    from apportion.keys import KeyMethod
    from apportion.keys.generation import Written
    from apportion.models import LanguageModel

_WRITING, _MACHINE = "Writing", "Machine and files"


def generate(
    model: given.Model,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="What the model goes on from, or @FILE to read it; may be repeated.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="dense, oracle, snap_kv, quantized_4 ...; `list` shows all.",
            rich_help_panel=room.METHOD,
        ),
    ] = "dense",
    budget: room.Budget = None,
    keys: room.Keys = None,
    fit: room.Fit = None,
    saved: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Read the method, with what was fitted, from here.",
            rich_help_panel=room.METHOD,
            show_default=False,
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write it there, for --saved.", rich_help_panel=room.METHOD, show_default=False
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.", rich_help_panel=_WRITING)] = 40,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's turn of a chat.", rich_help_panel=_WRITING)
    ] = False,
    sparse: Annotated[
        bool,
        typer.Option(
            "--sparse",
            help="MODEL is a folder of `apportion compress`: keep its weights packed.",
            rich_help_panel=_MACHINE,
        ),
    ] = False,
    json: given.Json = False,
    model_dtype: given.ModelDtype = "float32",
    device: given.Device = "cpu",
) -> None:
    """Let a model go on from a prompt while its attention layers remember and read keys by a method.

    Dense attention with a plain cache goes on from the same prompt, and what differs is shown: the bytes that the cache
    holds and that a step reads, tokens a second, and the first token that is another one. On short prompts a method can
    only lose time: the model's weights are read anyway, and the cache is small beside them.

    Example: [cyan]apportion generate smollm2 --prompt @notes.txt --method snap_kv --budget 1/4 --tokens 60[/cyan]
    """
    from apportion.keys.catalogue import CATALOGUE, method_named
    from apportion.models import load

    if method == "list":
        _list(json)
        return
    if not prompt:
        raise InputError("--prompt: say what the model is to go on from, as a text or as @FILE")
    wanted = room.budget_of(budget, keys, "1/16")
    texts = [_text(each) for each in prompt]
    if saved is not None:
        if method != "dense":
            raise InputError(f"--saved {saved} and --method {method}: give one of them")
        chosen = room.saved_method(saved, wanted if budget is not None or keys is not None else None)
        method = chosen.slug
    else:
        with about("--method"):
            chosen = method_named(method, wanted)
    if save is not None:
        from apportion.data.files import check_writable

        with about("--save"):
            check_writable(save)
    with about("MODEL"):
        lm = _packed_model(model, model_dtype, device) if sparse else load(model, model_dtype, device)
    chosen = room.fitted(method, chosen, lm, fit)
    if save is not None:
        chosen.save(save)
    started = time.perf_counter()
    results = [_compared(lm, text, chosen, tokens, chat) for text in texts]
    if json:
        from apportion.studies import machine

        answer(
            {
                "command": "generate",
                "model": model,
                "method": {"name": method, "settings": chosen.settings(), "says": _says(method, CATALOGUE)},
                "texts": results,
                "seconds": round(time.perf_counter() - started, 2),
                "machine": machine(),
            }
        )
        return
    for each in results:
        _show(each, method)


def _packed_model(model: str, dtype: str, device: str) -> "LanguageModel":
    from apportion.models.packed_files import is_packed
    from apportion.weights.checkpoint import load_compressed

    if not is_packed(model):
        raise InputError(
            f"{model} is no folder of packed weights: make one with `apportion compress`, or leave --sparse"
        )
    lm: LanguageModel = load_compressed(model, dtype, device)
    return lm


def _compared(lm: "LanguageModel", text: str, method: "KeyMethod", tokens: int, chat: bool) -> dict[str, Any]:
    """What a method and dense attention write after a prompt, and what differs."""
    from apportion.keys.generation import first_difference, write
    from apportion.models.generate import encode_prompts

    with about("--prompt"):
        ids = encode_prompts(lm, [text], chat=chat)["input_ids"][0]
    dense = write(lm, ids, tokens=tokens)
    written = write(lm, ids, method, tokens=tokens)
    place = first_difference(written.tokens, dense.tokens)
    found: dict[str, Any] = {"prompt": text, "prompt_tokens": len(ids)}
    found["method"] = _figures(lm, written)
    found["dense"] = _figures(lm, dense)
    usage = written.usage
    assert usage is not None
    found["method"] |= {"bytes_held": usage.bytes_held, "keys_read": usage.share_read}
    found["dense"] |= {"bytes_held": usage.bytes_held_dense, "keys_read": 1.0}
    if written.steps:
        found["method"]["bytes_per_step"] = usage.bytes_read / written.steps
        found["dense"]["bytes_per_step"] = usage.bytes_dense / written.steps
    found["first_difference"] = None if place is None else {"token": place, **_at(lm, place, written, dense)}
    return found


def _figures(lm: "LanguageModel", written: "Written") -> dict[str, Any]:
    return {
        "text": lm.tokenizer.decode(list(written.tokens), skip_special_tokens=True),
        "tokens": len(written.tokens),
        "tokens_per_second": written.tokens_per_second,
        "prompt_seconds": written.prompt_seconds,
        "compress_seconds": written.compress_seconds,
    }


def _at(lm: "LanguageModel", place: int, written: "Written", dense: "Written") -> dict[str, str | None]:
    pairs = (("method", written), ("dense", dense))
    return {
        name: lm.tokenizer.decode([each.tokens[place]]) if place < len(each.tokens) else None for name, each in pairs
    }


def _text(prompt: str) -> str:
    if not prompt.startswith("@"):
        return prompt
    path = Path(prompt[1:])
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt {prompt}: {path} cannot be read as text ({error})") from error


def _says(name: str, catalogue: Any) -> str:
    return catalogue[name].says if name in catalogue else ""


def _list(json: bool) -> None:
    from apportion.keys.catalogue import CATALOGUE

    if json:
        methods = [{"name": name, "saves": each.saves, "says": each.says} for name, each in CATALOGUE.items()]
        answer({"command": "generate", "methods": methods})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("method", "saves", "what it does"):
        table.add_column(heading, no_wrap=heading != "what it does")
    for name, each in CATALOGUE.items():
        table.add_row(name, each.saves, each.says)
    show(table, "kvpress:NAME is a press of kvpress, where that is installed")


def _show(found: dict[str, Any], method: str) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for heading in ("tokens/s", "prompt s", "cache held", "read a step", "keys read"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, each in ((method, found["method"]), ("dense", found["dense"])):
        speed, read = each["tokens_per_second"], each.get("bytes_per_step")
        table.add_row(
            name,
            "-" if speed is None else f"{speed:.1f}",
            f"{each['prompt_seconds'] + each['compress_seconds']:.2f}",
            size_text(each["bytes_held"]),
            "-" if read is None else size_text(read),
            f"{each['keys_read']:.1%}",
        )
    show(Text(found["method"]["text"]), "", table, Text(_difference(found)), "")


def _difference(found: dict[str, Any]) -> str:
    place = found["first_difference"]
    if place is None:
        return f"The same {found['dense']['tokens']} tokens as dense attention"
    method, dense = (repr(place[name]) if place[name] is not None else "the end" for name in ("method", "dense"))
    return f"The first other token is number {place['token'] + 1}: {method} where dense attention has {dense}"


def size_text(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
