"""Study of *Monarch: Expressive Structured Matrices for Efficient and Accurate Training* (Dao et al. 2022).

arXiv 2204.00595. Five parts. *Exactness*: what the class contains, and whether alternating least squares from random
starts finds anything nearer than the closed-form projection. *Real weights*: the error of projecting SmolLM2's
matrices, against low rank with as many parameters, pruning with as many non-zeros, and noise in place of the weights.
*From scratch*, *dense to sparse* and *sparse to dense*: the paper's three uses, on next-character prediction (twelve
characters in; two hidden layers take the structure). Arms are compared at equal parameters and equal steps; sparse to
dense at equal training multiplications, with 80 % of its steps structured.

What counts was written down before the first run: from scratch, better than both dense and low rank with as many
parameters, and within 0.05 bits of the dense network of the same width; dense to sparse, better than low rank after
finetuning at both budgets; sparse to dense, better than dense throughout. Errors of one-shot projections are shown and
do not count: the pilot of the method sheet says that low rank and pruning win there. Every arm's learning rate is
chosen from one grid by validation text, with a seed of its own.

After a first run of the default scale the grid was moved up by a factor of three, since most arms had chosen its upper
end (no choice changed by it), and the narrower dense network trained at equal cost was added to what is shown, since
any cheaper network takes more steps; what counts stayed as it was.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apportion.models import load
from apportion.models.families import blocks_of
from apportion.report import plots
from apportion.studies.finding import Comparison, Finding, Measured, Scale, Values, collect_rows
from apportion.studies.machine import machine, one_thread
from apportion.studies.monarch_exactness import exactness
from apportion.studies.monarch_networks import (
    DENSE,
    LOW_RANK,
    MONARCH,
    NARROW,
    PRUNED,
    REVERSE,
    CharacterTask,
    TaskSize,
    equal_rank,
    largest,
    multiplications,
    parameters,
)
from apportion.studies.workbench import Workbench
from apportion.weights.monarch import projection_error
from apportion.weights.monarch_shape import MonarchShape

CLAIM = (
    "Monarch layers match dense ones at about half the parameters, and beat dense and low-rank layers of as many "
    "parameters, trained from scratch or projected and finetuned; trained first and then made dense, they beat dense "
    "training at equal cost."
)
BASELINE = "a narrower dense network and low-rank layers with as many parameters; dense training at equal cost"

_TUNING_SEED = 1000
_NEAR = 0.05  # bits per character
_BLOCKS = 4  # whose errors are compared in words
BITS, ERROR = "bits per character", "relative error"
Figures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class _Size:
    """What is measured, for each seed.

    Attributes:
        task: the networks that are trained.
        blocks: of SmolLM2, drawn anew for each seed.
        matrices: of each.
        structures: blocks of a factor and rank; None is the published width.
        exact: size of the matrices that the class contains or not.
        starts: of alternating least squares.
    """

    task: TaskSize = field(default_factory=TaskSize)
    blocks: int = 3
    matrices: tuple[str, ...] = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    structures: tuple[tuple[int, int | None], ...] = ((4, None), (4, 18), (16, None))
    exact: int = 256
    starts: int = 10


_LONG_TASK = replace(TaskSize(), characters=6_000_000, width=1024, steps=3000, finetune_steps=750)
_SIZES: dict[Scale, _Size] = {
    "smoke": _Size(
        task=TaskSize(
            characters=200_000, width=32, steps=12, finetune_steps=4, batch=32, rates=(1e-3, 1e-2), ranks=(None,)
        ),
        blocks=1,
        matrices=("self_attn.q_proj",),
        structures=((4, None),),
        exact=16,
        starts=2,
    ),
    "default": _Size(),
    "long": _Size(task=_LONG_TASK, blocks=10, structures=((4, None), (4, 18), (16, None), (16, 1)), starts=50),
    "gpu": _Size(task=replace(_LONG_TASK, width=4096, steps=10_000, finetune_steps=2500, device="cuda"), blocks=10),
}


def run(scale: Scale, seeds: list[int], bench: Workbench) -> Finding:
    """Measure; see the module's docstring."""
    size = _SIZES[scale]
    measured = Measured()
    rates: dict[str, float] = {}
    with one_thread():
        tuning = CharacterTask(size.task, _TUNING_SEED)
        for part, tune in _TUNED.items():
            settings = [asdict(size.task), _TUNING_SEED, rates]
            rates |= bench.measure(f"learning rates: {part}", settings, partial(tune, tuning, dict(rates)))
        weights = _RealWeights(size)
        for seed in seeds:
            task = CharacterTask(size.task, seed)
            parts: dict[str, Callable[[], Figures]] = {
                "exactness": partial(exactness, size.exact, size.starts, seed),
                "real weights": partial(weights.errors, seed),
                "from scratch": partial(_from_scratch, task, rates),
                "dense to sparse": partial(_dense_to_sparse, task, rates),
                "sparse to dense": partial(_sparse_to_dense, task, rates),
            }
            for part, measure in parts.items():
                measured.add(bench.measure(f"seed {seed}: {part}", [asdict(size), seed, rates], measure))
    rows = collect_rows(measured)
    return Finding(
        slug="monarch",
        claim=CLAIM,
        rows=rows,
        comparisons=_claims(size, measured),
        seeds=seeds,
        seconds=bench.seconds,
        machine=machine(),
        scale=scale,
        notes=_notes(size, tuning, rates),
        plots={"errors": _plot(measured)},
    )


