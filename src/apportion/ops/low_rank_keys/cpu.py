"""Low-rank keys on the CPU: factors gathered and keys rotated by numba, multiplied by torch in between.

The product is most of the work from a rank of some tens on, and torch's is hard to beat; what is saved is everything
around it: keys are rotated where they are, by angles that are read where they lie.
"""

from typing import no_type_check

import numba
import torch
from torch import Tensor

from apportion.ops.low_rank_keys import reference
from apportion.ops.numbers import array_of, flat, number, prefetch, readable, stored
from apportion.ops.threads import matching_threads

_AHEAD = 16  # tokens that are asked for before their turn: scattered factors come late otherwise
_TOGETHER = 64  # tokens that a thread takes at a time


@numba.njit(parallel=True, cache=True)
@no_type_check
def _gather(factors, steps, tokens, out):
    """``out[batch, i] = factors[batch, tokens[batch, i]]``."""
    batch, kept, rank = out.shape
    blocks = (kept + _TOGETHER - 1) // _TOGETHER
    line = 64 // factors.itemsize
    for task in numba.prange(batch * blocks):
        row, first = task // blocks, task % blocks * _TOGETHER
        for place in range(first, min(kept, first + _TOGETHER)):
            if place + _AHEAD < kept:
                ahead = row * steps[0] + tokens[row, place + _AHEAD] * steps[1]
                for j in range(0, rank, line):
                    prefetch(factors, ahead + j)
            start = row * steps[0] + tokens[row, place] * steps[1]
            out[row, place] = factors[start : start + rank]


@numba.njit(parallel=True, cache=True)
@no_type_check
def _rotate(keys, tokens, cos, cos_steps, sin, sin_steps, half):
    """Turn ``keys[batch, i]`` by the angles of ``tokens[batch, i]``, in place."""
    batch, kept = tokens.shape
    blocks = (kept + _TOGETHER - 1) // _TOGETHER
    for task in numba.prange(batch * blocks):
        row, start = task // blocks, task % blocks * _TOGETHER
        for place in range(start, min(kept, start + _TOGETHER)):
            cos_start = row * cos_steps[0] + tokens[row, place] * cos_steps[1]
            sin_start = row * sin_steps[0] + tokens[row, place] * sin_steps[1]
            c, s = cos[cos_start : cos_start + half], sin[sin_start : sin_start + half]
            first, second = keys[row, place, :half], keys[row, place, half : 2 * half]
            for j in range(half):
                one, two = number(first[j]), number(second[j])
                by_cos, by_sin = number(c[j]), number(s[j])
                first[j] = stored(one * by_cos - two * by_sin, first[j])
                second[j] = stored(two * by_cos + one * by_sin, second[j])


def low_rank_keys(factors: Tensor, basis: Tensor, tokens: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """See ``apportion.ops.low_rank_keys.low_rank_keys``."""
    batch, groups, kept = tokens.shape
    rank, width = basis.shape[-2:]
    known = factors.dtype in (torch.float32, torch.float64, torch.bfloat16)
    if not known or 0 in (factors.numel(), basis.numel(), tokens.numel()):
        return reference.low_rank_keys(factors, basis, tokens, cos, sin)
    factors = readable(factors.detach())
    flattened = tokens.reshape(batch, groups * kept).contiguous().numpy()
    rows = torch.empty(batch, groups, kept, rank, dtype=factors.dtype)
    with matching_threads():
        _gather(flat(factors), factors.stride()[:2], flattened, array_of(rows).reshape(batch, groups * kept, rank))
    keys = rows @ basis.detach()
    if cos is None or sin is None:
        return keys
    cos, sin = (readable(each).expand(batch, -1, -1) for each in (cos, sin))
    turned = array_of(keys).reshape(batch, groups * kept, width)
    with matching_threads():
        _rotate(turned, flattened, flat(cos), cos.stride()[:2], flat(sin), sin.stride()[:2], cos.shape[-1])
    return keys
