"""Vector code that numba cannot be asked for in Python: one row of a packed matrix times a few columns.

Each intrinsic writes out the loop over a row in LLVM's own vectors of 16 float32. Most of them lean on instructions of
AVX-512: ``expand`` puts the next packed values where a mask has ones, which is a bitmap's row made dense in registers,
16 (bfloat16: 32) places at a time; ``compress`` is its inverse, which makes column numbers of the mask.
`apportion.ops.processor` says whether they exist here; LLVM would spell them out in dozens of scalar branches
otherwise. `wide_sum` is plain vector code for any processor.
"""

from typing import no_type_check

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from apportion.ops.vectors import (
    F32,
    I1,
    I16,
    I32,
    I64,
    LANES,
    data_of,
    function_of,
    integers,
    load,
    multiply_add,
    splat,
    sum_of,
    total_of,
    zeros,
)

WORD = 64
"""Bits of a word of a bitmap: rows are filled up to whole words."""

_VECTOR, _INTEGERS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


@intrinsic
@no_type_check
def expanded_dots(typing_context, values, at, bits, word, words, x, first, x_step, out, place, out_step, count):
    """``out[place + j * out_step]``: a row of a bitmap times column j of ``count``, which is 1, 2, 4 or 8.

    The row's values begin at ``values[at]`` and its bitmap at ``bits[word]``; column j lies at
    ``x[first + j * x_step]``. For bfloat16 values, columns have each 32 numbers in the order 0, 2, ..., 30, 1, ..., 31.
    """
    integer = types.int64
    signature = types.none(values, integer, bits, integer, integer, x, integer, integer, out, integer, integer, integer)

    def generate(context, builder, signature, arguments):
        _, at, _, word, words, _, first, x_step, _, place, out_step, count = arguments
        values, bits, x, out = (
            data_of(context, builder, signature.args[each], arguments[each]) for each in (0, 2, 5, 8)
        )
        x = builder.gep(x, [first])
        single = signature.args[0].dtype == types.float32
        after = builder.append_basic_block("after")
        cases = builder.switch(count, after)
        for columns in (1, 2, 4, 8):
            block = builder.append_basic_block(f"columns{columns}")
            cases.add_case(I64(columns), block)
            builder.position_at_end(block)
            # As many sums in flight as hide the latency of an addition, in no more registers than there are.
            copies = 4 if columns <= 2 else 2
            sums = [[zeros(builder) for _ in range(copies)] for _ in range(columns)]
            position = cgutils.alloca_once_value(builder, at)
            with cgutils.for_range(builder, words) as loop:
                mask = builder.load(builder.gep(bits, [builder.add(word, loop.index)]))
                start, column = builder.load(position), builder.mul(loop.index, I64(WORD))
                for part, weight in enumerate(_dense(builder, values, start, mask, single)):
                    source = builder.add(column, I64(LANES * part))
                    for j in range(columns):
                        factor = load(builder, x, builder.add(source, builder.mul(x_step, I64(j))))
                        total = sums[j][part % copies]
                        builder.store(multiply_add(builder, weight, factor, builder.load(total)), total)
                builder.store(builder.add(start, _ones(builder, mask)), position)
            for j in range(columns):
                target = builder.gep(out, [builder.add(place, builder.mul(out_step, I64(j)))])
                builder.store(sum_of(builder, total_of(builder, sums[j])), target)
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
@no_type_check
def expanded_row(typing_context, values, at, bits, word, words, out, place):
    """A row of a bitmap made dense from ``out[place]`` on, 64 places for each word.

    ``out`` has the type of the values, or is float32 where they are bfloat16.
    """
    integer = types.int64
    signature = types.none(values, integer, bits, integer, integer, out, integer)

    def generate(context, builder, signature, arguments):
        _, at, _, word, words, _, place = arguments
        values, bits, out = (data_of(context, builder, signature.args[each], arguments[each]) for each in (0, 2, 5))
        single, widened = (signature.args[each].dtype == types.float32 for each in (0, 5))
        number, lanes = (F32 if single else I16), (LANES if widened else 2 * LANES)
        position = cgutils.alloca_once_value(builder, at)
        with cgutils.for_range(builder, words) as loop:
            mask = builder.load(builder.gep(bits, [builder.add(word, loop.index)]))
            start, first = builder.load(position), builder.add(place, builder.mul(loop.index, I64(WORD)))
            for part in range(0, WORD, lanes):
                dense = _expand(builder, values, _after(builder, start, mask, part), mask, part, number, lanes)
                if widened and not single:
                    dense = builder.bitcast(builder.shl(builder.zext(dense, _INTEGERS), integers(16)), _VECTOR)
                target = builder.gep(out, [builder.add(first, I64(part))])
                builder.store(dense, builder.bitcast(target, ir.PointerType(dense.type)), align=2)
            builder.store(builder.add(start, _ones(builder, mask)), position)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
