"""SCR and TPP: does ablating the features of one concept remove that concept, and only that?

Karvonen et al. 2024, *Evaluating Sparse Autoencoders on Targeted Concept Erasure Tasks* (arXiv 2411.18895), as in
SAEBench (``sae_bench.evals.scr_and_tpp``). Probes are linear, on activations averaged over a text's tokens (AdamW,
learning rate 1e-3, L1 1e-3, batches of 16, 20 epochs). The effect of feature j on probe p is

``e_j = (mean code on positives - mean code on negatives)_j * (u_j . w_p)``,

|e_j| for SCR; for TPP the difference of means is first clamped at 0. The N features of largest effect are set to 0, the
dictionary's error is kept, and the probes judge the texts again, for N in 2, 5, 10, 20, 50, 100, 500.

**SCR** (spurious correlation removal). A probe is trained where two properties always go together (numpy's code against
scikit-learn's prose); ablating the features of the one property should make it a probe for the other:
``scr_metric_threshold_N = (acc_ablated - acc_biased) / (acc_clean - acc_biased)``, 0 where the denominator is below
0.001, in the direction in which the biased probe is the worse one. 1 is perfect; it can be negative.

**TPP** (targeted probe perturbation). Ablating class i's features should hurt class i's probe alone:
``tpp_threshold_N_total_metric = mean_i [(acc_i - acc_i|i) - mean_{j != i} (acc_j - acc_j|i)]``.

Since the probe is linear in the mean and the dictionary's decoder is affine, the mean of the ablated activations is the
mean activation less ``mean codes[S] @ directions[S]``: no token is decoded. The arithmetic of effects, ablations and
scores is compared with SAEBench's own functions in ``tests/features/suite/test_peers.py``; the texts are ours (see
`apportion.data.labelled`), so levels are not comparable with its leaderboard. For the control ``activations`` units are
dimensions of the activation. Standard errors are over classes (TPP) and over pairs of libraries (SCR).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.data.labelled import LabelledTexts, crossed_texts, labelled_texts
from apportion.features.evaluate import Metric
from apportion.features.suite.probes import LinearProbe, balanced_rows
from apportion.features.suite.result import NotApplicable, SuiteResult, mean_metric
from apportion.features.suite.sparse_probing import one_against_rest, pooled_by_class
from apportion.features.suite.units import ACTIVATIONS, Subject, Units

THRESHOLDS = (2, 5, 10, 20, 50, 100, 500)
PAIRS = (("numpy", "sklearn"), ("python", "scipy"))


def effects(
    codes: Float[Tensor, "texts units"],
    positive: Bool[Tensor, "texts"],
    directions: Float[Tensor, "units d"],
    probe: LinearProbe,
    spurious: bool,
) -> Float[Tensor, "units"]:
    """The effect of every unit on a probe: absolute for SCR (``spurious``), of positives only for TPP."""
    difference = codes[positive].mean(dim=0) - codes[~positive].mean(dim=0)
    if not spurious:
        difference = difference.clamp(min=0)
    found = difference * (directions @ probe.weight.to(directions))
    return found.abs() if spurious else found


def strongest(effect: Float[Tensor, "units"], n: int) -> Int[Tensor, "_"]:
    """The n units of largest effect; those without any effect are not taken."""
    return effect.topk(min(n, int((effect != 0).sum()))).indices


def ablated(
    mean: Float[Tensor, "texts d"],
    codes: Float[Tensor, "texts units"],
    directions: Float[Tensor, "units d"],
    units: Int[Tensor, "_"],
) -> Float[Tensor, "texts d"]:
    """Mean activations of texts with some units set to 0 on every token, the rest and the error kept."""
    return mean - codes[:, units] @ directions[units]


def scr_score(clean: float, biased: float, after: float) -> float:
    """The share of the harm of a spurious correlation that an ablation undoes."""
    return 0.0 if clean - biased < 0.001 else (after - biased) / (clean - biased)


def tpp_scores(clean: dict[str, float], after: dict[str, dict[str, float]]) -> dict[str, tuple[float, float, float]]:
    """Class -> the total metric, the intended part and the unintended part.

    Args:
        clean: class -> accuracy of its probe.
        after: ablated class -> judged class -> accuracy.
    """
    found = {}
    for name in after:
        intended = clean[name] - after[name][name]
        others = [clean[other] - after[name][other] for other in clean if other != name]
        unintended = sum(others) / len(others)
        found[name] = (intended - unintended, intended, unintended)
    return found


def evaluate_tpp(
    subject: Subject,
    sets: Sequence[LabelledTexts] | None = None,
    *,
    thresholds: Sequence[int] = THRESHOLDS,
    train: int = 100,
    test: int = 50,
    context: int = 128,
    seed: int = 0,
) -> SuiteResult:
    """Targeted probe perturbation.

    Args:
        subject: the dictionary and its model.
        sets: labelled texts; default the packaged sets ``library`` and ``module``.
        thresholds: numbers of units to ablate.
        train: texts a class, for packaged sets.
        test: texts a class, for packaged sets.
        context: tokens read of a text.
        seed: of texts and probes.
    """
    if sets is None:
        sets = [labelled_texts(name, train, test, seed) for name in ("library", "module")]
    units = subject.units()
    per_class: dict[str, dict[int, list[tuple[float, float, float]]]] = {
        name: {n: [] for n in thresholds} for name in units
    }
    details: dict[str, dict[str, float]] = {}
    for each in sets:
        if len(each.classes) < 3:
            raise NotApplicable(f"TPP needs 3 classes or more, {each.name!r} has {len(each.classes)}")
        clean = _tpp_of_set(subject, each, units, thresholds, context, seed, per_class)
        details[each.name] = clean
    figures = {name: _tpp_figures(per_class[name]) for name in units}
    return SuiteResult(
        "tpp",
        figures[""],
        {name: found for name, found in figures.items() if name},
        details={"probe_accuracy": details, "sizes": {each.name: each.sizes() for each in sets}},
        settings={"thresholds": list(thresholds), "context": context, "seed": seed},
    )


def _tpp_of_set(
    subject: Subject,
    texts: LabelledTexts,
    units: dict[str, Units],
    thresholds: Sequence[int],
    context: int,
    seed: int,
    per_class: dict[str, dict[int, list[tuple[float, float, float]]]],
) -> dict[str, float]:
    train, test = (pooled_by_class(subject, part, units, context) for part in (texts.train, texts.test))
    rows = {
        name: [
            balanced_rows({each: len(part[each]) for each in part}, name, torch.Generator().manual_seed(seed + place))
            for place, part in enumerate((texts.train, texts.test))
        ]
        for name in texts.classes
    }
    probes, clean = {}, {}
    for name in texts.classes:
        fitted_on = one_against_rest(train[ACTIVATIONS], name, rows[name][0])
        judged_on = one_against_rest(test[ACTIVATIONS], name, rows[name][1])
        probes[name] = _probe(fitted_on, judged_on, seed)
        clean[name] = probes[name].accuracy(*judged_on)
    for unit in units:
        directions = units[unit].directions
        found = {
            name: effects(*one_against_rest(train[unit], name, rows[name][0]), directions, probes[name], False)
            for name in texts.classes
        }
        for n in thresholds:
            after: dict[str, dict[str, float]] = {}
            for name in texts.classes:
                chosen = strongest(found[name], n)
                changed = {
                    each: ablated(test[ACTIVATIONS][each], test[unit][each], directions, chosen)
                    for each in texts.classes
                }
                after[name] = {
                    each: probes[each].accuracy(*one_against_rest(changed, each, rows[each][1]))
                    for each in texts.classes
                }
            per_class[unit][n] += list(tpp_scores(clean, after).values())
    return clean


def _tpp_figures(per_class: dict[int, list[tuple[float, float, float]]]) -> dict[str, Metric]:
    parts = {
        "total_metric": "accuracy that the class's own probe loses beyond what the others lose, on average",
        "intended_diff_only": "accuracy that the class's own probe loses",
        "unintended_diff_only": "accuracy that the other classes' probes lose",
    }
    found = {}
    for n, scores in per_class.items():
        for place, (part, what) in enumerate(parts.items()):
            name = f"tpp_threshold_{n}_{part}"
            found[name] = mean_metric(name, [score[place] for score in scores], f"{n} units of a class ablated: {what}")
    return found


def evaluate_scr(
    subject: Subject,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    *,
    thresholds: Sequence[int] = THRESHOLDS,
    train: int = 100,
    test: int = 50,
    context: int = 128,
    seed: int = 0,
) -> SuiteResult:
    """Spurious correlation removal, for properties "which library" and "code or prose".

    Args:
        subject: the dictionary and its model.
        pairs: pairs of libraries.
        thresholds: numbers of units to ablate.
        train: texts of each cell (library and kind).
        test: texts of each cell.
        context: tokens read of a text.
        seed: of texts and probes.
    """
    units = subject.units()
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in units}
    details = {}
    for pair in pairs:
        drawn = crossed_texts(pair, train, test, seed)
        details["/".join(pair)] = _scr_of_pair(subject, pair, drawn, units, thresholds, context, seed, scores)
    figures = {name: _scr_figures(found) for name, found in scores.items()}
    return SuiteResult(
        "scr",
        figures[""],
        {name: found for name, found in figures.items() if name},
        details=details,
        settings={"thresholds": list(thresholds), "train": train, "test": test, "context": context, "seed": seed},
    )


def _scr_of_pair(
    subject: Subject,
    pair: tuple[str, str],
    drawn: tuple[dict[tuple[str, str], list[str]], dict[tuple[str, str], list[str]]],
    units: dict[str, Units],
    thresholds: Sequence[int],
    context: int,
    seed: int,
    scores: dict[str, dict[str, list[float]]],
) -> dict[str, float]:
    train, test = (
        pooled_by_class(subject, {"/".join(cell): texts for cell, texts in part.items()}, units, context)
        for part in drawn
    )
    a, b = pair
    # Direction 1 judges the library and ablates the kind; direction 2 the other way round.
    library = ([f"{a}/code", f"{a}/prose"], [f"{b}/code", f"{b}/prose"])
    kind = ([f"{a}/code", f"{b}/code"], [f"{a}/prose", f"{b}/prose"])
    biased = ([f"{a}/code"], [f"{b}/prose"])
    probes = {
        name: _probe(_of_cells(train[ACTIVATIONS], cells), _of_cells(test[ACTIVATIONS], cells), seed)
        for name, cells in (("library", library), ("kind", kind), ("biased", biased))
    }
    judged = {"library": library, "kind": kind}
    clean = {name: probes[name].accuracy(*_of_cells(test[ACTIVATIONS], cells)) for name, cells in judged.items()}
    before = {name: probes["biased"].accuracy(*_of_cells(test[ACTIVATIONS], cells)) for name, cells in judged.items()}
    worse = "library" if before["library"] < before["kind"] else "kind"
    for unit in units:
        directions = units[unit].directions
        for number, (kept, spurious) in enumerate((("library", "kind"), ("kind", "library")), 1):
            on = _of_cells(train[unit], judged[spurious])
            found = effects(*on, directions, probes[spurious], True)
            for n in thresholds:
                chosen = strongest(found, n)
                changed = {
                    cell: ablated(test[ACTIVATIONS][cell], test[unit][cell], directions, chosen)
                    for cell in test[ACTIVATIONS]
                }
                after = probes["biased"].accuracy(*_of_cells(changed, judged[kept]))
                score = scr_score(clean[kept], before[kept], after)
                scores[unit].setdefault(f"scr_dir{number}_threshold_{n}", []).append(score)
                if kept == worse:
                    scores[unit].setdefault(f"scr_metric_threshold_{n}", []).append(score)
    return {
        "accuracy_library": clean["library"],
        "accuracy_kind": clean["kind"],
        "biased_on_library": before["library"],
        "biased_on_kind": before["kind"],
    }


def _scr_figures(scores: dict[str, list[float]]) -> dict[str, Metric]:
    what = {
        "scr_metric": "harm of the spurious correlation undone, in the direction that is harmed more",
        "scr_dir1": "the same, judging the library with the kind ablated",
        "scr_dir2": "the same, judging the kind with the library ablated",
    }
    found = {}
    for name in sorted(scores, key=lambda name: (not name.startswith("scr_metric"), name.split("_")[1])):
        kind = next(start for start in what if name.startswith(start))
        found[name] = mean_metric(name, scores[name], f"{name.rsplit('_', 1)[1]} units ablated: {what[kind]}")
    return found


def _of_cells(by_cell: dict[str, Tensor], cells: tuple[list[str], list[str]]) -> tuple[Tensor, Tensor]:
    values = [torch.cat([by_cell[cell] for cell in side]) for side in cells]
    return torch.cat(values), torch.arange(sum(map(len, values))) < len(values[0])


def _probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int) -> LinearProbe:
    return LinearProbe.fit(train, test, batch=16, epochs=20, learning_rate=1e-3, l1=1e-3, seed=seed)
