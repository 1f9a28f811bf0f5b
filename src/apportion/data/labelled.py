"""Texts of known class, made from what every installation holds, or read from people's own files.

Probes need labelled text, and most labelled text lives on a hub. These classes need none of it: the standard library,
numpy, scipy and scikit-learn have their sources and their docstrings on every machine that runs apportion, and each of
their texts has a kind (code or prose), a home (which library, which package) and, if it is code, a construct. Train and
test texts never come from the same file.
"""

import ast
import hashlib
import json
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from apportion.data.corpora import (
    DOCTEST,
    SHORTEST_DOCSTRING,
    docstrings_in,
    folder_of_package,
    python_files,
    standard_library,
)
from apportion.errors import InputError

# Some 60 tokens of code, 80 of prose: enough to tell classes apart, cheap to run a model on.
_CHARACTERS = 320
# One file may not make up a class.
_PIECES_A_FILE = 16
# Every third file is for testing, by a hash of its name.
_TEST_SHARE = 3
_LIBRARIES = {"numpy": "numpy", "scipy": "scipy", "sklearn": "scikit-learn"}
_MODULES = ("asyncio", "email", "idlelib", "multiprocessing", "xml")


@dataclass(frozen=True)
class LabelledTexts:
    """Texts by class, in two parts that share no file.

    Attributes:
        name: of the set.
        what: one line on what the classes are.
        train: class -> texts to fit on.
        test: class -> texts to judge on.
    """

    name: str
    what: str
    train: dict[str, list[str]]
    test: dict[str, list[str]]

    def __post_init__(self) -> None:
        if len(self.train) < 2 or set(self.train) != set(self.test):
            raise InputError(
                f"the labelled texts {self.name!r} need two classes or more, the same to train and to test on: "
                f"got {', '.join(self.train) or 'none'} and {', '.join(self.test) or 'none'}"
            )

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return list(self.train)

    def sizes(self) -> dict[str, list[int]]:
        """Class -> number of texts to train on, and to test on."""
        return {name: [len(self.train[name]), len(self.test[name])] for name in self.train}


_SETS: dict[str, str] = {
    "kind": "Python code, docstrings, and the pages of Python's reference manual",
    "library": "docstrings of Python's standard library, numpy, scipy and scikit-learn",
    "module": "code of five packages of the standard library",
    "construct": "functions that handle exceptions, that raise one, and that loop",
}
LABELLED_SETS = tuple(_SETS)


def labelled_texts(name: str, train: int, test: int, seed: int = 0) -> LabelledTexts:
    """A packaged set of labelled texts.

    Args:
        name: one of ``LABELLED_SETS``.
        train: texts a class to train on; fewer where there are no more.
        test: texts a class to test on.
        seed: which of the texts.

    Raises:
        InputError: no such set.
    """
    if name not in _SETS:
        raise InputError(
            f"labelled texts {name!r} are unknown: choose of {', '.join(_SETS)}, or give files of your own"
        )
    code, prose = _code_of, _prose_of
    sources: dict[str, Callable[[], Iterator[tuple[str, str]]]]
    if name == "kind":
        sources = {"code": partial(code, "python"), "docstring": partial(prose, "python"), "manual": _manual}
    elif name == "library":
        sources = {each: partial(prose, each) for each in ("python", *_LIBRARIES)}
    elif name == "module":
        sources = {each: partial(code, "python", each) for each in _MODULES}
    else:
        kinds = {"handler": _handles, "raise": _raises, "loop": _loops}
        sources = {each: partial(code, "python", only=kinds[each]) for each in kinds}
    return _drawn(name, _SETS[name], sources, train, test, seed)


def crossed_texts(
    first: tuple[str, str], train: int, test: int, seed: int = 0
) -> tuple[dict[tuple[str, str], list[str]], dict[tuple[str, str], list[str]]]:
    """Texts of two libraries in two kinds, each kind of each library: what a spurious correlation is made of.

    Args:
        first: two of ``python``, ``numpy``, ``scipy``, ``sklearn``.
        train: texts a cell to train on.
        test: texts a cell to test on.
        seed: which of the texts.

    Returns:
        (library, ``code`` or ``prose``) -> texts, to train on and to test on.
    """
    sources: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {}
    for library in first:
        sources[f"{library}/code"] = partial(_code_of, library)
        sources[f"{library}/prose"] = partial(_prose_of, library)
    drawn = _drawn("crossed", "two libraries in two kinds", sources, train, test, seed)
    parts = []
    for part in (drawn.train, drawn.test):
        parts.append({(name.split("/")[0], name.split("/")[1]): texts for name, texts in part.items()})
    return parts[0], parts[1]