# --- the three uses --------------------------------------------------------------------------------------------------

_SCRATCH = (DENSE, NARROW, LOW_RANK, MONARCH)
_PROJECTED = (MONARCH, LOW_RANK, PRUNED)
_THROUGHOUT = (MONARCH, NARROW)


def _tune_scratch(task: CharacterTask, rates: dict[str, float]) -> dict[str, float]:
    return {f"from scratch: {arm}": task.best_rate(partial(task.from_scratch, arm)) for arm in _SCRATCH}


def _tune_projected(task: CharacterTask, rates: dict[str, float]) -> dict[str, float]:
    trained = task.dense(rates[f"from scratch: {DENSE}"])
    found = {}
    for rank in task.size.ranks:
        for arm in _PROJECTED:
            found[f"{_budget(rank)}: {arm}"] = task.best_rate(partial(_finetune, task, trained, arm, rank))
    found[f"dense to sparse: {DENSE}, trained on"] = task.best_rate(partial(_finetune, task, trained, DENSE, None))
    return found


def _tune_reverse(task: CharacterTask, rates: dict[str, float]) -> dict[str, float]:
    found = {f"sparse to dense: {REVERSE}": task.best_rate(partial(task.from_scratch, REVERSE))}
    for arm in _THROUGHOUT:
        longer = partial(task.from_scratch, arm, steps=task.steps_throughout(arm))
        found[_throughout(arm)] = task.best_rate(longer)
    return found


_TUNED: dict[str, Callable[[CharacterTask, dict[str, float]], dict[str, float]]] = {
    "from scratch": _tune_scratch,
    "dense to sparse": _tune_projected,
    "sparse to dense": _tune_reverse,
}


def _finetune(task: CharacterTask, trained: nn.Module, arm: str, rank: int | None, rate: float) -> nn.Module:
    return task.finetuned(task.projected(trained, arm, rank), rate)


def _from_scratch(task: CharacterTask, rates: dict[str, float]) -> Figures:
    found = {}
    for arm in _SCRATCH:
        name = f"from scratch: {arm}"
        rate = rates[name]
        network = task.dense(rate) if arm == DENSE else task.from_scratch(arm, rate)
        found[name] = {
            BITS: task.bits(network),
            "parameters": parameters(network),
            "multiplications": multiplications(network),
        }
    return found


