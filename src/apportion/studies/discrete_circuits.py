"""Study of *Sparse Autoencoders Enable Scalable Circuit Identification* (O'Neill & Bui 2024, arXiv 2405.12522).

Two halves. On synthetic heads, whose part in a task is known, unique codes are compared with the mean difference: some
heads change the axis along which they write while their mean stays, others move their mean. On SmolLM2 doing IOI,
greater-than (on the tens digit) and docstring, every score of heads is held against exact activation patching on
prompts that no method sees: the 5 % and the 10 % of heads whose patching changes the answer most.

All methods see the same prompts. Attribution patching, head importance and mean ablation see the answers too, and go
through the model backwards or many times; codes, mean difference and norm see outputs alone. At the scale ``long`` the
number of codes, penalty, position, centring, scaling and score are searched on IOI with a seed of its own; what wins
there is judged, as one setting, on all tasks and seeds ("codes, searched"). Shorter runs take the best of five
combinations tried before.
"""

import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from apportion.data.synthetic_heads import SyntheticHeads, synthetic_heads
from apportion.data.tasks import PromptPairs, docstring, greater_than, ioi
from apportion.features.discrete_circuits import (
    CodeSettings,
    NodeScore,
    edge_scores,
    fit_codes,
    k_means_codes,
    node_scores,
    nodes_from_edges,
    written_on_prompts,
)
from apportion.features.head_scores import (
    HeadScores,
    auc_interval,
    label_heads,
    mean_difference,
    output_norm,
    roc_auc,
)
from apportion.models import (
    LanguageModel,
    TokenPairs,
    ablate_heads,
    attribute_heads,
    keep_heads,
    load,
    patch_heads,
    tokenise,
    validate,
)
from apportion.studies.finding import Comparison, Finding, Row, Scale, collect_rows
from apportion.studies.machine import machine, one_thread
from apportion.studies.workbench import Workbench

CLAIM = (
    "Integer codes of head outputs, from one small autoencoder fitted on 10 prompts, find the heads of a circuit in "
    "under a minute without ablations or gradients: ROC AUC about 0.87 on IOI, greater-than and docstring, above head "
    "importance; and they find heads that change what they write while its mean stays the same."
)
BASELINE = (
    "mean difference of head outputs, output norm, codes by k-means and by an untrained dictionary, on the same "
    "prompts; attribution patching, head importance and mean ablation, which may use the answers"
)

_TUNING_SEED, _LABEL_SEED = 1000, 2000
_PUBLISHED = {"IOI": 0.868, "greater-than": 0.855, "docstring": 0.869}
_SHARES = {"top 5 %": 0.05, "top 10 %": 0.10}
Measured = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class _Choice:
    """What the search chooses among."""

    settings: CodeSettings
    position: str = "mean"
    score: NodeScore = "raw"

    def __str__(self) -> str:
        ours = self.settings
        return (
            f"F={ours.n_features}, penalty {ours.penalty:g}, position {self.position}, center {ours.center}, normalize "
            f"{ours.normalize}, score {self.score}"
        )


# The best of the few combinations of the search that have been run so far (on IOI, unscaled, F = 200).
_SEARCHED = _Choice(CodeSettings(n_features=200, penalty=0.1), "mean", "tv")


@dataclass(frozen=True)
class _Task:
    name: str
    make: Callable[[int, int], PromptPairs]
    penalty: float = 0.02


_TASKS = (
    _Task("IOI", lambda pairs, seed: ioi(pairs, seed, frame=1)),
    _Task("greater-than", lambda pairs, seed: greater_than(pairs, seed)),
    _Task("docstring", lambda pairs, seed: docstring(pairs, seed), penalty=0.05),
)


