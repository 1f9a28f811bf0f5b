"""What numba lacks for kernels over half-precision numbers: bfloat16, and an exponential that becomes vector code."""

from typing import no_type_check

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor


@intrinsic
@no_type_check
def number(typing_context, stored):
    """What is stored, as a number: 16 unsigned bits are a bfloat16, a float is itself."""
    if stored != types.uint16:
        return stored(stored), lambda context, builder, signature, arguments: arguments[0]

    def generate(context, builder, signature, arguments):
        wide = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(stored), generate


@intrinsic
@no_type_check
def stored(typing_context, value, like):
    """A number as it is stored beside ``like``: rounded to bfloat16, half to even, where that is 16 unsigned bits."""
    if like != types.uint16:
        return like(like, like), lambda context, builder, signature, arguments: arguments[0]

    def generate(context, builder, signature, arguments):
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.add(bits, builder.add(odd, word(0x7FFF)))
        return builder.trunc(builder.lshr(rounded, word(16)), ir.IntType(16))

    return like(types.float32, like), generate


@intrinsic
@no_type_check
def float_of(typing_context, bits):
    """The float32 of 32 bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
@no_type_check
def bits_of(typing_context, value):
    """The bits of a float32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
@no_type_check
def prefetch(typing_context, array, place):
    """Ask for the cache line of an element of a one-dimensional array in one piece, ahead of its use."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), ir.PointerType(ir.IntType(8)))
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", (pointer.type,), kind)
        # To read, into every level of the cache, data rather than instructions.
        builder.call(function, [pointer, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.none(array, types.intp), generate


# 2**x between -0.5 and 0.5, relative error below 2**-24 in exact arithmetic: a fit at Chebyshev points.
_POLYNOMIAL = tuple(
    np.float32(each)
    for each in np.polynomial.Chebyshev.interpolate(lambda x: 2.0**x, 6, (-0.5, 0.5))
    .convert(kind=np.polynomial.Polynomial)
    .coef
)
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = _POLYNOMIAL
_LOG2_E = np.float32(np.log2(np.e))


@numba.njit(cache=True, inline="always")
@no_type_check
def exp_below(x):
    """``exp(x)`` of a float32 at most 0, in operations that LLVM turns into vectors; 0 below -87."""
    power = max(x, np.float32(-87.0)) * _LOG2_E
    whole = np.int32(power - np.float32(0.5))
    part = power - np.float32(whole)
    result = _C6
    result = result * part + _C5
    result = result * part + _C4
    result = result * part + _C3
    result = result * part + _C2
    result = result * part + _C1
    result = result * part + _C0
    return np.float32(0.0) if x < np.float32(-87.0) else result * float_of((whole + np.int32(127)) << np.int32(23))


def array_of(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as kernels read it: bfloat16 as its bits."""
    array: np.ndarray = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def flat(tensor: Tensor) -> np.ndarray:
    """The memory that a tensor lies in, from its first element on, whatever its strides; bfloat16 as its bits."""
    span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return array_of(tensor.detach().as_strided((span if tensor.numel() else 0,), (1,)))


def readable(tensor: Tensor) -> Tensor:
    """The tensor, in a type that kernels read by `number` and with its last dimension in one piece."""
    if tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        tensor = tensor.float()
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()