def read_labelled(path: Path | str, train: int, test: int, seed: int = 0) -> LabelledTexts:
    """Labelled texts of one's own.

    Args:
        path: a JSON Lines file whose lines have ``text`` and ``label`` (and, if texts of one origin must not be split,
            ``group``).
        train: texts a class to train on.
        test: texts a class to test on.
        seed: which of the texts.

    Raises:
        InputError: unreadable, a line without the two, or a class of fewer than 4 texts.
    """
    path = Path(path).expanduser()
    by_class: dict[str, list[tuple[str, str]]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error}): give a JSON Lines file") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, label = str(row["text"]), str(row["label"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}, line {number}: not an object with text and label ({type(error).__name__}: {error})"
            ) from error
        by_class.setdefault(label, []).append((str(row.get("group", number)), text))
    if few := [label for label, texts in by_class.items() if len(texts) < 4]:
        raise InputError(f"{path}: class {few[0]!r} has fewer than 4 texts; leave it out or give more")
    sources: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
        label: partial(iter, texts) for label, texts in by_class.items()
    }
    return _drawn(path.name, f"{len(by_class)} classes of {path.name}", sources, train, test, seed, cut=False)


def _drawn(
    name: str,
    what: str,
    sources: dict[str, Callable[[], Iterator[tuple[str, str]]]],
    train: int,
    test: int,
    seed: int,
    cut: bool = True,
) -> LabelledTexts:
    if train < 1 or test < 1:
        raise InputError(f"train={train}, test={test} texts a class: both must be at least 1")
    parts: tuple[dict[str, list[str]], dict[str, list[str]]] = {}, {}
    for label, read in sources.items():
        kept: tuple[list[str], list[str]] = [], []
        # More than is wanted, so that seeds draw different texts without all of the sources being read.
        wanted = (train + train // 2, test + test // 2)
        for file, text in read():
            place = 1 if _hash(file) % _TEST_SHARE == 0 else 0
            if len(kept[place]) < wanted[place]:
                kept[place].append(text[:_CHARACTERS] if cut else text)
            if all(len(found) >= enough for found, enough in zip(kept, wanted, strict=True)):
                break
        for found, part, size in zip(kept, parts, (train, test), strict=True):
            random.Random(f"{seed} {label}").shuffle(found)
            part[label] = found[:size]
        if not (parts[0][label] and parts[1][label]):
            raise InputError(f"labelled texts {name!r}: class {label!r} has too few texts to train and to test on")
    return LabelledTexts(name, what, *parts)


def _files_of(library: str, module: str = "") -> Iterator[tuple[str, ast.Module]]:
    """Parsed files of a library, in an order that mixes them; those that do not parse are passed over."""
    root = standard_library() if library == "python" else folder_of_package(library)
    if root is None:
        raise InputError(f"the package {library} is not installed, whose texts are asked for")
    files = python_files(library, root / module)
    if library == "python" and not module:
        files = [
            (name, path) for name, path in files if not name.startswith(("python/pydoc_data/", "python/encodings/"))
        ]
    for name, path in sorted(files, key=lambda file: _hash(file[0])):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield name, ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue


def _prose_of(library: str) -> Iterator[tuple[str, str]]:
    seen = set()
    for file, module in _files_of(library):
        found = 0
        for _, text in docstrings_in(module, ""):
            prose = DOCTEST.sub("", text).strip()
            if len(prose) >= SHORTEST_DOCSTRING and prose not in seen and found < _PIECES_A_FILE:
                seen.add(prose)
                found += 1
                yield file, prose


def _code_of(
    library: str, module: str = "", only: Callable[[ast.AST], bool] | None = None
) -> Iterator[tuple[str, str]]:
    """Functions without docstrings and comments, so that code has no prose in it."""
    for file, parsed in _files_of(library, module):
        found = 0
        for node in ast.walk(parsed):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or found >= _PIECES_A_FILE:
                continue
            if only is not None and not only(node):
                continue
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
            text = ast.unparse(node)
            if len(text) >= SHORTEST_DOCSTRING:
                found += 1
                yield file, text


def _manual() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items(), key=lambda item: _hash(item[0])):
        pieces = [text[start : start + _CHARACTERS] for start in range(0, len(text), _CHARACTERS)]
        for piece in pieces[:_PIECES_A_FILE]:
            if len(piece.strip()) >= SHORTEST_DOCSTRING:
                yield name, piece


def _handles(node: ast.AST) -> bool:
    return _has(node, ast.Try)


def _raises(node: ast.AST) -> bool:
    return _has(node, ast.Raise) and not _has(node, ast.Try) and not _has(node, ast.For)


def _loops(node: ast.AST) -> bool:
    return _has(node, ast.For) and not _has(node, ast.Try) and not _has(node, ast.Raise)


def _has(node: ast.AST, kind: type[ast.AST]) -> bool:
    return any(isinstance(each, kind) for each in ast.walk(node))


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:6], "big")