def _dense_to_sparse(task: CharacterTask, rates: dict[str, float]) -> Figures:
    trained = task.dense(rates[f"from scratch: {DENSE}"])
    found = {"dense to sparse: dense, as it was": {BITS: task.bits(trained)}}
    name = f"dense to sparse: {DENSE}, trained on"
    found[name] = {BITS: task.bits(_finetune(task, trained, DENSE, None, rates[name]))}
    for rank in task.size.ranks:
        for arm in _PROJECTED:
            name = f"{_budget(rank)}: {arm}"
            before = task.projected(trained, arm, rank)
            found[name] = {"bits before finetuning": task.bits(before)}
            found[name][BITS] = task.bits(task.finetuned(before, rates[name]))
    return found


def _sparse_to_dense(task: CharacterTask, rates: dict[str, float]) -> Figures:
    reverse = f"sparse to dense: {REVERSE}"
    dense = task.dense(rates[f"from scratch: {DENSE}"])
    changed = task.from_scratch(REVERSE, rates[reverse])
    found = {
        _throughout(DENSE): {BITS: task.bits(dense), "steps": task.size.steps},
        reverse: {BITS: task.bits(changed), "steps": sum(task.steps_of_reverse())},
    }
    for arm in _THROUGHOUT:
        name, steps = _throughout(arm), task.steps_throughout(arm)
        found[name] = {BITS: task.bits(task.from_scratch(arm, rates[name], steps)), "steps": steps}
    return found


def _throughout(arm: str) -> str:
    return f"sparse to dense: {arm}, throughout"


def _budget(rank: int | None) -> str:
    return f"dense to sparse, {'published width' if rank is None else f'rank {rank}'}"


# --- real weights ----------------------------------------------------------------------------------------------------


class _RealWeights:
    """SmolLM2's matrices, loaded when they are first asked for."""

    def __init__(self, size: _Size) -> None:
        self.size = size
        self._model: Any = None

    def errors(self, seed: int) -> Figures:
        """Relative errors of every matrix and structure, means over blocks drawn for the seed."""
        if self._model is None:
            self._model = load("smollm2", device=self.size.task.device).model
        layers = blocks_of(self._model)
        draws = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(layers), generator=draws)[: self.size.blocks].tolist()
        collected: dict[str, list[float]] = defaultdict(list)
        for block in chosen:
            for matrix in self.size.matrices:
                weight = layers[block].get_submodule(matrix).weight.detach()
                for name, error in self._of(weight, draws).items():
                    collected[f"{matrix.rpartition('.')[2]}, {name}"].append(error)
        return {name: {ERROR: sum(errors) / len(errors)} for name, errors in collected.items()}

    def _of(self, weight: Tensor, draws: torch.Generator) -> dict[str, float]:
        out_features, in_features = weight.shape
        norm = float(weight.norm())
        squares = torch.linalg.svdvals(weight).double().square()
        noise = torch.randn(weight.shape, generator=draws).to(weight)
        found = {}
        for nblocks, rank in self.size.structures:
            shape = MonarchShape.of(in_features, out_features, nblocks=nblocks, rank=rank)
            where = f"{shape.density:.0%} of the parameters ({nblocks} blocks)"
            found[f"{where}: {MONARCH}"] = projection_error(weight, shape) / norm
            found[f"{where}: {LOW_RANK}"] = float(squares[equal_rank(shape) :].sum().sqrt()) / norm
            pruned = ~largest(weight, shape.parameters)
            found[f"{where}: {PRUNED}"] = float((weight * pruned).norm()) / norm
            found[f"{where}: Monarch of noise"] = projection_error(noise, shape) / float(noise.norm())
        return found


# --- what it says ----------------------------------------------------------------------------------------------------


