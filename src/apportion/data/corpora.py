"""Text: two corpora that every Python installation already holds, people's own files, and Hugging Face data sets."""

import ast
import glob
import hashlib
import importlib.util
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from apportion.errors import InputError

# Longer texts become several documents, so that a book can be split into train and held-out text and need not fit in
# memory. 20,000 characters are some 5,000 tokens: many contexts, yet a file of a thousand lines stays in few pieces.
_SECTION = 20_000
# Shorter docstrings ("Return repr(self).") are labels rather than prose.
SHORTEST_DOCSTRING = 200
_NOT_ORDINARY_CODE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
DOCTEST = re.compile(r"^[ \t]*>>>.*\n?(?:^[ \t]*\S.*\n?)*", re.MULTILINE)
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Document:
    """A text and the name people would find it by."""

    name: str
    text: str


class Corpus:
    """An iterable of documents that yields the same documents in the same order every time.

    Attributes:
        name: what `corpus` was asked for.
    """

    def __init__(self, name: str, read: Callable[[], Iterable[Document]]):
        self.name = name
        self._read = read

    def __iter__(self) -> Iterator[Document]:
        """Read the documents one after another; but for docstrings of installed packages none is kept.

        Raises:
            InputError: a file cannot be read or is not text, or there is no text at all.
        """
        empty = True
        for document in self._read():
            empty = False
            yield document
        if empty:
            raise InputError(f"corpus {self.name!r} holds no text: give files with something written in them")

    def __repr__(self) -> str:
        return f"Corpus({self.name!r})"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all names and texts in order; reads the whole corpus once."""
        digest = hashlib.sha256()
        for document in self:
            add_to_digest(digest, document)
        return digest.hexdigest()


def add_to_digest(digest: Any, document: Document) -> None:
    """Feed one document to a hash so that no two sequences of documents look alike."""
    for part in (document.name, document.text):
        # Lone surrogates (from file names, or from a data set) must not end a harvest.
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)


def corpus(source: str | Path) -> Corpus:
    """Find a corpus.

    Args:
        source: one of

            - ``english``: some 2.5 million tokens of technical English that need no network: Python's own help topics,
              the docstrings of the standard library, numpy, scipy and scikit-learn (without their examples), and
              scikit-learn's descriptions of its data sets;
            - ``code``: the sources of the standard library without its tests, some 2.5 million tokens;
            - ``hf:ID``: the column ``text`` of the split ``train`` of a Hugging Face data set (needs ``datasets``);
            - a file, a folder (all text files in it, hidden and binary ones left out) or a glob such as
              ``notes/**/*.md``.

    Returns:
        The corpus. Texts of more than 20,000 characters are cut, at blank lines if possible, into several documents.
        The first two mix their sources (files come in the order of a hash), so that every stretch is like the whole;
        people's own files come sorted by name.

    Raises:
        InputError: nothing is there, a package is missing; while iterating: a file is unreadable or not UTF-8 text.
    """
    name = str(source)
    if name == "english":
        return Corpus(name, _english)
    if name == "code":
        return Corpus(name, _code)
    if name.startswith("hf:"):
        return Corpus(name, _hugging_face(name.removeprefix("hf:")))
    path = Path(name).expanduser()
    if path.is_file():
        return Corpus(name, partial(_read_files, name, path.parent, [path], skip_binary=False))
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path))]
        if not found:
            raise InputError(f"corpus {name!r} is a folder without files: give one that holds text files")
        return Corpus(name, partial(_read_files, name, path, sorted(found), skip_binary=True))
    if glob.has_magic(name):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        found = [match for match in matches if not match.is_dir()]
        if not found:
            raise InputError(f"corpus {name!r} matches no file: check the pattern and the folder it starts from")
        return Corpus(name, partial(_read_files, name, Path(), found, skip_binary=False))
    raise InputError(f"corpus {name!r} is not there: give english, code, hf:ID, a file, a folder or a glob pattern")


def _english() -> Iterator[Document]:
    from pydoc_data.topics import topics

    sources: list[tuple[str, Callable[[], Iterable[Document]]]] = [
        (f"pydoc/{name}", partial(_sections, f"pydoc/{name}", [text])) for name, text in topics.items()
    ]
    packages = {name: root for name in ("numpy", "scipy", "sklearn") if (root := folder_of_package(name))}
    for package, root in {"python": standard_library(), **packages}.items():
        sources += [(name, partial(_docstrings, name, path)) for name, path in python_files(package, root)]
    if "sklearn" in packages:
        for path in (packages["sklearn"] / "datasets" / "descr").glob("*.rst"):
            name = f"sklearn/datasets/descr/{path.name}"
            sources.append((name, partial(_read_text, name, path)))
    seen = set()
    for read in _mixed(sources):
        for document in read():
            # Wrappers repeat the docstrings of what they wrap.
            digest = hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest()
            if digest not in seen:
                seen.add(digest)
                yield document


def _code() -> Iterator[Document]:
    files = python_files("python", standard_library())
    # Help topics are English; the codecs' character maps are tables of numbers; _sysconfigdata tells of one machine.
    unlike_code = re.compile(r"python/(pydoc_data/|encodings/|config-|_sysconfigdata)")
    for read in _mixed([(n, partial(_read_code, n, path)) for n, path in files if not unlike_code.match(n)]):
        yield from read()


def standard_library() -> Path:
    """Where the sources of Python's own library are.

    Raises:
        InputError: they are not where they should be.
    """
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "argparse.py").exists():
        raise InputError(f"the standard library's sources are not in {root}: give files of your own with --text")
    return root


def folder_of_package(name: str) -> Path | None:
    """Where an installed package is, or None."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def python_files(package: str, root: Path) -> list[tuple[str, Path]]:
    """Names and paths of the Python files below a folder, without tests."""
    paths = ((path.relative_to(root), path) for path in root.rglob("*.py"))
    return [
        (f"{package}/{short.as_posix()}", path) for short, path in paths if not _NOT_ORDINARY_CODE & set(short.parts)
    ]


