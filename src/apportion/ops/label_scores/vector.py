"""Vector code of packed labels: codes are made numbers in registers, one lane a token."""

from typing import no_type_check

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from apportion.ops.vectors import (
    I8,
    I32,
    I64,
    INTEGER,
    LANES,
    add_product,
    data_of,
    floats,
    in_pieces,
    load,
    multiply_add,
    prefetch_at,
    splat,
    splat_of,
    store,
    zeros,
)

_AHEAD = 512  # tokens whose codes are asked for before their turn: planes are too many and too short to be foreseen


@intrinsic
@no_type_check
def score_codes(typing_context, query, total, planes, bits, codes, start, step, ranges, lows, widths, size, out, to):
    """``out[to + i] = total * ranges[lows + i] + ranges[widths + i] * sum of query times code`` for ``size`` tokens.

    The query is float32, zeros where it has fewer channels than ``planes`` bytes have codes of 2, 4 or 8 ``bits``, and
    ``total`` its sum. Byte ``p`` of token ``i`` is ``codes[start + p * step + i]``; ranges and scores are float32.
    """
    integers = (INTEGER,) * 3
    signature = types.none(
        query, types.float32, INTEGER, INTEGER, codes, INTEGER, INTEGER, ranges, *integers, out, INTEGER
    )

    def generate(context, builder, signature, arguments):
        _, total, planes, bits, _, start, step, _, lows, widths, size, _, to = arguments
        query, codes, ranges, out = (
            data_of(context, builder, signature.args[each], arguments[each]) for each in (0, 4, 7, 11)
        )

        def tile(bits, in_byte):
            for token, _, lanes in in_pieces(builder, size, (1,)):
                integers = ir.VectorType(I32, lanes)
                sums = [zeros(builder, lanes) for _ in range(in_byte)]
                with cgutils.for_range(builder, planes) as loop:
                    place = builder.add(builder.add(start, token), builder.mul(loop.index, step))
                    source = builder.bitcast(builder.gep(codes, [place]), ir.PointerType(ir.VectorType(I8, lanes)))
                    if lanes == LANES:
                        prefetch_at(builder, codes, builder.add(place, I64(_AHEAD)))
                    packed = builder.zext(builder.load(source, align=1), integers)
                    channel = builder.mul(loop.index, I64(in_byte))
                    for each, into in enumerate(sums):
                        shifted = builder.lshr(packed, ir.Constant(integers, [bits * each] * lanes))
                        code = builder.and_(shifted, ir.Constant(integers, [2**bits - 1] * lanes))
                        factor = splat_of(builder, query, builder.add(channel, I64(each)), lanes)
                        add_product(builder, factor, builder.sitofp(code, floats(lanes)), into)
                if lanes == LANES:
                    for each in (lows, widths):
                        prefetch_at(builder, ranges, builder.add(builder.add(each, token), I64(_AHEAD)))
                found = builder.load(sums[0])
                for each in sums[1:]:
                    found = builder.fadd(found, builder.load(each))
                low, width = (load(builder, ranges, builder.add(each, token), lanes) for each in (lows, widths))
                found = multiply_add(builder, width, found, builder.fmul(splat(builder, total, lanes), low))
                store(builder, found, out, builder.add(to, token))

        after = builder.append_basic_block("after")
        cases = builder.switch(bits, after)
        for each in (2, 4, 8):
            block = builder.append_basic_block(f"bits{each}")
            cases.add_case(I64(each), block)
            builder.position_at_end(block)
            tile(each, 8 // each)
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return signature, generate
