"""The three sparse products on CUDA, compiled by Triton; one program owns each part of a result: one order of sums.

No kernel makes an ``entries x d`` array and none adds with atomics: the transposed product first lists the entries by
column (a stable sort of the places, not of anything of width d) and then is the plain product of the transposed matrix.
Sums are taken in float32, of float64 operands in float64. Right under Triton's interpreter; **speed is unmeasured**.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from apportion.ops.csr.reference import row_of_each_entry
from apportion.ops.triton_support import on_device_of

# Entries that a program has in flight at once: enough to hide the latency of their scattered rows, and few enough that
# a row of a few winners wastes little.
_ENTRIES = 8
_WIDEST = 512  # of the parts of d that a program owns: 8 x 512 float32 sums fill 32 registers of its 128 threads


@triton.jit
@no_type_check
def _weighted_sums(
    pointers, sources, weights, dense, out, width, SUM: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr
):
    """``out[i]``: the sum of ``weights[e] * dense[sources[e]]`` for e from ``pointers[i]`` to ``pointers[i + 1]``."""
    target = tl.program_id(0).to(tl.int64)
    within = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_within = within < width
    last = tl.load(pointers + target + 1)
    total = tl.zeros([WIDTH], SUM)
    for first in range(tl.load(pointers + target), last, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        is_entry = entries < last
        source = tl.load(sources + entries, mask=is_entry, other=0)
        weight = tl.load(weights + entries, mask=is_entry, other=0).to(SUM)
        rows = tl.load(
            dense + source[:, None] * width + within[None, :], mask=is_entry[:, None] & is_within[None, :], other=0
        )
        total += tl.sum(weight[:, None] * rows.to(SUM), axis=0)
    tl.store(out + target * width + within, total.to(out.dtype.element_ty), mask=is_within)


@triton.jit
@no_type_check
def _products(
    rows, columns, left, right, out, entries, width, SUM: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr
):
    """``out[e] = left[rows[e]] . right[columns[e]]``; each entry sums in the same order, wherever it stands."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    is_entry = entry < entries
    row = tl.load(rows + entry, mask=is_entry, other=0)
    column = tl.load(columns + entry, mask=is_entry, other=0)
    sums = tl.zeros([ENTRIES, WIDTH], SUM)
    for start in range(0, width, WIDTH):
        within = start + tl.arange(0, WIDTH)
        is_place = is_entry[:, None] & (within < width)[None, :]
        ours = tl.load(left + row[:, None] * width + within[None, :], mask=is_place, other=0)
        theirs = tl.load(right + column[:, None] * width + within[None, :], mask=is_place, other=0)
        sums += ours.to(SUM) * theirs.to(SUM)
    tl.store(out + entry, tl.sum(sums, axis=1).to(out.dtype.element_ty), mask=is_entry)


def csr_matmul(
    crow_indices: Int64[Tensor, "rows_plus_1"],
    col_indices: Int64[Tensor, "entries"],
    values: Float[Tensor, "entries"],
    dense: Float[Tensor, "columns d"],
) -> Float[Tensor, "rows d"]:
    """``S @ dense``: a program per row and part of d."""
    return _sum_groups(crow_indices.contiguous(), col_indices, values, dense)


def csr_transposed_matmul(
    crow_indices: Int64[Tensor, "rows_plus_1"],
    col_indices: Int64[Tensor, "entries"],
    values: Float[Tensor, "entries"],
    dense: Float[Tensor, "rows d"],
    columns: int,
) -> Float[Tensor, "columns d"]:
    """``S.T @ dense``: a program per column and part of d, after one transposition of the places."""
    pointers, rows, places = by_column(crow_indices, col_indices, columns)
    return _sum_groups(pointers, rows, values[places], dense)


def csr_sampled_product(
    crow_indices: Int64[Tensor, "rows_plus_1"],
    col_indices: Int64[Tensor, "entries"],
    left: Float[Tensor, "rows d"],
    right: Float[Tensor, "columns d"],
) -> Float[Tensor, "entries"]:
    """``left @ right.T`` at the given places: a program per few entries, so that long rows keep nobody waiting."""
    entries, width = col_indices.numel(), left.shape[1]
    out = left.new_empty(entries)
    if entries:
        rows = row_of_each_entry(crow_indices)
        with on_device_of(left):
            _products[(triton.cdiv(entries, _ENTRIES),)](
                rows,
                col_indices.contiguous(),
                left.contiguous(),
                right.contiguous(),
                out,
                entries,
                width,
                SUM=_sum_type(left),
                ENTRIES=_ENTRIES,
                # A constant of the shape of neither batch nor allocation: it fixes the order of each sum.
                WIDTH=_part_of(width, 128),
            )
    return out


def by_column(
    crow_indices: Int64[Tensor, "rows_plus_1"], col_indices: Int64[Tensor, "entries"], columns: int
) -> tuple[Int64[Tensor, "columns_plus_1"], Int64[Tensor, "entries"], Int64[Tensor, "entries"]]:
    """CSR to CSC: column pointers, and for each entry in column order its row and its place in the CSR arrays."""
    # Columns fit 32 bits (a dictionary of two thousand million features does not fit a GPU): half the radix passes.
    ordered, places = col_indices.to(torch.int32).sort(stable=True)
    edges = torch.arange(columns + 1, dtype=torch.int32, device=col_indices.device)
    return torch.searchsorted(ordered, edges), row_of_each_entry(crow_indices)[places], places


def _sum_groups(pointers: Tensor, sources: Tensor, weights: Tensor, dense: Tensor) -> Tensor:
    groups, width = pointers.numel() - 1, dense.shape[1]
    out = dense.new_empty(groups, width)
    if out.numel():
        part = _part_of(width, _WIDEST)
        with on_device_of(dense):
            _weighted_sums[(groups, triton.cdiv(width, part))](
                pointers,
                sources.contiguous(),
                weights.contiguous(),
                dense.contiguous(),
                out,
                width,
                SUM=_sum_type(dense),
                ENTRIES=_ENTRIES,
                WIDTH=part,
            )
    return out


def _part_of(width: int, widest: int) -> int:
    """The power of two that a program takes of the width at once."""
    power: int = triton.next_power_of_2(max(width, 1))
    return min(power, widest)


def _sum_type(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
