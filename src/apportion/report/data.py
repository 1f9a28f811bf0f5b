"""`ReportData`: everything the HTML report shows, as plain arrays, numbers and strings.

Build it with `apportion.report.build_report`, or by hand: only ``title`` and ``contexts`` are required, and every
section whose data is missing is left out of the page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from apportion.features.contexts import FeatureContexts
from apportion.features.geometry import NearestFeatures
from apportion.features.logit_lens import LogitLens
from apportion.features.mutual_feature_choice import ZipfFit


@dataclass(frozen=True)
class Metric:
    """One measured number with its uncertainty and a line for readers who do not know it.

    Attributes:
        name: as in the literature, e.g. ``"FVU"``.
        value: the mean.
        stderr: standard error of the mean, None when it has none.
        n: how many samples (documents, seeds) the standard error is over.
        help: one line: what it is, and whether high or low is good.
    """

    name: str
    value: float
    stderr: float | None = None
    n: int | None = None
    help: str = ""


@dataclass(frozen=True)
class ErrorByDifficulty:
    """How the error, and what is spent against it, go with the difficulty of a token.

    Tokens are cut into equally many per group, easiest first.

    Attributes:
        difficulty: what difficulty means here, for the axis, e.g. ``"distance from the mean activation"``.
        error: mean of the token's own squared error / squared distance from the mean, per group.
        error_stderr: its standard error.
        winners: mean number of active features, per group.
        winners_stderr: its standard error.
    """

    difficulty: str
    error: Float[np.ndarray, " groups"]
    error_stderr: Float[np.ndarray, " groups"]
    winners: Float[np.ndarray, " groups"]
    winners_stderr: Float[np.ndarray, " groups"]


@dataclass(frozen=True)
class ScorerFigures:
    """What one scorer found out about an explanation; None where it could not be computed.

    Attributes:
        auroc: see `apportion.features.auto_interp.Score`, as the rest.
        balanced_accuracy: see there.
        expected_precision: see there.
        by_quantile: share of activating windows recognised, weakest activations first.
        by_source: AUROC against the negatives of each source.
        failed: windows without an answer, by why.
        notes: further figures, as they are shown.
    """

    auroc: float | None = None
    balanced_accuracy: float | None = None
    expected_precision: float | None = None
    by_quantile: Sequence[float | None] = ()
    by_source: Mapping[str, float | None] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, str | float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class ExplainedFeature:
    """A feature in words, and how well they hold.

    Attributes:
        text: the explanation.
        style: how it was made.
        judge: what made and judged it; empty where no chat model did.
        flagged: the judge did not keep to the form that was asked for.
        scores: by scorer; the AUROC of the first one is what the list of features shows.
    """

    text: str
    style: str = ""
    judge: str = ""
    flagged: bool = False
    scores: Mapping[str, ScorerFigures] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportData:
    """The input of `write_report`.

    Attributes:
        title: heading of the report.
        contexts: statistics and example contexts of every feature.
        token_text: text of every token id in ``contexts`` and ``lens``; a missing one is shown as its id.
        summary: facts of the run, shown in order, e.g. ``{"model": "smollm2", "budget": 32}``.
        metrics: judged quality.
        history: training log, one mapping a step with the key ``"step"`` and numbers.
        zipf: law fitted to the densities, drawn over them.
        error_by_difficulty: see there.
        lens: promoted and suppressed tokens; None where the site does not write to the residual stream.
        nearest: neighbours by decoder cosine.
        labels: what features are called, by feature number.
        explanations: of features, by number; where a feature has no label its explanation is one.
        document_names: names of the documents, by document number.
    """

    title: str
    contexts: FeatureContexts
    token_text: Mapping[int, str] = field(default_factory=dict)
    summary: Mapping[str, str | int | float] = field(default_factory=dict)
    metrics: Sequence[Metric] = ()
    history: Sequence[Mapping[str, float]] = ()
    zipf: ZipfFit | None = None
    error_by_difficulty: ErrorByDifficulty | None = None
    lens: LogitLens | None = None
    nearest: NearestFeatures | None = None
    labels: Mapping[int, str] = field(default_factory=dict)
    explanations: Mapping[int, ExplainedFeature] = field(default_factory=dict)
    document_names: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse parts that speak of different dictionaries.

        Raises:
            ValueError: names the part and both numbers of features.
        """
        parts: dict[str, Int[np.ndarray, ...] | None] = {
            "lens": None if self.lens is None else self.lens.promoted_ids,
            "nearest": None if self.nearest is None else self.nearest.indices,
        }
        for name, array in parts.items():
            if array is not None and len(array) != self.contexts.n_features:
                raise ValueError(
                    f"{name} is about {len(array)} features but contexts is about {self.contexts.n_features}: "
                    "take both from the same dictionary"
                )
        for name, named in (("labels", self.labels), ("explanations", self.explanations)):
            beyond = [feature for feature in named if not 0 <= feature < self.contexts.n_features]
            if beyond:
                raise ValueError(f"{name} names feature {beyond[0]}, but there are {self.contexts.n_features} features")
