"""How long a Monarch layer takes, against a dense one: forwards by width and rows, and whole training steps.

Square layers in float32, without bias. A Monarch layer of 4 blocks has half the multiplications of a dense one, of 16
blocks an eighth; what it costs beside them is bringing numbers into another order twice. Weights are as warm as
repeated calls leave them: small layers stay in the processor's cache, large ones do not.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from apportion.weights.monarch import MonarchLinear
from benchmarks.registry import Case, Race, RacePlan, Sample, benchmark

_DENSE = "dense"
_BLOCKS = (4, 16)
_WIDTHS, _ROWS = (512, 1024, 2048, 4096, 8192), (1, 64, 2048)
_STEPS = ((1024, 2048), (4096, 2048))
_ENOUGH = 2e7  # multiplications: calls of fewer are measured several at a time


@benchmark("monarch", "from which width on is a Monarch layer faster than a dense one?", rounds=7, share=2)
def plans(smoke: bool) -> Sequence[RacePlan]:
    """A race for each width and number of rows, then training steps."""
    sizes = [(16, 4)] if smoke else [(width, rows) for rows in _ROWS for width in _WIDTHS]
    steps = [(16, 4)] if smoke else _STEPS
    enough = 0.0 if smoke else _ENOUGH
    return [_plan(*size, enough, trained=False) for size in sizes] + [
        _plan(*size, enough, trained=True) for size in steps
    ]


def _plan(width: int, rows: int, enough: float, trained: bool) -> RacePlan:
    title = f"{width:,} wide, {rows:,} rows" + (", forward and backward" if trained else "")
    share = float(width**2 * rows * (3 if trained else 1) + width**2)
    return RacePlan(title, {"width": width, "rows": rows}, lambda: _race(width, rows, enough, trained), share=share)


def _race(width: int, rows: int, enough: float, trained: bool) -> Race:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    layers: dict[str, nn.Module] = {_DENSE: nn.Linear(width, width, bias=False)}
    layers |= {
        f"Monarch, {blocks} blocks": MonarchLinear(width, width, bias=False, nblocks=blocks) for blocks in _BLOCKS
    }
    calls = max(1, round(enough / (width**2 * rows)))
    cases = [
        Case(
            label,
            _measured(_step(layer, x) if trained else _forward(layer, x), calls),
            "torch.nn.Linear" if label == _DENSE else "two batched products and both permutations",
        )
        for label, layer in layers.items()
    ]
    return Race(cases, _DENSE)


def _forward(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> object:
        return layer(x)

    return run


def _step(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """Output, and the gradients of input and weights."""
    x = x.clone().requires_grad_()
    gradient = torch.ones_like(x)

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(gradient)

    return run


def _measured(run: Callable[[], object], calls: int) -> Callable[[int], Sample]:
    def measure(turn: int) -> Sample:
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return {"seconds": (time.perf_counter() - started) / calls}

    return measure
