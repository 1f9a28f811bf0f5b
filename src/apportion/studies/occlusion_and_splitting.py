"""The toys of the study of supervised dictionaries: an occluded attribute, a loss that prefers too many features."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from apportion.allocate import Threshold
from apportion.features import Recipe, fit_dictionary
from apportion.features.occlusion import (
    TwoAttributes,
    ideal_loss,
    random_features_loss,
    share_found,
    two_gaussians,
)
from apportion.features.supervised_dictionaries import explained_variance
from apportion.features.task_dictionaries import dense_codes, l1_penalty
from apportion.studies.finding import Comparison, Row, collect_rows
from apportion.studies.machine import one_thread
from apportion.studies.workbench import Workbench

_PENALTIES = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)


@dataclass(frozen=True)
class Toys:
    """Section 7: d = 20, 30 names an attribute, F = 180, lambda = .4; 20,000 samples, 1000 random features."""

    ratios: tuple[float, ...] = (1.0, 2.0)
    n_features: int = 180
    penalty: float = 0.4
    steps: int = 2500
    batch_size: int = 256
    learning_rate: float = 3e-3
    test: int = 6000
    samples: int = 20_000


def on_toys(size: Toys, seeds: list[int], bench: Workbench) -> tuple[list[Row], list[Comparison], list[str]]:
    """Rows, comparisons and notes of both toys."""
    measured: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in seeds:
        for ratio in size.ratios:
            what = f"occlusion, seed {seed}: ratio {ratio:g}"
            figures = bench.measure(what, asdict(size), partial(_occlusion, size, ratio, seed))
            for metric, value in figures.items():
                measured[f"occlusion: ratio {ratio:g}"][metric].append(value)
        losses = bench.measure(
            f"over-splitting, seed {seed}", [size.samples, _PENALTIES], partial(_splitting, size.samples, seed)
        )
        for name, figures in losses.items():
            for metric, value in figures.items():
                measured[f"over-splitting: {name}"][metric].append(value)

    def of(name: str, metric: str) -> Tensor:
        return torch.tensor(measured[name][metric], dtype=torch.float64)

    first, last = (f"occlusion: ratio {ratio:g}" for ratio in (size.ratios[0], size.ratios[-1]))
    high, low = "share of the high attribute found", "share of the low attribute found"
    margins = [
        of("over-splitting: ideal 2 features", f"loss at lambda {each:g}")
        - of("over-splitting: 1000 random features", f"loss at lambda {each:g}")
        for each in _PENALTIES
    ]
    claims = [
        (
            "occlusion: the low attribute is found less often than the high one, more so than at equal magnitudes",
            (of(last, high) - of(last, low)) - (of(first, high) - of(first, low)),
        ),
        (
            "occlusion: with the high attribute reduced to the low one's magnitude, more of the low one is found",
            of(last, f"{low}, high one reduced") - of(last, low),
        ),
        (
            "over-splitting: the loss prefers 1000 random features to the ideal two at every penalty",
            torch.stack(margins).amin(dim=0),
        ),
    ]
    notes = [
        f"Occlusion: 30 values an attribute in 20 dimensions, F={size.n_features}, ReLU with L1 of {size.penalty:g} in "
        f"the units of the activations, {size.steps} steps of {size.batch_size}, Adam {size.learning_rate:g}; a value "
        "counts as found if a feature has F1 of at least 0.5 for it.",
        f"Over-splitting: two unit Gaussians 4 apart in 100 dimensions, {size.samples} samples; best gain and "
        "threshold of the ideal dictionary, best scale of the random one, for each penalty.",
    ]
    return collect_rows(measured), [Comparison.positive(claim, each.tolist()) for claim, each in claims], notes


def _occlusion(size: Toys, ratio: float, seed: int) -> dict[str, float]:
    source = TwoAttributes(ratio=ratio, seed=seed)
    test = source.sample(size.test, seed=10**6)
    recipe = Recipe(
        Threshold(0.0),
        n_features=size.n_features,
        steps=size.steps,
        batch_size=size.batch_size,
        learning_rate=size.learning_rate,
        auxiliary="none",
        penalty=l1_penalty(size.penalty, test.x),
        seed=seed + 1,
    )
    with one_thread():
        sae, _ = fit_dictionary(recipe, lambda step: source.sample(size.batch_size, step).x, source.d, progress=False)
    figures: dict[str, float] = {}
    for where, drawn in (("", test), (", high one reduced", source.reduced(test, 1 - 1 / ratio))):
        codes = dense_codes(sae, drawn.x)
        for name, labels in (("high", drawn.high), ("low", drawn.low)):
            found = share_found(codes > 0, labels, source.values)
            figures[f"share of the {name} attribute found{where}"] = found
        if not where:
            output = codes @ sae.decoder_weight.detach() + sae.decoder_bias.detach()
            figures["L0"] = float((codes > 0).float().sum(dim=1).mean())
            figures["FVU"] = 1 - explained_variance(drawn.x, output)
    return figures


def _splitting(samples: int, seed: int) -> dict[str, dict[str, float]]:
    x, features = two_gaussians(samples, 2 * seed), two_gaussians(1000, 2 * seed + 1)
    found = {
        "ideal 2 features": ideal_loss(x, _PENALTIES),
        "1000 random features": random_features_loss(x, features, _PENALTIES),
    }
    return {
        name: {f"loss at lambda {penalty:g}": total for penalty, total in zip(_PENALTIES, each.total, strict=True)}
        | {"L0 at lambda 0.5": each.l0[0], "L0 at lambda 7": each.l0[-1]}
        for name, each in found.items()
    }
