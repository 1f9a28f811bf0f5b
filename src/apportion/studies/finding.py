"""What a study returns: rows of measurements, comparisons, and a verdict computed from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

Verdict = Literal["holds", "mixed", "does not hold"]
Scale = Literal["smoke", "default", "long", "gpu"]


@dataclass(frozen=True)
class Row:
    """One measured quantity over the seeds.

    Attributes:
        name: of the method or condition.
        metric: what was measured.
        mean: over seeds.
        stderr: of that mean, or None with one seed.
        n: seeds.
    """

    name: str
    metric: str
    mean: float
    stderr: float | None
    n: int

    @classmethod
    def of(cls, name: str, metric: str, values: Sequence[float]) -> "Row":
        """Mean and standard error of one value a seed."""
        array = np.asarray(values, dtype=float)
        stderr = float(array.std(ddof=1) / math.sqrt(array.size)) if array.size > 1 else None
        return cls(name, metric, float(array.mean()), stderr, array.size)


@dataclass(frozen=True)
class Comparison:
    """A claim about a quantity measured once a seed: that its mean is above zero.

    The 95 % interval is Student's, over seeds; what is compared is paired by seed before it comes here.

    Attributes:
        claim: what would be true if the quantity is positive.
        mean: of the quantity.
        low, high: its 95 % interval; equal to the mean with one seed.
        n: seeds.
        part_of_verdict: whether the study's verdict counts it (supplementary ones are only shown).
    """

    claim: str
    mean: float
    low: float
    high: float
    n: int
    part_of_verdict: bool = True

    @classmethod
    def positive(cls, claim: str, margins: Sequence[float], *, part_of_verdict: bool = True) -> "Comparison":
        """Compare: ``margins`` holds, for each seed, by how much the claim is met (negative where it is missed)."""
        from scipy import stats

        array = np.asarray(margins, dtype=float)
        mean = float(array.mean())
        half = 0.0
        if array.size > 1:
            half = float(stats.t.ppf(0.975, array.size - 1) * array.std(ddof=1) / math.sqrt(array.size))
        return cls(claim, mean, mean - half, mean + half, array.size, part_of_verdict)

    @property
    def verdict(self) -> Verdict:
        """``holds`` if the whole interval is above zero, ``does not hold`` if all of it is at or below, else ``mixed``.

        With a single seed there is no interval to exclude zero: never more than ``mixed``.
        """
        if self.n > 1 and self.low > 0:
            return "holds"
        if self.high <= 0:
            return "does not hold"
        return "mixed"


def overall(comparisons: Sequence[Comparison]) -> Verdict:
    """``holds`` if every comparison that counts does, ``does not hold`` if none does, else ``mixed``."""
    verdicts = [each.verdict for each in comparisons if each.part_of_verdict]
    if verdicts and all(each == "holds" for each in verdicts):
        return "holds"
    if "holds" in verdicts or "mixed" in verdicts:
        return "mixed"
    return "does not hold"


@dataclass(frozen=True)
class Finding:
    """What a study found.

    Attributes:
        slug: of the study.
        claim: what the paper says, in a sentence.
        rows: all measurements.
        comparisons: what they say about the claim.
        seeds: used.
        seconds: it took.
        machine: it ran on.
        scale: at which it ran.
        notes: what a reader must know to weigh it, such as fitted constants and settings that were tuned.
        plots: pictures by name, as SVG text.
    """

    slug: str
    claim: str
    rows: list[Row]
    comparisons: list[Comparison]
    seeds: list[int]
    seconds: float
    machine: str
    scale: Scale
    notes: list[str] = field(default_factory=list)
    plots: Mapping[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """Computed from the comparisons."""
        return overall(self.comparisons)

    def to_json(self) -> dict[str, Any]:
        """The contract of ``apportion study <slug> --json``; pictures are left out."""
        content = asdict(self)
        del content["plots"]
        content["comparisons"] = [{**asdict(each), "verdict": each.verdict} for each in self.comparisons]
        return {"slug": self.slug, "verdict": self.verdict, **content}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Finding":
        """Read what ``to_json`` gave."""
        arguments = {name: value for name, value in content.items() if name != "verdict"}
        arguments["rows"] = [Row(**row) for row in content["rows"]]
        arguments["comparisons"] = [
            Comparison(**{name: value for name, value in each.items() if name != "verdict"})
            for each in content["comparisons"]
        ]
        return cls(**arguments)


def by_condition(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each condition (what stands before the first colon of a name), turned to show methods side by side.

    In the result ``name`` is the metric and ``metric`` the method, so that a table of it has a line a metric.
    """
    conditions: dict[str, list[Row]] = {}
    for row in rows:
        condition, _, method = row.name.rpartition(": ")
        conditions.setdefault(condition, []).append(replace(row, name=row.metric, metric=method))
    return conditions


Values = Mapping[str, Mapping[str, list[float]]]
"""What was measured: a value a seed of each metric of each name."""


class Measured(dict[str, dict[str, list[float]]]):
    """What a study measures, as it comes in: ``measured[name][metric]`` has a value a seed."""

    def add(self, found: Mapping[str, Mapping[str, float]]) -> None:
        """One more value for each metric of each name."""
        for name, figures in found.items():
            own = self.setdefault(name, {})
            for metric, value in figures.items():
                own.setdefault(metric, []).append(value)


def collect_rows(measured: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Row]:
    """Rows from ``measured[name][metric][seed]``."""
    return [Row.of(name, metric, values) for name, metrics in measured.items() for metric, values in metrics.items()]
