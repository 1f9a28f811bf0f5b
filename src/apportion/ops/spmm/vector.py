"""Vector code that numba cannot be asked for in Python: one row of a packed matrix times a few columns.

Each intrinsic writes out the loop over a row in LLVM's own vectors of 16 float32. Most of them lean on instructions of
AVX-512: ``expand`` puts the next packed values where a mask has ones, which is a bitmap's row made dense in registers,
16 (bfloat16: 32) places at a time; ``compress`` is its inverse, which makes column numbers of the mask. `has_expand`
says whether they exist here; LLVM would spell them out in dozens of scalar branches otherwise. `wide_sum` is plain
vector code for any processor.
"""

import functools
from typing import no_type_check

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
WORD = 64
"""Bits of a word of a bitmap: rows are filled up to whole words."""

_I1, _I16, _I32, _I64, _F32 = ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR, _INTEGERS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


@functools.cache
def has_expand() -> bool:
    """Whether this processor expands packed float32 and bfloat16 by a mask in one instruction."""
    features = binding.get_host_cpu_features()
    return all(features.get(name, False) for name in ("avx512f", "avx512bw", "avx512vl", "avx512vbmi2"))


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
        values, bits, x, out = (_data(context, builder, signature.args[each], arguments[each]) for each in (0, 2, 5, 8))
        x = builder.gep(x, [first])
        single = signature.args[0].dtype == types.float32
        after = builder.append_basic_block("after")
        cases = builder.switch(count, after)
        for columns in (1, 2, 4, 8):
            block = builder.append_basic_block(f"columns{columns}")
            cases.add_case(_I64(columns), block)
            builder.position_at_end(block)
            # As many sums in flight as hide the latency of an addition, in no more registers than there are.
            copies = 4 if columns <= 2 else 2
            sums = [[_zeros(builder) for _ in range(copies)] for _ in range(columns)]
            position = cgutils.alloca_once_value(builder, at)
            with cgutils.for_range(builder, words) as loop:
                mask = builder.load(builder.gep(bits, [builder.add(word, loop.index)]))
                start, column = builder.load(position), builder.mul(loop.index, _I64(WORD))
                for part, weight in enumerate(_dense(builder, values, start, mask, single)):
                    source = builder.add(column, _I64(LANES * part))
                    for j in range(columns):
                        factor = _vector(builder, x, builder.add(source, builder.mul(x_step, _I64(j))))
                        total = sums[j][part % copies]
                        builder.store(_multiply_add(builder, weight, factor, builder.load(total)), total)
                builder.store(builder.add(start, _ones(builder, mask)), position)
            for j in range(columns):
                target = builder.gep(out, [builder.add(place, builder.mul(out_step, _I64(j)))])
                builder.store(_sum(builder, _total(builder, sums[j])), target)
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
        values, bits, out = (_data(context, builder, signature.args[each], arguments[each]) for each in (0, 2, 5))
        single, widened = (signature.args[each].dtype == types.float32 for each in (0, 5))
        number, lanes = (_F32 if single else _I16), (LANES if widened else 2 * LANES)
        position = cgutils.alloca_once_value(builder, at)
        with cgutils.for_range(builder, words) as loop:
            mask = builder.load(builder.gep(bits, [builder.add(word, loop.index)]))
            start, first = builder.load(position), builder.add(place, builder.mul(loop.index, _I64(WORD)))
            for part in range(0, WORD, lanes):
                dense = _expand(builder, values, _after(builder, start, mask, part), mask, part, number, lanes)
                if widened and not single:
                    dense = builder.bitcast(builder.shl(builder.zext(dense, _INTEGERS), _all(16)), _VECTOR)
                target = builder.gep(out, [builder.add(first, _I64(part))])
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
        bits, columns = (_data(context, builder, signature.args[each], arguments[each]) for each in (0, 3))
        mask_type = ir.VectorType(_I1, LANES)
        compress = _function(
            builder, "llvm.experimental.vector.compress.v16i32", _INTEGERS, [_INTEGERS, mask_type, _INTEGERS]
        )
        position = cgutils.alloca_once_value(builder, _I64(0))
        with cgutils.for_range(builder, words) as loop:
            mask = builder.load(builder.gep(bits, [builder.add(word, loop.index)]))
            start = builder.load(position)
            column = _splat(builder, builder.trunc(builder.mul(loop.index, _I64(WORD)), _I32), _INTEGERS)
            for part in range(WORD // LANES):
                numbers = ir.Constant(_INTEGERS, [LANES * part + lane for lane in range(LANES)])
                chosen = builder.bitcast(builder.trunc(builder.lshr(mask, _I64(LANES * part)), _I16), mask_type)
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
        count = _function(builder, "llvm.cttz.i64", _I64, [_I64, _I1])
        return builder.call(count, [arguments[0], _I1(1)])

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
            _data(context, builder, signature.args[each], arguments[each]) for each in (0, 2, 5, 8)
        )
        single = signature.args[0].dtype == types.float32
        sums = [_zeros(builder) for _ in range(4)]

        def add(entry, total):
            value = builder.load(builder.gep(values, [builder.add(at, entry)]))
            if not single:
                value = builder.bitcast(builder.shl(builder.zext(value, _I32), _I32(16)), _F32)
            column = builder.load(builder.gep(columns, [builder.add(first, entry)]))
            column = builder.zext(column, _I64)
            source = _vector(builder, x, builder.add(offset, builder.mul(column, step)))
            value = _splat(builder, value, _VECTOR)
            builder.store(_multiply_add(builder, value, source, builder.load(total)), total)

        whole = builder.and_(count, _I64(-len(sums)))
        with cgutils.for_range_slice(builder, _I64(0), whole, _I64(len(sums))) as (entry, _):
            for place, total in enumerate(sums):
                add(builder.add(entry, _I64(place)), total)
        with cgutils.for_range_slice(builder, whole, count, _I64(1)) as (entry, _):
            add(entry, sums[0])
        target = builder.bitcast(builder.gep(out, [_I64(0)]), ir.PointerType(_VECTOR))
        builder.store(_total(builder, sums), target, align=4)
        return context.get_dummy_value()

    return signature, generate


