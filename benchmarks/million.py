"""A dictionary of a million features, trained on a machine of 24 GiB.

Its two matrices and Adam's four take 13.5 GiB, so there is no room for a dense gradient of either, let alone for the
scores of a batch. It runs in a fresh process, which trains a tiny dictionary first (imports, compiled kernels).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from apportion.allocate import MutualChoice
from apportion.features import Recipe, fit_dictionary
from benchmarks.memory import bytes_stated_in, count_from_here, in_fresh_process, require_proc, resident
from benchmarks.problem import SMOKE, Problem, Shape
from benchmarks.registry import Case, Race, RacePlan, Sample, Unavailable, benchmark

_MILLION = Shape(tokens=1024, width=576, features=1 << 20, budget=32)
# Few enough tokens that less than half of the features can win, as among a million.
_SMOKE = replace(SMOKE, tokens=8)
_STEPS = 3
_ENOUGH = 17 * 1024**3
_LABEL = "apportion MutualChoice"
_INCLUDES = (
    "objective, backward, projection, clipping, Adam with normalisation and statistics; the first step is not timed"
)


@benchmark("million", "can a million features be trained on this machine?", rounds=1, share=3, warm_ups=0)
def plans(smoke: bool) -> Sequence[RacePlan]:
    """One case, and so nothing to compare it with."""
    require_proc()
    if not smoke and _available_memory() < _ENOUGH:
        raise Unavailable(
            f"17 GiB of memory must be available, of which there are {_available_memory() / 1024**3:.1f} GiB"
        )
    shape = _SMOKE if smoke else _MILLION

    def measure(turn: int) -> Sample:
        return in_fresh_process("benchmarks.million", {"shape": shape.as_dict()})

    return [RacePlan("million", shape.as_dict(), lambda: Race([Case(_LABEL, measure, _INCLUDES)], _LABEL))]


def train_and_measure(shape: Shape) -> dict[str, float]:
    """Measure in this process, which must be a fresh one: seconds of a step, and its peak resident memory."""
    _train(_SMOKE)
    problem = Problem(shape)
    count_from_here()
    seconds, weights = _train(shape, problem)
    return {
        "seconds": seconds,
        "peak resident bytes": resident("VmHWM"),
        "weights and optimizer bytes": 3 * weights,
        "scores bytes": shape.scores_bytes,
    }


def _train(shape: Shape, problem: Problem | None = None) -> tuple[float, int]:
    """Mean seconds of the steps after the first, which makes the optimiser's state, and bytes of the weights."""
    problem = problem or Problem(shape)
    # So long a run that nothing is dead during the few steps that are taken of it.
    recipe = Recipe(MutualChoice(shape.budget), shape.features, steps=1_000_000, batch_size=shape.tokens)
    sae, result = fit_dictionary(
        recipe, problem.batch, shape.width, progress=False, stop_after=_STEPS, log_every=1, warmup_fraction=0.0
    )
    first, *_, last = (record["seconds"] or 0.0 for record in result.history)
    weights = sum(each.numel() * each.element_size() for each in sae.parameters())
    return (last - first) / (_STEPS - 1), weights


def _available_memory() -> int:
    return bytes_stated_in(Path("/proc/meminfo"), "MemAvailable")


def _child(asked: str) -> None:
    question = json.loads(asked)
    shape = Shape(**question["shape"])
    torch.set_num_threads(question["threads"])
    print(json.dumps(train_and_measure(shape)))


if __name__ == "__main__":
    _child(sys.argv[1])
