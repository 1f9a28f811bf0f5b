"""Study of *Principled Evaluations of Sparse Autoencoders* (Makelov, Lange, Nanda 2024, arXiv 2405.08366).

On a model that does indirect object identification, the six attention heads whose outputs at the last token matter
most (measured, on prompts that nothing else uses) get dictionaries: supervised ones, fitted to the labels of a few
hundred prompts, and unsupervised ones of the same prompts. Every dictionary is judged on prompts about other places and
objects, by what the model predicts: with reconstructions in place, with reconstructions taken away, and after edits
that should change one attribute. Names differ from seed to seed.

An edit is right if the model then predicts what the true counterfactual *activations* make it predict. How often it
predicts that anyway, with no edit, stands beside every accuracy: where the two are close the accuracy says nothing.

Equal effort: all dictionaries of a head see the same prompts, all unsupervised ones have the same width and steps;
nothing is tuned on the test prompts. The margins were set before the first run: 10 % for "sufficient", "necessary" and
"at the level of no edit", 0.8 for edit accuracy, 0.2 for the gap. Two things came after a first look at one seed: frame
1 instead of 0 (it is the one that the method sheet measured, and shorter; the scale ``long`` has all three), and
training prompts with all combinations of attributes equally often.

Two toys with known truth follow: an attribute that is occluded by one of larger magnitude, and a loss that prefers a
thousand random features to the right two.
"""

import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.data import corpus
from apportion.data.tasks import Prompt, PromptPairs, ioi
from apportion.data.tasks.ioi import NAMES, OBJECTS, PLACES
from apportion.features import SparseAutoencoder
from apportion.features.control import (
    Agreement,
    SparseEdit,
    Unit,
    edit_magnitude,
    exact_edit,
    feature_weights,
    interpretation_aware_edit,
    sparse_edit,
)
from apportion.features.cross_section import (
    CrossSection,
    Head,
    effects_at_end,
    outputs_at_end,
    strongest_heads,
    table_of,
)
from apportion.features.interpretability import f1_scores, interpretable, keep_features, predicates_of, union_f1
from apportion.features.supervised_dictionaries import (
    Attribute,
    Table,
    approximation,
    explained_variance,
    fit_supervised,
)
from apportion.features.task_dictionaries import dense_codes, fit_on_task, random_dictionary, task_recipe
from apportion.models import LanguageModel, Site, cache_dir, harvest, load, tokenise
from apportion.report import plots
from apportion.report.tables import ResultRow
from apportion.studies.finding import Comparison, Finding, Row, Scale, collect_rows
from apportion.studies.machine import machine, one_thread
from apportion.studies.occlusion_and_splitting import Toys, on_toys
from apportion.studies.workbench import Workbench

CLAIM = (
    "Supervised dictionaries approximate, and control with one swap per attribute, what attention heads carry for "
    "indirect object identification; a TopK dictionary of the same activations approximates them as well but controls "
    "them worse with two edits; dictionaries with random directions do not control at all."
)
BASELINE = (
    "TopK dictionaries of the same prompts, the same with a frozen random decoder, untrained random ones, and no edit "
    "at all; for the toys, equal magnitudes and the ideal two features"
)

_SELECTION_SEED = 1000
_SUPERVISED: dict[str, tuple[str, list[Attribute]]] = {
    "supervised, MSE": ("mse", ["IO", "S", "Pos"]),
    "supervised, mean": ("mean", ["IO", "S", "Pos"]),
    "supervised, MSE, coupled": ("mse", [("IO", "Pos"), ("S", "Pos")]),
}
_HEADLINE, _COUPLED = "supervised, MSE", "supervised, MSE, coupled"
_TOPK, _FROZEN, _RANDOM = "TopK", "TopK, frozen decoder", "TopK, random"
_GENERAL = "TopK, general text"
_BUDGETS = (1, 2, 4)
Measured = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class _Task:
    """Section 7 of the method sheet."""

    model: str = "smollm2"
    frame: int = 1
    heads: int = 6
    names: int = 8
    repeats: int = 4  # training prompts of every combination of attributes
    test: int = 40
    selection: int = 8
    n_features: int = 256
    k: int = 4
    l1: float = 2.5
    steps: int = 1500
    batch_size: int = 256
    learning_rate: float = 1e-3
    arms: tuple[str, ...] = (*_SUPERVISED, _TOPK, _FROZEN, _RANDOM)
    general_tokens: int = 50_000
    general_features: int = 1024
    device: str = "cpu"

    @property
    def where(self) -> str:
        """The condition in words."""
        return f"IOI, frame {self.frame}"


