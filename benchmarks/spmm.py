"""Products of a pruned weight with one to sixteen columns, packed against dense; and whole tokens of a pruned model.

In a model the layers take turns, so that a weight is seldom in a cache when its turn comes; so they do here. Masks are
random, which changes nothing for these formats. Bytes are those that a product reads of its weight.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.models import LanguageModel, load
from apportion.ops.spmm import cpu
from apportion.ops.spmm.formats import Bitmap, NarrowCSR
from apportion.studies.flash_llm import torch_csr
from apportion.weights.compression import compress, decompress
from apportion.weights.sparse_linear import SparseLinear
from benchmarks.registry import Case, Race, RacePlan, Sample, Unavailable, benchmark, timed

_DENSE = "dense float32"
_SHAPES = {
    "SmolLM2": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
    "7B": ((4096, 4096), (11008, 4096), (4096, 11008)),
}
_CASES = ((0.5, 1), (0.7, 1), (0.8, 1), (0.8, 4), (0.8, 16), (0.9, 1))  # share of zeros, columns
_COLD = 128_000_000  # bytes of dense weights that take turns
_MODEL = "smollm2"


@benchmark("spmm", "how long does a product with a pruned weight take?", rounds=15, share=3)
def plans(smoke: bool) -> Sequence[RacePlan]:
    """One race a shape, share of zeros and batch."""
    shapes: dict[str, Any] = {"small": ((32, 64),)} if smoke else _SHAPES
    return [
        RacePlan(
            f"{model} {rows}x{columns}, {sparsity:.0%} zeros, batch {batch}",
            {"rows": rows, "columns": columns, "percent": round(100 * sparsity), "batch": batch},
            partial(_race, rows, columns, sparsity, batch, smoke),
            share=float(rows * columns) ** 0.5,
        )
        for model, sizes in shapes.items()
        for rows, columns in sizes
        for sparsity, batch in (((0.8, 1),) if smoke else _CASES)
    ]


@dataclass(frozen=True)
class _Weights:
    """The same weights in every form."""

    dense: list[Tensor]
    half: list[Tensor]
    torch_csr: list[Tensor]
    packed: list[SparseLinear]
    packed_half: list[SparseLinear]
    csr: list[tuple[Tensor, Tensor, Tensor]]


@functools.lru_cache(maxsize=1)
def _weights(rows: int, columns: int, sparsity: float, layers: int) -> _Weights:
    draw = torch.Generator().manual_seed(0)
    found = _Weights([], [], [], [], [], [])
    for _ in range(layers):
        weight = torch.rand(rows, columns, generator=draw) - 0.5
        weight[weight.abs() < sparsity / 2] = 0
        half, narrow = weight.bfloat16(), NarrowCSR.pack(weight)
        found.dense.append(weight)
        found.half.append(half)
        found.torch_csr.append(torch_csr(weight))
        found.packed.append(SparseLinear(Bitmap.pack(weight)))
        found.packed_half.append(SparseLinear(Bitmap.pack(half)))
        found.csr.append((narrow.starts.long(), narrow.columns, narrow.values))
    return found


def _race(rows: int, columns: int, sparsity: float, batch: int, smoke: bool) -> Race:
    layers = 2 if smoke else max(2, min(32, _COLD // (rows * columns * 4)))
    all_of = _weights(rows, columns, sparsity, layers)
    dense, dense_half, csr = all_of.dense, all_of.half, all_of.csr
    packed, packed_half = all_of.packed, all_of.packed_half
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(0))
    half = x.bfloat16()

    def turn(run: Callable[[int], object]) -> Callable[[int], Sample]:
        """Every layer once; seconds of one."""

        def all_layers(_: int) -> None:
            for layer in range(layers):
                run(layer)

        measure = timed(all_layers)
        return lambda number: {"seconds": measure(number)["seconds"] / layers}

    by_csr: Callable[[int], Tensor] = (
        (lambda i: all_of.torch_csr[i] @ x[0]) if batch == 1 else lambda i: torch.mm(all_of.torch_csr[i], x.t())
    )
    cases = [
        Case(_DENSE, turn(lambda i: nn.functional.linear(x, dense[i])), "torch"),
        Case("dense bfloat16", turn(lambda i: nn.functional.linear(half, dense_half[i])), "torch, bfloat16 input"),
        Case("torch CSR", turn(by_csr), "float32, int64 columns"),
        Case("packed float32", turn(lambda i: packed[i](x)), "SparseLinear, called as a module"),
        Case("packed bfloat16", turn(lambda i: packed_half[i](x)), "bfloat16 values, float32 input"),
        Case("csr float32", turn(lambda i: cpu.csr_narrow_matmul(x, *csr[i])), "16-bit columns"),
    ]
    return Race(cases, _DENSE)


@benchmark("sparse_decode", "how fast does a pruned model write?", rounds=15, share=1)
def decode_plans(smoke: bool) -> Sequence[RacePlan]:
    """One race a share of zeros."""
    if smoke:
        return [RacePlan("a small module, 80% zeros", {"percent": 80}, partial(_module_race, 0.8))]
    return [
        RacePlan(f"{_MODEL}, {share:.0%} zeros", {"percent": round(100 * share)}, partial(_model_race, share))
        for share in (0.7, 0.8)
    ]


def _module_race(share: float) -> Race:
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    _prune(module, share)
    x = torch.randn(1, 64)
    return _decode_race(module, lambda: module(x))


def _model_race(share: float) -> Race:
    try:
        lm: LanguageModel = load(_MODEL)
    except InputError as reason:
        raise Unavailable(str(reason)) from reason
    _prune(lm.model, share)
    ids = torch.arange(100, 132)[None]
    with torch.no_grad():
        cache = lm.model(ids, use_cache=True).past_key_values
    token = torch.tensor([[5]])

    def step() -> object:
        with torch.no_grad():
            found = lm.model(token, past_key_values=cache, use_cache=True)
        cache.crop(-1)
        return found

    return _decode_race(lm.model, step)


def _decode_race(module: nn.Module, step: Callable[[], object]) -> Race:
    """Swapping layers is not part of what is timed; the same weights take both forms in turn."""

    def measured(prepare: Callable[[], object], steps: int = 4) -> Callable[[int], Sample]:
        def measure(turn: int) -> Sample:
            prepare()
            step()  # warm
            took = timed(lambda _: [step() for _ in range(steps)])(turn)["seconds"] / steps
            held = sum(each.nbytes for each in {id(p): p for p in module.parameters()}.values())
            held += sum(each.nbytes for each in module.buffers())
            decompress(module, torch.float32)
            return {"seconds": took, "weight_bytes": float(held)}

        return measure

    cases = [
        Case(_DENSE, measured(lambda: None), "as torch runs it"),
        Case("packed float32", measured(lambda: compress(module)), "bitmaps, float32 values"),
        Case("packed bfloat16", measured(lambda: compress(module, dtype=torch.bfloat16)), "bitmaps, bfloat16 values"),
    ]
    return Race(cases, _DENSE)


@torch.no_grad()
def _prune(module: nn.Module, share: float) -> None:
    """By magnitude within each layer: for speed only, nobody asks what such a model knows."""
    for name, each in module.named_modules():
        if isinstance(each, nn.Linear) and not name.endswith("lm_head"):
            cut = each.weight.abs().flatten().kthvalue(int(each.weight.numel() * share)).values
            each.weight *= each.weight.abs() > cut
