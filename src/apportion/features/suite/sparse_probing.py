"""Sparse probing: does a concept have a feature of its own? Probes that may look at k units only.

Gurnee et al. 2023, *Finding Neurons in a Haystack* (arXiv 2305.01610), as in SAEBench
(``sae_bench.evals.sparse_probing``): values are averaged over a text's tokens; for each class against the rest the k
units with the largest |mean on positives - mean on negatives| of the training texts are chosen, a logistic regression
is fitted on them, and its accuracy on test texts reported, averaged over the classes of a set and then over sets.

| figure | units |
|---|---|
| ``sae_top_{k}_test_accuracy``, k in 1, 2, 5 | the k best features |
| ``sae_test_accuracy`` | all features (AdamW, 100 epochs, lr 0.01) |
| ``llm_top_{k}_test_accuracy`` | the k best dimensions of the activation: the control ``activations`` |
| ``llm_test_accuracy`` | all of the activation |

Chance is 0.5. Selection, probe and averages are those of SAEBench and give the same numbers on the same pooled values
(``tests/features/suite/test_peers.py``); its texts come from a hub (professions, reviews, languages, code, news; 4,000
to train on and 1,000 to test on, 128 tokens each), ours from the installation (`apportion.data.labelled`) unless you
bring your own, so the level of the figures is not comparable with its leaderboard. Standard errors are over classes.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from apportion.data.labelled import LABELLED_SETS, LabelledTexts, labelled_texts
from apportion.features.evaluate import Metric
from apportion.features.suite.probes import LinearProbe, balanced_rows, best_by_mean_difference, logistic_accuracy
from apportion.features.suite.result import SuiteResult, mean_metric
from apportion.features.suite.units import ACTIVATIONS, RANDOM, Subject, Units, pooled

KS = (1, 2, 5)
# Pooled values of that many numbers are kept for TPP, which may ask for the same texts: 256 MiB.
_KEPT = 2**26


def evaluate_sparse_probing(
    subject: Subject,
    sets: Sequence[LabelledTexts] | None = None,
    *,
    ks: Sequence[int] = KS,
    train: int = 100,
    test: int = 50,
    context: int = 128,
    full_probes: bool = True,
    seed: int = 0,
) -> SuiteResult:
    """Sparse probing of a dictionary, a random one, and the activation's own dimensions.

    Args:
        subject: the dictionary and its model.
        sets: labelled texts; default all packaged sets.
        ks: how many units a probe may use.
        train: texts a class, for packaged sets.
        test: texts a class, for packaged sets.
        context: tokens read of a text.
        full_probes: also fit probes on all features and on the whole activation.
        seed: of the texts and of the choice of negatives.
    """
    if sets is None:
        sets = [labelled_texts(name, train, test, seed) for name in LABELLED_SETS]
    units = subject.units()
    by_set: dict[str, dict[str, dict[str, float]]] = {}
    for each in sets:
        by_set[each.name] = _one_set(subject, each, units, ks, context, full_probes, seed)
    probes = [f"top_{k}" for k in ks] + (["full"] if full_probes else [])
    own = _figures(by_set, "", probes, "sae") | _figures(by_set, ACTIVATIONS, probes, "llm")
    controls = {control: _figures(by_set, control, probes, "sae") for control in (RANDOM, ACTIVATIONS)}
    return SuiteResult(
        "sparse_probing",
        own,
        controls,
        details={"sets": by_set, "sizes": {each.name: each.sizes() for each in sets}},
        settings={"ks": list(ks), "context": context, "seed": seed, "sets": {each.name: each.what for each in sets}},
    )


def _figures(
    by_set: dict[str, dict[str, dict[str, float]]], unit: str, probes: Sequence[str], kind: str
) -> dict[str, Metric]:
    """Means over sets of the means over classes; standard errors are over all classes."""
    figures = {}
    for probe in probes:
        name = f"{kind}_test_accuracy" if probe == "full" else f"{kind}_{probe}_test_accuracy"
        per_set = [list(found[f"{unit or 'features'} {probe}"].values()) for found in by_set.values()]
        flat = [value for values in per_set for value in values]
        what = "all units" if probe == "full" else f"the best {probe.removeprefix('top_')} of all units"
        figures[name] = Metric(
            name,
            sum(sum(values) / len(values) for values in per_set) / len(per_set),
            mean_metric(name, flat, "").stderr,
            len(flat),
            f"test accuracy of one-against-rest probes on {what}, over classes and sets; chance is 0.5",
        )
    return figures


def _one_set(
    subject: Subject,
    texts: LabelledTexts,
    units: dict[str, Units],
    ks: Sequence[int],
    context: int,
    full_probes: bool,
    seed: int,
) -> dict[str, dict[str, float]]:
    """(units, probe) -> class -> test accuracy."""
    parts = [pooled_by_class(subject, part, units, context) for part in (texts.train, texts.test)]
    found: dict[str, dict[str, float]] = {}
    for name in texts.classes:
        rows = [
            balanced_rows({each: len(part[each]) for each in part}, name, torch.Generator().manual_seed(seed + place))
            for place, part in enumerate((texts.train, texts.test))
        ]
        for unit in units:
            train, test = (one_against_rest(part[unit], name, row) for part, row in zip(parts, rows, strict=True))
            for k in ks:
                best = best_by_mean_difference(*train, k)
                accuracy = logistic_accuracy((train[0][:, best], train[1]), (test[0][:, best], test[1]))
                found.setdefault(f"{unit or 'features'} top_{k}", {})[name] = accuracy
            if full_probes:
                probe = LinearProbe.fit(train, test, batch=250, epochs=100, learning_rate=1e-2, seed=seed)
                found.setdefault(f"{unit or 'features'} full", {})[name] = probe.accuracy(*test)
    return found


def pooled_by_class(
    subject: Subject,
    texts: dict[str, list[str]],
    units: dict[str, Units],
    context: int,
) -> dict[str, dict[str, Tensor]]:
    """Units -> class -> mean values of its texts; texts that were pooled before are not run again."""
    flat = [text for each in texts.values() for text in each]
    digest = hashlib.sha256("\0".join(flat).encode("utf-8", "surrogatepass")).hexdigest()
    key = ("pooled", digest, context, *units)
    values = subject.made.get(key)
    if values is None:
        _, values = pooled(subject.lm, subject.site, flat, list(units.values()), context)
        if sum(value.numel() for value in values) <= _KEPT:
            subject.made[key] = values
    sizes = [len(each) for each in texts.values()]
    return {unit: dict(zip(texts, value.split(sizes), strict=True)) for unit, value in zip(units, values, strict=True)}


def one_against_rest(by_class: dict[str, Tensor], positive: str, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Values of the chosen texts, the positive class first, and which are positive."""
    others = [by_class[name][row] for name, row in rows.items() if name != positive]
    values = torch.cat([by_class[positive][rows[positive]], *others])
    return values, torch.arange(len(values)) < len(rows[positive])