@dataclass(frozen=True)
class _Size:
    tasks: tuple[_Task, ...] = ()
    toys: Toys = field(default_factory=Toys)


_ALL = (*_SUPERVISED, _TOPK, "ReLU + L1", "Gated", _FROZEN, _RANDOM, _GENERAL)
_SIZES: dict[Scale, _Size] = {
    "smoke": _Size((), Toys(steps=60, test=500, samples=500)),
    "default": _Size((_Task(steps=800),), Toys(steps=1500)),
    "long": _Size(
        tuple(_Task(frame=frame, names=10, repeats=5, test=120, selection=32, arms=_ALL) for frame in (1, 0, 2)),
        Toys(ratios=(1.0, 1.25, 1.5, 2.0)),
    ),
    "gpu": _Size(
        tuple(
            _Task(frame=frame, names=20, repeats=5, test=200, selection=32, n_features=512, arms=_ALL, device="cuda")
            for frame in (1, 0, 2)
        ),
        Toys(ratios=(1.0, 1.25, 1.5, 2.0)),
    ),
}


def run(scale: Scale, seeds: list[int], bench: Workbench) -> Finding:
    """Measure; see the module's docstring."""
    size = _SIZES[scale]
    rows, comparisons, notes = on_toys(size.toys, seeds, bench)
    pictures: dict[str, str] = {}
    for task in reversed(size.tasks):
        more = _on_task(task, seeds, bench)
        rows, comparisons, notes = more[0] + rows, more[1] + comparisons, more[2] + notes
        pictures[f"edits-frame-{task.frame}"] = _edit_plot(task.where, more[0])
    if not size.tasks:
        notes.append("This scale runs the toys only; the model is part of the scales default, long and gpu.")
    return Finding(
        slug="supervised_dictionaries",
        claim=CLAIM,
        rows=rows,
        comparisons=comparisons,
        seeds=seeds,
        seconds=bench.seconds,
        machine=machine(),
        scale=scale,
        notes=notes,
        plots=pictures,
    )


# --- indirect object identification ---------------------------------------------------------------------------------


def _on_task(size: _Task, seeds: list[int], bench: Workbench) -> tuple[list[Row], list[Comparison], list[str]]:
    bench.say(f"loading {size.model}")
    lm = load(size.model, device=size.device)
    selection = [size.model, size.frame, size.selection, size.heads]
    chosen = bench.measure(f"{size.where}: which heads matter", selection, partial(_heads_that_matter, lm, size))
    heads = [(layer, head) for layer, head, _ in chosen]
    measured: Measured = defaultdict(lambda: defaultdict(list))
    for seed in seeds:
        world = _World(lm, heads, size, seed)
        for name in size.arms:
            figures = bench.measure(
                f"{size.where}, seed {seed}: {name}", [asdict(size), heads, seed], partial(world.measure, name)
            )
            for metric, value in figures.items():
                measured[f"{size.where}: {name}"][metric].append(value)
        figures = bench.measure(
            f"{size.where}, seed {seed}: the model alone", [asdict(size), heads, seed], world.baseline
        )
        for metric, value in figures.items():
            measured[f"{size.where}: no edit"][metric].append(value)
    notes = [
        f"{size.where}: {size.model}; heads (layer, head; by how much the logit difference falls when the head alone "
        "puts out, at the last token, what it does on a prompt with three names): "
        + ", ".join(f"({layer}, {head}) {effect:+.2f}" for layer, head, effect in chosen)
        + f". {size.repeats} training prompts of every combination of {size.names} names and two orders "
        f"(names drawn anew for each seed), {size.test} test "
        "prompts about other places and objects. All heads are edited at once, on true activations.",
        f"{size.where}, unsupervised: {size.n_features} features a head, {size.steps} steps of {size.batch_size}, Adam "
        f"{size.learning_rate:g}, TopK k={size.k}. Edits are greedy, k per head; 'feature' swaps a feature's old value "
        "for its new one, 'move' is one removal or one addition; a supervised swap is two moves.",
        *_worth_of_edits(size, measured),
    ]
    return collect_rows(measured), _task_claims(size, measured), notes


def _heads_that_matter(lm: LanguageModel, size: _Task) -> list[tuple[int, int, float]]:
    effects = effects_at_end(lm, tokenise(ioi(size.selection, seed=_SELECTION_SEED, frame=size.frame), lm))
    return [(layer, head, float(effects[layer, head])) for layer, head in strongest_heads(effects, size.heads)]


