"""Study of *Sparse-IFT: Sparse Iso-FLOP Transformations* (Thangarasa et al. 2023, arXiv 2303.11525), with RigL and SET.

Networks so small that capacity binds, and larger sparse ones that cost exactly as many multiply-adds an example, dense
heads counted. *Digits*: a 64-8-8-10 network; Sparse Wide at nominal sparsities of .5, .75 and .9 with masks that move
by gradient (RigL), at random (SET) or not at all; Parallel, Factorized and Doped at .5 and .75 with RigL; and dense
networks at twice the multiply-adds, and with as many parameters as the widest. *Characters*: a network with norms and
64 hidden units, and Wide at .75.

Every arm has the same steps and batches, and its own learning rate out of the same three, the one with the best mean on
validation data over networks that are not judged. Networks without norms start with weights rescaled by density (Wide,
Factorized). Seeds are networks, masks and batches; the parts of the data are the same for all.

Fixed before the first run: all of the above and steps, that Wide with RigL should beat dense and static at every
sparsity, that every other member should beat dense, and that Wide at .75 should be within 0.01 of accuracy of dense at
twice the multiply-adds. RigL against SET and static against dense are shown, and do not count. In the first run the
grids of rates were a step lower; most arms chose the highest rate and none the lowest, so all grids were moved up.
"""

import math
import tempfile
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apportion.data.characters import characters
from apportion.data.digits import digits
from apportion.report.plots import ParetoPoint, pareto
from apportion.studies.finding import Comparison, Finding, Row, Scale
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
)
from apportion.studies.workbench import Workbench
from apportion.weights.accounting import largest_width
from apportion.weights.cost import Cost, cost_of
from apportion.weights.prune_and_grow import Growth, PruneAndGrow, PruneAndGrowSettings
from apportion.weights.sparse_ift import Member, SparseIftSettings, transform

CLAIM = (
    "A larger sparse network that costs exactly what a small dense one does learns more, if its masks move by gradient "
    "while it is trained: about as much as a dense one of twice the cost."
)
BASELINE = "the dense network of the same multiply-adds, and the same larger network under masks that stay"

RIGL, SET, STATIC = "RigL", "SET", "static"
DENSE, DOUBLE, WIDEST = "dense", "dense, twice the multiply-adds", "dense, as wide as the widest"
# Networks that learning rates are chosen on; none of them is judged.
_TUNING_SEED = 10_000
_CLOSE = 0.01  # of accuracy


@dataclass(frozen=True)
class _TaskSize:
    """How much is trained of a task."""

    width: int  # of the dense network's hidden layers
    steps: int
    batch: int
    rates: tuple[float, ...]
    tuning: int  # networks for each rate
    sparsities: tuple[float, ...]  # of Wide
    others: tuple[float, ...]  # of the other members
    every: int = 50


@dataclass(frozen=True)
class _Size:
    """How much is trained."""

    digits: _TaskSize = _TaskSize(8, 1000, 64, (1e-2, 3e-2, 1e-1), 2, (0.5, 0.75, 0.9), (0.5, 0.75))
    characters: _TaskSize = _TaskSize(64, 600, 256, (3e-3, 1e-2, 3e-2), 1, (0.75,), ())
    amount: int = 1_500_000  # of characters
    device: str = "cpu"


_SIZES: dict[Scale, _Size] = {
    "smoke": _Size(
        _TaskSize(8, 40, 32, (1e-2,), 1, (0.75, 0.9), (0.75,), every=10),
        _TaskSize(16, 15, 32, (3e-3,), 1, (0.75,), (), every=5),
        amount=200_000,
    ),
    "default": _Size(),
    "long": _Size(
        _TaskSize(8, 3000, 64, (3e-3, 1e-2, 3e-2, 1e-1), 3, (0.5, 0.75, 0.9), (0.5, 0.75, 0.9), every=100),
        _TaskSize(64, 3000, 256, (1e-3, 3e-3, 1e-2, 3e-2), 2, (0.5, 0.75, 0.9), (0.75,), every=100),
    ),
}
_SIZES["gpu"] = replace(
    _SIZES["long"],
    characters=_TaskSize(256, 10_000, 1024, (1e-3, 3e-3, 1e-2, 3e-2), 2, (0.5, 0.75, 0.9), (0.75,), every=100),
    device="cuda",
)


@dataclass(frozen=True)
class _Arm:
    """One kind of network, trained one way.

    Attributes:
        name: of it.
        member: None for a dense network.
        sparsity: nominal.
        moves: how masks move.
        factor: how much wider a dense network is than the one of equal cost.
    """

    name: str
    member: Member | None = None
    sparsity: float = 0.0
    moves: str = STATIC
    factor: float = 1.0


