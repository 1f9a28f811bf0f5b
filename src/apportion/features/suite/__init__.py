"""SAEBench's evaluations, offline: on any model with its dictionary, on tasks made on the spot or brought along.

*SAEBench: A Comprehensive Benchmark for Sparse Autoencoders in Language Model Interpretability* (Karvonen et al. 2025,
arXiv 2503.09532; code ``sae-bench`` 0.6.0). One file an evaluation, whose docstring has its definitions, under
SAEBench's names, and what differs. Every evaluation comes with what no training went into: a random dictionary with as
many features and the same mean L0, and the activation's own dimensions, as many of them as features are used. Where an
evaluation has nothing to say about a model it gives the reason instead of a number.

| evaluation | asks |
|---|---|
| ``core`` | what reconstruction loses, and what the model loses by it |
| ``sparse_probing`` | whether a concept has a feature of its own |
| ``scr``, ``tpp`` | whether ablating a concept's features removes that concept, and only that |
| ``ravel`` | whether one attribute of an entity can be exchanged, and the others kept |
| ``absorption`` | whether features are silent where other features say it for them |
| ``unlearning`` | whether clamping features takes knowledge away, and only that |

SAEBench's ``autointerp`` needs a judge model, ``mdl`` and ``meta_structure`` are not here.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.data.files import read_json, write_json
from apportion.data.labelled import LabelledTexts, read_labelled
from apportion.errors import InputError
from apportion.features.evaluate import Contexts
from apportion.features.suite.absorption import evaluate_absorption
from apportion.features.suite.core import evaluate_core
from apportion.features.suite.ravel import evaluate_ravel
from apportion.features.suite.result import FORMAT, NotApplicable, SuiteResult
from apportion.features.suite.scr_tpp import evaluate_scr, evaluate_tpp
from apportion.features.suite.sparse_probing import evaluate_sparse_probing
from apportion.features.suite.units import ACTIVATIONS, RANDOM, Subject, random_dictionary
from apportion.features.suite.unlearning import UnlearningData, evaluate_unlearning, read_unlearning_data

__all__ = [
    "ACTIVATIONS",
    "EVALUATIONS",
    "HEADLINES",
    "RANDOM",
    "NotApplicable",
    "Sizes",
    "Subject",
    "SuiteData",
    "SuiteResult",
    "evaluate_absorption",
    "evaluate_core",
    "evaluate_ravel",
    "evaluate_scr",
    "evaluate_sparse_probing",
    "evaluate_tpp",
    "evaluate_unlearning",
    "random_dictionary",
    "read_unlearning_data",
    "run_suite",
    "suite_names",
]


@dataclass(frozen=True)
class Sizes:
    """How much each evaluation looks at.

    ``QUICK`` makes the whole suite take some minutes on two cores; ``FULL`` has SAEBench's contexts and a tenth of its
    texts, which is what the packaged sources hold.
    """

    contexts: int
    probing_train: int
    probing_test: int
    context: int
    pairs: int
    words_train: int
    words_test: int
    questions: int


QUICK = Sizes(16, 50, 25, 48, 32, 150, 40, 24)
FULL = Sizes(160, 400, 100, 128, 500, 1000, 250, 200)
SIZES = {"quick": QUICK, "full": FULL}


@dataclass(frozen=True, eq=False)
class SuiteData:
    """What the suite reads besides the dictionary.

    Attributes:
        view: held-out text with its activations, for ``core``.
        labelled: a JSON Lines file of labelled texts instead of the packaged ones, for ``sparse_probing`` and ``tpp``.
        unlearning: data for ``unlearning`` instead of the stand-in.
    """

    view: Contexts
    labelled: Path | None = None
    unlearning: UnlearningData | None = None

    def sets(self, sizes: Sizes, seed: int) -> list[LabelledTexts] | None:
        """The texts brought along, if there are any."""
        if self.labelled is None:
            return None
        return [read_labelled(self.labelled, sizes.probing_train, sizes.probing_test, seed)]


def _core(subject: Subject, data: SuiteData, sizes: Sizes, seed: int) -> SuiteResult:
    return evaluate_core(subject, data.view, contexts=sizes.contexts)


def _sparse_probing(subject: Subject, data: SuiteData, sizes: Sizes, seed: int) -> SuiteResult:
    return evaluate_sparse_probing(subject, data.sets(sizes, seed), **_texts(sizes, seed))


def _scr(subject: Subject, data: SuiteData, sizes: Sizes, seed: int) -> SuiteResult:
    return evaluate_scr(subject, **_texts(sizes, seed))


def _tpp(subject: Subject, data: SuiteData, sizes: Sizes, seed: int) -> SuiteResult:
    return evaluate_tpp(subject, data.sets(sizes, seed), **_texts(sizes, seed))


def _ravel(subject: Subject, data: SuiteData, sizes: Sizes, seed: int) -> SuiteResult:
    return evaluate_ravel(subject, pairs=sizes.pairs, seed=seed)


def _absorption(subject: Subject, data: SuiteData, sizes: Sizes, seed: int) -> SuiteResult:
    return evaluate_absorption(subject, train=sizes.words_train, test=sizes.words_test, seed=seed)


def _unlearning(subject: Subject, data: SuiteData, sizes: Sizes, seed: int) -> SuiteResult:
    return evaluate_unlearning(subject, data.unlearning, max_questions=sizes.questions)


def _texts(sizes: Sizes, seed: int) -> dict[str, Any]:
    return {"train": sizes.probing_train, "test": sizes.probing_test, "context": sizes.context, "seed": seed}


EVALUATIONS: dict[str, Callable[[Subject, SuiteData, Sizes, int], SuiteResult]] = {
    "core": _core,
    "sparse_probing": _sparse_probing,
    "scr": _scr,
    "tpp": _tpp,
    "ravel": _ravel,
    "absorption": _absorption,
    "unlearning": _unlearning,
}
# What a short table shows of each.
HEADLINES: dict[str, tuple[str, ...]] = {
    "core": ("ce_loss_score", "kl_div_score", "explained_variance", "cossim", "l0"),
    "sparse_probing": (
        "sae_top_1_test_accuracy", "sae_top_2_test_accuracy", "sae_top_5_test_accuracy", "sae_test_accuracy",
    ),
    "scr": ("scr_metric_threshold_5", "scr_metric_threshold_20", "scr_metric_threshold_100"),
    "tpp": ("tpp_threshold_5_total_metric", "tpp_threshold_20_total_metric", "tpp_threshold_100_total_metric"),
    "ravel": ("disentanglement_score", "cause_score", "isolation_score"),
    "absorption": (
        "mean_absorption_fraction_score", "mean_full_absorption_score", "mean_num_split_features", "mean_k1_f1",
    ),
    "unlearning": ("unlearning_score", "forgotten_at_any_cost"),
}  # fmt: skip


def suite_names(text: str) -> list[str]:
    """The evaluations that ``all`` or a list with commas names, in the suite's order.

    Raises:
        InputError: one that is unknown.
    """
    asked = [name.strip().replace("-", "_") for name in text.split(",") if name.strip()]
    if asked == ["all"]:
        return list(EVALUATIONS)
    if not asked or (unknown := [name for name in asked if name not in EVALUATIONS]):
        wrong = f"{unknown[0]!r} is unknown" if asked else "names no evaluation"
        raise InputError(f"suite {text!r}: {wrong}: give all, or some of {', '.join(EVALUATIONS)}")
    return [name for name in EVALUATIONS if name in asked]


def run_suite(
    subject: Subject,
    data: SuiteData,
    names: Sequence[str] | None = None,
    *,
    sizes: Sizes = QUICK,
    seed: int = 0,
    folder: Path | str | None = None,
    decided_by: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, SuiteResult]:
    """Run some evaluations; those that an earlier call has finished in ``folder`` are read back.

    Args:
        subject: the dictionary and its model.
        data: what else is read.
        names: of ``EVALUATIONS``; None: all.
        sizes: how much each looks at.
        seed: of everything drawn.
        folder: where each result is kept as ``NAME.json`` once it is there; None keeps nothing.
        decided_by: what, besides sizes and seed, decides the results (such as the dictionary's hash): a result of other
            things is made anew.
        progress: say on stderr how things go on.

    Raises:
        InputError: an unknown name; bad data.
    """
    names = suite_names(",".join(names)) if names is not None else list(EVALUATIONS)
    results = {}
    for number, name in enumerate(names, 1):
        key = {"sizes": _shown(sizes), "seed": seed, **(decided_by or {})}
        path = None if folder is None else Path(folder) / f"{name}.json"
        before = _kept(path, key)
        if before is not None:
            _say(progress, f"suite {number}/{len(names)}: {name} is done already")
            results[name] = before
            continue
        _say(progress, f"suite {number}/{len(names)}: {name}")
        started = time.perf_counter()
        try:
            result = EVALUATIONS[name](subject, data, sizes, seed)
        except NotApplicable as reason:
            result = SuiteResult(name, not_applicable=str(reason), settings={"seed": seed})
        seconds = round(time.perf_counter() - started, 1)
        # As JSON has it, so that a fresh result and one read back are the same.
        content = result.to_json() | {"decided_by": key, "seconds": seconds}
        if path is not None:
            write_json(path, content)
        results[name] = SuiteResult.from_json(content)
        _say(progress, f"suite {number}/{len(names)}: {name} took {seconds:g} s")
    return results


def _kept(path: Path | None, key: Mapping[str, Any]) -> SuiteResult | None:
    if path is None or not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("decided_by") != key:
        return None
    return SuiteResult.from_json(content)


def _shown(sizes: Sizes) -> dict[str, int]:
    return {name: getattr(sizes, name) for name in sizes.__dataclass_fields__}


def _say(progress: bool, message: str) -> None:
    if progress:
        print(message, file=sys.stderr, flush=True)
