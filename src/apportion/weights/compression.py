"""All pruned linear layers of a model, swapped for packed ones; and back.

    report = compress(lm)          # in place; lm.generate(...) now reads packed weights
    print(report.bytes, report.dense_bytes)
    decompress(lm)                 # dense again, bit for bit (but that -0.0 is 0.0)

Any model with ``nn.Linear`` layers will do. A layer stays dense, and the report says why, if it is of another kind
(GPT-2's ``Conv1D``, convolutions), if it has too few zeros, if its weight is tied to another module's (packing the head
would not remove the embeddings), or, with ``measure=True``, if dense is faster here.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from apportion.errors import InputError
from apportion.models.families import transformer_of
from apportion.weights.crossover import measure_crossover
from apportion.weights.layers import WeightLayer, has_matrix
from apportion.weights.sparse_linear import RUNNABLE, SparseLinear

MINIMUM_SPARSITY = 0.4


@dataclass(frozen=True)
class CompressedLayer:
    """What became of one linear or convolutional layer.

    Attributes:
        name: of the module.
        shape: of its weight as a matrix ``[out, in]``.
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
        layers: its linear and convolutional layers.
    """

    layers: tuple[CompressedLayer, ...]

    @property
    def bytes(self) -> int:
        """Of the layers' weights now, in memory."""
        return sum(each.bytes for each in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Of the layers' weights before."""
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
    for name, each in list(module.named_modules()):
        if not has_matrix(each):
            continue
        stays = _dense(WeightLayer(name, each))
        reason = _why_dense(stays, each, minimum_sparsity, dtype, measure, shared)
        layers.append(replace(stays, reason=reason) if reason else _swapped(module, stays, format, dtype, measure))
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


def other_kind(module: nn.Module) -> str:
    """Why a module that is no plain linear layer stays dense."""
    return f"it is of the kind {type(module).__name__}: only nn.Linear is packed"


def _dense(layer: WeightLayer) -> CompressedLayer:
    weight = layer.weight
    rows, columns = layer.matrix().shape
    zeros = 1 - int(weight.count_nonzero()) / weight.numel() if weight.numel() else 0.0
    return CompressedLayer(layer.name, (rows, columns), zeros, "dense", weight.nbytes, weight.nbytes)


def _why_dense(
    layer: CompressedLayer,
    module: nn.Module,
    minimum: float,
    dtype: torch.dtype | None,
    measure: bool,
    shared: set[int],
) -> str:
    """Why a layer is not to be packed; empty if it is."""
    if type(module) is not nn.Linear:
        return other_kind(module)
    if not layer.name:
        return "it is the model itself: use SparseLinear.from_linear"
    if id(module.weight) in shared:
        return "its weight is tied to another module's"
    if layer.sparsity < minimum or not layer.dense_bytes:
        return f"{layer.sparsity:.1%} zeros, below {minimum:.0%}"
    if measure:
        crossover = measure_crossover(module.weight if dtype is None else module.weight.to(dtype))
        if crossover is not None and crossover.gain() < 1:
            return f"dense is {1 / crossover.gain():.2f} times as fast for one row"
    return ""


def _swapped(
    model: nn.Module, layer: CompressedLayer, format: str, dtype: torch.dtype | None, measure: bool
) -> CompressedLayer:
    """The layer packed, in the model; or as it was, where the format cannot hold it."""
    linear = model.get_submodule(layer.name)
    try:
        packed = SparseLinear.from_linear(linear, format, dtype=dtype, measure=measure)
    except InputError as error:
        return replace(layer, reason=str(error))
    replace_module(model, layer.name, packed.train(linear.training))
    return replace(layer, format=packed.format, bytes=packed.nbytes)


def _shared(module: nn.Module) -> set[int]:
    """Parameters that more than one module has."""
    seen: set[int] = set()
    twice: set[int] = set()
    for each in module.modules():
        for parameter in each.parameters(recurse=False):
            (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice
