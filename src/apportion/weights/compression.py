"""All pruned linear layers of a model, swapped for packed ones; and back.

    report = compress(lm)          # in place; lm.generate(...) now reads packed weights
    print(report.bytes, report.dense_bytes)
    decompress(lm)                 # dense again, bit for bit (but that -0.0 is 0.0)

Any model with ``nn.Linear`` layers will do. A layer stays dense, and the report says why, if it has too few zeros, if
its weight is tied to another module's (packing the head would not remove the embeddings), or, with ``measure=True``, if
dense is faster here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from apportion.errors import InputError
from apportion.models.families import transformer_of
from apportion.weights.crossover import measure_crossover
from apportion.weights.sparse_linear import RUNNABLE, SparseLinear

MINIMUM_SPARSITY = 0.4


@dataclass(frozen=True)
class CompressedLayer:
    """What became of one linear layer.

    Attributes:
        name: of the module.
        shape: of its weight.
        sparsity: share of zeros.
        format: that it is packed in, or ``dense``.
        bytes: of its weight now, in memory.
        dense_bytes: of its weight before.
        reason: why it stayed dense; empty where it did not.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    format: str
    bytes: int
    dense_bytes: int
    reason: str = ""


@dataclass(frozen=True)
class Compression:
    """What became of a model.

    Attributes:
        layers: its linear layers.
    """

    layers: tuple[CompressedLayer, ...]

    @property
    def bytes(self) -> int:
        """Of all linear weights now, in memory."""
        return sum(each.bytes for each in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Of all linear weights before."""
        return sum(each.dense_bytes for each in self.layers)

    @property
    def packed(self) -> tuple[CompressedLayer, ...]:
        """The layers that are packed now."""
        return tuple(each for each in self.layers if not each.reason)


@torch.no_grad()
def compress(
    model: Any,
    format: str = "auto",
    minimum_sparsity: float = MINIMUM_SPARSITY,
    *,
    dtype: torch.dtype | None = None,
    measure: bool = False,
) -> Compression:
    """Swap pruned linear layers for packed ones, in place.

    Args:
        model: a `LanguageModel` or any module.
        format: of every layer, or ``auto``; see `SparseLinear.from_linear`. A layer that a format cannot hold stays
            dense.
        minimum_sparsity: share of zeros from which on a layer is packed.
        dtype: to store values in; rounding them to bfloat16 is the one thing here that changes what a model computes.
        measure: try formats and kernels out, 50 ms for each shape.

    Raises:
        InputError: an unknown format, or a minimum that is no share; nothing is changed then.
    """
    module = transformer_of(model)
    if format != "auto" and format not in RUNNABLE:
        raise InputError(f"format {format!r} cannot be run: choose from auto, {', '.join(RUNNABLE)}")
    if not 0 <= minimum_sparsity <= 1:
        raise InputError(f"minimum_sparsity={minimum_sparsity}: a share between 0 and 1")
    shared = _shared(module)
    layers = []
    for name, linear in list(module.named_modules()):
        if type(linear) is not nn.Linear:
            continue
        layers.append(_swapped(module, name, linear, format, minimum_sparsity, dtype, measure, shared))
    return Compression(tuple(layers))


def decompress(model: Any, dtype: torch.dtype | None = None) -> int:
    """Swap packed layers for dense ones, in place; how many there were.

    Args:
        model: a `LanguageModel` or any module.
        dtype: of the dense weights, instead of that of the values.
    """
    module = transformer_of(model)
    found = [(name, each) for name, each in module.named_modules() if isinstance(each, SparseLinear)]
    for name, packed in found:
        linear = packed.to_linear()
        replace_module(module, name, (linear if dtype is None else linear.to(dtype)).train(packed.training))
    return len(found)


def replace_module(module: nn.Module, name: str, new: nn.Module) -> None:
    """Put another module in the place of the one of that name."""
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, new)


def _swapped(
    module: nn.Module,
    name: str,
    linear: nn.Linear,
    format: str,
    minimum: float,
    dtype: torch.dtype | None,
    measure: bool,
    shared: set[int],
) -> CompressedLayer:
    weight = linear.weight
    numel = weight.numel()
    zeros = 1 - int(weight.count_nonzero()) / numel if numel else 0.0
    shape = (weight.shape[0], weight.shape[1])
    stays = CompressedLayer(name, shape, zeros, "dense", weight.nbytes, weight.nbytes)

    def stay(reason: str) -> CompressedLayer:
        return CompressedLayer(**{**vars(stays), "reason": reason})

    if not name:
        return stay("it is the model itself: use SparseLinear.from_linear")
    if id(weight) in shared:
        return stay("its weight is tied to another module's")
    if zeros < minimum or not numel:
        return stay(f"{zeros:.1%} zeros, below {minimum:.0%}")
    if measure:
        crossover = measure_crossover(weight if dtype is None else weight.to(dtype))
        if crossover is not None and crossover.gain() < 1:
            return stay(f"dense is {1 / crossover.gain():.2f} times as fast for one row")
    try:
        packed = SparseLinear.from_linear(linear, format, dtype=dtype, measure=measure)
    except InputError as error:
        return stay(str(error))
    replace_module(module, name, packed.train(linear.training))
    return CompressedLayer(name, shape, zeros, packed.format, packed.nbytes, weight.nbytes)


def _shared(module: nn.Module) -> set[int]:
    """Parameters that more than one module has."""
    seen: set[int] = set()
    twice: set[int] = set()
    for each in module.modules():
        for parameter in each.parameters(recurse=False):
            (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice
