"""Study of Flash-LLM on a CPU.

*Flash-LLM: Enabling Cost-Effective and Highly-Efficient Large Generative Model Inference with Unstructured Sparsity*,
Xia et al. 2023, arXiv 2309.10285. A CPU has no tensor cores, but the same wall of memory bandwidth: weights are loaded
as a bitmap and multiplied as dense, in registers for a few columns, panel by panel in the cache for many (LSCD).
Measured are layers of SmolLM2's MLPs, pruned by magnitude, and random matrices of 4096 x 4096, which no cache near a
core holds. All arms compute the same product of the same masked weight in float32 on one thread; several weights take
turns, so that none waits in a near cache; the arms take turns as well. Nothing is tuned.

Fixed before the first run: a seed chooses the blocks whose layers are measured and draws the large matrices; medians of
at least 20 rounds; the claims below with their thresholds: bytes equal the formula exactly, errors below 1e-5 of the
largest output, at 80 % zeros and one column faster than dense and than torch's CSR on both shapes, on the large matrix
at least half of what the bytes promise from 50 % to 90 % zeros, and the gain over dense at 64 columns below that at 1.
A first run took the arms in turn weight by weight, so that the usual way found the weight that LSCD had just read; that
was changed, and nothing else.
"""

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from apportion.models import load
from apportion.models.families import blocks_of
from apportion.ops.processor import has_expand
from apportion.ops.spmm import cpu
from apportion.ops.spmm.formats import Bitmap, NarrowCSR
from apportion.report import plots
from apportion.report.plots import ParetoPoint
from apportion.studies.finding import Comparison, Finding, Measured, Row, Scale, collect_rows
from apportion.studies.machine import machine, one_thread
from apportion.studies.workbench import Workbench

CLAIM = (
    "Loading weights as sparse and computing as dense makes products with few columns faster by what is saved in "
    "memory traffic, though no multiplication is saved; the advantage vanishes as columns grow in number."
)
BASELINE = "torch's dense product, and its sparse CSR, of the same masked weight in the same run"

_SMALL, _LARGE = "SmolLM2 MLP", "4096 x 4096"
_DENSE, _CSR, _LSCD, _OURS = "dense", "torch CSR", "LSCD bitmap", "usual way"
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class _Size:
    """How much is measured, for each seed."""

    side: int = 4096  # of the large matrix
    large: int = 2  # of them take turns
    blocks: int = 4  # whose up-projections take turns
    sparsities: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    counts: tuple[int, ...] = (1, 4, 16, 64)
    rounds: int = 20


_SIZES: dict[Scale, _Size] = {
    "smoke": _Size(side=256, blocks=1, sparsities=(0.5, 0.8, 0.9), counts=(1, 64), rounds=2),
    "default": _Size(),
    "long": _Size(large=4, blocks=12, rounds=60),
    "gpu": _Size(large=4, blocks=12, rounds=60),
}


def run(scale: Scale, seeds: list[int], bench: Workbench) -> Finding:
    """Measure bytes, times and errors for each seed, and judge."""
    size = _SIZES[scale]
    measured = Measured()
    with one_thread():
        for seed in seeds:
            for where in (_SMALL, _LARGE):
                for sparsity in size.sparsities:

                    def measure(where: str = where, sparsity: float = sparsity, seed: int = seed) -> dict[str, float]:
                        return _measure(size, where, sparsity, seed)

                    what = f"{where}, {sparsity:.0%} zeros"
                    measured.add({what: bench.measure(f"{what}, seed {seed}", [asdict(size), seed], measure)})
    rows = collect_rows(measured)
    return Finding(
        slug="flash_llm",
        claim=CLAIM,
        rows=rows,
        comparisons=_claims(size, measured),
        seeds=seeds,
        seconds=bench.seconds,
        machine=machine(),
        scale=scale,
        notes=_notes(size, measured),
        plots={"gain": _picture(size, rows)},
    )


def _measure(size: _Size, where: str, sparsity: float, seed: int) -> dict[str, float]:
    weights = [_pruned(each, sparsity) for each in _weights(size, where, seed)]
    packed = [Bitmap.pack(each) for each in weights]
    read = [(each.words(), each.starts(), each.values) for each in packed]
    csr = [torch_csr(each) for each in weights]
    rows, columns = weights[0].shape
    nonzeros = sum(int(each.count_nonzero()) for each in weights)
    formula = sum(Bitmap.formula((rows, columns), int(each.count_nonzero()), 4) for each in weights)
    dense_bytes = sum(each.nbytes for each in weights)
    found = {
        "bytes of dense": sum(each.nbytes for each in packed) / dense_bytes,
        "bytes beyond the formula": float(sum(each.nbytes for each in packed) - formula),
        "bytes of dense as 16-bit CSR": sum(NarrowCSR.pack(each).nbytes for each in weights) / dense_bytes,
        "zeros": 1 - nonzeros / (len(weights) * rows * columns),
    }
    draw = torch.Generator().manual_seed(seed)
    for count in size.counts:
        x = torch.randn(count, columns, generator=draw)
        way = "expand" if count < 64 else "panels"
        arms: dict[str, Callable[[int], Tensor]] = {
            _DENSE: lambda i, x=x: torch.nn.functional.linear(x, weights[i]),  # type: ignore[misc]
            _CSR: _by_csr(csr, x),
            _LSCD: lambda i, x=x, way=way: cpu.bitmap_matmul(x, *read[i], way),  # type: ignore[misc]
            _OURS: lambda i, x=x: cpu.bitmap_matmul(x, *read[i]),  # type: ignore[misc]
        }
        exact = x.double() @ weights[0].double().T
        for name, seconds in _medians(arms, len(weights), size.rounds).items():
            found[f"{count} columns, ms: {name}"] = 1000 * seconds
            error = (arms[name](0).double() - exact).abs().max() / exact.abs().max()
            found[f"{count} columns, error: {name}"] = float(error)
    return found


