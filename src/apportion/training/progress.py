"""What somebody who waits sees: a bar on a terminal, a line every ten seconds anywhere else, on stderr."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from apportion.training.log import Record

_SECONDS_BETWEEN_LINES = 10.0


class Display(Protocol):
    """Something that is told about every step."""

    def update(self, steps_done: int, record: Record | None) -> None:
        """``record`` is given on logged steps."""


class _Silence:
    def update(self, steps_done: int, record: Record | None) -> None:
        pass


class _Bar:
    def __init__(self, progress: Progress, steps: int, steps_done: int, shown: tuple[str, ...], title: str) -> None:
        self._progress = progress
        self._shown = shown
        self._task = progress.add_task(title, total=steps, completed=steps_done, values="")

    def update(self, steps_done: int, record: Record | None) -> None:
        if record is not None:
            self._progress.update(self._task, values=_values(record, self._shown))
        self._progress.update(self._task, completed=steps_done)


class _Lines:
    def __init__(
        self,
        console: Console,
        steps: int,
        shown: tuple[str, ...],
        clock: Callable[[], float] = time.monotonic,
        what: str = "step",
    ) -> None:
        self._what = what
        self._console = console
        self._steps = steps
        self._shown = shown
        self._clock = clock
        self._printed_at = clock()

    def update(self, steps_done: int, record: Record | None) -> None:
        if record is None or self._clock() - self._printed_at < _SECONDS_BETWEEN_LINES:
            return
        self._printed_at = self._clock()
        line = f"{self._what} {steps_done:,}/{self._steps:,}  {_values(record, self._shown)}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress_display(
    enabled: bool,
    steps: int,
    steps_done: int,
    shown: tuple[str, ...],
    console: Console | None = None,
    *,
    what: str = "step",
    title: str = "training",
) -> Iterator[Display]:
    """A display for a run of ``steps`` of which ``steps_done`` are done.

    Args:
        enabled: whether to show anything.
        steps: of the whole run.
        steps_done: before it began.
        shown: names of the logged values to show.
        console: to show them on; stderr if None.
        what: a step is called.
        title: of the bar.
    """
    if not enabled:
        yield _Silence()
        return
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console, steps, shown, what=what)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}", markup=False),
    )
    # Drawn from a thread of its own: often enough to look alive, rarely enough not to cost training anything.
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        yield _Bar(progress, steps, steps_done, shown, title)


def _values(record: Record, shown: tuple[str, ...]) -> str:
    return "  ".join(f"{name} {_number(record[name])}" for name in shown if name in record)


def _number(value: int | float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
