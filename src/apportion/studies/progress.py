"""What a study is doing, on stderr."""

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol, runtime_checkable


@runtime_checkable
class Steps(Protocol):
    """Where a study says what it does next."""

    def say(self, what: str) -> None:
        """The next thing begins."""
        ...


class _Silent:
    def say(self, what: str) -> None:
        pass


class _Spoken:
    def __init__(self, status: object, started: float) -> None:
        self._status, self._started = status, started

    def say(self, what: str) -> None:
        minutes, seconds = divmod(int(time.perf_counter() - self._started), 60)
        self._status.update(f"[{minutes}:{seconds:02d}] {what}")  # type: ignore[attr-defined]


class _Lines:
    """For logs: a line a step."""

    def __init__(self, started: float) -> None:
        self._started = started

    def say(self, what: str) -> None:
        import sys

        print(f"[{time.perf_counter() - self._started:6.1f} s] {what}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def steps_shown(progress: bool, title: str) -> Iterator[Steps]:
    """Show the running step with its time: a spinner on a terminal, a line each elsewhere."""
    if not progress:
        yield _Silent()
        return
    from rich.console import Console

    console = Console(stderr=True)
    started = time.perf_counter()
    if not console.is_terminal:
        yield _Lines(started)
        return
    with console.status(title) as status:
        yield _Spoken(status, started)
