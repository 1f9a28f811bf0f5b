"""Vector code of selection: the places of scores that reach a cut."""

from typing import no_type_check

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from apportion.ops.vectors import I1, I16, I32, I64, LANES, data_of, function_of, load, splat


@intrinsic
@no_type_check
def reaching_by_compress(typing_context, scores, cut, places):
    """List the places whose score reaches the cut (16 more than there are scores must fit); how many there are.

    It leans on an instruction of AVX-512, see `apportion.ops.processor.has_expand`.
    """
    signature = types.int64(scores, types.float32, places)

    def generate(context, builder, signature, arguments):
        of_scores = context.make_array(signature.args[0])(context, builder, arguments[0])
        size = builder.extract_value(of_scores.shape, 0)
        scores, cut = of_scores.data, arguments[1]
        places = data_of(context, builder, signature.args[2], arguments[2])
        integers, mask_type = ir.VectorType(I32, LANES), ir.VectorType(I1, LANES)
        compress = function_of(
            builder, "llvm.experimental.vector.compress.v16i32", integers, [integers, mask_type, integers]
        )
        ones = function_of(builder, "llvm.ctpop.i16", I16, [I16])
        found = cgutils.alloca_once_value(builder, I64(0))
        whole = builder.and_(size, I64(-LANES))
        with cgutils.for_range_slice(builder, I64(0), whole, I64(LANES)) as (first, _):
            reaches = builder.fcmp_ordered(">=", load(builder, scores, first), splat(builder, cut))
            numbers = builder.add(splat(builder, builder.trunc(first, I32)), ir.Constant(integers, list(range(LANES))))
            packed = builder.call(compress, [numbers, reaches, ir.Constant(integers, ir.Undefined)])
            start = builder.load(found)
            target = builder.bitcast(builder.gep(places, [start]), ir.PointerType(integers))
            # The whole vector is stored: what is beyond the ones is overwritten by the next.
            builder.store(packed, target, align=4)
            count = builder.zext(builder.call(ones, [builder.bitcast(reaches, I16)]), I64)
            builder.store(builder.add(start, count), found)
        with cgutils.for_range_slice(builder, whole, size, I64(1)) as (place, _):
            start = builder.load(found)
            builder.store(builder.trunc(place, I32), builder.gep(places, [start]))
            reaches = builder.fcmp_ordered(">=", builder.load(builder.gep(scores, [place])), cut)
            builder.store(builder.add(start, builder.zext(reaches, I64)), found)
        return builder.load(found)

    return signature, generate
