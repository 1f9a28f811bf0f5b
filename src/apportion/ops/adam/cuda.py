"""A step of Adam and the projection on CUDA, compiled by Triton; a program owns a row, or a part of it.

Only unit rows need a whole row in one program. Right under Triton's interpreter; **speed is unmeasured**.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from apportion.ops.triton_support import on_device_of

_PART = 1024  # of a row, where rows need not be whole


@triton.jit
@no_type_check
def _adam_step(
    param,
    mean,
    square,
    grad,
    places,
    width,
    numbers,
    IS_COMPACT: tl.constexpr,
    UNIT_ROWS: tl.constexpr,
    TINY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    within = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_within = within < width
    # Read from memory, in the matrix's own type: as arguments float64 numbers would arrive as float32.
    keep1, add1, keep2, add2 = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    rate, root2, eps, decay = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6), tl.load(numbers + 7)
    here = row * width + within
    if IS_COMPACT:
        place = tl.load(places + row)
        g = tl.load(grad + place * width + within, mask=is_within & (place >= 0), other=0)
    else:
        g = tl.load(grad + here, mask=is_within, other=0)
    p = tl.load(param + here, mask=is_within, other=0)
    m = tl.load(mean + here, mask=is_within, other=0)
    v = tl.load(square + here, mask=is_within, other=0)
    g += decay * p
    m = keep1 * m + add1 * g
    v = keep2 * v + add2 * g * g
    # Not a number stays what it is.
    m = tl.where(tl.abs(m) < TINY, 0.0, m)
    v = tl.where(v < TINY, 0.0, v)
    p -= rate * m / (tl.sqrt(v) * root2 + eps)
    if UNIT_ROWS:
        p = tl.where(is_within, p, 0.0)
        # Not through maximum, which would drop a NaN.
        norm = tl.sqrt(tl.sum(p * p, axis=0))
        p = p / tl.where(norm < 1e-12, 1e-12, norm)
    tl.store(mean + here, m, mask=is_within)
    tl.store(square + here, v, mask=is_within)
    tl.store(param + here, p, mask=is_within)


@triton.jit
@no_type_check
def _project_rows(grad, unit, rows, width, IS_COMPACT: tl.constexpr, WIDTH: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, WIDTH)
    is_within = within < width
    row = tl.load(rows + place) if IS_COMPACT else place
    g = tl.load(grad + place * width + within, mask=is_within, other=0)
    u = tl.load(unit + row * width + within, mask=is_within, other=0)
    tl.store(grad + place * width + within, g - tl.sum(g * u, axis=0) * u, mask=is_within)


def adam_step_(
    param: Float[Tensor, "rows d"],
    exp_avg: Float[Tensor, "rows d"],
    exp_avg_sq: Float[Tensor, "rows d"],
    grad: Float[Tensor, "n d"],
    grad_rows: Int64[Tensor, "n"] | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    unit_rows: bool,
) -> None:
    """A program a row, or a part of it where rows need not be of unit norm."""
    rows, width = param.shape
    if param.numel() == 0:
        return
    numbers = (beta1, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, eps, weight_decay)
    whole = triton.next_power_of_2(width)
    part = whole if unit_rows else min(whole, _PART)
    places = grad
    if grad_rows is not None:
        places = torch.full((rows,), -1, dtype=torch.int64, device=param.device)
        places[grad_rows] = torch.arange(grad_rows.numel(), device=param.device)
    with on_device_of(param):
        _adam_step[(rows, triton.cdiv(width, part))](
            param,
            exp_avg,
            exp_avg_sq,
            grad.contiguous(),
            places,
            width,
            torch.tensor(numbers, dtype=param.dtype, device=param.device),
            IS_COMPACT=grad_rows is not None,
            UNIT_ROWS=unit_rows,
            TINY=torch.finfo(param.dtype).tiny,
            WIDTH=part,
            num_warps=_warps(part),
        )


def project_rows_(
    grad: Float[Tensor, "n d"], unit: Float[Tensor, "rows d"], grad_rows: Int64[Tensor, "n"] | None
) -> None:
    """A program a row."""
    count, width = grad.shape
    if grad.numel() == 0:
        return
    whole = triton.next_power_of_2(width)
    with on_device_of(grad):
        _project_rows[(count,)](
            grad,
            unit.contiguous(),
            grad if grad_rows is None else grad_rows.contiguous(),
            width,
            IS_COMPACT=grad_rows is not None,
            WIDTH=whole,
            num_warps=_warps(whole),
        )


def _warps(width: int) -> int:
    """Few enough for short rows, enough that those of a long one keep it in registers."""
    return min(max(width // 256, 1), 16)
