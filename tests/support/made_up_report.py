"""Reports about dictionaries that never existed, with every section filled."""

from typing import Any

import numpy as np

from apportion.features import ZipfFit
from apportion.features.contexts import FeatureContexts
from apportion.features.geometry import NearestFeatures
from apportion.features.logit_lens import LogitLens
from apportion.report import ErrorByDifficulty, Metric, ReportData

TOP, QUANTILES, PER_QUANTILE, WIDTH, LENGTH = 4, 2, 2, 9, 16


def made_up_contexts(n_features: int, n_words: int, seed: int = 0) -> FeatureContexts:
    """Random windows over one random text; the last feature never fires."""
    generator = np.random.default_rng(seed)
    slots = TOP + QUANTILES * PER_QUANTILE
    text = generator.integers(0, n_words, size=200 * LENGTH).astype(np.int32)
    context = generator.integers(0, 200, size=(n_features, slots))
    position = context * LENGTH + generator.integers(0, LENGTH - WIDTH + 1, size=context.shape)
    token_ids = text[position[:, :, None] + np.arange(WIDTH)]
    largest = generator.uniform(1, 20, n_features).astype(np.float32)
    activations = np.where(generator.random(token_ids.shape) < 0.2, generator.random(token_ids.shape), 0)
    activations = (activations * largest[:, None, None]).astype(np.float32)
    peak = np.full((n_features, slots), 5, dtype=np.int16)
    activations[:, :, 5] = largest[:, None] * np.linspace(1, 0.4, slots, dtype=np.float32)
    fires = np.maximum(2, 50_000 / (np.arange(n_features) + 2)).astype(np.int64)
    histogram = generator.integers(1, 30, size=(n_features, 12)).astype(np.int32)
    for array, empty in ((token_ids, -1), (activations, 0), (peak, -1), (fires, 0), (largest, 0), (histogram, 0)):
        array[-1] = empty
    return FeatureContexts(
        n_tokens=100_000,
        top=TOP,
        quantiles=QUANTILES,
        per_quantile=PER_QUANTILE,
        fires=fires,
        activation_sum=fires * largest * 0.4,
        max_activation=largest,
        histogram=histogram,
        histogram_edges=np.exp2(np.arange(13) / 4),
        winners_per_token=generator.poisson(1000 * np.exp(-((np.arange(60) - 30) ** 2) / 90)).astype(np.int64),
        token_ids=token_ids,
        activations=activations,
        peak=peak,
        position=position,
        document=context // 3,
    )


def made_up_report(n_features: int, words: list[str], **changes: Any) -> ReportData:
    """A report with every section filled."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, len(words), size=(n_features, 10)).astype(np.int32)
    logits = -np.sort(-generator.random((n_features, 10)), axis=1).astype(np.float32)
    groups = np.linspace(0.1, 0.5, 10)
    settings: dict[str, Any] = {
        "title": "A made-up dictionary",
        "contexts": made_up_contexts(n_features, len(words)),
        "token_text": dict(enumerate(words)),
        "summary": {"model": "none", "features": n_features, "budget": 32.0},
        "metrics": [Metric("FVU", 0.1234, 0.0021, 12, "Fraction of variance unexplained; lower is better.")],
        "history": [{"step": step, "loss": 1 / (step + 1), "l0": 32.0} for step in range(0, 100, 5)],
        "zipf": ZipfFit(exponent=1.0, offset=2.0, scale=0.4, r_squared=0.99),
        "error_by_difficulty": ErrorByDifficulty("a guess", groups, groups / 20, groups * 60, groups),
        "lens": LogitLens(tokens, logits, tokens[:, ::-1].copy(), -logits),
        "nearest": NearestFeatures(
            ((np.arange(n_features)[:, None] + np.arange(1, 9)) % n_features).astype(np.int32),
            np.tile(np.linspace(0.9, 0.2, 8, dtype=np.float32), (n_features, 1)),
        ),
    }
    return ReportData(**(settings | changes))
