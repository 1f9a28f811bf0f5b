"""Vector code of keys rebuilt from a factorisation: a product of matrices, some of whose rows lie scattered."""

from typing import no_type_check

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from apportion.ops.vectors import I64, INTEGER, LANES, add_product, data_of, in_pieces, load, splat_of, store, zeros

_ROWS = 4  # keys at a time: 4 of 4 vectors are the sums that registers hold beside 4 vectors of the basis


@intrinsic
@no_type_check
def rebuild_rows(typing_context, factors, start, step, places, count, basis, first, rank, width, keys):
    """``keys[i * width :][:width] = factors[start + places[i] * step :][:rank] @ basis``, for ``count`` places.

    Basis is [rank, width] from ``basis[first]`` on, float32 as ``keys``.
    """
    signature = types.none(factors, INTEGER, INTEGER, places, INTEGER, basis, INTEGER, INTEGER, INTEGER, keys)

    def generate(context, builder, signature, arguments):
        _, start, step, _, count, _, first, rank, width, _ = arguments
        factors, places, basis, keys = (
            data_of(context, builder, signature.args[each], arguments[each]) for each in (0, 3, 5, 9)
        )

        def some_keys(entry, rows):
            sources, targets = [], []
            for each in range(rows):
                key = builder.add(entry, I64(each))
                place = builder.load(builder.gep(places, [key]))
                sources.append(builder.add(start, builder.mul(place, step)))
                targets.append(builder.mul(key, width))
            for column, vectors, lanes in in_pieces(builder, width, (4, 1)):
                sums = [[zeros(builder, lanes) for _ in range(vectors)] for _ in range(rows)]
                with cgutils.for_range(builder, rank) as loop:
                    line = builder.add(builder.add(first, column), builder.mul(loop.index, width))
                    parts = [
                        load(builder, basis, builder.add(line, I64(LANES * each)), lanes) for each in range(vectors)
                    ]
                    for source, of_key in zip(sources, sums, strict=True):
                        factor = splat_of(builder, factors, builder.add(source, loop.index), lanes)
                        for part, total in zip(parts, of_key, strict=True):
                            add_product(builder, factor, part, total)
                for target, of_key in zip(targets, sums, strict=True):
                    for each, total in enumerate(of_key):
                        place = builder.add(builder.add(target, column), I64(LANES * each))
                        store(builder, builder.load(total), keys, place)

        whole = builder.and_(count, I64(-_ROWS))
        with cgutils.for_range_slice(builder, I64(0), whole, I64(_ROWS)) as (entry, _):
            some_keys(entry, _ROWS)
        with cgutils.for_range_slice(builder, whole, count, I64(1)) as (entry, _):
            some_keys(entry, 1)
        return context.get_dummy_value()

    return signature, generate
