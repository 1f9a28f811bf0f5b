"""How long one training step takes, against the bare encoder product and against other libraries."""

from collections.abc import Sequence

from benchmarks.contenders import BARE, bare, enter, ours
from benchmarks.peers import peers
from benchmarks.problem import SMOKE, USUAL, Problem
from benchmarks.registry import Race, RacePlan, benchmark


@benchmark("step", "how long does one training step take?", rounds=9, warm_ups=2, share=5)
def plans(smoke: bool) -> Sequence[RacePlan]:
    """One race of everybody."""
    shape = SMOKE if smoke else USUAL

    def build() -> Race:
        everybody = [
            bare(),
            bare("bfloat16"),
            *ours(shape.budget),
            *ours(shape.budget, "bfloat16"),
            *peers(),
        ]
        cases, skipped = enter(everybody, Problem(shape))
        return Race(cases, BARE, skipped=skipped)

    return [RacePlan("step", shape.as_dict(), build)]
