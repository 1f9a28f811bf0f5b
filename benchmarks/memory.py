"""How much memory a training step needs beyond the weights and the optimiser's state.

Each case runs in a fresh process, so that nothing another library keeps is counted, and with an allocator that keeps
nothing either, so that what counts is what the step holds. The process imports, takes steps at a tiny size (compiled
kernels, thread pools), makes the data, and only then starts to count: the peak of its resident memory while it builds
the model and takes a few steps, above what was resident before.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.contenders import BARE, Contender, bare, ours
from benchmarks.machine import ROOT
from benchmarks.peers import peer, peers
from benchmarks.problem import SMOKE, USUAL, Problem, Shape
from benchmarks.registry import Case, Race, RacePlan, Sample, Unavailable, benchmark

_STEPS = 3
_MANY = 32_768
# glibc gives blocks of at least so many bytes back as soon as they are freed. By itself it keeps many for later, in
# whatever pieces are left between others: the same step then differs by half its extra from one process to the next.
_GIVEN_BACK = str(1 << 20)


@benchmark("memory", "how much memory does a step need beyond weights and optimiser?", rounds=1, share=4, warm_ups=0)
def plans(smoke: bool) -> Sequence[RacePlan]:
    """A race of everybody, and one of four times the features where a bar is set for them.

    The bare product's extra is one matrix of scores, so ratios count such matrices.
    """
    require_proc()
    if smoke:
        return [_plan("memory", SMOKE, everybody(SMOKE)[:2])]
    few = [bare(), *ours(USUAL.budget), *map(peer, ("sparsify", "SAELens TopK", "dictionary_learning TopK"))]
    larger = replace(USUAL, features=_MANY)
    return [_plan("memory", USUAL, everybody(USUAL)), _plan(f"memory, features {_MANY:,}", larger, few)]


def _plan(title: str, shape: Shape, contenders: Sequence[Contender]) -> RacePlan:
    def build() -> Race:
        cases, skipped = [], {}
        for each in contenders:
            try:
                # Only to see whether it can be: the measurement is in another process.
                each.build(Problem(SMOKE))
            except Unavailable as error:
                skipped[each.label] = str(error)
                continue
            cases.append(Case(each.label, _peak_in_fresh_process(each.label, shape), each.includes))
        return Race(cases, BARE, "extra bytes", skipped)

    return RacePlan(title, shape.as_dict(), build)


def require_proc() -> None:
    """Raises `Unavailable` where peak memory cannot be read."""
    if not Path("/proc/self/clear_refs").exists():
        raise Unavailable("peak memory is read from /proc, which this system does not have")


def everybody(shape: Shape) -> list[Contender]:
    """What is compared."""
    # A fused optimiser changes time, not memory.
    others = [each for each in peers() if "fused" not in each.label]
    return [bare(), *ours(shape.budget), *ours(shape.budget, "bfloat16"), *others]


def in_fresh_process(module: str, question: Mapping[str, object], **environment: str) -> Sample:
    """What ``module``, run by a new Python with ``question`` as JSON for its only argument, prints in its last line.

    The question also gets this process's number of torch's threads, as ``threads``; ``environment`` adds variables.
    """
    asked = json.dumps({**question, "threads": torch.get_num_threads()})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, asked],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])} | environment,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring {dict(question)} by {module} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _peak_in_fresh_process(label: str, shape: Shape) -> Callable[[int], Sample]:
    asked = {"label": label, "shape": shape.as_dict()}
    return lambda turn: in_fresh_process("benchmarks.memory", asked, MALLOC_MMAP_THRESHOLD_=_GIVEN_BACK)


def peak_of(label: str, shape: Shape) -> dict[str, float]:
    """Measure one contender in this process, which must be a fresh one."""
    contender = next(each for each in everybody(shape) if each.label == label)
    _take_steps(next(each for each in everybody(SMOKE) if each.label == label), Problem(SMOKE))
    problem = Problem(shape)
    problem.directions  # noqa: B018  made here, since it is data and not the contender's
    before = count_from_here()
    state = _take_steps(contender, problem)
    peak = resident("VmHWM") - before
    return {
        "extra bytes": max(peak - state["weights"] - state["optimizer"], 0),
        "peak bytes": peak,
        "weights bytes": state["weights"],
        "optimizer bytes": state["optimizer"],
        "scores bytes": shape.scores_bytes,
    }


def _take_steps(contender: Contender, problem: Problem) -> dict[str, int]:
    step = contender.build(problem)
    for turn in range(_STEPS):
        step.take(problem.batch(turn))
    return step.state_bytes()


def count_from_here() -> int:
    """Let the peak of this process's resident memory count anew; returns the bytes that are resident already."""
    gc.collect()
    # What making the data left behind would otherwise be used again, and not counted.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others keep less
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(entry: str) -> int:
    """Bytes of resident memory now (``VmRSS``) or at its peak (``VmHWM``)."""
    return bytes_stated_in(Path("/proc/self/status"), entry)


def bytes_stated_in(file: Path, entry: str) -> int:
    """Bytes that a file of /proc states in kilobytes, as ``entry: 12 kB``."""
    for line in file.read_text().splitlines():
        if line.startswith(entry + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"{file} has no {entry}")


def _child(asked: str) -> None:
    question = json.loads(asked)
    torch.set_num_threads(question["threads"])
    print(json.dumps(peak_of(question["label"], Shape(**question["shape"]))))


if __name__ == "__main__":
    _child(sys.argv[1])
