"""Which way to multiply by a packed weight is fastest here: measured when it is packed, for each shape once."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.ops.processor import has_expand
from apportion.ops.spmm import runs_compiled, runs_tiles
from apportion.ops.spmm.formats import Bitmap, NarrowCSR
from apportion.ops.spmm.tiles import Tiles

COUNTS = (1, 4, 16, 64)
BUDGET = 0.05  # seconds for a shape


@dataclass(frozen=True)
class Crossover:
    """How long each way took, in seconds, for some numbers of input rows.

    What is measured lies in the cache if it fits; in a model it mostly does not, and then less is gained by dense.

    Attributes:
        seconds: by number of rows, then by way: ``dense``, ``csr``, and the ways to read a bitmap, or what lies in its
            place in memory (`SparseLinear`).
    """

    seconds: dict[int, dict[str, float]]

    @property
    def format(self) -> str:
        """Of bitmap and csr, the faster for one row."""
        ways = _of_a_bitmap(self.seconds[COUNTS[0]])
        return "csr" if self.seconds[COUNTS[0]]["csr"] < min(ways.values()) else "bitmap"

    def way(self, count: int) -> str:
        """The fastest way to read a bitmap for so many rows."""
        return self._fastest[next((each for each in COUNTS if count <= each), COUNTS[-1])]

    @functools.cached_property
    def _fastest(self) -> dict[int, str]:
        ways = {count: _of_a_bitmap(self.seconds[count]) for count in COUNTS}
        return {count: min(took, key=took.__getitem__) for count, took in ways.items()}

    def gain(self, count: int = 1) -> float:
        """How many times faster than dense the best way is, for a number of rows that was measured."""
        took = self.seconds[count]
        return took["dense"] / min(each for way, each in took.items() if way != "dense")


def _of_a_bitmap(seconds: dict[str, float]) -> dict[str, float]:
    return {way: took for way, took in seconds.items() if way not in ("csr", "dense")}


def measure_crossover(weight: Tensor) -> Crossover | None:
    """Measure on this machine with as many threads as torch has; None where no kernel of ours reads the weight.

    Weights of the same shape, type and share of zeros (to 5 %) are measured once.
    """
    if weight.device.type != "cpu" or not runs_compiled(torch.empty(0), weight) or not weight.numel():
        return None
    share = round(20 * float((weight == 0).float().mean()))
    return _measured(weight.shape[0], weight.shape[1], weight.dtype, share, torch.get_num_threads())


@functools.cache
def _measured(rows: int, columns: int, dtype: torch.dtype, share: int, threads: int) -> Crossover:
    from apportion.ops.spmm import cpu

    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=draw)
    weight = (weight * (torch.rand(rows, columns, generator=draw) >= share / 20)).to(dtype)
    bitmap, csr = Bitmap.pack(weight), NarrowCSR.pack(weight)
    words, starts, csr_starts = bitmap.words(), bitmap.starts(), csr.starts.long()
    tiles = runs_tiles(weight)
    if tiles:
        from apportion.ops.spmm.tile_product import WAYS, TileProduct

        product = TileProduct(Tiles.pack(weight))
    seconds: dict[int, dict[str, float]] = {}
    for count in COUNTS:
        x = torch.randn(count, columns, generator=draw)
        narrow = x.to(dtype)
        ways: dict[str, Callable[[], object]] = {
            "dense": lambda x=narrow: torch.nn.functional.linear(x, weight),  # type: ignore[misc]
            "csr": lambda x=x: cpu.csr_narrow_matmul(x, csr_starts, csr.columns, csr.values),  # type: ignore[misc]
        }
        for way in WAYS if tiles else ():
            ways[way] = lambda x=x, way=way: product(x, way)  # type: ignore[misc]
        for way in () if tiles else cpu.WAYS if has_expand() else cpu.WAYS[1:]:
            ways[way] = lambda x=x, way=way: cpu.bitmap_matmul(x, words, starts, bitmap.values, way)  # type: ignore[misc]
        for run in ways.values():
            run()  # compiled, and warm
        seconds[count] = _medians(ways, BUDGET / len(COUNTS))
    return Crossover(seconds)


def _medians(ways: dict[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """All in turn, three times at least and until the time is up."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    until = time.perf_counter() + budget
    while len(took["dense"]) < 3 or time.perf_counter() < until:
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            took[name].append(time.perf_counter() - started)
    return {name: sorted(each)[len(each) // 2] for name, each in took.items()}