class _Task(ABC):
    """Data, networks, and what counts."""

    name: str
    metric: str
    sign: int  # 1 where more of the metric is better, -1 where less is
    dense: tuple[str, ...]
    rescale: bool

    def __init__(self, size: _TaskSize) -> None:
        self.size = size

    @abstractmethod
    def make(self, factor: float) -> nn.Module:
        """A network that many times wider."""

    @abstractmethod
    def batches(self, seed: int) -> Batches:
        """To train on."""

    @abstractmethod
    def figure(self, network: nn.Module, part: str) -> float:
        """The metric on validation or test data."""

    @property
    def sample(self) -> torch.Tensor:
        """An input."""
        return self.batches(0)(0)[0][:2]

    def arms(self) -> list[_Arm]:
        """Everything that is trained."""
        size = self.size
        wide = [
            _Arm(_wide(sparsity, moves), "wide", sparsity, moves)
            for sparsity in size.sparsities
            for moves in (RIGL, SET, STATIC)
        ]
        members: tuple[Member, ...] = ("parallel", "factorized", "doped")
        others = [_Arm(_other(m, s), m, s, RIGL) for m in members for s in size.others]
        widest = 1 / math.sqrt(1 - max(size.sparsities))
        dense = [_Arm(DENSE), _Arm(DOUBLE, factor=self._doubled()), _Arm(WIDEST, factor=widest)]
        return [*dense, *wide, *others]

    def _doubled(self) -> float:
        """The factor of the widest network that costs at most twice as much."""

        def cost(width: int) -> int:
            return cost_of(self.make(width / self.size.width), self.sample).flops

        return largest_width(cost, 2 * cost(self.size.width)) / self.size.width


class _Digits(_Task):
    name, metric, sign, dense, rescale = "digits", "accuracy", 1, ("4",), True

    def __init__(self, size: _TaskSize) -> None:
        super().__init__(size)
        self.data = digits()

    def make(self, factor: float) -> nn.Module:
        width = int(self.size.width * factor)
        return DigitsNetwork((64, width, width, 10))

    def batches(self, seed: int) -> Batches:
        return batches_of(*self.data.train, self.size.batch, seed)

    def figure(self, network: nn.Module, part: str) -> float:
        return accuracy(network, getattr(self.data, part))


class _Characters(_Task):
    name, metric, sign, dense, rescale = "characters", "bits per character", -1, ("head",), False

    def __init__(self, size: _TaskSize, amount: int) -> None:
        super().__init__(size)
        self.data = characters(amount)

    def make(self, factor: float) -> nn.Module:
        return CharacterNetwork(int(self.size.width * factor))

    def batches(self, seed: int) -> Batches:
        return character_batches(self.data.train, self.size.batch, seed)

    def figure(self, network: nn.Module, part: str) -> float:
        return bits_per_character(network, getattr(self.data, part))


def run(scale: Scale, seeds: list[int], bench: Workbench) -> Finding:
    """Measure; see the module's docstring."""
    size = _SIZES[scale]
    measured: dict[str, dict[str, Any]] = {}
    with one_thread():
        tasks = [_Digits(size.digits), _Characters(size.characters, size.amount)]
        for task in tasks:
            for arm in task.arms():
                key = [asdict(task.size), asdict(arm), seeds, size.amount, size.device]
                what = f"{task.name}: {arm.name}"
                measured[what] = bench.measure(what, key, lambda t=task, a=arm: _measure(t, a, seeds, size.device))  # type: ignore[misc]
    return Finding(
        slug="sparse_ift",
        claim=CLAIM,
        rows=_rows(tasks, measured, len(seeds)),
        comparisons=_claims(tasks, measured),
        seeds=seeds,
        seconds=bench.seconds,
        machine=machine(),
        scale=scale,
        notes=_notes(tasks, measured),
        plots={task.name: _picture(task, measured) for task in tasks},
    )


def _measure(task: _Task, arm: _Arm, seeds: list[int], device: str) -> dict[str, Any]:
    """Choose the arm's learning rate, train it on every seed, and say what it costs."""

    def mean(rate: float) -> float:
        networks = (_train(task, arm, rate, _TUNING_SEED + seed, device) for seed in range(task.size.tuning))
        return sum(task.sign * task.figure(network, "validation") for network in networks)

    rate = max(task.size.rates, key=mean) if len(task.size.rates) > 1 else task.size.rates[0]
    _, before, after, realised = _build(task, arm, 0)
    cost = _moves(task, arm, 0).training_flops(after.flops, after.dense_flops) / (3 * before.flops)
    return {
        "figures": [task.figure(_train(task, arm, rate, seed, device), "test") for seed in seeds],
        "facts": {
            "learning rate": rate,
            "nominal sparsity": arm.sparsity,
            "realised sparsity": realised,
            "multiply-adds": after.flops,
            "cost of a training step, the dense network's being 1": cost,
            "parameters": after.parameters,
            "parameters that are not pruned": after.kept,
            "activations": after.activations,
        },
    }


def _train(task: _Task, arm: _Arm, rate: float, seed: int, device: str) -> nn.Module:
    network = _build(task, arm, seed)[0].to(device)
    hooks = [PruneAndGrow(_moves(task, arm, seed))] if arm.member else []
    fit(network, task.batches(seed), task.size.steps, rate, seed=seed, hooks=hooks)
    return network.cpu()


