"""Study of *To prune, or not to prune* (Zhu & Gupta 2017, arXiv 1710.01878).

Two small tasks, digits and the next character of source code. A network is trained for a while; then it is pruned by
magnitude, layer by layer and with its head, while it is trained on: gradually along a cubic or a straight line, or at
once. Against it stand thin dense networks which hold as much: as many nonzeros, all parameters counted, or as many
bytes (each layer of the pruned one packed as this library's files pack it: as a bitmap or CSR, whichever is smaller),
trained for as many steps in one go. Every arm has its learning rate from one grid, chosen on validation data with a
seed of its own.

What counts was written down before the first run: on both tasks, at the highest sparsity, gradual cubic pruning against
thin networks of as many nonzeros and of as many bytes; and, on digits, the cubic schedule against a straight line. The
method sheet's pilot had thin networks win on digits, which are so easy that little capacity is enough; the paper claims
it of every family, so they count.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apportion.data.characters import characters
from apportion.data.digits import digits
from apportion.report import ResultRow, plots
from apportion.studies.finding import Comparison, Finding, Scale, collect_rows
from apportion.studies.machine import machine, one_thread
from apportion.studies.small_networks import (
    Batches,
    CharacterNetwork,
    DigitsNetwork,
    accuracy,
    batches_of,
    bits_per_character,
    character_batches,
    fit,
    seeded,
)
from apportion.studies.workbench import Workbench
from apportion.training import TrainingSettings
from apportion.weights import Unstructured, add_masks, choose_masks, prunable
from apportion.weights.accounting import largest_width, memory
from apportion.weights.gradual_pruning import GradualPruning, PruningSettings
from apportion.weights.schedule import OneShot, PolynomialSchedule, SparsitySchedule

CLAIM = (
    "A large network that is pruned gradually while it trains is better than a small dense one that holds as many "
    "nonzeros or as many bytes, and removing fast at first and slowly at the end is better than at a steady pace."
)
BASELINE = "thin dense networks of equal nonzeros and equal bytes, with all the steps; a linear schedule"

DENSE, AT_ONCE, RETRAINED, LINEAR, CUBIC = (
    "dense",
    "pruned at once, not retrained",
    "pruned at once, retrained",
    "gradual, linear",
    "gradual, cubic",
)
RANDOM, THIN, THIN_BYTES = "random mask", "thin, equal nonzeros", "thin, equal bytes"
_TUNING_SEED = 1000
Figures = dict[str, float]
Measured = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class _Size:
    """Of one task."""

    name: str
    metric: str
    width: int
    steps: int  # of each half: before pruning begins, and from then on
    batch: int
    sparsities: tuple[float, ...]
    updates: int = 20  # in the first half of the second half
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    tuning_seeds: int = 1
    random: bool = False  # also masks drawn by chance

    @property
    def arms(self) -> tuple[str, ...]:
        """Those that are trained, each at its own learning rate."""
        trained = (DENSE, RETRAINED, LINEAR, CUBIC, THIN, THIN_BYTES)
        return (*trained, RANDOM) if self.random else trained

    @property
    def sign(self) -> int:
        """1 where more is better."""
        return 1 if self.metric == "accuracy" else -1

    @property
    def schedules(self) -> dict[str, Callable[[float], SparsitySchedule]]:
        every = self.steps // 2 // self.updates
        return {
            RETRAINED: lambda sparsity: OneShot(sparsity),
            LINEAR: lambda sparsity: PolynomialSchedule(sparsity, 0, every, self.updates, power=1),
            CUBIC: lambda sparsity: PolynomialSchedule(sparsity, 0, every, self.updates),
        }


_DIGITS = _Size("digits", "accuracy", width=128, steps=1000, batch=64, sparsities=(0.95,))
_CHARACTERS = _Size("characters", "bits per character", width=256, steps=1000, batch=128, sparsities=(0.95,))
_SIZES: dict[Scale, tuple[_Size, ...]] = {
    "smoke": (
        replace(_DIGITS, steps=40, updates=5, width=64, sparsities=(0.9,), rates=(3e-3,), random=True),
        replace(_CHARACTERS, steps=40, updates=5, width=64, sparsities=(0.9,), rates=(3e-3,), random=True),
    ),
    "default": (_DIGITS, _CHARACTERS),
    "long": (
        replace(_DIGITS, sparsities=(0.8, 0.9, 0.95, 0.98), tuning_seeds=3, random=True),
        replace(_CHARACTERS, steps=4000, batch=256, sparsities=(0.9, 0.95, 0.98), tuning_seeds=2, random=True),
    ),
}
_SIZES["gpu"] = (_SIZES["long"][0], replace(_SIZES["long"][1], width=1024, steps=8000))


def run(scale: Scale, seeds: list[int], bench: Workbench) -> Finding:
    """Measure; see the module's docstring."""
    measured: Measured = defaultdict(lambda: defaultdict(list))
    chosen: dict[str, dict[str, float]] = {}
    with one_thread():
        for size in _SIZES[scale]:
            experiment = _Experiment(bench, size, "cuda" if scale == "gpu" else "cpu")
            for sparsity in size.sparsities:
                condition = _condition(size, sparsity)
                chosen[condition] = experiment.tuned(sparsity)
                for seed in seeds:
                    for arm, rate in chosen[condition].items():
                        for name, figures in experiment.measure(arm, sparsity, rate, seed).items():
                            for metric, value in figures.items():
                                if metric != "validation":
                                    measured[f"{condition}: {name}"][metric].append(value)
    return Finding(
        slug="gradual_pruning",
        claim=CLAIM,
        rows=collect_rows(measured),
        comparisons=_claims(_SIZES[scale], measured),
        seeds=seeds,
        seconds=bench.seconds,
        machine=machine(),
        scale=scale,
        notes=_notes(_SIZES[scale], chosen),
        plots=_plots(_SIZES[scale], measured),
    )