def _mixed(sources: list[tuple[str, Callable[[], Iterable[Document]]]]) -> Iterator[Callable[[], Iterable[Document]]]:
    # A hash of the name rather than a random shuffle: a file more or less leaves the order of the others alone.
    return (read for _, read in sorted(sources, key=lambda source: hashlib.sha256(source[0].encode()).digest()))


# Kept once read: parsing all files takes seconds, and a run reads the corpus for its fingerprint and for its text. What
# is kept is some ten megabytes.
@cache
def _docstrings(name: str, path: Path) -> tuple[Document, ...]:
    return tuple(_read_docstrings(name, path))


def _read_docstrings(name: str, path: Path) -> Iterator[Document]:
    try:
        with warnings.catch_warnings():
            # Other people's invalid escape sequences are not this program's to report.
            warnings.simplefilter("ignore")
            module = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        # Some packages ship templates that end in .py.
        return
    for qualified_name, text in docstrings_in(module, ""):
        prose = DOCTEST.sub("", text).strip()
        if len(prose) >= SHORTEST_DOCSTRING:
            yield from _sections(f"{name}:{qualified_name}" if qualified_name else name, [prose])


def docstrings_in(node: ast.AST, qualified_name: str) -> Iterator[tuple[str, str]]:
    """Qualified names and docstrings of a parsed module and all that is in it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield qualified_name, docstring
    for block in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, block, ()):
            own_name = getattr(child, "name", None) if not isinstance(child, ast.ExceptHandler) else None
            yield from docstrings_in(child, f"{qualified_name}.{own_name}".lstrip(".") if own_name else qualified_name)


def _read_code(name: str, path: Path) -> Iterator[Document]:
    try:
        # Honours the encoding that a source declares.
        with tokenize.open(path) as file:
            yield from _sections(name, [file.read()])
    except (SyntaxError, UnicodeDecodeError, OSError):
        return


def _read_files(corpus_name: str, root: Path, paths: list[Path], *, skip_binary: bool) -> Iterator[Document]:
    for path in paths:
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
        try:
            if _looks_binary(path):
                if skip_binary:
                    continue
                raise InputError(f"corpus {corpus_name!r}: {path} is not text: give UTF-8 text files")
            yield from _read_text(name, path)
        except UnicodeDecodeError as error:
            raise InputError(
                f"corpus {corpus_name!r}: {path} is not UTF-8 text ({error.reason}): convert it, for example with iconv"
            ) from error
        except OSError as error:
            raise InputError(
                f"corpus {corpus_name!r}: {path} cannot be read ({error.strerror}): check its path and permissions"
            ) from error


def _looks_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(_CHUNK)


def _read_text(name: str, path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8-sig") as file:
        yield from _sections(name, iter(lambda: file.read(_CHUNK), ""))


def _sections(name: str, pieces: Iterable[str]) -> Iterator[Document]:
    part = 0
    for text in _cut(pieces):
        if not text.strip():
            continue
        part += 1
        yield Document(name if part == 1 else f"{name} (part {part})", text)


def _cut(pieces: Iterable[str]) -> Iterator[str]:
    text = ""
    for piece in pieces:
        text += piece
        while len(text) > _SECTION:
            blank_line = text.rfind("\n\n", _SECTION // 2, _SECTION) + 2
            line = text.rfind("\n", _SECTION // 2, _SECTION) + 1
            end = blank_line if blank_line > 1 else line or _SECTION
            yield text[:end]
            text = text[end:]
    yield text


def _hugging_face(identifier: str) -> Callable[[], Iterator[Document]]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"corpus 'hf:{identifier}' needs the package datasets, which is not installed: pip install datasets"
        ) from error

    def read() -> Iterator[Document]:
        try:
            rows = datasets.load_dataset(identifier, split="train", streaming=True)
            for index, row in enumerate(rows):
                if "text" not in row:
                    raise InputError(f"corpus 'hf:{identifier}' has no column 'text', only {', '.join(row)}")
                yield from _sections(f"{identifier}#{index}", [row["text"]])
        except InputError:
            raise
        except Exception as error:
            # Whatever the hub, the network or the data set's reader has to say.
            raise InputError(
                f"corpus 'hf:{identifier}' could not be loaded ({error}): check the id and the network"
            ) from error

    return read


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
