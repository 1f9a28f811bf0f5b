"""What a benchmark is, and the list of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from apportion.errors import InputError

Sample = Mapping[str, float]
"""What one round of one case measured, by the name of the quantity; the name's ending says the unit (see `tables`)."""


@dataclass(frozen=True)
class Case:
    """One contender of a race.

    Attributes:
        label: what it is called in tables and plots.
        measure: runs it once, in the given round, and says what was measured.
        includes: what exactly is measured, in a line.
    """

    label: str
    measure: Callable[[int], Sample]
    includes: str = ""


@dataclass(frozen=True)
class Race:
    """Cases that are measured side by side, in interleaved rounds.

    Attributes:
        cases: in the order in which they take turns.
        baseline: label of the case that ratios are relative to.
        quantity: the measured quantity that ratios and spreads are of.
        skipped: why a contender is not here, by its label.
    """

    cases: Sequence[Case]
    baseline: str
    quantity: str = "seconds"
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RacePlan:
    """A race that is still to be set up; one at a time is, so that only one holds memory.

    Attributes:
        title: tells the races of a benchmark apart.
        shape: sizes of the problem.
        build: sets it up.
        varies: the entry of ``shape`` that a series of races changes, if it belongs to one.
        share: of the benchmark's time, relative to its other races.
    """

    title: str
    shape: Mapping[str, int]
    build: Callable[[], Race]
    varies: str | None = None
    share: float = 1.0


class Unavailable(Exception):
    """A benchmark or a contender cannot run here; says why."""


@dataclass(frozen=True)
class Benchmark:
    """One question about speed or size.

    Attributes:
        name: on the command line and in file names.
        question: in a line.
        plans: makes the races, small ones if the argument is true (smoke). Raises `Unavailable`.
        rounds: of each race, where the budget allows.
        warm_ups: rounds before those, not counted.
        share: of the time budget, relative to the other benchmarks.
    """

    name: str
    question: str
    plans: Callable[[bool], Sequence[RacePlan]]
    rounds: int
    warm_ups: int
    share: float


BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(
    name: str, question: str, *, rounds: int, share: float, warm_ups: int = 1
) -> Callable[[Callable[[bool], Sequence[RacePlan]]], Callable[[bool], Sequence[RacePlan]]]:
    """Register the decorated function, which makes a benchmark's races, under ``name``."""

    def register(plans: Callable[[bool], Sequence[RacePlan]]) -> Callable[[bool], Sequence[RacePlan]]:
        BENCHMARKS[name] = Benchmark(name, question, plans, rounds, warm_ups, share)
        return plans

    return register


def chosen(names: Sequence[str]) -> list[Benchmark]:
    """The named benchmarks, or all of them.

    Raises:
        InputError: there is no such benchmark.
    """
    for name in names:
        if name not in BENCHMARKS:
            raise InputError(f"no benchmark is called {name!r}: choose from {', '.join(BENCHMARKS)}")
    return [each for each in BENCHMARKS.values() if not names or each.name in names]


def timed(action: Callable[[int], object]) -> Callable[[int], Sample]:
    """A measurement of how long ``action`` takes."""

    def measure(turn: int) -> Sample:
        started = time.perf_counter()
        action(turn)
        return {"seconds": time.perf_counter() - started}

    return measure