def _condition(size: _Size, sparsity: float) -> str:
    return f"{size.name}, {sparsity:.0%} sparse"


@dataclass(frozen=True)
class _Task:
    """What is learned, and how well a network has."""

    network: Callable[[int], nn.Module]
    batches: Callable[[int], Batches]
    validation: Callable[[nn.Module], float]
    test: Callable[[nn.Module], float]


def _task(size: _Size, device: str) -> _Task:
    if size.name == "digits":
        data = digits()
        return _Task(
            lambda width: DigitsNetwork((64, width, width, 10)).to(device),
            lambda seed: batches_of(*data.train, size.batch, seed),
            lambda network: accuracy(network.cpu(), data.validation),
            lambda network: accuracy(network.cpu(), data.test),
        )
    codes = characters()
    return _Task(
        lambda width: CharacterNetwork(width).to(device),
        lambda seed: character_batches(codes.train, size.batch, seed),
        lambda network: bits_per_character(network.cpu(), codes.validation),
        lambda network: bits_per_character(network.cpu(), codes.test),
    )


class _Experiment:
    """All arms on one task."""

    def __init__(self, bench: Workbench, size: _Size, device: str) -> None:
        self.bench, self.size, self.task = bench, size, _task(size, device)
        self._halves: dict[tuple[float, int], dict[str, torch.Tensor]] = {}

    def tuned(self, sparsity: float) -> dict[str, float]:
        """The learning rate of each arm, by validation with seeds of its own."""
        size, chosen = self.size, {}
        seeds = [_TUNING_SEED + place for place in range(size.tuning_seeds)]
        for arm in size.arms:
            scores = {
                rate: sum(self.measure(arm, sparsity, rate, seed)[arm]["validation"] for seed in seeds)
                for rate in size.rates
            }
            chosen[arm] = max(scores, key=lambda rate: size.sign * scores[rate])
        return chosen

    def measure(self, arm: str, sparsity: float, rate: float, seed: int) -> dict[str, Figures]:
        """What came of an arm; of the dense network also what pruning leaves of it."""
        what = f"{_condition(self.size, sparsity)}, seed {seed}: {arm} at {rate:g}"
        key = [asdict(self.size), sparsity, arm, rate, seed]
        return self.bench.measure(what, key, partial(self._measure, arm, sparsity, rate, seed))

    def _measure(self, arm: str, sparsity: float, rate: float, seed: int) -> dict[str, Figures]:
        network = self._trained(arm, sparsity, rate, seed)
        found = {arm: self._figures(network)}
        if arm == DENSE:
            GradualPruning(network, PruningSettings(OneShot(sparsity)))
            found[AT_ONCE] = self._figures(network)
        return found

    def _figures(self, network: nn.Module) -> Figures:
        held = memory(network, prunable(network))
        return {
            self.size.metric: self.task.test(network),
            "validation": self.task.validation(network),
            "nonzeros": float(held.nonzeros),
            "kB": held.smallest / 1000,
        }

    def _trained(self, arm: str, sparsity: float, rate: float, seed: int) -> nn.Module:
        if arm in (THIN, THIN_BYTES, RANDOM):
            network = self._network(self._width(arm, sparsity), seed)
            if arm == RANDOM:
                _prune_by_chance(network, sparsity, seed)
            return self._fit(network, 2 * self.size.steps, rate, seed, decay=0.125)
        network = self._half(rate, seed)
        hooks = []
        if arm in self.size.schedules:
            hooks.append(GradualPruning(network, PruningSettings(self.size.schedules[arm](sparsity))))
        return self._fit(network, self.size.steps, rate, seed + 500_000, decay=0.25, hooks=hooks)

    def _half(self, rate: float, seed: int) -> nn.Module:
        """The network as it is when pruning begins, trained once for all arms."""
        network = self._network(self.size.width, seed)
        if (rate, seed) not in self._halves:
            self._fit(network, self.size.steps, rate, seed, decay=0.0)
            self._halves[rate, seed] = {name: each.clone() for name, each in network.state_dict().items()}
        network.load_state_dict(self._halves[rate, seed])
        return network

    def _fit(
        self, network: nn.Module, steps: int, rate: float, seed: int, *, decay: float, hooks: Sequence[Any] = ()
    ) -> nn.Module:
        settings = TrainingSettings(
            steps=steps, learning_rate=rate, decay_fraction=decay, clip_norm=None, log_every=steps
        )
        return fit(network, self.task.batches(seed), steps, rate, seed=seed, hooks=hooks, settings=settings)

    def _network(self, width: int, seed: int) -> nn.Module:
        return seeded(lambda: self.task.network(width), seed)

    def _width(self, arm: str, sparsity: float) -> int:
        if arm == RANDOM:
            return self.size.width
        pruned = self._network(self.size.width, 0)
        GradualPruning(pruned, PruningSettings(OneShot(sparsity)))
        budget = memory(pruned, prunable(pruned))

        def cost(width: int) -> int:
            thin = self._network(width, 0)
            held = memory(thin, prunable(thin))
            return held.nonzeros if arm == THIN else held.dense

        return largest_width(cost, budget.nonzeros if arm == THIN else budget.smallest)