def torch_csr(weight: Tensor) -> Tensor:
    """A weight as torch's own CSR, without its notice that this is beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
        return weight.to_sparse_csr()


def _by_csr(csr: list[Tensor], x: Tensor) -> Callable[[int], Tensor]:
    if len(x) == 1:
        return lambda i: (csr[i] @ x[0]).unsqueeze(0)
    return lambda i: torch.mm(csr[i], x.t()).t()


def _weights(size: _Size, where: str, seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    if where == _LARGE:
        return [torch.randn(size.side, size.side, generator=draw) for _ in range(size.large)]
    blocks = blocks_of(load("smollm2").model)
    chosen = torch.randperm(len(blocks), generator=draw)[: size.blocks].tolist()
    return [blocks[each].mlp.up_proj.weight.detach().clone() for each in chosen]


def _pruned(weight: Tensor, sparsity: float) -> Tensor:
    cut = weight.abs().flatten().kthvalue(int(sparsity * weight.numel())).values
    return torch.where(weight.abs() > cut, weight, 0.0)


def _medians(arms: dict[str, Callable[[int], Tensor]], weights: int, rounds: int) -> dict[str, float]:
    """Every arm in turn, each time with every weight, so that none finds what the arm before it has read."""
    took: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(rounds + 1):
        for name, arm in arms.items():
            for weight in range(weights):
                started = time.perf_counter()
                arm(weight)
                if round_:  # the first is to warm up, and to compile
                    took[name].append(time.perf_counter() - started)
    return {name: sorted(each)[len(each) // 2] for name, each in took.items()}


def _claims(size: _Size, measured: Measured) -> list[Comparison]:
    def of(where: str, sparsity: float, metric: str) -> Tensor:
        return torch.tensor(measured[f"{where}, {sparsity:.0%} zeros"][metric], dtype=torch.float64)

    def took(where: str, sparsity: float, count: int, name: str) -> Tensor:
        return of(where, sparsity, f"{count} columns, ms: {name}")

    def gain(where: str, sparsity: float, count: int, over: str) -> Tensor:
        return took(where, sparsity, count, over) / took(where, sparsity, count, _LSCD)

    few, many = size.counts[0], size.counts[-1]
    least, most = size.sparsities[0], size.sparsities[-1]
    claims: list[tuple[str, Tensor, bool]] = []
    for where in (_SMALL, _LARGE):
        beyond = sum(of(where, each, "bytes beyond the formula").abs() for each in size.sparsities)
        assert isinstance(beyond, Tensor)
        claims.append((f"{where}: bytes are those of the formula", 1 - beyond, True))
        worst = torch.stack(
            [of(where, each, f"{count} columns, error: {_LSCD}") for each in size.sparsities for count in size.counts]
        )
        claims.append((f"{where}: errors below {_TOLERANCE:g}", _TOLERANCE - worst.amax(0), True))
        for over in (_DENSE, _CSR):
            margin = gain(where, 0.8, few, over) - 1
            claims.append((f"{where}, 80 % zeros, 1 column: faster than {over}", margin, True))
        fading = gain(where, 0.8, few, _DENSE) - gain(where, 0.8, many, _DENSE)
        claims.append((f"{where}, 80 % zeros: gains less over dense with {many} columns than with 1", fading, True))
        lost = 1 - gain(where, 0.8, many, _DENSE)
        claims.append((f"{where}, 80 % zeros, {many} columns: no faster than dense", lost, False))
    times = took(_LARGE, least, few, _LSCD) / took(_LARGE, most, few, _LSCD)
    volumes = of(_LARGE, least, "bytes of dense") / of(_LARGE, most, "bytes of dense")
    claims.append(
        (
            f"{_LARGE}, 1 column: from {least:.0%} to {most:.0%} zeros time falls by at least half of what bytes do",
            (times - 1) - 0.5 * (volumes - 1),
            True,
        )
    )
    return [Comparison.positive(claim, margin.tolist(), part_of_verdict=counted) for claim, margin, counted in claims]


def _notes(size: _Size, measured: Measured) -> list[str]:
    notes = [
        f"One thread, float32, medians of {size.rounds} rounds with each weight; {size.blocks} up-projections "
        f"(1536 x 576) or {size.large} large matrices take turns with all arms.",
        "LSCD is 'expand' below 64 columns and 'panels' at 64; the usual way is what the library takes.",
        "Break-even is the smallest measured share of zeros from which on LSCD is faster than dense, seeds averaged: "
        + "; ".join(
            f"{where}, {count} columns: {_break_even(size, measured, where, count)}"
            for where in (_SMALL, _LARGE)
            for count in size.counts
        )
        + ".",
    ]
    if not has_expand():
        notes.append("This processor lacks AVX-512: below 64 columns 'LSCD' fell back to looking up each nonzero.")
    return notes


def _break_even(size: _Size, measured: Measured, where: str, count: int) -> str:
    def faster(sparsity: float) -> bool:
        found = measured[f"{where}, {sparsity:.0%} zeros"]
        return sum(found[f"{count} columns, ms: {_LSCD}"]) < sum(found[f"{count} columns, ms: {_DENSE}"])

    start = len(size.sparsities)
    while start and faster(size.sparsities[start - 1]):
        start -= 1
    return f"{size.sparsities[start]:.0%}" if start < len(size.sparsities) else "none"


def _picture(size: _Size, rows: list[Row]) -> str:
    """How many times faster than dense LSCD is, by zeros."""
    means = {(row.name, row.metric): row.mean for row in rows}
    points = []
    for count in size.counts:
        for sparsity in size.sparsities:
            name = f"{_LARGE}, {sparsity:.0%} zeros"
            gain = means[name, f"{count} columns, ms: {_DENSE}"] / means[name, f"{count} columns, ms: {_LSCD}"]
            points.append(ParetoPoint(f"{count} columns", sparsity, gain))
    with tempfile.TemporaryDirectory() as folder:
        path = plots.pareto(
            Path(folder) / "gain.svg",
            points,
            cost="share of zeros",
            quality="times faster than dense",
            title=f"LSCD on {_LARGE}, one thread",
        )
        return path.read_text(encoding="utf-8")