@no_type_check
def _dense(builder, values, start, mask, single):
    """The 64 places of a word as four vectors of float32: packed values where the mask has ones, else zeros."""
    if single:
        for part in range(0, WORD, LANES):
            yield _expand(builder, values, _after(builder, start, mask, part), mask, part, _F32, LANES)
        return
    lanes = 2 * LANES
    for part in range(0, WORD, lanes):
        halves = _expand(builder, values, _after(builder, start, mask, part), mask, part, _I16, lanes)
        # Two bfloat16 to a lane: the even ones are its low half, the odd ones its high half.
        pairs = builder.bitcast(halves, _INTEGERS)
        yield builder.bitcast(builder.shl(pairs, _all(16)), _VECTOR)
        yield builder.bitcast(builder.and_(pairs, _all(0xFFFF0000)), _VECTOR)


@no_type_check
def _expand(builder, values, at, mask, part, number, lanes):
    vector, mask_type = ir.VectorType(number, lanes), ir.VectorType(_I1, lanes)
    source = builder.gep(values, [at])
    name = f"llvm.masked.expandload.v{lanes}{'f32' if number == _F32 else 'i16'}"
    load = _function(builder, name, vector, [source.type, mask_type, vector])
    chosen = builder.trunc(builder.lshr(mask, _I64(part)), ir.IntType(lanes))
    return builder.call(load, [source, builder.bitcast(chosen, mask_type), ir.Constant(vector, [0] * lanes)])


@no_type_check
def _after(builder, start, mask, part):
    """Where the values after the first ``part`` places of a word begin; each from the word, not from one another."""
    if part == 0:
        return start
    return builder.add(start, _ones(builder, builder.and_(mask, _I64((1 << part) - 1))))


@no_type_check
def _ones(builder, mask):
    return builder.call(_function(builder, "llvm.ctpop.i64", _I64, [_I64]), [mask])


@no_type_check
def _data(context, builder, kind, array):
    return context.make_array(kind)(context, builder, array).data


@no_type_check
def _function(builder, name, result, arguments):
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


@no_type_check
def _vector(builder, array, place):
    pointer = builder.bitcast(builder.gep(array, [place]), ir.PointerType(_VECTOR))
    return builder.load(pointer, align=4)


@no_type_check
def _multiply_add(builder, left, right, total):
    return builder.call(_function(builder, "llvm.fma.v16f32", _VECTOR, [_VECTOR] * 3), [left, right, total])


@no_type_check
def _zeros(builder):
    return cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [0.0] * LANES))


@no_type_check
def _total(builder, sums):
    total = builder.load(sums[0])
    for each in sums[1:]:
        total = builder.fadd(total, builder.load(each))
    return total


@no_type_check
def _sum(builder, vector):
    add = _function(builder, "llvm.vector.reduce.fadd.v16f32", _F32, [_F32, _VECTOR])
    return builder.call(add, [_F32(0.0), vector], fastmath=("reassoc",))


@no_type_check
def _splat(builder, value, vector):
    empty = ir.Constant(vector, ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(empty, value, _I32(0)), empty, ir.Constant(_INTEGERS, [0] * LANES)
    )


@no_type_check
def _all(value):
    return ir.Constant(_INTEGERS, [value] * LANES)