def _worth_of_edits(size: _Task, measured: Measured) -> list[str]:
    """What the no-edit agreement makes of the edit accuracies."""
    notes = []
    for attribute in ("IO", "S", "Pos"):
        no_edit = float(np.mean(measured[f"{size.where}: no edit"][f"{attribute} edit accuracy"]))
        if no_edit >= 0.9:
            notes.append(
                f"{size.where}: {attribute} edits say nothing here. With no edit at all the model predicts, in "
                f"{no_edit:.3f} of the cases, what the counterfactual {attribute} activations make it predict: these "
                "heads do not decide by it."
            )
    return notes


def _balanced(drawn: PromptPairs, repeats: int) -> PromptPairs:
    """The first few pairs of every combination of attributes, so that no feature absorbs how frequent a value is."""
    kept: dict[tuple[str, ...], list[tuple[Prompt, Prompt]]] = defaultdict(list)
    for clean, other in zip(drawn.clean, drawn.counterfactual, strict=True):
        own = kept[tuple(clean.attributes.values())]
        if len(own) < repeats:
            own.append((clean, other))
    clean_prompts, others = zip(*(pair for own in kept.values() for pair in own), strict=True)
    return replace(drawn, clean=clean_prompts, counterfactual=others)


@dataclass(frozen=True, eq=False)
class _Changed:
    """The test prompts with one attribute changed."""

    table: Table
    outputs: dict[Head, Tensor]
    patched: Tensor  # logits of the clean run with these outputs in place


