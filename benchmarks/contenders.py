"""Training steps that can be compared: the bare product, apportion's, and (from `peers`) those of other libraries."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn

from apportion.allocate import FeatureChoice, MutualChoice, Rule, TokenChoice
from apportion.features import fitting
from apportion.features.fitting import Recipe, fit_dictionary
from apportion.features.mutual_feature_choice import Phases
from apportion.training import Processes, TrainingResult
from apportion.training.loop import _Steps
from apportion.training.optimizer import build_optimizer
from apportion.training.run import Run
from benchmarks.problem import LEARNING_RATE, Problem
from benchmarks.registry import Case, Unavailable, timed

Precision = Literal["float32", "bfloat16"]
BARE = "bare product"


@dataclass(frozen=True)
class TrainingStep:
    """Something that takes training steps.

    Attributes:
        take: one step on a batch.
        parameters: what is trained.
        optimizer: None where nothing is trained.
    """

    take: Callable[[Tensor], object]
    parameters: Sequence[nn.Parameter] = ()
    optimizer: torch.optim.Optimizer | None = None

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the weights and of the optimiser's state."""
        state = self.optimizer.state.values() if self.optimizer is not None else ()
        tensors = [each for entry in state for each in entry.values() if isinstance(each, Tensor)]
        return {"weights": _bytes(self.parameters), "optimizer": _bytes(tensors)}


@dataclass(frozen=True)
class Contender:
    """A way to take a training step.

    Attributes:
        label: its name.
        includes: what exactly a step of it includes.
        build: sets it up for a problem. Raises `Unavailable` where it cannot run.
    """

    label: str
    includes: str
    build: Callable[[Problem], TrainingStep]


def bare_product(precision: Precision = "float32") -> Callable[[Problem], TrainingStep]:
    """``x @ weight.T`` into fresh memory, as anybody would write it: what a dense encoder cannot do without."""

    def build(problem: Problem) -> TrainingStep:
        weight = problem.directions.to(getattr(torch, precision))
        return TrainingStep(lambda x: x.to(weight.dtype) @ weight.T)

    return build


def apportion_step(rule: Rule, precision: Precision = "float32") -> Callable[[Problem], TrainingStep]:
    """One step of `apportion.features.fit_dictionary`, taken by the training loop itself."""

    def build(problem: Problem) -> TrainingStep:
        run, steps = training_run(problem, rule, precision)
        return TrainingStep(steps.take, list(run.module.parameters()), run.optimizer)

    return build


def training_run(problem: Problem, rule: Rule, precision: Precision) -> tuple[Run, _Steps]:
    """What the training loop works with after `fit_dictionary` called it, ready to take steps one at a time.

    `train` runs to its end once it is called, and a benchmark has to take turns between steps; so `fit_dictionary`
    sets everything up as always, and what it hands to `train` is kept instead of run.
    """
    handed_over: dict[str, Any] = {}

    def keep(module: Any, objective: Any, batches: Any, settings: Any, folder: Any, **more: Any) -> TrainingResult:
        handed_over.update(more, module=module, objective=objective, settings=settings)
        return TrainingResult(0, [], 0.0, None)

    def same_start(sae: Any) -> None:
        sae.encoder_weight.data.copy_(problem.directions)
        sae.decoder_weight.data.copy_(problem.directions)

    recipe = Recipe(
        rule=rule,
        n_features=problem.shape.features,
        # So long a run that nothing is dead, and no phase begins, during the few steps that are measured.
        steps=1_000_000,
        batch_size=problem.shape.tokens,
        learning_rate=LEARNING_RATE,
        phases=Phases(mutual_fraction=0.0),
        precision=precision,
    )
    with mock.patch.object(fitting, "train", keep):
        fit_dictionary(
            recipe,
            problem.batch,
            problem.shape.width,
            start_from=same_start,
            progress=False,
            warmup_fraction=0.0,
            decay_fraction=0.0,
        )
    module, settings = handed_over["module"], handed_over["settings"]
    optimizer = build_optimizer(module, settings, handed_over.get("optimizer"))
    run = Run(module.train(), optimizer, settings, None, {}, Processes())
    return run, _Steps(run, handed_over["objective"], handed_over["hooks"])


_OURS = "objective, backward, gradient projection, clipping, Adam with normalisation and statistics of the real loop"


def ours(budget: int, precision: Precision = "float32") -> list[Contender]:
    """apportion's three rules that have a budget."""
    rules: list[Rule] = [TokenChoice(budget), MutualChoice(budget), FeatureChoice(budget)]
    suffix = " bf16" if precision == "bfloat16" else ""
    return [
        Contender(f"apportion {type(rule).__name__}{suffix}", _OURS, apportion_step(rule, precision)) for rule in rules
    ]


def bare(precision: Precision = "float32") -> Contender:
    """The encoder's product alone."""
    if precision == "bfloat16":
        return Contender(f"{BARE} bf16", "x.bfloat16() @ weight.T, weight in bfloat16", bare_product(precision))
    return Contender(BARE, "x @ weight.T in float32", bare_product())


def enter(contenders: Iterable[Contender], problem: Problem) -> tuple[list[Case], dict[str, str]]:
    """Timed cases of the contenders that can run here, and why the others cannot."""
    cases, skipped = [], {}
    for each in contenders:
        try:
            step = each.build(problem)
        except Unavailable as error:
            skipped[each.label] = str(error)
            continue
        cases.append(Case(each.label, timed(_on_batches(step, problem)), each.includes))
    return cases, skipped


def _on_batches(step: TrainingStep, problem: Problem) -> Callable[[int], object]:
    return lambda turn: step.take(problem.batch(turn))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)
