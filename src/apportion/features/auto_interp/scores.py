"""What a scorer found out about one explanation: a score for every window, and the figures that follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from apportion.features.auto_interp.windows import Example

_DIGITS = 4


@dataclass(frozen=True)
class Score:
    """Figures of one scorer for one feature; None where they cannot be computed.

    Attributes:
        auroc: the chance that a window with the feature scores higher than one without it; ties count half.
        balanced_accuracy: mean of the share of activating windows recognised and of the share of others rejected.
        true_positive_rate, false_positive_rate: the two it is made of.
        expected_precision: of the windows in which the explanation finds the feature, the share that has it, were
            windows as they come in the text: ``TPR p / (TPR p + FPR (1 - p))`` for the base rate ``p``. A balanced test
            says nothing about that.
        by_quantile: the recognised share of activating windows of each quantile, weakest first.
        auroc_by_quantile: AUROC of those windows against all negatives.
        by_source: AUROC and balanced accuracy against the negatives of each source.
        n: windows that got a score.
        failed: windows that got none, by why.
        extra: figures of a scorer's own.
        windows: ``[source, quantile, score]`` for each window; the score is None where it failed.
    """

    auroc: float | None = None
    balanced_accuracy: float | None = None
    true_positive_rate: float | None = None
    false_positive_rate: float | None = None
    expected_precision: float | None = None
    by_quantile: list[float | None] = field(default_factory=list)
    auroc_by_quantile: list[float | None] = field(default_factory=list)
    by_source: dict[str, dict[str, float | None]] = field(default_factory=dict)
    n: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    windows: list[list[Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it, with four digits."""
        return _rounded(dict(self.__dict__))


def summarise(
    examples: Sequence[Example],
    scores: Sequence[float | None],
    *,
    threshold: float | None,
    quantiles: int,
    base_rate: float,
    failed: dict[str, int] | None = None,
    extra: dict[str, Any] | None = None,
) -> Score:
    """All figures from the scores of windows.

    Args:
        examples: the windows.
        scores: higher where the explanation says that the feature fires; None where the judge failed.
        threshold: scores above it say that it fires; None: the median of all scores, which looks at no label (ours).
        quantiles: how many groups of activating windows there are.
        base_rate: share of windows in which the feature fires.
        failed: why windows have no score.
        extra: figures of the scorer's own.
    """
    there = np.array([score is not None for score in scores], dtype=np.bool_)
    value = np.array([0.0 if score is None else score for score in scores], dtype=np.float64)
    positive = np.array([example.activating for example in examples], dtype=np.bool_)
    quantile = np.array([example.quantile for example in examples])
    source = np.array([example.source for example in examples])
    if threshold is None:
        threshold = float(np.median(value[there])) if there.any() else 0.0
    said = value > threshold
    has, lacks = there & positive, there & ~positive
    true, false = _share(said, has), _share(said, lacks)
    return Score(
        auroc=auroc(value[has], value[lacks]),
        balanced_accuracy=_balanced(true, false),
        true_positive_rate=true,
        false_positive_rate=false,
        expected_precision=_precision(true, false, base_rate),
        by_quantile=[_share(said, has & (quantile == group)) for group in range(quantiles)],
        auroc_by_quantile=[auroc(value[has & (quantile == group)], value[lacks]) for group in range(quantiles)],
        by_source={
            str(name): {
                "auroc": auroc(value[has], value[lacks & (source == name)]),
                "balanced_accuracy": _balanced(true, _share(said, lacks & (source == name))),
            }
            for name in dict.fromkeys(source[~positive].tolist())
        },
        n=int(there.sum()),
        failed=dict(failed or {}),
        extra=dict(extra or {}),
        windows=[[example.source, example.quantile, score] for example, score in zip(examples, scores, strict=True)],
    )


def auroc(positive: Float[np.ndarray, " p"], negative: Float[np.ndarray, " n"]) -> float | None:
    """The area under the ROC curve, from ranks; None without examples of both kinds."""
    if not len(positive) or not len(negative):
        return None
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([positive, negative]))[: len(positive)]
    return float((ranks.sum() - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative)))


def _share(said: Bool[np.ndarray, " n"], among: Bool[np.ndarray, " n"]) -> float | None:
    return float(said[among].mean()) if among.any() else None


def _balanced(true: float | None, false: float | None) -> float | None:
    return None if true is None or false is None else (true + 1 - false) / 2


def _precision(true: float | None, false: float | None, base_rate: float) -> float | None:
    if true is None or false is None:
        return None
    found = true * base_rate + false * (1 - base_rate)
    return true * base_rate / found if found > 0 else None


def _rounded(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _rounded(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_rounded(value) for value in content]
    if isinstance(content, float):
        return round(content, _DIGITS) if np.isfinite(content) else None
    return content