@dataclass(frozen=True)
class _Real:
    """Pairs of prompts: for the codes, for the labels and for what goes through the model many times."""

    model: str = "smollm2"
    dtype: str = "float32"
    device: str = "cpu"
    pairs: int = 40
    label_pairs: int = 16
    label_pairs_docstring: int = 8
    attributed_pairs: int = 8
    search: bool = True

    def labelling(self, task: _Task) -> int:
        """Pairs that label the heads; docstring's are long."""
        return self.label_pairs_docstring if task.name == "docstring" else self.label_pairs

    def ablating(self, task: _Task) -> int:
        """Pairs whose heads are ablated."""
        return max(1, self.labelling(task) // 3)


@dataclass(frozen=True)
class _Size:
    worlds: int = 5  # a seed
    epochs: int = 500
    real: _Real | None = None


_SIZES: dict[Scale, _Size] = {
    "smoke": _Size(worlds=1, epochs=200),
    "default": _Size(
        worlds=3,
        real=_Real(pairs=30, label_pairs=6, label_pairs_docstring=3, attributed_pairs=4, search=False),
    ),
    "long": _Size(real=_Real()),
    "gpu": _Size(real=_Real(device="cuda", pairs=250, label_pairs=128, label_pairs_docstring=64)),
}


def run(scale: Scale, seeds: list[int], bench: Workbench) -> Finding:
    """Measure; see the module's docstring."""
    size = _SIZES[scale]
    with one_thread():
        rows, comparisons, notes = _on_synthetic(size, seeds, bench)
    if size.real is not None:
        more = _on_model(size.real, seeds, bench)
        rows, comparisons, notes = rows + more[0], comparisons + more[1], notes + more[2]
    return Finding(
        slug="discrete_circuits",
        claim=CLAIM,
        rows=rows,
        comparisons=comparisons,
        seeds=seeds,
        seconds=bench.seconds,
        machine=machine(),
        scale=scale,
        notes=notes,
    )


# --- known truth ---------------------------------------------------------------------------------------------------


def _on_synthetic(size: _Size, seeds: list[int], bench: Workbench) -> tuple[list[Row], list[Comparison], list[str]]:
    measured: Measured = defaultdict(lambda: defaultdict(list))
    settings = CodeSettings(epochs=size.epochs)
    for seed in seeds:
        what = {"worlds": size.worlds, "settings": asdict(settings)}
        found = bench.measure(f"synthetic heads, seed {seed}", [what, seed], partial(_in_worlds, size, settings, seed))
        for method, figures in found.items():
            for metric, value in figures.items():
                measured[f"synthetic heads: {method}"][metric].append(value)

    def of(method: str, metric: str = "AUC, mean-preserving heads") -> Tensor:
        return torch.tensor(measured[f"synthetic heads: {method}"][metric], dtype=torch.float64)

    codes, shift = "codes, unique", "AUC, mean-shift heads"
    claims = [
        ("unique codes find mean-preserving heads, AUC above 0.95", of(codes) - 0.95, True),
        ("unique codes beat the mean difference by 0.15 there", of(codes) - of("mean difference") - 0.15, True),
        ("the trained dictionary beats an untrained one there", of(codes) - of("random dictionary, unique"), False),
        (
            "on mean-shift heads the mean difference beats unique codes",
            of("mean difference", shift) - of(codes, shift),
            False,
        ),
    ]
    notes = [
        f"Synthetic heads: 40 heads of width 32, 60 + 60 prompts, {size.worlds} draws a seed; 8 heads switch the axis "
        "of their output on positives (means equal), 8 add a constant, 24 do neither; each kind is judged against "
        "these 24. With 60 prompts the mean difference of a head that writes +-c is not zero: what it scores is chance."
    ]
    comparisons = [
        Comparison.positive(f"synthetic heads: {claim}", margins.tolist(), part_of_verdict=counts)
        for claim, margins, counts in claims
    ]
    return collect_rows(measured), comparisons, notes


def _in_worlds(size: _Size, settings: CodeSettings, seed: int) -> dict[str, dict[str, float]]:
    """AUCs of every method, averaged over some draws."""
    total: Measured = defaultdict(lambda: defaultdict(list))
    for world in range(size.worlds):
        heads = synthetic_heads(10_000 * world + seed)
        for method, scores in _synthetic_scores(heads, replace(settings, seed=seed)).items():
            for kind, wanted in (("mean-preserving", heads.switches), ("mean-shift", heads.shifts)):
                judged = wanted | heads.others
                auc = roc_auc(scores[judged][None], wanted[judged][None])
                total[method][f"AUC, {kind} heads"].append(auc)
    return {
        method: {metric: sum(values) / len(values) for metric, values in metrics.items()}
        for method, metrics in total.items()
    }


def _synthetic_scores(heads: SyntheticHeads, settings: CodeSettings) -> dict[str, Tensor]:
    both = heads.positive, heads.negative
    codes, _ = fit_codes(*both, settings)
    untrained, _ = fit_codes(*both, replace(settings, epochs=0))
    centroids = k_means_codes(*both, settings)
    return {
        "codes, unique": node_scores(codes)[None],
        "codes, total variation": node_scores(codes, "tv")[None],
        "k-means codes, unique": node_scores(centroids)[None],
        "random dictionary, unique": node_scores(untrained)[None],
        "mean difference": mean_difference(*both),
        "output norm": output_norm(*both),
    }


# --- a language model -----------------------------------------------------------------------------------------------


def _on_model(size: _Real, seeds: list[int], bench: Workbench) -> tuple[list[Row], list[Comparison], list[str]]:
    bench.say(f"loading {size.model}")
    lm = load(size.model, dtype=size.dtype, device=size.device)
    trials = _Trials(lm, size, bench)
    searched, notes = _SEARCHED, []
    if size.search:
        searched, said = trials.searched()
        notes.append(said)
    else:
        notes.append(f"Codes, searched: {searched}; the best of five combinations on IOI, a seed of its own.")
    measured: Measured = defaultdict(lambda: defaultdict(list))
    for task in _TASKS:
        for method, figures in trials.of_the_task(task).items():
            for metric, value in figures.items():
                measured[f"{task.name}: {method}"][metric].append(value)
        for seed in seeds:
            for method, figures in trials.of_the_seed(task, seed, searched).items():
                for metric, value in figures.items():
                    measured[f"{task.name}: {method}"][metric].append(value)
    notes.append(
        f"{size.model}: {size.pairs} + {size.pairs} prompts a task and seed, the autoencoder on 10 of them. Labels: "
        f"exact patching of each of {lm.n_layers * lm.n_heads} heads on {size.label_pairs} pairs "
        f"({size.label_pairs_docstring} of docstring) of a seed of their own: counterfactual output at all positions "
        "of the clean run, the task's metric. Intervals are means over seeds of 95 % bootstrap intervals over label "
        "prompts and heads. Attribution patching, head importance and ablation see the answers, on prompts that are "
        "not those of the labels. Seconds include the model's forward passes."
    )
    return collect_rows(measured), _model_claims(measured), notes


class _Trials:
    """All measurements on one model."""

    def __init__(self, lm: LanguageModel, size: _Real, bench: Workbench) -> None:
        self.lm, self.size, self.bench = lm, size, bench

    def pairs(self, task: _Task, count: int, seed: int) -> TokenPairs:
        """Pairs of a task as tokens."""
        return tokenise(task.make(count, seed), self.lm)

    def effects(self, task: _Task) -> Tensor:
        """Exact patching on the label prompts: [pairs, layers, heads]."""
        count = self.size.labelling(task)

        def measure() -> Any:
            started = time.perf_counter()
            effects = patch_heads(self.lm, self.pairs(task, count, _LABEL_SEED))
            return {"effects": effects.tolist(), "seconds": time.perf_counter() - started}

        found = self.bench.measure(f"{task.name}: exact patching", [asdict(self.size), task.name], measure)
        return torch.tensor(found["effects"])

    def of_the_task(self, task: _Task) -> dict[str, dict[str, float]]:
        """What is measured once: the model itself, exact patching against itself, ablation."""
        effects = self.effects(task)

        def measure() -> Any:
            found = validate(self.lm, self.pairs(task, 32, _LABEL_SEED))
            model = {
                "top-1 accuracy": found.accuracy,
                "prompts with metric > 0": found.preferred,
                "metric": found.metric,
                "metric of counterfactuals": found.counterfactual_metric,
            }
            started = time.perf_counter()
            pairs = self.pairs(task, 32, _LABEL_SEED + 1)
            ablated = ablate_heads(self.lm, pairs.select(slice(0, self.size.ablating(task))), means_over=pairs)
            ablation = HeadScores("", ablated.mean(0).abs().cpu(), time.perf_counter() - started)
            return {"the model itself": model, "mean ablation of each head": self._judged(ablation, effects)}

        figures = self.bench.measure(f"{task.name}: the model, ablation", [asdict(self.size), task.name], measure)
        half = HeadScores("", effects[1::2].mean(0).abs())
        figures["exact patching, half of the label prompts against the other half"] = {
            f"AUC, {name}": roc_auc(half.scores, label_heads(effects[::2], share)) for name, share in _SHARES.items()
        }
        return dict(figures)

    def of_the_seed(self, task: _Task, seed: int, searched: _Choice) -> dict[str, dict[str, float]]:
        """All scores on the prompts of a seed."""
        effects = self.effects(task)

        def measure() -> Any:
            pairs = self.pairs(task, self.size.pairs, seed)
            scores = self._scores(task, pairs, seed, searched)
            figures = {each.name: self._judged(each, effects) | each.notes for each in scores}
            self._add_faithfulness(figures, scores, self.pairs(task, 4, _LABEL_SEED + 2), seed)
            return figures

        settings = [asdict(self.size), task.name, seed, str(searched)]
        return dict(self.bench.measure(f"{task.name}, seed {seed}: scores of heads", settings, measure))

    def _scores(self, task: _Task, pairs: TokenPairs, seed: int, searched: _Choice) -> list[HeadScores]:
        paper = CodeSettings(penalty=task.penalty, seed=seed)
        found = []
        started = time.perf_counter()
        both = self._written(pairs, "mean")
        forward = time.perf_counter() - started

        def timed(name: str, score: Callable[[], Tensor], before: float = forward, **notes: float) -> None:
            began = time.perf_counter()
            values = score().view(self.lm.n_layers, self.lm.n_heads).cpu()
            found.append(HeadScores(name, values, before + time.perf_counter() - began, notes))

        began = time.perf_counter()
        codes, notes = fit_codes(*both, paper)
        fitted = forward + time.perf_counter() - began
        described = {f"dictionary, {name}": value for name, value in notes.items()}
        timed("codes (paper), unique", lambda: node_scores(codes), fitted, **described)
        timed("codes (paper), normalised", lambda: node_scores(codes, "normalised"), fitted)
        timed("codes (paper), total variation", lambda: node_scores(codes, "tv"), fitted)
        timed("codes (paper), from edges", lambda: nodes_from_edges(edge_scores(codes)), fitted)
        timed("codes, searched", lambda: self._searched_scores(pairs, both, searched, seed))
        centroids: list[Any] = []
        timed(
            "k-means codes, unique", lambda: node_scores(centroids[0] if centroids else _kept(centroids, both, paper))
        )
        timed("k-means codes, total variation", lambda: node_scores(centroids[0], "tv"), found[-1].seconds)
        untrained, _ = fit_codes(*both, replace(paper, epochs=0))
        timed("random dictionary, unique", lambda: node_scores(untrained))
        timed("random dictionary, total variation", lambda: node_scores(untrained, "tv"))
        timed("mean difference", lambda: mean_difference(*both))
        timed("mean difference, standardised", lambda: mean_difference(*both, standardised=True))
        timed("output norm", lambda: output_norm(*both))
        few = pairs.select(slice(0, self.size.attributed_pairs))
        timed("attribution patching", lambda: attribute_heads(self.lm, few).mean(0).abs(), 0.0)
        timed("head importance", lambda: attribute_heads(self.lm, few, kind="importance").mean(0), 0.0)
        return found

    def _searched_scores(self, pairs: TokenPairs, means: tuple[Tensor, Tensor], choice: _Choice, seed: int) -> Tensor:
        both = means if choice.position == "mean" else self._written(pairs, choice.position)
        return node_scores(fit_codes(*both, replace(choice.settings, seed=seed))[0], choice.score)

    def _written(self, pairs: TokenPairs, position: str) -> tuple[Tensor, Tensor]:
        return (
            written_on_prompts(self.lm, pairs.clean, position),
            written_on_prompts(self.lm, pairs.counterfactual, position),
        )

    def _judged(self, scores: HeadScores, effects: Tensor) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name, share in _SHARES.items():
            low, high = auc_interval(scores.scores, effects, share)
            figures |= {f"AUC, {name}": roc_auc(scores.scores, label_heads(effects, share))}
            figures |= {f"AUC, {name}, 95 % from": low, f"AUC, {name}, to": high}
        return figures | {"seconds": scores.seconds}

    def _add_faithfulness(
        self, figures: dict[str, dict[str, float]], scores: list[HeadScores], pairs: TokenPairs, seed: int
    ) -> None:
        """How much of the task is left while only the best tenth of all heads do their own work."""
        generator = torch.Generator().manual_seed(seed)
        shape = scores[0].scores.shape
        chance = HeadScores("heads drawn by chance", torch.rand(shape, generator=generator))
        whole, none = (
            float(keep_heads(self.lm, pairs, torch.full(shape, kept, device=self.lm.device)).mean())
            for kept in (True, False)
        )
        judged = ("codes (paper), unique", "codes, searched", "mean difference", "attribution patching", chance.name)
        for each in [*scores, chance]:
            if each.name not in judged:
                continue
            kept = each.mask(max(1, int(0.1 * each.scores.numel()))).to(self.lm.device)
            left = float(keep_heads(self.lm, pairs, kept).mean())
            figures.setdefault(each.name, {})["faithfulness, best 10 %"] = (left - none) / (whole - none)

    def searched(self) -> tuple[_Choice, str]:
        """Every combination on IOI, a seed of its own; the best by the mean AUC of both labels."""
        task = _TASKS[0]
        effects = self.effects(task)
        pairs = self.pairs(task, self.size.pairs, _TUNING_SEED)
        written: dict[str, tuple[Tensor, Tensor]] = {}
        tried: list[tuple[float, _Choice]] = []
        scores: tuple[NodeScore, ...] = ("raw", "normalised", "tv")
        for choice in _candidates():

            def measure(choice: _Choice = choice) -> list[float]:
                if choice.position not in written:
                    written[choice.position] = self._written(pairs, choice.position)
                codes, _ = fit_codes(*written[choice.position], replace(choice.settings, seed=_TUNING_SEED))
                return [
                    sum(
                        roc_auc(node_scores(codes, score).view(effects.shape[1:]).cpu(), label_heads(effects, share))
                        for share in _SHARES.values()
                    )
                    / len(_SHARES)
                    for score in scores
                ]

            found = self.bench.measure(f"IOI, search: {choice}", [asdict(self.size), str(choice)], measure)
            tried += [(auc, replace(choice, score=score)) for auc, score in zip(found, scores, strict=True)]
        tried.sort(key=lambda each: each[0], reverse=True)
        listed = "; ".join(f"{auc:.3f} {choice}" for auc, choice in tried[:5])
        middle = tried[len(tried) // 2][0]
        return tried[0][1], (
            f"Search on IOI, seed {_TUNING_SEED}: {len(tried)} combinations, mean AUC of both labels from "
            f"{tried[-1][0]:.3f} to {tried[0][0]:.3f}, median {middle:.3f}. The best of so many is too good by chance: "
            f"judge it by the other seeds and tasks. Best: {listed}."
        )


def _kept(kept: list[Any], both: tuple[Tensor, Tensor], settings: CodeSettings) -> Any:
    kept.append(k_means_codes(*both, settings))
    return kept[0]


def _candidates() -> list[_Choice]:
    scalings: tuple[tuple[Any, Any], ...] = (
        (None, None),
        ("global", None),
        ("global", "per_head"),
        ("per_head", None),
        ("per_head", "per_head"),
    )
    return [
        _Choice(CodeSettings(n_features=count, penalty=penalty, normalize=normalize, center=center), position)
        for position, (normalize, center), count, penalty in itertools.product(
            ("mean", "end"), scalings, (50, 200), (0.002, 0.02, 0.1, 0.3)
        )
    ]


def _model_claims(measured: Measured) -> list[Comparison]:
    claims: list[tuple[str, Tensor, bool]] = []
    for task in _TASKS:

        def of(method: str, metric: str = "AUC, top 5 %", task: _Task = task) -> Tensor:
            return torch.tensor(measured[f"{task.name}: {method}"][metric], dtype=torch.float64)

        codes, published = "codes (paper), unique", _PUBLISHED[task.name]
        both = (of(codes) + of(codes, "AUC, top 10 %")) / 2
        claims += [
            (f"{task.name}: codes reach the published AUC of {published} less 0.05", both - published + 0.05, True),
            (f"{task.name}: codes beat head importance, top 5 %", of(codes) - of("head importance"), True),
            (f"{task.name}: codes beat the mean difference, top 5 %", of(codes) - of("mean difference"), True),
            (f"{task.name}: codes take less than 60 s, autoencoder included", 60 - of(codes, "seconds"), True),
            (
                f"{task.name}: the frequency-aware score beats unique codes, top 5 %",
                of("codes (paper), total variation") - of(codes),
                False,
            ),
            (
                f"{task.name}: the trained dictionary beats an untrained one, top 5 %",
                of(codes) - of("random dictionary, unique"),
                False,
            ),
            (
                f"{task.name}: codes as searched beat the mean difference, top 5 %",
                of("codes, searched") - of("mean difference"),
                False,
            ),
        ]
    return [Comparison.positive(claim, margins.tolist(), part_of_verdict=counts) for claim, margins, counts in claims]