def _claims(size: _Size, measured: Values) -> list[Comparison]:
    def of(name: str, metric: str = BITS) -> Tensor:
        return torch.tensor(measured[name][metric], dtype=torch.float64)

    scratch = {arm: of(f"from scratch: {arm}") for arm in _SCRATCH}
    claims: list[tuple[str, Tensor, bool]] = [
        ("from scratch: fewer bits than a dense network of equal parameters", scratch[NARROW] - scratch[MONARCH], True),
        ("from scratch: fewer bits than low rank of equal parameters", scratch[LOW_RANK] - scratch[MONARCH], True),
        (
            f"from scratch: within {_NEAR} bits of the dense network of the same width",
            _NEAR - (scratch[MONARCH] - scratch[DENSE]),
            True,
        ),
    ]
    for rank in size.task.ranks:
        where = _budget(rank)
        bits = {arm: of(f"{where}: {arm}") for arm in _PROJECTED}
        before = {arm: of(f"{where}: {arm}", "bits before finetuning") for arm in _PROJECTED}
        claims += [
            (f"{where}: fewer bits than low rank after finetuning", bits[LOW_RANK] - bits[MONARCH], True),
            (f"{where}: fewer bits than pruning after finetuning", bits[PRUNED] - bits[MONARCH], False),
            (f"{where}: fewer bits than low rank before finetuning", before[LOW_RANK] - before[MONARCH], False),
        ]
    reverse = of(f"sparse to dense: {REVERSE}")
    for arm in (DENSE, *_THROUGHOUT):
        claim = f"sparse to dense: fewer bits than {arm} throughout, at equal cost"
        claims.append((claim, of(_throughout(arm)) - reverse, arm == DENSE))
    for name in [name for name in measured if name.endswith(f"parameters ({_BLOCKS} blocks): {MONARCH}")]:
        where = name.removesuffix(f": {MONARCH}")
        own = of(name, ERROR)
        claims += [
            (f"{where}: {what}", of(f"{where}: {other}", ERROR) - own, False)
            for what, other in (
                ("nearer to the weights than low rank", LOW_RANK),
                ("nearer to the weights than pruning", PRUNED),
                ("nearer to the weights than to noise", "Monarch of noise"),
            )
        ]
    return [Comparison.positive(claim, margin.tolist(), part_of_verdict=counted) for claim, margin, counted in claims]


def _notes(size: _Size, task: CharacterTask, rates: dict[str, float]) -> list[str]:
    of_task = size.task
    structured, dense = task.steps_of_reverse()
    grid = ", ".join(f"{rate:g}" for rate in of_task.rates)
    return [
        f"Networks: 12 characters of 16 numbers, two hidden layers of {of_task.width} with LayerNorm and GELU, batches "
        f"of {of_task.batch}, Adam, warm-up over 5 % and decay over 20 % of the steps. Monarch layers have 4 blocks "
        f"and start as published. The narrower dense network is {task.narrow_width()} wide; its head is narrower too.",
        f"Learning rates from {grid}, by validation text and seed {_TUNING_SEED}: "
        + "; ".join(f"{name} {rate:g}" for name, rate in rates.items())
        + ".",
        f"Dense to sparse: {of_task.steps} steps dense, then {of_task.finetune_steps} after the projection of both "
        "hidden layers. Pruned weights stay zero; their places are not counted.",
        f"Sparse to dense: {structured} Monarch steps and {dense} dense ones cost as much as {of_task.steps} dense "
        f"steps, {task.steps_throughout(MONARCH)} Monarch or {task.steps_throughout(NARROW)} narrower ones, by "
        "multiplications of all layers (not by the clock). Adam starts anew at the switch; the learning rate falls to "
        "zero over the dense steps.",
        f"Real weights: means over {size.blocks} blocks of SmolLM2 drawn for each seed; nothing is finetuned.",
        "What counts was chosen before the first run; one-shot errors do not, since the pilot had shown that low rank "
        "and pruning are nearer.",
    ]


def _plot(measured: Values) -> str:
    """Relative errors by share of parameters, means over matrices."""
    collected: dict[tuple[str, float], list[float]] = defaultdict(list)
    for name, figures in measured.items():
        if ERROR in figures and " of the parameters" in name:
            share = float(name.partition(", ")[2].partition("%")[0])
            collected[name.rpartition(": ")[2], share] += figures[ERROR]
    points = [
        plots.ParetoPoint(series, share, sum(errors) / len(errors))
        for (series, share), errors in sorted(collected.items())
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = plots.pareto(
            Path(folder) / "errors.svg",
            points,
            cost="% of the parameters",
            quality=ERROR,
            title="projecting SmolLM2's matrices, not finetuned",
        )
        return path.read_text(encoding="utf-8")
