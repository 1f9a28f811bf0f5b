"""What the commands of the keys room share: finding, fitting and reading methods, before anything expensive begins."""

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apportion.cli.errors import about
from apportion.cli.output import tell
from apportion.errors import InputError

if TYPE_CHECKING:
    from apportion.keys import KeyBudget, KeyMethod
    from apportion.models import LanguageModel

METHOD = "Method"
_FIT_DOCUMENTS = 16

Budget = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE",
        help="Keys a query reads, or tokens kept of a prompt: a share such as 1/16.",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
Keys = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="The same as a number of tokens.", rich_help_panel=METHOD, show_default=False
    ),
]
Fit = Annotated[
    str | None,
    typer.Option(
        metavar="TEXTS",
        help="Fit methods that need it on these: english, code, a file, a folder or a glob pattern.",
        rich_help_panel=METHOD,
    ),
]


def budget_of(budget: str | None, keys: int | None, default: str) -> "KeyBudget":
    """The budget that was asked for."""
    from apportion.keys import KeyBudget
    from apportion.keys.catalogue import parse_budget

    if budget is not None and keys is not None:
        raise InputError(f"--budget {budget} and --keys {keys}: give one of them")
    if keys is not None:
        return KeyBudget(keys=keys)
    with about("--budget"):
        return parse_budget(default if budget is None else budget)


def fitted(name: str, method: "KeyMethod", lm: "LanguageModel", fit: str | None) -> "KeyMethod":
    """A method that can be used: fitted to texts if it needs that."""
    from apportion.data import corpus
    from apportion.data.tasks.cache_suite import PROSE_DOCUMENTS

    if not method.needs_fit or method.fitted:
        with about(name):
            method.check(lm)
        return method
    if fit is None:
        raise InputError(
            f"{name} has to be fitted to the model first: give --fit english (or texts of your own), or --saved FOLDER "
            "with one that was"
        )
    with about("--fit"):
        # Tasks take their prose from the first documents of the packaged corpus.
        skipped = PROSE_DOCUMENTS if fit == "english" else 0
        documents = itertools.islice(corpus(fit), skipped, skipped + _FIT_DOCUMENTS)
        texts = [each.text for each in documents]
    tell(f"fitting {name} to {len(texts)} texts")
    return method.fit(lm, texts)


def saved_method(folder: Path, budget: "KeyBudget | None") -> "KeyMethod":
    """A method from a folder, with another budget if one is given."""
    from apportion.keys import read_method

    with about("--saved"):
        method = read_method(folder)
    if budget is None:
        return method
    if "budget" not in {field.name for field in dataclasses.fields(method)}:
        raise InputError(f"--budget: {method.slug} has none")
    return dataclasses.replace(method, budget=budget)  # type: ignore[call-arg]
