"""The one way to run a benchmark: interleaved rounds within a time budget, then medians, quartiles and ratios."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from benchmarks.machine import commit, machine, versions
from benchmarks.registry import Benchmark, Race, RacePlan, Sample, Unavailable

Say = Callable[[str], None]

_ALWAYS_SECONDS = 5.0
Result = dict[str, Any]
"""One benchmark's answer, ready for JSON."""


def run(
    benchmarks: Sequence[Benchmark],
    *,
    smoke: bool,
    rounds: int | None,
    minutes: float,
    say: Say,
    finished: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run benchmarks one after the other; each gets its share of what is left of the budget.

    Args:
        benchmarks: which.
        smoke: the small sizes: shows that the code runs, measures nothing worth knowing.
        rounds: of every race, instead of the benchmark's own number.
        minutes: for everything together. A race stops adding rounds when the next one would not fit, but never before
            its first.
        say: is told what is going on.
        finished: gets each result as soon as there is one, so that an interrupted run keeps what it measured.
    """
    # The last round of a race and the setting up of the next are not foreseen, so a tenth is kept back for them.
    deadline = time.monotonic() + 60 * minutes * 0.9
    results = []
    for place, each in enumerate(benchmarks):
        share = each.share / sum(later.share for later in benchmarks[place:])
        until = time.monotonic() + share * max(deadline - time.monotonic(), 0.0)
        results.append(_run_one(each, smoke, rounds, until, say))
        finished(results[-1])
    return results


def _run_one(each: Benchmark, smoke: bool, rounds: int | None, until: float, say: Say) -> Result:
    say(f"{each.name}: {each.question}")
    result: Result = {
        "name": each.name,
        "question": each.question,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "smoke": smoke,
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "versions": versions(),
        "shape": {},
        "seconds": {},
        "ratios": {},
        "skipped": None,
        "races": [],
    }
    started = time.monotonic()
    try:
        plans = each.plans(smoke)
    except Unavailable as reason:
        say(f"{each.name}: skipped: {reason}")
        return result | {"skipped": str(reason)}
    result["shape"] = dict(plans[0].shape)
    wanted = rounds or (2 if smoke else each.rounds)
    for place, plan in enumerate(plans):
        share = plan.share / sum(later.share for later in plans[place:])
        race_until = time.monotonic() + share * max(until - time.monotonic(), 0.0)
        result["races"].append(_run_race(plan, wanted, each.warm_ups, race_until, say))
    for race in result["races"]:
        prefix = f"{race['title']}: " if len(plans) > 1 else ""
        for case in race["cases"]:
            if "seconds" in case["median"]:
                result["seconds"][prefix + case["label"]] = case["median"]["seconds"]
            result["ratios"][f"{prefix}{case['label']}/{race['baseline']}"] = case["ratio"]
    return result | {"minutes": round((time.monotonic() - started) / 60, 2)}


def _run_race(plan: RacePlan, rounds: int, warm_ups: int, until: float, say: Say) -> dict[str, Any]:
    race = plan.build()
    for label, reason in race.skipped.items():
        say(f"  {plan.title}: {label} skipped: {reason}")
    samples = interleaved(race, rounds, warm_ups, until)
    done = len(samples[race.baseline])
    say(f"  {plan.title}: {done} of {rounds} rounds of {len(race.cases)} cases")
    return {
        "title": plan.title,
        "shape": dict(plan.shape),
        "varies": plan.varies,
        "baseline": race.baseline,
        "quantity": race.quantity,
        "warm_ups": warm_ups,
        "rounds": done,
        "skipped": dict(race.skipped),
        "cases": summaries(race, samples),
    }


def interleaved(race: Race, rounds: int, warm_ups: int, until: float) -> dict[str, list[Sample]]:
    """Measure A B C A B C ..., so that whatever disturbs the machine disturbs all cases alike.

    Stops after ``rounds`` rounds, or when another one is not expected to end before ``until`` (monotonic clock), but
    any race may take a few seconds.
    """
    gc.collect()
    for turn in range(warm_ups):
        for case in race.cases:
            case.measure(turn)
    samples: dict[str, list[Sample]] = {case.label: [] for case in race.cases}
    # What takes moments need not pay for what took long before it.
    until = max(until, time.monotonic() + _ALWAYS_SECONDS)
    longest = 0.0
    for done in range(rounds):
        started = time.monotonic()
        if done and started + longest > until:
            break
        for case in race.cases:
            samples[case.label].append(case.measure(warm_ups + done))
        longest = max(longest, time.monotonic() - started)
    return samples


def summaries(race: Race, samples: Mapping[str, Sequence[Sample]]) -> list[dict[str, Any]]:
    """Each case with all samples, medians, quartiles, and its ratio: median over the baseline's median."""
    cases: list[dict[str, Any]] = []
    for case in race.cases:
        by_quantity = {name: [each[name] for each in samples[case.label]] for name in samples[case.label][0]}
        cases.append(
            {
                "label": case.label,
                "includes": case.includes,
                "median": {name: float(np.median(values)) for name, values in by_quantity.items()},
                "quartiles": {
                    name: [float(np.quantile(values, share)) for share in (0.25, 0.75)]
                    for name, values in by_quantity.items()
                },
                "samples": by_quantity,
            }
        )
    medians = {each["label"]: each["median"][race.quantity] for each in cases}
    reference = medians[race.baseline]
    for each in cases:
        each["ratio"] = medians[each["label"]] / reference if reference else None
    return cases