class _World:
    """The prompts of a seed, read once, and the judgement of dictionaries on them."""

    def __init__(self, lm: LanguageModel, heads: list[Head], size: _Task, seed: int) -> None:
        self.lm, self.heads, self.size, self.seed = lm, heads, size, seed
        generator = np.random.default_rng(np.random.SeedSequence([seed, 0x51D]))
        self.names = tuple(generator.permutation(np.array(NAMES))[: size.names].tolist())

    @cached_property
    def training(self) -> tuple[Table, dict[Head, Tensor]]:
        """Labels and activations to fit on."""
        size = self.size
        combinations = 2 * size.names * (size.names - 1)
        drawn = ioi(
            10 * size.repeats * combinations,
            2 * self.seed,
            size.frame,
            names=self.names,
            places=PLACES[:5],
            objects=OBJECTS[:5],
        )
        drawn = _balanced(drawn, size.repeats)
        return table_of(drawn.clean), outputs_at_end(self.lm, self.heads, tokenise(drawn, self.lm).clean)

    @cached_property
    def test(self) -> tuple[Table, CrossSection]:
        """Labels and activations to judge on."""
        drawn = self._test_pairs("IO")
        return table_of(drawn.clean), CrossSection(self.lm, self.heads, tokenise(drawn, self.lm).clean)

    @cached_property
    def clean(self) -> Tensor:
        """Logits of the test prompts."""
        return self.test[1].logits()

    @cached_property
    def changed(self) -> dict[str, _Changed]:
        """The same prompts with another IO, S or Pos."""
        found = {}
        for attribute in ("IO", "S", "Pos"):
            drawn = self._test_pairs(attribute)
            outputs = outputs_at_end(self.lm, self.heads, tokenise(drawn, self.lm).counterfactual)
            found[attribute] = _Changed(table_of(drawn.counterfactual), outputs, self.test[1].logits(outputs))
        return found

    def _test_pairs(self, attribute: Any) -> PromptPairs:
        # The clean prompts of a seed are the same whatever is changed.
        return ioi(
            self.size.test,
            2 * self.seed + 1,
            self.size.frame,
            counterfactual=attribute,
            names=self.names,
            places=PLACES[5:],
            objects=OBJECTS[5:],
        )

    @cached_property
    def mean(self) -> dict[Head, Tensor]:
        """Mean activations."""
        return {head: x.mean(dim=0) for head, x in self.training[1].items()}

    def baseline(self) -> dict[str, float]:
        """The model alone: how well it does the task, and how often no edit is right."""
        answers = tokenise(self._test_pairs("IO"), self.lm).clean.answers[:, 0]
        figures = {
            "accuracy": float((self.clean.argmax(dim=1) == answers).float().mean()),
            "logit difference": float(self.test[1].score().mean()),
        }
        for attribute, changed in self.changed.items():
            figures[f"{attribute} edit accuracy"] = Agreement.of(self.clean, changed.patched, self.clean).accuracy
        return figures

    def measure(self, name: str) -> dict[str, float]:
        """Everything about one kind of dictionary, fitted for every head."""
        return self._measure_supervised(name) if name in _SUPERVISED else self._measure_unsupervised(name)

    # --- supervised

    def _measure_supervised(self, name: str) -> dict[str, float]:
        features, attributes = _SUPERVISED[name]
        table, outputs = self.training
        before, section = self.test
        fitted = {
            head: fit_supervised(x, table, attributes, features=features)  # type: ignore[arg-type]
            for head, x in outputs.items()
        }
        rebuilt = {head: each.decode(each.encode(before)) for head, each in fitted.items()}
        figures = {**self._approximation(rebuilt), "L0": float(len(attributes))}
        figures["explained variance, training prompts"] = _mean(
            explained_variance(outputs[head], each.decode(each.encode(table))) for head, each in fitted.items()
        )
        for attribute, changed in self.changed.items():
            after = changed.table
            edited = {head: each.edit(section.outputs[head], before, after) for head, each in fitted.items()}
            figures |= self._agreement(f"{attribute} edit", "one swap", attribute, edited)
            magnitudes = []
            for each in fitted.values():
                weights = feature_weights(each.encode(before).to_dense(), each.decoder_weight)
                magnitudes.append(edit_magnitude(each.removed(before, after), weights).mean())
            figures[f"{attribute} edit magnitude, one swap"] = _mean(magnitudes)
        return figures

    # --- unsupervised

    def _measure_unsupervised(self, name: str) -> dict[str, float]:
        section = self.test[1]
        fitted = {head: self._fit(name, head) for head in self.heads}
        codes = {head: dense_codes(each, section.outputs[head]) for head, each in fitted.items()}
        weights = {head: each.decoder_weight.detach() for head, each in fitted.items()}
        biases = {head: each.decoder_bias.detach() for head, each in fitted.items()}
        rebuilt = {head: codes[head] @ weights[head] + biases[head] for head in self.heads}
        figures = self._approximation(rebuilt)
        figures["L0"] = _mean((each > 0).float().sum(dim=1).mean() for each in codes.values())
        # What features mean is read off the training prompts, whose labels no such dictionary has seen.
        predicates = predicates_of(self.training[0], ["IO", "S", "Pos", ("IO", "Pos"), ("S", "Pos")])
        active = {head: dense_codes(each, self.training[1][head]) > 0 for head, each in fitted.items()}
        f1 = {head: f1_scores(each, predicates.truth) for head, each in active.items()}
        figures |= self._interpretability(f1, codes, weights, biases)
        where = [predicates.index("Pos", "ABB"), predicates.index("Pos", "BAB")]
        figures["F1 of Pos, best feature"] = _mean(each[:, where].max() for each in f1.values())
        figures["F1 of Pos, union of 10"] = _mean(
            max(union_f1(each, predicates.truth[:, column], 10)[0] for column in where) for each in active.values()
        )
        for attribute, changed in self.changed.items():
            target_codes = {head: dense_codes(each, changed.outputs[head]) for head, each in fitted.items()}
            shares = {head: feature_weights(codes[head], weights[head]) for head in self.heads}
            for unit, budgets in (("feature", _BUDGETS if attribute != "IO" else (2,)), ("move", (2,))):
                made = {
                    head: self._edit(unit, head, changed, codes[head], target_codes[head], weights[head], max(budgets))
                    for head in self.heads
                }
                for k in budgets:
                    figures |= self._of_edit(f"{attribute} edit", f"k={k} {unit}", attribute, made, shares, k)
                if (name, attribute, unit) == (_TOPK, "Pos", "feature"):
                    figures["greedy distance over exact, Pos k=2 feature"] = self._gap(
                        changed, codes, target_codes, weights, made
                    )
            old, new = (
                [predicates.index(attribute, value) for value in table[attribute]]
                for table in (self.test[0], changed.table)
            )
            aware = {
                head: interpretation_aware_edit(
                    section.outputs[head],
                    codes[head],
                    target_codes[head],
                    weights[head],
                    f1[head][:, old].T,
                    f1[head][:, new].T,
                    budget=2,
                )
                for head in self.heads
            }
            figures |= self._of_edit(f"{attribute} interpretation-aware edit", "k=2", attribute, aware, shares, 2)
        return figures

    def _edit(
        self, unit: Any, head: Head, changed: _Changed, old: Tensor, new: Tensor, weight: Tensor, budget: int
    ) -> SparseEdit:
        chosen: Unit = unit
        return sparse_edit(self.test[1].outputs[head], changed.outputs[head], old, new, weight, budget, unit=chosen)

    def _gap(
        self,
        changed: _Changed,
        old: dict[Head, Tensor],
        new: dict[Head, Tensor],
        weights: dict[Head, Tensor],
        made: dict[Head, SparseEdit],
    ) -> float:
        """How much further from the target greedy edits of two features end than the best ones do."""
        greedy = exact = 0.0
        for head, each in made.items():
            source, target = self.test[1].outputs[head], changed.outputs[head]
            greedy += float(each.distance(target)[:, 2].sum())
            for row in range(source.shape[0]):
                best = exact_edit(
                    source[row], target[row], old[head][row], new[head][row], weights[head], 2, unit="feature"
                )
                exact += float((best - target[row]).norm())
        return greedy / exact

    def _fit(self, name: str, head: Head) -> SparseAutoencoder:
        size = self.size
        x = self.training[1][head] if name != _GENERAL else self._general(head)
        kind: Any = {"ReLU + L1": "relu", "Gated": "gated"}.get(name, "topk")
        recipe = task_recipe(
            kind,
            x,
            n_features=size.general_features if name == _GENERAL else size.n_features,
            steps=size.steps,
            k=size.k,
            l1=size.l1,
            learning_rate=size.learning_rate,
            batch_size=size.batch_size,
            seed=self.seed,
        )
        if name == _RANDOM:
            return random_dictionary(x, recipe)
        with one_thread():
            return fit_on_task(x, recipe, freeze_decoder=name == _FROZEN)

    def _general(self, head: Head) -> Tensor:
        """Outputs of a head on general text, the same for all seeds."""
        size = self.size
        layers = sorted({layer for layer, _ in self.heads})
        name = f"study-{size.model}-heads-{'-'.join(map(str, layers))}-english-{size.general_tokens}"
        sites = [Site(layer, "heads") for layer in layers]
        folder = cache_dir() / "stores" / name.replace("/", "-")
        store = harvest(self.lm, sites, corpus("english"), folder, tokens=size.general_tokens)
        layer, place = head
        every = store.read(torch.arange(store.n_tokens), Site(layer, "heads"))
        return every.unflatten(1, (self.lm.n_heads, -1))[:, place].contiguous()

    # --- judged

    def _approximation(self, rebuilt: dict[Head, Tensor]) -> dict[str, float]:
        section = self.test[1]
        found = approximation(section.score, section.outputs, rebuilt, self.mean)
        return {
            "explained variance": _mean(
                explained_variance(section.outputs[head], each) for head, each in rebuilt.items()
            ),
            "sufficiency": found.sufficiency.value,
            "necessity": found.necessity.value,
        }

    def _interpretability(
        self,
        f1: dict[Head, Tensor],
        codes: dict[Head, Tensor],
        weights: dict[Head, Tensor],
        biases: dict[Head, Tensor],
    ) -> dict[str, float]:
        section = self.test[1]
        kept = {
            head: keep_features(codes[head], interpretable(f1[head], 0.6), weights[head], biases[head])
            for head in self.heads
        }
        found = approximation(section.score, section.outputs, kept, self.mean)
        return {
            "features a head with F1 >= .8": _mean(interpretable(each, 0.8).float().sum() for each in f1.values()),
            "sufficiency, features with F1 >= .6": found.sufficiency.value,
            "necessity, features with F1 >= .6": found.necessity.value,
        }

    def _agreement(self, what: str, how: str, attribute: str, edited: dict[Head, Tensor]) -> dict[str, float]:
        section, changed = self.test[1], self.changed[attribute]
        judged = Agreement.of(section.logits(edited), changed.patched, self.clean)
        left = [
            (each - changed.outputs[head]).norm(dim=1).sum()
            / (section.outputs[head] - changed.outputs[head]).norm(dim=1).sum()
            for head, each in edited.items()
        ]
        figures = {f"{what} accuracy, {how}": judged.accuracy}
        if how in ("one swap", "k=2 feature"):
            figures[f"{what} distance left, {how}"] = _mean(left)
            if not math.isnan(judged.corrected):
                figures[f"{what} accuracy corrected for no edit, {how}"] = judged.corrected
        return figures

    def _of_edit(
        self,
        what: str,
        how: str,
        attribute: str,
        made: dict[Head, SparseEdit],
        shares: dict[Head, Tensor],
        k: int,
    ) -> dict[str, float]:
        figures = self._agreement(what, how, attribute, {head: each.path[:, k] for head, each in made.items()})
        taken = (edit_magnitude(each.removed[:, k], shares[head]).mean() for head, each in made.items())
        figures[f"{what} magnitude, {how}"] = _mean(taken)
        return figures