def _prune_by_chance(network: nn.Module, sparsity: float, seed: int) -> None:
    """Masks drawn at random, with as many weights in every layer as magnitude would leave."""
    draws = torch.Generator().manual_seed(seed)
    scores = {each.name: torch.rand(each.matrix().shape, generator=draws) for each in prunable(network)}
    add_masks(network, choose_masks(scores, Unstructured(sparsity)))


def _claims(sizes: Sequence[_Size], measured: Measured) -> list[Comparison]:
    claims = []
    for size in sizes:
        for sparsity in size.sparsities:
            hardest = sparsity == max(size.sparsities)
            for arm, other, counts in (
                (CUBIC, THIN, hardest),
                (CUBIC, THIN_BYTES, hardest),
                (CUBIC, LINEAR, hardest and size.name == "digits"),
                (CUBIC, RETRAINED, False),
                (RETRAINED, AT_ONCE, False),
                *([(CUBIC, RANDOM, False)] if size.random else []),
            ):
                mine, theirs = (measured[f"{_condition(size, sparsity)}: {each}"][size.metric] for each in (arm, other))
                margins = [size.sign * (a - b) for a, b in zip(mine, theirs, strict=True)]
                text = f"{_condition(size, sparsity)}: {arm} is better than {other} ({size.metric})"
                claims.append(Comparison.positive(text, margins, part_of_verdict=counts))
    return claims


def _notes(sizes: Sequence[_Size], chosen: dict[str, dict[str, float]]) -> list[str]:
    notes = [
        "What counts was fixed before the first run: at each task's highest sparsity, cubic pruning against thin "
        "networks of equal nonzeros and of equal bytes, and on digits against a linear schedule.",
        "Nonzeros count every parameter (biases, norms, embedding); kB is what a packed file takes, each layer "
        "dense, as a bitmap or in CSR, whichever is smallest, values in float32. Head pruned, embedding not.",
        "A first run had learning rates of 1e-3, 3e-3 and 1e-2: no arm chose the first and most chose the last, so the "
        "grid moved up for all of them. It also had digits at 90 % and random masks, which are left to `long`.",
    ]
    for size in sizes:
        notes.append(
            f"{size.name}: width {size.width}, {size.steps} steps and as many more, Adam, batches of {size.batch}, "
            f"{size.updates} updates of the mask in the first half of the second {size.steps} steps, the learning rate "
            f"falls in their last quarter. Thin networks (and random masks) train {2 * size.steps} steps in one go. "
            f"Learning rates from {list(size.rates)} by validation on {size.tuning_seeds} seed(s) not used otherwise."
        )
    for condition, rates in chosen.items():
        notes.append(f"{condition}: learning rates " + ", ".join(f"{arm} {rate:g}" for arm, rate in rates.items()))
    return notes


def _plots(sizes: Sequence[_Size], measured: Measured) -> dict[str, str]:
    """Bars of every task at its highest sparsity."""
    pictures = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            condition = _condition(size, max(size.sparsities))
            rows = [
                ResultRow(row.name.removeprefix(f"{condition}: "), row.metric, row.mean, row.stderr, row.n)
                for row in collect_rows({name: each for name, each in measured.items() if name.startswith(condition)})
                if row.metric in (size.metric, "nonzeros", "kB")
            ]
            path = plots.bars_with_errors(Path(folder) / f"{size.name}.svg", rows, title=condition)
            pictures[size.name] = path.read_text(encoding="utf-8")
    return pictures
