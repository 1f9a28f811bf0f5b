"""Vector code of attention over chosen keys: a product with one key, and a mix of values that lie scattered."""

from typing import no_type_check

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from apportion.ops.vectors import (
    I64,
    INTEGER,
    LANES,
    add_product,
    data_of,
    in_pieces,
    load,
    prefetch_at,
    splat_of,
    store,
    sum_of,
    zeros,
)


@intrinsic
@no_type_check
def dot(typing_context, query, at, keys, start, width):
    """The sum of ``query[at + j] * keys[start + j]`` over ``width`` numbers; the query is float32."""

    def generate(context, builder, signature, arguments):
        _, at, _, start, width = arguments
        query, keys = (data_of(context, builder, signature.args[each], arguments[each]) for each in (0, 2))
        totals = {LANES: zeros(builder), 1: zeros(builder, 1)}
        for j, _, lanes in in_pieces(builder, width, (1,)):
            left = load(builder, query, builder.add(at, j), lanes)
            right = load(builder, keys, builder.add(start, j), lanes)
            add_product(builder, left, right, totals[lanes])
        return builder.fadd(*(sum_of(builder, builder.load(each)) for each in totals.values()))

    return types.float32(query, INTEGER, keys, INTEGER, INTEGER), generate


@intrinsic
@no_type_check
def mix_rows(typing_context, weights, at, count, places, first, values, start, step, ahead, out, to, width):
    """``out[to:to + width]``: rows ``values[start + places[first + i] * step :]`` times ``weights[at + i]``, summed.

    The rows of ``ahead`` entries later are asked for while one is read.
    """
    signature = types.none(
        weights, INTEGER, INTEGER, places, INTEGER, values, INTEGER, INTEGER, INTEGER, out, INTEGER, INTEGER
    )

    def generate(context, builder, signature, arguments):
        _, at, count, _, first, _, start, step, ahead, _, to, width = arguments
        weights, places, values, out = (
            data_of(context, builder, signature.args[each], arguments[each]) for each in (0, 3, 5, 9)
        )
        last = builder.sub(count, I64(1))

        def row(entry):
            place = builder.load(builder.gep(places, [builder.add(first, entry)]))
            return builder.add(start, builder.mul(place, step))

        for column, vectors, lanes in in_pieces(builder, width, (4, 1)):
            sums = [zeros(builder, lanes) for _ in range(vectors)]
            with cgutils.for_range(builder, count) as loop:
                later = builder.add(loop.index, ahead)
                later = builder.select(builder.icmp_signed("<", later, last), later, last)
                coming, here = (builder.add(row(entry), column) for entry in (later, loop.index))
                weight = splat_of(builder, weights, builder.add(at, loop.index), lanes)
                for vector, total in enumerate(sums):
                    beyond = I64(LANES * vector)
                    if lanes == LANES:
                        prefetch_at(builder, values, builder.add(coming, beyond))
                    add_product(builder, weight, load(builder, values, builder.add(here, beyond), lanes), total)
            for vector, total in enumerate(sums):
                store(builder, builder.load(total), out, builder.add(builder.add(to, column), I64(LANES * vector)))
        return context.get_dummy_value()

    return signature, generate