def _mean(values: Iterable[Tensor | float]) -> float:
    return float(np.mean([float(value) for value in values]))


def _task_claims(size: _Task, measured: Measured) -> list[Comparison]:
    def of(name: str, metric: str) -> Tensor:
        return torch.tensor(measured[f"{size.where}: {name}"][metric], dtype=torch.float64)

    two = "k=2 feature"
    pos = "Pos edit accuracy"
    nothing = of("no edit", pos)
    counted = [
        ("(i) supervised: sufficiency within 10 % of 1", 0.1 - (of(_HEADLINE, "sufficiency") - 1).abs()),
        ("(i) supervised: necessity within 10 % of 1", 0.1 - (of(_HEADLINE, "necessity") - 1).abs()),
        ("(i) supervised: S edit accuracy above 0.8", of(_HEADLINE, "S edit accuracy, one swap") - 0.8),
        ("(i) supervised: Pos edit accuracy above 0.8", of(_HEADLINE, f"{pos}, one swap") - 0.8),
        ("(ii) TopK: sufficiency within 10 % of 1", 0.1 - (of(_TOPK, "sufficiency") - 1).abs()),
        (
            "(ii) TopK: its 2-feature Pos edit stays 0.2 or more below the supervised swap",
            of(_HEADLINE, f"{pos}, one swap") - of(_TOPK, f"{pos}, {two}") - 0.2,
        ),
        (
            "(iii) frozen decoder: 2-feature Pos edit within 0.1 of no edit",
            0.1 - of(_FROZEN, f"{pos}, {two}") + nothing,
        ),
        ("(iii) random: 2-feature Pos edit within 0.1 of no edit", 0.1 - of(_RANDOM, f"{pos}, {two}") + nothing),
    ]
    aside = [
        (
            f"supervised: {attribute} edit agrees more often than no edit",
            of(_HEADLINE, f"{attribute} edit accuracy, one swap") - of("no edit", f"{attribute} edit accuracy"),
        )
        for attribute in ("IO", "S", "Pos")
    ]
    aside += [
        ("supervised, coupled: Pos edit accuracy above 0.8", of(_COUPLED, f"{pos}, one swap") - 0.8),
        ("supervised, coupled: S edit accuracy above 0.8", of(_COUPLED, "S edit accuracy, one swap") - 0.8),
        (
            "TopK: its 4-feature Pos edit is within 0.1 of the supervised swap",
            0.1 - (of(_HEADLINE, f"{pos}, one swap") - of(_TOPK, f"{pos}, k=4 feature")),
        ),
        (
            "TopK: its 2-feature Pos edit takes away a larger share than the supervised swap",
            of(_TOPK, f"Pos edit magnitude, {two}") - of(_HEADLINE, "Pos edit magnitude, one swap"),
        ),
    ]
    return [Comparison.positive(f"{size.where} {claim}", margins.tolist()) for claim, margins in counted] + [
        Comparison.positive(f"{size.where} {claim}", margins.tolist(), part_of_verdict=False)
        for claim, margins in aside
    ]


def _edit_plot(where: str, rows: list[Row]) -> str:
    """Edit accuracies of every dictionary, as SVG text."""
    chosen = {
        "one swap": "one swap, or 2 features",
        "k=2 feature": "one swap, or 2 features",
        "k=4 feature": "one swap, or 4 features",
    }
    shown: list[ResultRow] = []
    for attribute in ("Pos", "S"):
        for row in rows:
            what, _, how = row.metric.partition(", ")
            if what != f"{attribute} edit accuracy" or (how and how not in chosen):
                continue
            label = f"{attribute}: {chosen.get(how, 'one swap, or 2 features')}"
            name = row.name.removeprefix(f"{where}: ")
            shown.append(ResultRow(name=name, metric=label, mean=row.mean, stderr=row.stderr, n=row.n))
    with tempfile.TemporaryDirectory() as folder:
        path = plots.bars_with_errors(Path(folder) / "edits.svg", shown, title=f"Edit accuracy, {where}")
        return path.read_text(encoding="utf-8")