def _build(task: _Task, arm: _Arm, seed: int) -> tuple[nn.Module, Cost, Cost, float]:
    """An arm's network, what the dense one and this one cost, and its sparsity."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if arm.member is None:
            network = task.make(arm.factor)
            return network, cost_of(task.make(1.0), task.sample), cost_of(network, task.sample), 0.0
        settings = SparseIftSettings(arm.member, arm.sparsity, task.dense, rescale=task.rescale, seed=seed)
        found = transform(task.make, settings, task.sample)
    return found.network, found.before, found.after, found.realised


def _moves(task: _Task, arm: _Arm, seed: int) -> PruneAndGrowSettings:
    share = 0.0 if arm.moves == STATIC else PruneAndGrowSettings.drop_fraction
    growth: Growth = "random" if arm.moves == SET else "gradient"
    return PruneAndGrowSettings(task.size.steps, growth, share, task.size.every, seed=seed)


def _wide(sparsity: float, moves: str) -> str:
    return f"Wide {sparsity:g}, {moves}"


def _other(member: str, sparsity: float) -> str:
    return f"{member.capitalize()} {sparsity:g}, {RIGL}"


def _claims(tasks: list[_Task], measured: dict[str, dict[str, Any]]) -> list[Comparison]:
    claims: list[Comparison] = []
    for task in tasks:

        def add(says: str, better: str, worse: str, counts: bool, slack: float = 0.0, task: _Task = task) -> None:
            pairs = zip(*(measured[f"{task.name}: {each}"]["figures"] for each in (better, worse)), strict=True)
            margins = [task.sign * (a - b) + slack for a, b in pairs]
            claims.append(Comparison.positive(f"{task.name}: {says}", margins, part_of_verdict=counts))

        for s in task.size.sparsities:
            add(f"Wide {s:g} with RigL is better than dense at equal multiply-adds", _wide(s, RIGL), DENSE, True)
            add(f"Wide {s:g}: RigL is better than masks that stay", _wide(s, RIGL), _wide(s, STATIC), True)
        if task.name == "digits":
            says = f"Wide 0.75 with RigL is within {_CLOSE:g} of dense at twice the multiply-adds"
            add(says, _wide(0.75, RIGL), DOUBLE, True, _CLOSE)
        for s in task.size.others:
            for member in ("parallel", "factorized", "doped"):
                says = f"{member.capitalize()} {s:g} with RigL is better than dense at equal multiply-adds"
                add(says, _other(member, s), DENSE, True)
        for s in task.size.sparsities:
            add(f"Wide {s:g}: RigL is better than SET", _wide(s, RIGL), _wide(s, SET), False)
            add(f"Wide {s:g}: masks that stay are better than dense", _wide(s, STATIC), DENSE, False)
    return claims


def _rows(tasks: list[_Task], measured: dict[str, dict[str, Any]], seeds: int) -> list[Row]:
    rows = []
    for task in tasks:
        for arm in task.arms():
            name = f"{task.name}: {arm.name}"
            rows.append(Row.of(name, task.metric, measured[name]["figures"]))
            rows += [Row(name, fact, value, None, seeds) for fact, value in measured[name]["facts"].items()]
    return rows


def _notes(tasks: list[_Task], measured: dict[str, dict[str, Any]]) -> list[str]:
    notes = [
        "Fixed before the first run: sizes, steps, and what counts. After it the grids of learning rates were moved up "
        "by a step for all arms, since most had chosen the highest rate and none the lowest.",
        "Multiply-adds are of the forward pass of one example in linear layers, heads counted; masks only simulate "
        "sparsity here: nothing is faster, and training takes the memory of the larger network.",
        "Learning rates are chosen on validation data, on networks that are not judged. Test data are the same for "
        "all seeds, which are networks, masks and batches.",
    ]
    for task in tasks:
        size, rates = task.size, ", ".join(f"{rate:g}" for rate in task.size.rates)
        chosen = {arm.name: measured[f"{task.name}: {arm.name}"]["facts"]["learning rate"] for arm in task.arms()}
        edges = {size.rates[0], size.rates[-1]} if len(size.rates) > 1 else set()
        edge = [f"{name} ({rate:g})" for name, rate in chosen.items() if rate in edges]
        notes.append(
            f"{task.name}: {size.steps} steps of {size.batch}; masks move every {size.every}, until three quarters. Of "
            f"the rates {rates} the first or the last was chosen by {', '.join(edge) or 'nobody'}."
        )
    return notes


def _picture(task: _Task, measured: dict[str, dict[str, Any]]) -> str:
    """Quality by nominal sparsity: a line for each way, the dense networks at 0."""
    points = []
    for arm in task.arms():
        row = Row.of("", "", measured[f"{task.name}: {arm.name}"]["figures"])
        series = arm.name if arm.member is None else f"{arm.member.capitalize()}, {arm.moves}"
        points.append(ParetoPoint(series, arm.sparsity, row.mean, 0.0, row.stderr or 0.0))
    with tempfile.TemporaryDirectory() as folder:
        picture = pareto(
            Path(folder) / "quality.svg", points, cost="nominal sparsity", quality=task.metric, title=task.name
        )
        return picture.read_text(encoding="utf-8")
