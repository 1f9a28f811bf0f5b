"""What an evaluation of the suite answers: figures, those of the controls, or the reason why there are none."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from apportion.features.evaluate import Metric

FORMAT = "apportion.suite/1"


class NotApplicable(Exception):
    """An evaluation has nothing to say about this model or dictionary; the message says why."""


@dataclass(frozen=True)
class SuiteResult:
    """One evaluation of one dictionary.

    Attributes:
        name: of the evaluation, such as ``sparse_probing``.
        figures: by SAEBench's name.
        controls: the same figures of something that no training went into: ``random dictionary`` (random unit
            directions, as many, at the same mean number of winners a token) and ``activations`` (the dimensions of the
            activation themselves, as many of them as the dictionary may use features).
        details: by task, class or letter.
        settings: sizes and seeds.
        not_applicable: why there are no figures; None where there are.
    """

    name: str
    figures: dict[str, Metric] = field(default_factory=dict)
    controls: dict[str, dict[str, Metric]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    not_applicable: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON: what is not a number is null."""
        return {
            "format": FORMAT,
            "name": self.name,
            "not_applicable": self.not_applicable,
            "figures": {name: _plain(metric) for name, metric in self.figures.items()},
            "controls": {
                control: {name: _plain(metric) for name, metric in figures.items()}
                for control, figures in self.controls.items()
            },
            "details": finite(self.details),
            "settings": self.settings,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "SuiteResult":
        """What ``to_json`` gave; null becomes NaN."""
        return cls(
            content["name"],
            _metrics(content["figures"]),
            {control: _metrics(figures) for control, figures in content["controls"].items()},
            content["details"],
            content["settings"],
            content["not_applicable"],
        )


def mean_metric(name: str, values: Sequence[float], definition: str) -> Metric:
    """The mean of some units that were measured one by one, with its standard error over them."""
    each = np.asarray([value for value in values if math.isfinite(value)], dtype=np.float64)
    if not len(each):
        return Metric(name, math.nan, None, 0, definition)
    error = float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else None
    return Metric(name, float(each.mean()), error, len(each), definition)


def finite(content: Any) -> Any:
    """JSON has no NaN: what could not be measured is null."""
    if isinstance(content, dict):
        return {str(name): finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _plain(metric: Metric) -> dict[str, Any]:
    return dict(finite(asdict(metric)))


def _metrics(content: dict[str, Any]) -> dict[str, Metric]:
    return {
        name: Metric(**{**metric, "value": math.nan if metric["value"] is None else metric["value"]})
        for name, metric in content.items()
    }
