"""Where apportion's training step spends its time, by torch's profiler.

The profiler sees every op by name, apportion's own among them (``torch.ops.apportion.*``). Each op's own time goes to
the part that the innermost op around it stands for; what no part claims is the rest.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any
from unittest import mock

from torch.autograd.profiler import profile, record_function

from apportion.allocate import FeatureChoice, MutualChoice, Rule, TokenChoice
from apportion.features.dictionary import SparseAutoencoder
from apportion.features.statistics import FeatureStatistics
from apportion.training import loop
from benchmarks.contenders import BARE, bare, training_run
from benchmarks.problem import SMOKE, USUAL, Problem
from benchmarks.registry import Case, Race, RacePlan, Sample, benchmark, timed

PARTS = (
    "product",
    "selection",
    "decode",
    "gradient of the codes",
    "weight gradients",
    "bias gradients",
    "projection",
    "clipping",
    "Adam and normalisation",
    "statistics",
    "rest",
)
# Python functions without an op of their own, and the part that they are.
_LABELLED: tuple[tuple[Any, str, str], ...] = (
    (SparseAutoencoder, "project_decoder_gradient", "projection"),
    (FeatureStatistics, "update", "statistics"),
    (FeatureStatistics, "dead", "statistics"),
    (loop, "clip_gradients", "clipping"),
)
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::matmul", "aten::_to_copy", "aten::linear")
_ENCODE = "apportion::encode_select"
_BACKWARD = "autograd::engine"


@benchmark("step_parts", "where does apportion's training step spend its time?", rounds=9, warm_ups=2, share=1)
def plans(smoke: bool) -> Sequence[RacePlan]:
    """One race of the three rules, next to the bare product."""
    shape = SMOKE if smoke else USUAL

    def build() -> Race:
        problem = Problem(shape)
        product = bare().build(problem)
        rules: list[Rule] = [TokenChoice(shape.budget), MutualChoice(shape.budget), FeatureChoice(shape.budget)]
        cases = [Case(BARE, timed(lambda turn: product.take(problem.batch(turn))), bare().includes)]
        cases += [Case(f"apportion {type(rule).__name__}", _profiled(problem, rule)) for rule in rules]
        return Race(cases, BARE)

    return [RacePlan("step parts", shape.as_dict(), build)]


def _profiled(problem: Problem, rule: Rule) -> Callable[[int], Sample]:
    _, steps = training_run(problem, rule, "float32")

    def measure(turn: int) -> Sample:
        # Without kineto: it writes to stderr whenever it starts, and nothing here runs on an accelerator.
        with labelled(), profile(use_kineto=False) as profiler:
            started = time.perf_counter()
            steps.take(problem.batch(turn))
            seconds = time.perf_counter() - started
        spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for event in profiler.function_events or ():
            spent[part_of(names_around(event))] += event.self_cpu_time_total / 1e6
        # Python between the ops belongs to no event.
        spent["rest"] += max(seconds - sum(spent.values()), 0.0)
        return {"seconds": seconds, **{f"{part} seconds": spent[part] for part in PARTS}}

    return measure


def names_around(event: Any) -> list[str]:
    """Names of a profiler event and of what it happened inside, innermost first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def part_of(names: Sequence[str]) -> str:
    """The part of the step that an op belongs to, by its name and those of the ops around it, innermost first."""
    for place, name in enumerate(names):
        around = names[place + 1 :]
        if name in PARTS:
            return name
        if name.startswith("Optimizer.step"):
            return "Adam and normalisation"
        if name in _PRODUCTS and _ENCODE in around:
            return "product"
        if name == _ENCODE or name.startswith("apportion::select"):
            return "selection"
        backward = any(each.startswith(_BACKWARD) for each in around)
        if name == "apportion::csr_transposed_matmul":
            return "weight gradients"
        if name == "apportion::csr_sampled_product" and backward:
            return "gradient of the codes"
        if name == "apportion::csr_matmul":
            # Backwards it is the gradient of the encoder's input, of which only the decoder bias is trained.
            return "bias gradients" if backward else "decode"
        if name == "aten::index_add_" and backward:
            return "bias gradients"
    return "rest"


@contextlib.contextmanager
def labelled() -> Iterator[None]:
    """Let the profiler see the functions that are not ops, under the name of their part."""
    with contextlib.ExitStack() as stack:
        for owner, name, part in _LABELLED:
            # A function that was renamed since costs its label only: its time goes to the rest.
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, _recorded(getattr(owner, name), part)))
        yield


def _recorded(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    @wraps(function)
    def with_label(*arguments: Any, **named: Any) -> Any:
        with record_function(part):
            return function(*arguments, **named)

    return with_label
