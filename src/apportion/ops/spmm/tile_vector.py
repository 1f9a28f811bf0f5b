"""Vector code over `tiles.Tiles`: 16 rows of a packed matrix times a few columns, in LLVM's vectors of 16 float32."""

from typing import no_type_check

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from apportion.ops.spmm.tiles import COLUMNS, ROWS, STRIDE
from apportion.ops.vectors import (
    F32,
    I8,
    I16,
    I32,
    I64,
    data_of,
    function_of,
    integers,
    load,
    multiply_add,
    prefetch_at,
    total_of,
    zeros,
)

AT_ONCE = 8
"""Columns that registers have room for: two vectors of inputs each, and one of sums."""

AHEAD = 2048
"""How many values ahead of its turn memory is asked for; no less helps where weights are in no cache."""

_VECTOR, _INTEGERS = ir.VectorType(F32, ROWS), ir.VectorType(I32, ROWS)


@intrinsic
@no_type_check
def tile_sums(
    typing_context, values, at, places, counts, step, fours, lanes, tile, tiles, x, first, x_step, out, count
):
    """``out[16 * j + i]``: row i of a row of ``tiles`` tiles times column j of ``count``, which is 1, 2, 4 or 8.

    The row's values and places begin at ``values[at]``, its steps at ``counts[step]`` and its tiles at ``fours[tile]``;
    column j lies at ``x[first + j * x_step]``, filled up to whole tiles.
    """
    integer = types.int64
    arrays = {0: values, 2: places, 3: counts, 5: fours, 6: lanes, 9: x, 12: out}
    signature = types.none(*(arrays.get(each, integer) for each in range(14)))

    def generate(context, builder, signature, arguments):
        data = {each: data_of(context, builder, signature.args[each], arguments[each]) for each in arrays}
        at, step, tile, tiles, first, x_step, count = (arguments[each] for each in (1, 4, 7, 8, 10, 11, 13))
        single = signature.args[0].dtype == types.float32
        x = builder.gep(data[9], [first])
        filled = _filled(builder)
        after = builder.append_basic_block("after")
        cases = builder.switch(count, after)
        for columns in (1, 2, 4, 8):
            block = builder.append_basic_block(f"columns{columns}")
            cases.add_case(I64(columns), block)
            builder.position_at_end(block)
            # As many sums in flight as hide the latency of an addition, in no more registers than there are.
            copies = max(1, 4 // columns)
            sums = [zeros(builder) for _ in range(columns)]
            part = [[zeros(builder) for _ in range(copies)] for _ in range(columns)]
            value, now = cgutils.alloca_once_value(builder, at), cgutils.alloca_once_value(builder, step)
            builder.store(at, value)
            builder.store(step, now)
            with cgutils.for_range(builder, tiles) as loop:
                number = builder.add(tile, loop.index)
                column = builder.mul(loop.index, I64(COLUMNS))
                starts = [builder.add(column, builder.mul(x_step, I64(j))) for j in range(columns)]
                inputs = [(load(builder, x, each), load(builder, x, builder.add(each, I64(ROWS)))) for each in starts]
                for each in part:
                    for total in each:
                        builder.store(ir.Constant(_VECTOR, [0.0] * ROWS), total)
                again = builder.zext(builder.load(builder.gep(data[5], [number])), I64)
                with cgutils.for_range(builder, again):
                    position, place = builder.load(value), builder.load(now)
                    for turn in range(STRIDE):
                        many = builder.zext(builder.load(builder.gep(data[3], [builder.add(place, I64(turn))])), I64)
                        weight = _numbers(builder, data[0], position, single)
                        kept = builder.load(builder.gep(filled, [I64(0), many]), align=64)
                        weight = builder.bitcast(builder.and_(weight, kept), _VECTOR)
                        index = _octets(builder, data[2], position)
                        prefetch_at(builder, data[0], builder.add(position, I64(AHEAD)))
                        if turn == 0:
                            prefetch_at(builder, data[2], builder.add(position, I64(AHEAD)))
                        for j, (low, high) in enumerate(inputs):
                            factor = _lookup(builder, low, index, high)
                            total = part[j][turn % copies]
                            builder.store(multiply_add(builder, weight, factor, builder.load(total)), total)
                        position = builder.add(position, many)
                    builder.store(position, value)
                    builder.store(builder.add(place, I64(STRIDE)), now)
                order = _octets(builder, data[6], builder.mul(number, I64(ROWS)))
                for j in range(columns):
                    total = total_of(builder, part[j])
                    moved = _permuted(builder, total, order)
                    builder.store(builder.fadd(builder.load(sums[j]), moved), sums[j])
            for j in range(columns):
                target = builder.bitcast(builder.gep(data[12], [I64(ROWS * j)]), ir.PointerType(_VECTOR))
                builder.store(builder.load(sums[j]), target, align=4)
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return signature, generate


@no_type_check
def _filled(builder):
    """Bits of the first n lanes, for each n: the lanes that a step does not fill have read on into the next step."""
    rows = [ir.Constant(_INTEGERS, [-1] * each + [0] * (ROWS - each)) for each in range(ROWS + 1)]
    table = cgutils.global_constant(builder, "lanes_filled", ir.Constant(ir.ArrayType(_INTEGERS, ROWS + 1), rows))
    table.align = 64
    return table


@no_type_check
def _numbers(builder, array, place, single):
    """16 values as the bits of float32."""
    kind = _INTEGERS if single else ir.VectorType(I16, ROWS)
    pointer = builder.bitcast(builder.gep(array, [place]), ir.PointerType(kind))
    found = builder.load(pointer, align=2)
    return found if single else builder.shl(builder.zext(found, _INTEGERS), integers(16))


@no_type_check
def _octets(builder, array, place):
    """16 bytes as 32-bit integers."""
    pointer = builder.bitcast(builder.gep(array, [place]), ir.PointerType(ir.VectorType(I8, ROWS)))
    return builder.zext(builder.load(pointer, align=1), _INTEGERS)


@no_type_check
def _lookup(builder, low, index, high):
    function = function_of(builder, "llvm.x86.avx512.vpermi2var.ps.512", _VECTOR, [_VECTOR, _INTEGERS, _VECTOR])
    return builder.call(function, [low, index, high])


@no_type_check
def _permuted(builder, vector, index):
    function = function_of(builder, "llvm.x86.avx512.permvar.sf.512", _VECTOR, [_VECTOR, _INTEGERS])
    return builder.call(function, [vector, index])
