"""How the step grows with features, tokens, budget and width, relative to the bare product of the same shape."""

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.contenders import BARE, bare, enter, ours
from benchmarks.peers import peer
from benchmarks.problem import SMOKE, USUAL, Problem, Shape
from benchmarks.registry import Race, RacePlan, benchmark

# Around the usual shape.
_SIZES = {
    "features": (2048, 32768),
    "tokens": (512, 8192),
    "budget": (8, 128),
    "width": (256, 1152),
}
# Peers only where a bar is set for them, and where what they do best shows: elsewhere they would eat the time budget.
_WITH_PEERS = (("features", 32768), ("tokens", 8192))


@benchmark("scaling", "how does the step grow with features, tokens, budget and width?", rounds=5, share=6)
def plans(smoke: bool) -> Sequence[RacePlan]:
    """One race a shape; the usual shape belongs to all series and is measured once."""
    if smoke:
        return [_plan(SMOKE, None), _plan(replace(SMOKE, features=64), "features")]
    return [_plan(USUAL, None)] + [
        _plan(replace(USUAL, **{axis: size}), axis, peers=(axis, size) in _WITH_PEERS)
        for axis, sizes in _SIZES.items()
        for size in sizes
    ]


def _plan(shape: Shape, axis: str | None, peers: bool = False) -> RacePlan:
    def build() -> Race:
        contenders = [bare(), *ours(shape.budget)]
        if peers:
            contenders += [*ours(shape.budget, "bfloat16"), peer("sparsify"), peer("SAELens TopK")]
        cases, skipped = enter(contenders, Problem(shape))
        return Race(cases, BARE, skipped=skipped)

    # The product's size, and four times it where peers run: they are several times slower.
    share = float(shape.tokens * shape.features * shape.width * (4 if peers else 1))
    title = f"{axis} {getattr(shape, axis):,}" if axis else "usual shape"
    return RacePlan(title, shape.as_dict(), build, varies=axis, share=share)
