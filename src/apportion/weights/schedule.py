"""How sparse a network is to be at which step of its training: when weights are removed, and how many by then.

Steps are counted by the optimiser's steps that are done: at step ``t`` the mask is chosen anew after the ``t``-th of
them, and what follows trains under it; at step 0, before the first. A schedule is a pure function of the step, so that
a run that was interrupted needs none of its history.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from apportion.errors import InputError


class SparsitySchedule(ABC):
    """Says at which steps masks are chosen anew, and for which sparsity.

    Attributes:
        final: sparsity from the last update on.
    """

    final: float

    @property
    @abstractmethod
    def start(self) -> int:
        """The first step at which masks are chosen."""

    @property
    @abstractmethod
    def end(self) -> int:
        """The last one: from here on masks never change."""

    @abstractmethod
    def is_update(self, step: int) -> bool:
        """Whether masks are chosen anew at a step."""

    @abstractmethod
    def at(self, step: float) -> float:
        """The sparsity wanted at a step; before the start and after the end it is what it is there."""


@dataclass(frozen=True)
class PolynomialSchedule(SparsitySchedule):
    """Fast while there is much to remove, slow towards the end (Zhu & Gupta 2017, arXiv 1710.01878, equation 1).

    ``s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^power`` at ``t = t_0, t_0 + dt, ..., t_0 + n dt``. Halfway, a
    cubic one has removed 7/8 of what goes.

    Args:
        final: s_f, below 1.
        begin: t_0, the first step at which masks are chosen; the paper starts once the network has learned something.
        every: dt, steps from one update to the next. The paper has 100 to 1000.
        updates: n, how many updates follow the first one. (torch's ``CubicSL`` counts them so too.)
        initial: s_i.
        power: 3 is the paper's, 1 a straight line.

    Raises:
        InputError: a value that cannot work.
    """

    final: float
    begin: int
    every: int
    updates: int
    initial: float = 0.0
    power: float = 3.0

    def __post_init__(self) -> None:
        _check_sparsity("final", self.final)
        _check_sparsity("initial", self.initial)
        _check_steps(begin=(self.begin, 0), every=(self.every, 1), updates=(self.updates, 1))
        if self.initial > self.final:
            raise InputError(
                f"initial={self.initial} is above final={self.final}: a schedule only removes weights, so use at most "
                f"{self.final}"
            )
        if not 0 < self.power < math.inf:
            raise InputError(f"power={self.power}: use a positive number, such as 3 (cubic) or 1 (a straight line)")

    @classmethod
    def over(
        cls, final: float, begin: int, end: int, every: int = 100, initial: float = 0.0, power: float = 3.0
    ) -> "PolynomialSchedule":
        """The schedule from one step to another.

        Raises:
            InputError: ``every`` does not divide the steps in between: the last update would be somewhere else.
        """
        if end <= begin or every < 1 or (end - begin) % every:
            raise InputError(
                f"begin={begin}, end={end}, every={every}: the end must come after begin, by a multiple of every"
            )
        return cls(final, begin, every, (end - begin) // every, initial, power)

    @property
    def start(self) -> int:
        """t_0."""
        return self.begin

    @property
    def end(self) -> int:
        """t_0 + n dt."""
        return self.begin + self.every * self.updates

    def is_update(self, step: int) -> bool:
        """Every so many steps from the first to the last."""
        return self.begin <= step <= self.end and (step - self.begin) % self.every == 0

    def at(self, step: float) -> float:
        """The equation."""
        if step >= self.end:
            return self.final
        progress = max(0.0, (step - self.begin) / (self.end - self.begin))
        return self.final + (self.initial - self.final) * (1 - progress) ** self.power


@dataclass(frozen=True)
class OneShot(SparsitySchedule):
    """Everything at once.

    Args:
        final: sparsity, below 1.
        step: at which; 0 prunes before the first step.

    Raises:
        InputError: a value that cannot work.
    """

    final: float
    step: int = 0

    def __post_init__(self) -> None:
        _check_sparsity("final", self.final)
        _check_steps(step=(self.step, 0))

    @property
    def start(self) -> int:
        """The step."""
        return self.step

    @property
    def end(self) -> int:
        """The same step."""
        return self.step

    def is_update(self, step: int) -> bool:
        """Only then."""
        return step == self.step

    def at(self, step: float) -> float:
        """Nothing before."""
        return self.final if step >= self.step else 0.0


@dataclass(frozen=True)
class GeometricSchedule(SparsitySchedule):
    """The same share of what is left, phase after phase: iterative magnitude pruning.

    The k-th of ``phases`` updates leaves ``(1 - final)^(k / phases)`` of the weights.

    Args:
        final: sparsity after the last phase, below 1.
        phases: how many.
        every: steps of a phase: the network is trained so long before the next update.
        begin: step of the first update.

    Raises:
        InputError: a value that cannot work.
    """

    final: float
    phases: int
    every: int
    begin: int = 0

    def __post_init__(self) -> None:
        _check_sparsity("final", self.final)
        _check_steps(begin=(self.begin, 0), every=(self.every, 1), phases=(self.phases, 1))

    @property
    def start(self) -> int:
        """Of the first phase."""
        return self.begin

    @property
    def end(self) -> int:
        """The first step of the last phase."""
        return self.begin + self.every * (self.phases - 1)

    @property
    def removed(self) -> float:
        """The share p of the remaining weights that each phase removes."""
        return 1 - (1 - self.final) ** (1 / self.phases)

    def is_update(self, step: int) -> bool:
        """At the start of each phase."""
        return self.start <= step <= self.end and (step - self.start) % self.every == 0

    def at(self, step: float) -> float:
        """A stair: 0 before the first phase."""
        done = min(self.phases, math.floor((step - self.begin) / self.every) + 1)
        if done == self.phases:
            return self.final
        return 1 - (1 - self.removed) ** done if done > 0 else 0.0


def _check_sparsity(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise InputError(f"{name}={value}: use a share of weights to remove, at least 0 and below 1, such as 0.9")


def _check_steps(**given: tuple[int, int]) -> None:
    for name, (value, least) in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name}={value!r}: use a whole number, at least {least}")
