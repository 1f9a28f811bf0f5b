"""Where a study works: it says what it does and keeps what it has measured, so that a killed study goes on."""

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import apportion
from apportion.data.files import read_json, write_json
from apportion.errors import InputError


class Workbench:
    """Runs the measurements of a study.

    Args:
        path: the file that keeps what was measured until the study has ended; None keeps nothing.
        say: shows what is being done.
    """

    def __init__(self, path: Path | None = None, say: Callable[[str], None] | None = None) -> None:
        self._path, self._say = path, say or (lambda what: None)
        self._kept: dict[str, Any] = {}
        self._seconds_before, self._started = 0.0, time.perf_counter()
        self._identity = _identity()
        if path is not None and path.exists():
            self._recall(path)

    @property
    def seconds(self) -> float:
        """Spent on this study so far, earlier attempts included."""
        return self._seconds_before + time.perf_counter() - self._started

    def say(self, what: str) -> None:
        """The next thing begins."""
        minutes, seconds = divmod(int(self.seconds), 60)
        self._say(f"[{minutes}:{seconds:02d}] {what}")

    def measure(self, what: str, settings: Any, measurement: Callable[[], Any]) -> Any:
        """The result of ``measurement()``, taken from an interrupted run of the study if that one got so far.

        Args:
            what: is measured, for people; part of the key.
            settings: all that decides the result, JSON-ready.
            measurement: gives a JSON-ready result.
        """
        key = hashlib.sha256(json.dumps([what, settings], sort_keys=True).encode()).hexdigest()
        if key not in self._kept:
            self.say(what)
            self._kept[key] = measurement()
            if self._path is not None:
                content = {"identity": self._identity, "seconds": self.seconds, "measured": self._kept}
                write_json(self._path, content)
        return self._kept[key]

    def clear(self) -> None:
        """The study has ended and its finding is safe: forget the parts."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _recall(self, path: Path) -> None:
        try:
            content = read_json(path)
            identity, seconds, measured = content["identity"], float(content["seconds"]), dict(content["measured"])
        except (InputError, KeyError, TypeError, ValueError):
            self.say(f"{path} is not readable: starting over")
            return
        if identity != self._identity:
            self.say("the code has changed since an earlier run was interrupted: starting over")
            return
        self._kept, self._seconds_before = measured, seconds
        self.say(f"going on after {len(measured)} measurements of an interrupted run")


@contextlib.contextmanager
def workbench(title: str, path: Path | None = None, progress: bool = True) -> Iterator[Workbench]:
    """A workbench that shows the running measurement: a spinner on a terminal, a line each elsewhere.

    Args:
        title: shown until the first measurement begins.
        path: see ``Workbench``.
        progress: whether to show anything.
    """
    if not progress:
        yield Workbench(path)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Workbench(path, lambda what: print(what, file=sys.stderr, flush=True))
        return
    with console.status(Text(title)) as status:
        yield Workbench(path, lambda what: status.update(Text(what)))


def _identity() -> dict[str, str]:
    """What else decides a result: this package's code and torch's version."""
    root = Path(apportion.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return {"apportion": digest.hexdigest(), "torch": torch.__version__}
