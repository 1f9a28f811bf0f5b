"""Compiled functions on torch's own threads.

A second pool of threads beside torch's is slow where there are few cores: for milliseconds after a parallel operation
the workers of OpenMP spin in wait for the next one, and whoever else wants the core waits for them. A model whose
linear layers are ours and whose other operations are torch's would pay that in every layer. So a function compiled by
``numba.cfunc`` is run here by the very team that torch has, through the OpenMP library that torch is linked to. Where
that cannot be had (torch without GNU or Intel OpenMP), the calling thread runs it alone.
"""

import ctypes
import functools
import importlib.util
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import no_type_check

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic
from torch import Tensor

ARGUMENTS = 64
Arguments = ctypes.c_int64 * ARGUMENTS
"""What a function of a team is told: the next task first (0), then sizes and addresses."""

SIGNATURE = types.void(types.CPointer(types.int64))  # type: ignore[no-untyped-call]
"""Of a function for a team."""


@intrinsic
@no_type_check
def take_task(typing_context, arguments):
    """The number of the next task that nobody took: the first of the arguments, counted up for everybody at once."""

    def generate(context, builder, signature, values):
        return builder.atomic_rmw("add", values[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.CPointer(types.int64)), generate


@intrinsic
@no_type_check
def count_up(typing_context, address):
    """The int64 at an address, counted up for everybody at once; what others wrote before they counted is seen."""

    def generate(context, builder, signature, values):
        counter = builder.inttoptr(values[0], ir.PointerType(ir.IntType(64)))
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "acq_rel")

    return types.int64(types.int64), generate


@intrinsic
@no_type_check
def pointer_to(typing_context, address):
    """An address as a pointer, for ``numba.carray``."""

    def generate(context, builder, signature, values):
        return builder.inttoptr(values[0], ir.PointerType(ir.IntType(8)))

    return types.voidptr(types.int64), generate


@numba.njit(cache=True)
@no_type_check
def is_last(address, count):
    """Count up at an address; whether so many have counted now. Then the counter is zero again."""
    if count_up(address) < count - 1:
        return False
    carray(pointer_to(address), 1, np.int64)[0] = 0
    return True


@functools.cache
def address_of(function: Callable[..., None]) -> int:
    """A function for a team, compiled when it is first wanted."""
    compiled = numba.cfunc(SIGNATURE, cache=True)(function)
    _COMPILED.append(compiled)  # an address keeps nothing alive
    return int(compiled.address)  # type: ignore[arg-type]


def as_bits(value: float) -> int:
    """A number as a function of a team is told it: the bits of a float32, for `numbers.float_of`."""
    return int(_BITS.unpack(_FLOAT.pack(value))[0])


def scratch(count: int) -> Tensor:
    """At least so many float32 to write to: the same ones at every call of a thread, since new memory is slow at first.

    Whoever calls must be done with them before anybody else on this thread can call.
    """
    found: Tensor | None = getattr(_OWN, "memory", None)
    if found is None or found.numel() < count:
        found = _OWN.memory = torch.empty(count, dtype=torch.float32)
    return found


def counters(count: int) -> Tensor:
    """At least so many int64 zeros to count up; who counts must leave zeros behind. The same ones at every call."""
    found: Tensor | None = getattr(_OWN, "counters", None)
    if found is None or found.numel() < count:
        found = _OWN.counters = torch.zeros(count, dtype=torch.int64)
    return found


def floats(tensor: Tensor) -> Tensor:
    """The tensor as a kernel reads it that is told an address alone: float32, in one piece."""
    # Asked first: even an operation that does nothing takes microseconds where its code is in no cache.
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.detach().float().contiguous()


def run_on_team(function: int, *arguments: int) -> None:
    """Run a compiled function once on each of torch's threads, and wait for all.

    Args:
        function: address of a ``numba.cfunc`` of `SIGNATURE`, whose threads share out tasks by `take_task`.
        arguments: what it is told after the number of the next task; whoever calls keeps what they point to alive.
    """
    told = Arguments(0, *arguments)
    start(function, ctypes.addressof(told), torch.get_num_threads())


def start(function: int, told: int, threads: int) -> None:
    """As `run_on_team`, for whoever keeps arguments: the first must be 0 again before each call.

    Args:
        function: address of a ``numba.cfunc`` of `SIGNATURE`.
        told: address of `Arguments`.
        threads: how many run it.
    """
    parallel = _parallel() if threads > 1 else None
    if parallel is None:
        _alone(function)(told)
    else:
        parallel(function, told, threads, 0)


def run_alone(function: int, *arguments: int) -> int:
    """Run such a function on the calling thread, where there is too little to do for a team.

    Returns:
        What it has put in the place of the number of the next task.
    """
    told = Arguments(0, *arguments)
    _alone(function)(ctypes.addressof(told))
    return told[0]


_FLOAT, _BITS = struct.Struct("f"), struct.Struct("i")
_OWN = threading.local()
_COMPILED: list[object] = []


@functools.cache
def _alone(function: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)


@functools.cache
def _parallel() -> Callable[[int, int, int, int], None] | None:
    """``GOMP_parallel(function, data, threads, flags)`` of the OpenMP library that torch computes with."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            # Looked up through torch's library: another OpenMP in this process would be another team.
            found = ctypes.CDLL(str(folder / name)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        found.restype = None
        return found
    return None
