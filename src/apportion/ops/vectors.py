"""What kernels write in LLVM's own vectors, for the loops that numba cannot be asked for in Python.

Called while an intrinsic is generated. A vector of 16 float32 is one register where there is AVX-512, and several
elsewhere: LLVM cuts it up. What is left over at the end of a loop is a vector of one number, so that it is computed as
the others are, bit for bit.
"""

from typing import no_type_check

from llvmlite import ir
from numba import types
from numba.core import cgutils

LANES = 16
INTEGER = types.int64
I1, I8, I16, I32, I64, F32 = (*(ir.IntType(bits) for bits in (1, 8, 16, 32, 64)), ir.FloatType())


@no_type_check
def data_of(context, builder, kind, array):
    """Where the elements of an array begin."""
    return context.make_array(kind)(context, builder, array).data


@no_type_check
def function_of(builder, name, result, arguments):
    """A function of LLVM's."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


@no_type_check
def floats(lanes=LANES):
    """The type of so many float32."""
    return ir.VectorType(F32, lanes)


@no_type_check
def integers(value, lanes=LANES):
    """A constant: the same 32-bit integer everywhere."""
    return ir.Constant(ir.VectorType(I32, lanes), [value] * lanes)


@no_type_check
def load(builder, array, place, lanes=LANES):
    """So many numbers from ``array[place]`` on, which are float32, or bfloat16 in 16 unsigned bits."""
    number = array.type.pointee
    pointer = builder.bitcast(builder.gep(array, [place]), ir.PointerType(ir.VectorType(number, lanes)))
    found = builder.load(pointer, align=number.width // 8 if number != F32 else 4)
    if number == F32:
        return found
    wide = builder.zext(found, ir.VectorType(I32, lanes))
    return builder.bitcast(builder.shl(wide, integers(16, lanes)), floats(lanes))


@no_type_check
def store(builder, vector, array, place):
    """Write a vector of float32 from ``array[place]`` on."""
    pointer = builder.bitcast(builder.gep(array, [place]), ir.PointerType(vector.type))
    builder.store(vector, pointer, align=4)


@no_type_check
def splat(builder, value, lanes=LANES):
    """A vector of the same number everywhere."""
    empty = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(empty, value, I32(0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


@no_type_check
def splat_of(builder, array, place, lanes=LANES):
    """A vector of one number of an array, everywhere."""
    return splat(builder, builder.extract_element(load(builder, array, place, 1), I32(0)), lanes)


@no_type_check
def zeros(builder, lanes=LANES):
    """A variable that begins with zeros."""
    return cgutils.alloca_once_value(builder, ir.Constant(floats(lanes), [0.0] * lanes))


@no_type_check
def multiply_add(builder, left, right, total):
    """``left * right + total``, rounded once."""
    name = f"llvm.fma.v{total.type.count}f32"
    return builder.call(function_of(builder, name, total.type, [total.type] * 3), [left, right, total])


@no_type_check
def add_product(builder, left, right, total):
    """``total += left * right`` for a variable."""
    builder.store(multiply_add(builder, left, right, builder.load(total)), total)


@no_type_check
def total_of(builder, variables):
    """The sum of some variables."""
    total = builder.load(variables[0])
    for each in variables[1:]:
        total = builder.fadd(total, builder.load(each))
    return total


@no_type_check
def sum_of(builder, vector):
    """The sum of a vector's numbers, in an order of LLVM's choice."""
    name = f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
    return builder.call(function_of(builder, name, F32, [F32, vector.type]), [F32(0.0), vector], fastmath=("reassoc",))


@no_type_check
def prefetch_at(builder, array, place):
    """Ask for a cache line ahead of its use."""
    pointer = builder.bitcast(builder.gep(array, [place]), ir.PointerType(I8))
    fetch = builder.module.declare_intrinsic(
        "llvm.prefetch", (pointer.type,), ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    )
    # To read, into every level of the cache, data rather than instructions.
    builder.call(fetch, [pointer, I32(0), I32(3), I32(1)])


@no_type_check
def in_pieces(builder, size, pieces):
    """Yield (first, vectors, lanes) within loops that cover ``size`` numbers in pieces of so many vectors.

    Args:
        builder: writes the loops.
        size: how many numbers.
        pieces: numbers of vectors of 16 in a piece, descending to 1. What is left is walked number by number.
    """
    start = I64(0)
    for vectors in pieces:
        stop = builder.and_(size, I64(-LANES * vectors))
        with cgutils.for_range_slice(builder, start, stop, I64(LANES * vectors)) as (place, _):
            yield place, vectors, LANES
        start = stop
    with cgutils.for_range_slice(builder, start, size, I64(1)) as (place, _):
        yield place, 1, 1
