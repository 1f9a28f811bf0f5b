"""A cycle-level model of SAT, the accelerator for N:M training of Fang et al. 2023 (arXiv 2309.13015).

Allocated are cycles of an array of multiply-add units and bytes of memory traffic, to each of the three products of
each layer: an offline scheduler gives every product the dataflow that needs fewer cycles.

The paper's text was not at hand, its abstract was. **This is a design of our own after it**, not a copy: 32 x 32 units
at 200 MHz, products of 16-bit values summed in 32 bits, three optimisations that can each be switched off. *Inputs* are
all attributes of `Sat` and the shapes (see `training_shapes`). *Outputs* are cycles, dataflows, utilisation, bytes and
what bounds each product. Nothing is fitted to the paper's figures.

| paper | here |
|---|---|
| STCE: systolic array of sparse units | ``rows``, ``columns``; a group of M costs N cycles |
| interleave mapping | ``interleave`` outputs share a unit, so that sums need not wait ``adder_latency`` cycles |
| pre-generation of N:M weights | ``pregenerate``: sorted behind the optimiser, else before each sparse product |
| offline scheduling (dataflows OS and WS) | ``schedule`` |
| WUVE, SORE | ``vector_lanes``, ``sort_lanes`` |

Output-stationary: tiles of ``rows`` x ``columns`` sums stay in the units, in bundles of at most ``interleave``.
Weight-stationary: ``rows`` groups x ``columns`` outputs of weights stay, partial sums travel down; independent sums
follow each other, so nothing waits. `tests/support/systolic_events.py` is the same array register by register; it needs
exactly these cycles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from apportion.errors import InputError
from apportion.weights.training_shapes import LayerShape, Op, WeightSparsity

Dataflow = Literal["OS", "WS", "WS dense"]


@dataclass(frozen=True)
class Product:
    """``A[p, k] @ B[k, q]``, B being N:M along k unless ``n == m``.

    Raises:
        InputError: a value that cannot work.
    """

    p: int
    k: int
    q: int
    n: int = 1
    m: int = 1

    def __post_init__(self) -> None:
        if min(self.p, self.k, self.q) < 1 or not 1 <= self.n <= self.m or self.k % self.m:
            raise InputError(f"{self}: use sizes of at least 1, 1 <= n <= m, and k a multiple of m")

    @property
    def steps(self) -> int:
        """Multiply-adds of each output."""
        return self.k // self.m * self.n

    @property
    def macs(self) -> int:
        """Multiply-adds of all outputs."""
        return self.p * self.steps * self.q


@dataclass(frozen=True)
class Cost:
    """What one product, or the optimiser, costs in a training step.

    Attributes:
        layer, part: of what; ``part`` is FF, BP, WU or optimiser.
        dataflow: that was chosen; None for the optimiser.
        cycles: of the array, or of the vector lanes.
        memory_cycles: for ``bytes`` of traffic.
        waiting: cycles of sorting before the product begins.
        total: cycles until it is done.
        macs: multiply-adds that count: not those with pruned weights, or with zeros that a stride puts in.
        bytes: to and from memory.
    """

    layer: str
    part: str
    dataflow: Dataflow | None
    cycles: float
    memory_cycles: float
    waiting: float
    total: float
    macs: int
    bytes: float

    @property
    def bound(self) -> Literal["compute", "memory"]:
        """Which side of the roofline it is on."""
        return "memory" if self.memory_cycles > self.cycles else "compute"


@dataclass(frozen=True)
class StepCost:
    """A training step.

    Attributes:
        parts: of all layers.
        elementwise: cycles of norms, non-linearities and the like.
        units: of the array.
        clock: cycles a second.
    """

    parts: list[Cost]
    elementwise: float
    units: int
    clock: float

    @property
    def cycles(self) -> float:
        """All of them."""
        return sum(each.total for each in self.parts) + self.elementwise

    @property
    def seconds(self) -> float:
        """The time it takes."""
        return self.cycles / self.clock

    @property
    def utilisation(self) -> float:
        """Multiply-adds that count, of those the array could do while it is at work on products."""
        cycles = sum(each.cycles for each in self.parts if each.dataflow)
        return sum(each.macs for each in self.parts) / (self.units * cycles)

    def by_part(self) -> dict[str, float]:
        """Cycles of FF, BP, WU, the optimiser and of element-wise operations."""
        found = {part: sum(each.total for each in self.parts if each.part == part) for part in _PARTS}
        return {**found, "elementwise": self.elementwise}


@dataclass(frozen=True)
class Sat:
    """The accelerator: all that the model takes as given.

    Attributes:
        rows, columns: of the array.
        clock: in Hz.
        adder_latency: cycles until a sum can be added to again.
        interleave: outputs that share a unit in turn; 1 switches it off.
        sum_hop: cycles a partial sum takes from one unit to the next (weight-stationary); the adder's latency is the
            pessimistic choice.
        hide_drain: outputs leave while the next tiles are summed.
        vector_lanes: of the optimiser and of element-wise operations.
        sort_lanes: weights sorted into groups a cycle, for one direction.
        value_bytes, master_bytes: of an operand, and of a master weight, momentum or gradient.
        bandwidth: of memory, bytes a second. The board has four channels of 19.2 GB/s.
        buffer_bytes: on chip; where neither operand fits, one of them is read again and again.
        overlap: traffic and products at the same time.
        pregenerate: N:M weights are sorted out right after the update.
        schedule: ``best`` of the dataflows for each product, or one for all.

    Raises:
        InputError: a value that cannot work.
    """

    rows: int = 32
    columns: int = 32
    clock: float = 200e6
    adder_latency: int = 8
    interleave: int = 8
    sum_hop: int = 1
    hide_drain: bool = False
    vector_lanes: int = 32
    sort_lanes: int = 32
    value_bytes: int = 2
    master_bytes: int = 4
    bandwidth: float = 76.8e9
    buffer_bytes: int = 8 * 2**20
    overlap: bool = True
    pregenerate: bool = True
    schedule: Literal["best", "OS", "WS"] = "best"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, str | bool) and value <= 0:
                raise InputError(f"{name}={value}: use a number above 0")
        if self.schedule not in ("best", "OS", "WS"):
            raise InputError(f"schedule={self.schedule!r}: use best, OS or WS")

    def output_stationary(self, product: Product) -> int:
        """Cycles of a product whose sums stay in the units."""
        tiles = -(-product.p // self.rows) * -(-product.q // self.columns)
        whole, rest = divmod(tiles, self.interleave)
        return whole * self._bundle(product, self.interleave) + (self._bundle(product, rest) if rest else 0)

    def _bundle(self, product: Product, tiles: int) -> int:
        fill = self.rows + self.columns - 2
        drain = 0 if self.hide_drain else tiles * self.rows
        return product.steps * max(tiles, self.adder_latency) + fill + drain

    def weight_stationary(self, product: Product) -> int:
        """Cycles of a product whose B stays in the units, a group of M in each."""
        tiles = -(-product.k // (self.rows * product.m)) * -(-product.q // self.columns)
        fill = (self.rows - 1) * self.sum_hop + self.columns - 1
        # The next tile's weights come in meanwhile, a row each step; the first tile's have nothing to hide behind.
        return tiles * (max(product.p, self.rows) * product.n + fill) + self.rows * product.n

    def choose(self, product: Product) -> tuple[Dataflow, int]:
        """The dataflow of a product, and its cycles; N:M weights may be spread out where units would stand idle."""
        choices: dict[Dataflow, int] = {}
        if self.schedule in ("best", "OS"):
            choices["OS"] = self.output_stationary(product)
        if self.schedule in ("best", "WS"):
            choices["WS"] = self.weight_stationary(product)
            if product.n < product.m:
                choices["WS dense"] = self.weight_stationary(Product(product.p, product.k, product.q))
        best = min(choices, key=lambda each: choices[each])
        return best, choices[best]

    def step(self, layers: Sequence[LayerShape], batch: int, sparsity: WeightSparsity | None = None) -> StepCost:
        """The cost of a training step.

        Args:
            layers: of the network.
            batch: examples.
            sparsity: which products have N:M weights; None for dense training.

        Raises:
            InputError: the batch has no example.
        """
        if batch < 1:
            raise InputError(f"batch={batch}: use at least 1 example")
        parts, elements = [], 0
        for shape in layers:
            parts += [self.product_cost(shape, op, batch, sparsity) for op in shape.ops]
            if shape.weights:
                parts.append(self._optimiser(shape, sparsity))
            elements += 2 * shape.elementwise * batch * shape.positions_out * shape.outputs * shape.repeat
        return StepCost(parts, elements / self.vector_lanes, self.rows * self.columns, self.clock)

    def product_cost(self, shape: LayerShape, op: Op, batch: int, sparsity: WeightSparsity | None = None) -> Cost:
        """One product of one layer."""
        p, k, q, times = shape.product(op, batch)
        sparse = sparsity is not None and sparsity.holds(shape, op)
        product = Product(p, k, q, sparsity.n, sparsity.m) if sparsity is not None and sparse else Product(p, k, q)
        dataflow, cycles = self.choose(product)
        traffic = self.traffic(shape, op, batch, sparsity)
        memory = self._memory_cycles(traffic)
        macs = shape.macs(op, batch) // product.m * product.n
        waiting = shape.weights / self.sort_lanes if sparse and not self.pregenerate else 0.0
        total = (max(cycles * times, memory) if self.overlap else cycles * times + memory) + waiting
        return Cost(shape.name, op, dataflow, cycles * times, memory, waiting, total, macs, traffic)

    def traffic(self, shape: LayerShape, op: Op, batch: int, sparsity: WeightSparsity | None = None) -> float:
        """Bytes of a product: its operands as they lie in memory (kernels unfold on chip), and what comes out."""
        places = batch * shape.repeat
        given = places * shape.positions_in * shape.inputs * self.value_bytes
        made = places * shape.positions_out * shape.outputs * self.value_bytes
        if not shape.weighted:
            other = places * shape.inputs * shape.outputs * self.value_bytes
            first, second, out = {"FF": (given, other, made), "BP": (made, other, given), "WU": (given, made, other)}[
                op
            ]
            return first + second + out  # of one head, which fits
        if op == "WU":
            return self._read(given, made) + shape.weights * self.master_bytes
        sparse = sparsity is not None and sparsity.holds(shape, op)
        weights: float = shape.weights * (self.master_bytes if sparse and not self.pregenerate else self.value_bytes)
        if sparse and self.pregenerate:
            weights = self.stored(shape.weights, sparsity)
        return self._read(given, weights) + made if op == "FF" else self._read(made, weights) + given

    def stored(self, weights: int, sparsity: WeightSparsity | None) -> float:
        """Bytes of weights as an operand: values and indices of those that stay, or all where that is less."""
        dense = float(weights * self.value_bytes)
        if sparsity is None:
            return dense
        index_bits = (sparsity.m - 1).bit_length()
        return min(dense, weights * sparsity.n / sparsity.m * (self.value_bytes + index_bits / 8))

    def _read(self, a: float, b: float) -> float:
        """Bytes read for two operands: blocks of one stay on chip while all of the other passes."""
        blocks_a, blocks_b = -(-a // self.buffer_bytes), -(-b // self.buffer_bytes)
        return min(a + b * blocks_a, b + a * blocks_b)

    def _optimiser(self, shape: LayerShape, sparsity: WeightSparsity | None) -> Cost:
        """Momentum: weight, momentum and gradient come, weight and momentum go, and the operands of the next step."""
        sparse = [op for op in ("FF", "BP") if sparsity is not None and sparsity.holds(shape, op)]
        traffic = 5.0 * self.master_bytes * shape.weights
        cycles = shape.weights / self.vector_lanes
        if self.pregenerate:
            traffic += len(sparse) * self.stored(shape.weights, sparsity)
            cycles = max(cycles, len(sparse) * shape.weights / self.sort_lanes)
        if len(sparse) < len(shape.ops) - 1:  # a dense product reads 16-bit weights, one copy for both
            traffic += self.value_bytes * shape.weights
        memory = self._memory_cycles(traffic)
        total = max(cycles, memory) if self.overlap else cycles + memory
        return Cost(shape.name, "optimiser", None, cycles, memory, 0.0, total, 0, traffic)

    def _memory_cycles(self, traffic: float) -> float:
        return traffic / self.bandwidth * self.clock


_PARTS = ("FF", "BP", "WU", "optimiser")
