"""A linear layer whose weight lies packed in memory: smaller by its zeros, and faster where memory is the limit.

For inference: a packed weight is no parameter and gets no gradient (one with respect to the input goes through the
unpacked weight). Any pruner's result will do, as a weight with zeros in it:

    layer = SparseLinear.from_linear(pruned)       # nn.Linear -> SparseLinear
    dense = layer.to_linear()                      # and back, bit for bit

In the memory of a CPU with AVX-512 what is a bitmap in a file lies in tiles (`apportion.ops.spmm.tiles`), which are
read faster and take a seventh to a fifth more; elsewhere it is a bitmap with three kernels (`apportion.ops.spmm.cpu`).
What is fastest depends on the number of input rows and on the machine: ``measure=True`` tries all out, and dense too.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from apportion.errors import InputError
from apportion.ops.direct import runs_directly
from apportion.ops.spmm import (
    bitmap_matmul,
    block_matmul,
    check_tiles,
    csr_narrow_matmul,
    runs_compiled,
    runs_tiles,
    tiles_matmul,
)
from apportion.ops.spmm.formats import FORMATS, Bitmap, Blocks, Dense, NarrowCSR, NOfM, Packed
from apportion.ops.spmm.tiles import Tiles
from apportion.weights.crossover import Crossover, measure_crossover
from apportion.weights.semi_structured import accelerated, why_not

if TYPE_CHECKING:
    from apportion.ops.spmm.tile_product import TileProduct

RUNNABLE = ("bitmap", "csr", "nm", "block")
_TILES = tuple(each.name for each in fields(Tiles) if each.name != "shape")
_PARTS = {"bits", "columns", *_TILES}


class SparseLinear(nn.Module):
    """``x @ W.T + bias`` with ``W`` packed.

    Attributes:
        in_features: columns of the weight.
        out_features: rows of the weight.
        format: what the weight is written as in a file (`apportion.ops.spmm.formats`).
        settings: of that format.
        crossover: what was measured, if it was.
    """

    bits: Tensor
    starts: Tensor
    columns: Tensor
    places: Tensor
    counts: Tensor
    fours: Tensor
    lanes: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None = None, crossover: Crossover | None = None) -> None:
        """Take over a packed weight.

        Args:
            packed: the weight; N:M is unpacked into a bitmap, which is what kernels read, unless it is 2:4 on a GPU
                that multiplies by it.
            bias: [rows].
            crossover: how fast each way was on this machine.

        Raises:
            InputError: the weight is not sparse but `Dense`, or the bias has another length.
        """
        super().__init__()
        if isinstance(packed, Dense):
            raise InputError(f"packed is dense: a SparseLinear holds {', '.join(RUNNABLE)}; keep the nn.Linear")
        self.out_features, self.in_features = packed.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise InputError(f"bias has shape {tuple(bias.shape)}: the weight has {self.out_features} rows")
        self.format, self.settings, self.crossover = packed.name, packed.settings(), crossover
        self._accelerated: Tensor | None = None
        if isinstance(packed, NOfM):
            weight = packed.unpack()
            if (packed.keep, packed.of) == (2, 4) and why_not(weight) is None:
                self._accelerated = accelerated(weight)
            packed = Bitmap.pack(weight)
        self._made: TileProduct | None = None
        self._hold(packed)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        format: str = "auto",
        *,
        dtype: torch.dtype | None = None,
        measure: bool = False,
        settings: Mapping[str, int] | None = None,
    ) -> "SparseLinear":
        """Pack a layer that was pruned.

        Args:
            linear: with zeros in its weight.
            format: one of `RUNNABLE`, or ``auto``: what takes the fewest bytes; with ``measure`` what is fastest for
                one input row.
            dtype: to store values in, instead of the weight's own.
            measure: try formats and kernels out on this machine, 50 ms for each shape.
            settings: of the format: ``keep`` and ``of``, or ``height`` and ``width``.

        Raises:
            InputError: an unknown format, a weight that it cannot hold, or not a linear layer.
        """
        if not isinstance(linear, nn.Linear):
            raise InputError(f"linear is a {type(linear).__name__}: only nn.Linear is packed")
        weight = linear.weight.detach()
        if dtype is not None:
            weight = weight.to(dtype)
        crossover = measure_crossover(weight) if measure else None
        if format == "auto":
            packed = smallest(weight) if crossover is None else FORMATS[crossover.format].pack(weight)
        else:
            packed = pack_as(weight, format, settings)
        if isinstance(packed, Dense):
            packed = Bitmap.pack(weight)
        return cls(packed, linear.bias, crossover)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight made dense: a new tensor each time."""
        return self._runtime().unpack()

    @property
    def nbytes(self) -> int:
        """Bytes of the weight in memory; the bias is not counted."""
        return sum(each.nbytes for name, each in self.named_buffers() if name != "bias")

    def packed(self) -> Packed:
        """The weight as a file holds it."""
        found = self._runtime()
        if isinstance(found, Tiles):
            return pack_as(found.unpack(), self.format, self.settings)
        return found if found.name == self.format else pack_as(found.unpack(), self.format, self.settings)

    def to_linear(self) -> nn.Linear:
        """The dense layer that this is, in the type of the values."""
        weight = self.weight
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return linear

    @override
    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """``x @ W.T + bias``.

        Raises:
            InputError: ``x`` has another width, or lies on another device.
        """
        if torch.compiler.is_compiling() or x.__class__ is not Tensor or (x.requires_grad and torch.is_grad_enabled()):
            return self._by_ops(x)
        # Past torch's dispatcher, and past attributes of modules: small layers take no longer than those do.
        product = self._made
        if product is None or not product.serves(self._buffers):
            product = self._made = self._made_product()
        if product is None or not x.is_cpu or x.shape[-1] != product.columns:
            return self._by_ops(x)
        way = None if self.crossover is None else self.crossover.way(x.numel() // product.columns)
        if x.dtype is torch.float32:
            return product(x if x.is_contiguous() else x.contiguous(), way)
        return product.half(x, way) if x.dtype is torch.bfloat16 else self._by_ops(x)

    def _by_ops(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise InputError(f"x has width {x.shape[-1]}: the weight has {self.in_features} columns")
        if x.device != self.values.device:
            raise InputError(f"x is on {x.device}, the weight on {self.values.device}: move one to the other")
        if torch.is_grad_enabled() and x.requires_grad:
            y = nn.functional.linear(x, self.weight.to(x.dtype))
        elif self._accelerated is not None and x.dtype == self.values.dtype:
            y = nn.functional.linear(x, self._accelerated)
        else:
            y = self._product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @override
    def extra_repr(self) -> str:
        size = self.in_features * self.out_features
        share = 1 - int(self.values.count_nonzero()) / size if size else 0.0
        return f"{self.in_features}, {self.out_features}, format={self.format}, zeros={share:.1%}"

    def _product(self, x: Tensor) -> Tensor:
        held = self._buffers
        values: Any = held["values"]
        direct = runs_directly(x, values) and runs_compiled(x, values)
        if direct:
            from apportion.ops.spmm import cpu
        if self._kind == "tiles":
            parts = (held[name] for name in _TILES)
            return tiles_matmul(x, *parts, self.out_features)
        if self._kind == "bitmap":
            way = None if self.crossover is None else self.crossover.way(x.shape[0])
            multiply: Any = cpu.bitmap_matmul if direct else bitmap_matmul
            return multiply(x, held["bits"], held["starts"], values, way)
        if self._kind == "csr":
            multiply = cpu.csr_narrow_matmul if direct else csr_narrow_matmul
            return multiply(x, held["starts"], held["columns"], values)
        missing = -self.in_features % values.shape[2]
        x = nn.functional.pad(x, (0, missing)) if missing else x
        multiply = cpu.block_matmul if direct else block_matmul
        found: Tensor = multiply(x, held["starts"], held["columns"], values)
        return found[:, : self.out_features]

    def _runtime(self) -> Packed | Tiles:
        shape = (self.out_features, self.in_features)
        if self._kind == "tiles":
            return Tiles.restore(shape, self._buffers)
        if self._kind == "bitmap":
            octets = self.bits.view(torch.uint8)[:, : -(-self.in_features // 8)]
            return Bitmap(shape, octets.contiguous(), self.values)
        if self._kind == "csr":
            return NarrowCSR(shape, self.starts.int(), self.columns, self.values)
        return Blocks(shape, self.starts.int(), self.columns.int(), self.values)

    def _hold(self, packed: Packed | Tiles) -> None:
        """Keep a weight in buffers, instead of what they were: a bitmap in tiles where those can be read."""
        if isinstance(packed, Bitmap) and runs_tiles(packed.values):
            packed = Tiles.pack(packed.unpack())
        self._hold_as(packed)

    def _hold_as(self, packed: Packed | Tiles) -> None:
        for name in _PARTS:
            self._buffers.pop(name, None)
        self._kind = "tiles" if isinstance(packed, Tiles) else packed.name
        for name, each in _as_read(packed).items():
            self.register_buffer(name, each)

    def _made_product(self) -> "TileProduct | None":
        """What multiplies by tiles that lie where they can be read, with a bias that it can add; None elsewhere."""
        bias = self.bias
        if self._kind != "tiles" or not self.in_features or not runs_tiles(self.values):
            return None
        if bias is not None and not (bias.dtype == torch.float32 and bias.is_cpu and bias.is_contiguous()):
            return None
        from apportion.ops.spmm.tile_product import TileProduct

        tiles = Tiles.restore((self.out_features, self.in_features), self._buffers)
        check_tiles(tiles)
        return TileProduct(tiles, bias)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseLinear":
        before, self._made = self.values.device.type, None
        super()._apply(fn, recurse)
        after = self.values.device.type
        # Tiles are for the CPU and bitmaps for everywhere else; what has no memory (meta) is neither.
        if after != before and "meta" not in (before, after) and self._kind in ("tiles", "bitmap"):
            self._hold(Bitmap.pack(self.weight))
        return self

    @override
    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self._made = None
        other = {"tiles": f"{prefix}bits", "bitmap": f"{prefix}places"}.get(self._kind)
        if other not in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        # Written where this weight lies in the other form: it is read as that, and then brought into ours.
        weight = self.weight
        self._hold_as(Bitmap.pack(weight) if self._kind == "tiles" else Tiles.pack(weight))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._hold(Bitmap.pack(self.weight))

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}  # addresses mean nothing in a copy


def smallest(weight: Tensor) -> Packed:
    """A weight in the format that takes the fewest bytes; a tie goes to the one that is read as it is."""
    found = bytes_by_format(weight)
    return pack_as(weight, min(("bitmap", "csr", "dense", "nm", "block"), key=lambda each: found.get(each, 2**63)))


def bytes_by_format(weight: Tensor) -> dict[str, int]:
    """Bytes of a matrix in every format that can hold it; blocks of 16 x 16."""
    size, nonzeros = weight.element_size(), int(weight.count_nonzero())
    shape = (weight.shape[0], weight.shape[1])
    found = {each.name: each.formula(shape, nonzeros, size) for each in (Dense, Bitmap, NarrowCSR)}
    pattern = NOfM.pattern(weight)
    if pattern is not None:
        found["nm"] = NOfM.formula(shape, *pattern, size)
    found["block"] = Blocks.formula(shape, Blocks.count(weight) if weight.numel() else 0, 16, 16, size)
    return found


def pack_as(weight: Tensor, format: str, settings: Mapping[str, int] | None = None) -> Packed:
    """Pack a weight in a format of that name, or in the smallest (``auto``).

    Raises:
        InputError: there is no such format, or it cannot hold the weight.
    """
    if format == "auto":
        return smallest(weight)
    if format not in FORMATS:
        raise InputError(f"format {format!r} is unknown: choose from auto, {', '.join(FORMATS)}")
    return FORMATS[format].pack(weight, **(settings or {}))


def _as_read(packed: Packed | Tiles) -> dict[str, Tensor]:
    """What kernels read, under the names of the layer's buffers."""
    if isinstance(packed, Tiles):
        return packed.tensors()
    if isinstance(packed, Bitmap):
        return {"bits": packed.words(), "starts": packed.starts(), "values": packed.values}
    if isinstance(packed, NarrowCSR):
        return {"starts": packed.starts.long(), "columns": packed.columns, "values": packed.values}
    assert isinstance(packed, Blocks)
    return {"starts": packed.starts.long(), "columns": packed.columns.long(), "values": packed.blocks}
