"""How long the feature browser takes to write, and how large its file is, at 20,000 features."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from apportion.features import ZipfFit
from apportion.features.contexts import FeatureContexts
from apportion.features.geometry import NearestFeatures
from apportion.features.logit_lens import LogitLens
from apportion.report import ReportData, write_report
from benchmarks.registry import Case, Race, RacePlan, Sample, benchmark, timed

# What `collect_contexts` keeps of a feature by default: its best windows and some from each quantile.
_TOP, _QUANTILES, _PER_QUANTILE, _WINDOW = 10, 4, 3, 25
_VOCABULARY, _CONTEXT, _TOKENS = 49_152, 128, 1_000_000


@benchmark("report", "how long does a report take to write, and how large is it?", rounds=3, share=1.5, warm_ups=0)
def plans(smoke: bool) -> Sequence[RacePlan]:
    """One race of two sizes: the ratio says whether cost grows faster than features."""
    small, large = (20, 200) if smoke else (2_000, 20_000)

    def build() -> Race:
        includes = "write_report: tables, blocks, HTML"
        cases = [Case(_label(size), _written(made_up(size)), includes) for size in (small, large)]
        return Race(cases, _label(small))

    return [RacePlan("report", {"features": large, "windows": _TOP + _QUANTILES * _PER_QUANTILE}, build)]


def _label(features: int) -> str:
    return f"{features:,} features"


def _written(data: ReportData) -> Callable[[int], Sample]:
    def measure(turn: int) -> Sample:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "report.html"
            sample = timed(lambda _: write_report(path, data))(turn)
            return {**sample, "file bytes": path.stat().st_size}

    return measure


def made_up(features: int) -> ReportData:
    """A report about no dictionary in particular, with what a real one of this size holds.

    Words are drawn by Zipf's law and windows overlap by chance, as in text: both decide how well the file compresses.
    """
    random = np.random.default_rng(0)
    words = np.minimum(random.zipf(1.2, size=_TOKENS), _VOCABULARY) - 1
    lens = random.integers(0, _VOCABULARY, size=(2, features, 10)).astype(np.int32)
    logits = -np.sort(-random.random((features, 10)), axis=1).astype(np.float32)
    return ReportData(
        title="Nobody's dictionary",
        contexts=_contexts(features, words.astype(np.int32), random),
        token_text={word: f" word{word}" for word in range(_VOCABULARY)},
        summary={"features": features},
        zipf=ZipfFit(exponent=1.0, offset=2.0, scale=0.4, r_squared=0.99),
        lens=LogitLens(lens[0], logits, lens[1], -logits),
        nearest=NearestFeatures(
            ((np.arange(features)[:, None] + np.arange(1, 9)) % features).astype(np.int32),
            np.tile(np.linspace(0.9, 0.2, 8, dtype=np.float32), (features, 1)),
        ),
    )


def _contexts(features: int, text: np.ndarray, random: np.random.Generator) -> FeatureContexts:
    slots = _TOP + _QUANTILES * _PER_QUANTILE
    context = random.integers(0, _TOKENS // _CONTEXT, size=(features, slots))
    position = context * _CONTEXT + random.integers(0, _CONTEXT - _WINDOW + 1, size=context.shape)
    largest = random.uniform(1, 20, features).astype(np.float32)
    fires = np.maximum(2, _TOKENS / (np.arange(features) + 2)).astype(np.int64)
    middle = _WINDOW // 2
    activations = np.zeros((features, slots, _WINDOW), np.float32)
    # A feature fires on its peak and seldom elsewhere in the window.
    activations[:, :, middle + 1] = random.random((features, slots)) * 0.3 * largest[:, None]
    activations[:, :, middle] = largest[:, None] * np.linspace(1, 0.4, slots, dtype=np.float32)
    return FeatureContexts(
        n_tokens=_TOKENS,
        top=_TOP,
        quantiles=_QUANTILES,
        per_quantile=_PER_QUANTILE,
        fires=fires,
        activation_sum=fires * largest * 0.4,
        max_activation=largest,
        histogram=random.integers(1, 30, size=(features, 12)).astype(np.int32),
        histogram_edges=np.exp2(np.arange(13) / 4),
        winners_per_token=random.poisson(1000 * np.exp(-((np.arange(60) - 30) ** 2) / 90)).astype(np.int64),
        token_ids=text[position[:, :, None] + np.arange(_WINDOW)],
        activations=activations,
        peak=np.full((features, slots), middle, dtype=np.int16),
        position=position,
        document=context // 3,
    )