@no_type_check
def columns_by_compress(typing_context, bits, word, words, columns):
    """Where a row's bitmap has ones: their column numbers into ``columns`` (16 more than fit a row); their count."""
    signature = types.int64(bits, types.int64, types.int64, columns)

    def generate(context, builder, signature, arguments):
        _, word, words, _ = arguments
        bits, columns = (data_of(context, builder, signature.args[each], arguments[each]) for each in (0, 3))
        mask_type = ir.VectorType(I1, LANES)
        compress = function_of(
            builder, "llvm.experimental.vector.compress.v16i32", _INTEGERS, [_INTEGERS, mask_type, _INTEGERS]
        )
        position = cgutils.alloca_once_value(builder, I64(0))
        with cgutils.for_range(builder, words) as loop:
            mask = builder.load(builder.gep(bits, [builder.add(word, loop.index)]))
            start = builder.load(position)
            column = splat(builder, builder.trunc(builder.mul(loop.index, I64(WORD)), I32))
            for part in range(WORD // LANES):
                numbers = ir.Constant(_INTEGERS, [LANES * part + lane for lane in range(LANES)])
                chosen = builder.bitcast(builder.trunc(builder.lshr(mask, I64(LANES * part)), I16), mask_type)
                packed = builder.call(
                    compress, [builder.add(numbers, column), chosen, ir.Constant(_INTEGERS, ir.Undefined)]
                )
                target = builder.gep(columns, [_after(builder, start, mask, LANES * part)])
                # The whole vector is stored: what is beyond the ones is overwritten by the next.
                builder.store(packed, builder.bitcast(target, ir.PointerType(_INTEGERS)), align=4)
            builder.store(builder.add(start, _ones(builder, mask)), position)
        return builder.load(position)

    return signature, generate


@intrinsic
@no_type_check
def trailing_zeros(typing_context, word):
    """How many zero bits come before the lowest one."""

    def generate(context, builder, signature, arguments):
        count = function_of(builder, "llvm.cttz.i64", I64, [I64, I1])
        return builder.call(count, [arguments[0], I1(1)])

    return types.int64(types.int64), generate


@intrinsic
@no_type_check
def wide_sum(typing_context, values, at, columns, first, count, x, offset, step, out):
    """``out[0:16]``: the sum over ``count`` entries of a value and 16 numbers of ``x``.

    Entry i is ``values[at + i]`` and ``x[offset + columns[first + i] * step :][:16]``.
    """
    integer = types.int64
    signature = types.none(values, integer, columns, integer, integer, x, integer, integer, out)

    def generate(context, builder, signature, arguments):
        _, at, _, first, count, _, offset, step, _ = arguments
        values, columns, x, out = (
            data_of(context, builder, signature.args[each], arguments[each]) for each in (0, 2, 5, 8)
        )
        single = signature.args[0].dtype == types.float32
        sums = [zeros(builder) for _ in range(4)]

        def add(entry, total):
            value = builder.load(builder.gep(values, [builder.add(at, entry)]))
            if not single:
                value = builder.bitcast(builder.shl(builder.zext(value, I32), I32(16)), F32)
            column = builder.load(builder.gep(columns, [builder.add(first, entry)]))
            column = builder.zext(column, I64)
            source = load(builder, x, builder.add(offset, builder.mul(column, step)))
            value = splat(builder, value)
            builder.store(multiply_add(builder, value, source, builder.load(total)), total)

        whole = builder.and_(count, I64(-len(sums)))
        with cgutils.for_range_slice(builder, I64(0), whole, I64(len(sums))) as (entry, _):
            for place, total in enumerate(sums):
                add(builder.add(entry, I64(place)), total)
        with cgutils.for_range_slice(builder, whole, count, I64(1)) as (entry, _):
            add(entry, sums[0])
        target = builder.bitcast(builder.gep(out, [I64(0)]), ir.PointerType(_VECTOR))
        builder.store(total_of(builder, sums), target, align=4)
        return context.get_dummy_value()

    return signature, generate


@no_type_check
def _dense(builder, values, start, mask, single):
    """The 64 places of a word as four vectors of float32: packed values where the mask has ones, else zeros."""
    if single:
        for part in range(0, WORD, LANES):
            yield _expand(builder, values, _after(builder, start, mask, part), mask, part, F32, LANES)
        return
    lanes = 2 * LANES
    for part in range(0, WORD, lanes):
        halves = _expand(builder, values, _after(builder, start, mask, part), mask, part, I16, lanes)
        # Two bfloat16 to a lane: the even ones are its low half, the odd ones its high half.
        pairs = builder.bitcast(halves, _INTEGERS)
        yield builder.bitcast(builder.shl(pairs, integers(16)), _VECTOR)
        yield builder.bitcast(builder.and_(pairs, integers(0xFFFF0000)), _VECTOR)


@no_type_check
def _expand(builder, values, at, mask, part, number, lanes):
    vector, mask_type = ir.VectorType(number, lanes), ir.VectorType(I1, lanes)
    source = builder.gep(values, [at])
    name = f"llvm.masked.expandload.v{lanes}{'f32' if number == F32 else 'i16'}"
    expand = function_of(builder, name, vector, [source.type, mask_type, vector])
    chosen = builder.trunc(builder.lshr(mask, I64(part)), ir.IntType(lanes))
    return builder.call(expand, [source, builder.bitcast(chosen, mask_type), ir.Constant(vector, [0] * lanes)])


@no_type_check
def _after(builder, start, mask, part):
    """Where the values after the first ``part`` places of a word begin; each from the word, not from one another."""
    if part == 0:
        return start
    return builder.add(start, _ones(builder, builder.and_(mask, I64((1 << part) - 1))))


@no_type_check
def _ones(builder, mask):
    return builder.call(function_of(builder, "llvm.ctpop.i64", I64, [I64]), [mask])
