"""Who gets shown: windows for the explainer and for the scorers, from one bounded pass over the text.

The candidates of a feature are the windows in which it fires, possibly thousands; the budget is ``train`` windows for
the explainer and ``test`` windows for the scorers, beside ``non_activating`` ones in which it is silent.

How it is kept honest and small:

- *No leak.* Every window belongs to one side, train or test, for all features. With ``split="document"`` runs of whole
  documents take a side, and a context that has documents of both is left out; with ``split="context"`` contexts do.
- *A sample of bounded size.* Of each feature's activating windows a uniform sample (by a hash, so that it depends
  neither on the order of the work nor on a global random state) is kept on either side, and its strongest windows.
  Quantiles are those of the sample. That is 12 bytes for each kept window: 48 MB for each 10,000 features with the
  defaults.
- *Exact negatives.* Random ones come from a pool of windows whose active features are all known; those of neighbours
  are encoded once more, with the positives, and dropped where the feature fires.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from apportion.errors import InputError
from apportion.features.auto_interp.windows import Example
from apportion.models.spelling import Spelled

NEGATIVES = ("random", "neighbour", "cooccurring", "similar")
CHOICES = ("quantiles", "top", "random", "mix")
TRAIN, TEST = 0, 1


@dataclass(frozen=True)
class ExampleSettings:
    """Which windows are shown to whom; the defaults are those of the authors' code.

    Args:
        window: tokens a window.
        train: activating windows for the explainer.
        test: activating windows for the scorers.
        non_activating: windows without the feature for the scorers, of each source.
        quantiles: equal groups of the activating windows by their maximum, from which both are drawn evenly.
        choice: what the explainer sees: ``quantiles``, the ``top`` windows, ``random`` ones, or a ``mix`` of 20 % top
            and the rest by quantiles.
        negatives: sources of the windows without the feature: ``random``; ``neighbour``: where a feature of high
            decoder cosine fires; ``cooccurring``: where a feature fires that often fires in the same windows;
            ``similar``: like the activating ones in an encoder's eyes.
        near_misses: windows without the feature on the train side, for contrastive explanations.
        neighbours: features that ``neighbour`` and ``cooccurring`` look at.
        per_neighbour: windows from each, at most.
        split: what takes sides: ``document`` or ``context``.
        min_windows: features with fewer activating windows in the text are not explained.
        reservoir: windows kept for each that is wanted.
        pool: windows of either side whose active features are remembered, about.
        seed: of the samples.
    """

    window: int = 32
    train: int = 40
    test: int = 50
    non_activating: int = 50
    quantiles: int = 10
    choice: str = "quantiles"
    negatives: tuple[str, ...] = ("random",)
    near_misses: int = 0
    neighbours: int = 10
    per_neighbour: int = 10
    split: str = "document"
    min_windows: int = 200
    reservoir: int = 4
    pool: int = 4096
    seed: int = 22

    def __post_init__(self) -> None:
        for name in ("window", "train", "test", "quantiles", "neighbours", "per_neighbour", "reservoir", "pool"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.non_activating < 0 or self.near_misses < 0:
            raise InputError("non_activating and near_misses must not be negative")
        if self.quantiles > min(self.train, self.test):
            raise InputError(
                f"quantiles={self.quantiles}: more than examples (train={self.train}, test={self.test}); take fewer"
            )
        for name, value, known in (
            ("choice", (self.choice,), CHOICES),
            ("negatives", self.negatives, NEGATIVES),
            ("split", (self.split,), ("document", "context")),
        ):
            unknown = [each for each in value if each not in known]
            if unknown:
                raise InputError(f"{name}={unknown[0]!r}: choose of {', '.join(known)}")


@dataclass(frozen=True, eq=False)
class FeatureExamples:
    """What is shown of one feature.

    Attributes:
        feature: its number.
        n_windows: activating windows in the text.
        density: share of all tokens on which it fires.
        window_density: share of all windows in which it fires, the base rate that precision depends on.
        largest: its largest activation in the text.
        train: for the explainer, strongest first.
        test: for the scorers: activating ones.
        negatives: for the scorers: those in which it is silent, of all sources.
        near_misses: for the explainer: in which it is silent.
    """

    feature: int
    n_windows: int
    density: float
    window_density: float
    largest: float
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    negatives: tuple[Example, ...]
    near_misses: tuple[Example, ...] = ()


@dataclass(frozen=True, eq=False)
class Examples:
    """Windows of many features: numbers into one table of windows, which all features share.

    Attributes:
        settings: how they were chosen.
        features: which features these are, ascending.
        n_windows, density, window_density, largest: see `FeatureExamples`.
        chosen: for each feature the train windows, then the test windows, as rows of the table; -1: there was none.
        quantile: of each of those.
        activations: of the feature on their tokens, as shares of its largest in the text.
        negatives: rows of the table for each source, and for ``near``.
        numbers: of the table's windows in the text.
        token_ids: of the table's windows.
        documents: in which they begin.
    """

    settings: ExampleSettings
    features: Int[np.ndarray, " n"]
    n_windows: Int[np.ndarray, " n"]
    density: Float[np.ndarray, " n"]
    window_density: Float[np.ndarray, " n"]
    largest: Float[np.ndarray, " n"]
    chosen: Int[np.ndarray, "n slots"]
    quantile: Int[np.ndarray, "n slots"]
    activations: Float[np.ndarray, "n slots width"]
    negatives: dict[str, Int[np.ndarray, "n _"]]
    numbers: Int[np.ndarray, " table"]
    token_ids: Int[np.ndarray, "table width"]
    documents: Int[np.ndarray, " table"]

    def __len__(self) -> int:
        return len(self.features)

    def of(self, feature: int, spell: Callable[[Sequence[int]], Spelled]) -> FeatureExamples:
        """The windows of a feature, as text.

        Args:
            feature: its number in the dictionary.
            spell: what the tokens say, see `apportion.models.spelling.speller`.

        Raises:
            KeyError: no windows were collected for it.
        """
        row = int(np.searchsorted(self.features, feature))
        if row >= len(self.features) or self.features[row] != feature:
            raise KeyError(f"no windows were collected for feature {feature}")

        def example(place: int, activations: np.ndarray, source: str, quantile: int = -1) -> Example:
            said = spell(self.token_ids[place].tolist())
            return Example(int(self.numbers[place]), said.text, said.spans, activations, source, quantile)

        split = self.settings.train
        positives: list[list[Example]] = [[], []]
        for slot, place in enumerate(self.chosen[row].tolist()):
            if place >= 0:
                activations = self.activations[row, slot].astype(np.float32) * self.largest[row]
                positives[slot >= split].append(
                    example(place, activations, "activating", int(self.quantile[row, slot]))
                )
        silent = np.zeros(self.token_ids.shape[1], dtype=np.float32)
        negatives = {
            source: tuple(example(place, silent, source) for place in places[row].tolist() if place >= 0)
            for source, places in self.negatives.items()
        }
        near = negatives.pop("near", ())
        return FeatureExamples(
            feature=feature,
            n_windows=int(self.n_windows[row]),
            density=float(self.density[row]),
            window_density=float(self.window_density[row]),
            largest=float(self.largest[row]),
            train=tuple(sorted(positives[0], key=lambda each: -float(each.activations.max()))),
            test=tuple(positives[1]),
            negatives=tuple(each for part in negatives.values() for each in part),
            near_misses=near,
        )


def settings_to_json(settings: ExampleSettings) -> dict[str, Any]:
    """Settings as JSON can hold them."""
    content = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {**content, "negatives": list(settings.negatives)}
