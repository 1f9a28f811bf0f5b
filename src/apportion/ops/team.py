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
from collections.abc import Callable
from pathlib import Path
from typing import Any, no_type_check

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

ARGUMENTS = 17
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
def pointer_to(typing_context, address):
    """An address as a pointer, for ``numba.carray``."""

    def generate(context, builder, signature, values):
        return builder.inttoptr(values[0], ir.PointerType(ir.IntType(8)))

    return types.voidptr(types.int64), generate


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


_COMPILED: dict[Any, Any] = {}


@functools.cache
def address_of(function: Callable[..., None]) -> int:
    """A function for a team, compiled when it is first wanted."""
    _COMPILED[function] = numba.cfunc(SIGNATURE, cache=True)(function)  # kept: an address keeps nothing alive
    return int(_COMPILED[function].address)


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
