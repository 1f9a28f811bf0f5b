"""Selection on CUDA without sorting everything, compiled by Triton.

Who wins is settled by the score of the last winner, found digit by digit: floats become unsigned integers of the same
order, and each round counts one digit (8 bits, the highest first) of those scores that share all digits found so far.
After 4 rounds (8 for float64) every score above the last winner's has won, and of its equals the first few. Counts are
integers, and winners are written where a running sum puts them, so the result is exact and always the same.

The kernels work on *segments*, runs of scores at a constant distance from each other: the rows of a matrix, or the
candidates of a row that ``apportion.ops.encode.cuda`` has collected. Right under Triton's interpreter; **speed is
unmeasured**.
"""

import math
from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from apportion.ops.csr.cuda import by_column
from apportion.ops.select.reference import Places
from apportion.ops.triton_support import on_device_of

_DIGIT = 8  # bits a round; the kernels write it out as 255 and 256
_BLOCK = 2048  # scores that a program looks at together
_COUNTERS = 1024  # programs that count a whole matrix: several for each of a GPU's processors
_TRANSPOSED = 2**26  # scores transposed at a time so that columns can be read as rows: at most 256 MiB in float32
_CHUNK = 4096  # length of the rows into which one long list of scores is cut


@triton.jit
@no_type_check
def _sortable(scores, WIDE: tl.constexpr):
    """Unsigned integers in the order of the floats, in which minus zero equals zero."""
    if WIDE:
        wide = scores.to(tl.float64)
        bits = tl.where(wide == 0, 0.0, wide).to(tl.uint64, bitcast=True)
        keys = tl.where((bits >> 63) == 1, bits ^ 0xFFFFFFFFFFFFFFFF, bits | 0x8000000000000000)
    else:
        # Widening keeps every order and every tie of the 16-bit types.
        wide = scores.to(tl.float32)
        bits = tl.where(wide == 0, 0.0, wide).to(tl.uint32, bitcast=True)
        keys = tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return keys


@triton.jit
@no_type_check
def _last_winners(
    scores, firsts, lengths, step, counts, thresholds, ties, WIDE: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """For each segment the sortable last winner of ``counts``, and how many of its equals win."""
    segment = tl.program_id(0)
    base = scores + tl.load(firsts + segment)
    length = tl.load(lengths + segment)
    left = tl.load(counts + segment).to(tl.int32)
    digits = tl.arange(0, 256)
    if WIDE:
        found = tl.full([], 0, tl.uint64)
    else:
        found = tl.full([], 0, tl.uint32)
    for known in tl.static_range(BITS // 8):
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, length, BLOCK):
            places = start + tl.arange(0, BLOCK)
            inside = places < length
            keys = _sortable(tl.load(base + places * step, mask=inside, other=0), WIDE)
            # Two shifts, since one by all bits is undefined.
            shifted = keys >> (BITS - 8 - 8 * known)
            histogram += tl.histogram((shifted & 255).to(tl.int32), 256, mask=inside & ((shifted >> 8) == found))
        reaching = tl.sum(histogram) - tl.cumsum(histogram, axis=0) + histogram
        digit = tl.sum((reaching >= left).to(tl.int32)) - 1
        left -= tl.sum(tl.where(digits == digit, reaching - histogram, 0))
        found = (found << 8) | digit.to(found.dtype)
    tl.store(thresholds + segment, found.to(tl.int64))
    tl.store(ties + segment, left)


@triton.jit
@no_type_check
def _count_digits(
    scores,
    found,
    histograms,
    blocks,
    blocks_per_row,
    columns,
    row_step,
    column_step,
    SHIFT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How often each digit follows the digits found so far, in this program's share of a matrix."""
    program = tl.program_id(0)
    if WIDE:
        prefix = tl.load(found).to(tl.uint64)
    else:
        prefix = tl.load(found).to(tl.uint32)
    histogram = tl.zeros([256], tl.int32)
    for block in range(program, blocks, tl.num_programs(0)):
        row = block // blocks_per_row
        places = (block % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
        inside = places < columns
        base = scores + row.to(tl.int64) * row_step
        keys = _sortable(tl.load(base + places.to(tl.int64) * column_step, mask=inside, other=0), WIDE)
        shifted = keys >> SHIFT
        histogram += tl.histogram((shifted & 255).to(tl.int32), 256, mask=inside & ((shifted >> 8) == prefix))
    tl.store(histograms + program * 256 + tl.arange(0, 256), histogram)


@triton.jit
@no_type_check
def _count_around(scores, firsts, lengths, step, thresholds, above, equal, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """How many scores of each segment lie above its threshold, and how many equal it."""
    segment = tl.program_id(0)
    base = scores + tl.load(firsts + segment)
    length = tl.load(lengths + segment)
    if WIDE:
        threshold = tl.load(thresholds + segment).to(tl.uint64)
    else:
        threshold = tl.load(thresholds + segment).to(tl.uint32)
    higher = tl.zeros([BLOCK], tl.int32)
    tied = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < length
        keys = _sortable(tl.load(base + places * step, mask=inside, other=0), WIDE)
        higher += (inside & (keys > threshold)).to(tl.int32)
        tied += (inside & (keys == threshold)).to(tl.int32)
    tl.store(above + segment, tl.sum(higher))
    tl.store(equal + segment, tl.sum(tied))


@triton.jit
@no_type_check
def _write_winners(
    scores, firsts, lengths, step, thresholds, ties, starts, winners, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Places within its segment of each score above the threshold, and of the first ``ties`` that equal it."""
    segment = tl.program_id(0)
    base = scores + tl.load(firsts + segment)
    length = tl.load(lengths + segment)
    ties_left = tl.load(ties + segment).to(tl.int32)
    start_of_next = tl.load(starts + segment)
    if WIDE:
        threshold = tl.load(thresholds + segment).to(tl.uint64)
    else:
        threshold = tl.load(thresholds + segment).to(tl.uint32)
    for start in range(0, length, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < length
        keys = _sortable(tl.load(base + places * step, mask=inside, other=0), WIDE)
        tied = (inside & (keys == threshold)).to(tl.int32)
        wins = inside & ((keys > threshold) | ((tied == 1) & (tl.cumsum(tied, axis=0) <= ties_left)))
        counted = wins.to(tl.int32)
        tl.store(winners + start_of_next + tl.cumsum(counted, axis=0) - 1, places, mask=wins)
        start_of_next += tl.sum(counted)
        ties_left -= tl.sum(tied)


@triton.jit
@no_type_check
def _above(
    scores,
    limits,
    counts,
    starts,
    winners,
    columns,
    row_step,
    column_step,
    WRITE: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the scores of each row that exceed their column's limit, or (``WRITE``) list their columns."""
    row = tl.program_id(0).to(tl.int64)
    found = tl.zeros([BLOCK], tl.int32)
    start_of_next = tl.load(starts + row)
    for start in range(0, columns, BLOCK):
        places = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = places < columns
        score = tl.load(scores + row * row_step + places * column_step, mask=inside, other=0).to(TYPE)
        limit = tl.load(limits + places, mask=inside, other=0).to(TYPE)
        wins = inside & (score > limit)
        counted = wins.to(tl.int32)
        if WRITE:
            tl.store(winners + start_of_next + tl.cumsum(counted, axis=0) - 1, places, mask=wins)
            start_of_next += tl.sum(counted)
        else:
            found += counted
    if not WRITE:
        tl.store(counts + row, tl.sum(found))


@dataclass(frozen=True)
class Segments:
    """Runs of scores: run ``i`` holds ``scores[firsts[i] + j * step]`` for ``j < lengths[i]``."""

    scores: Tensor  # storage to point into, whatever its shape
    firsts: Int64[Tensor, "segments"]
    lengths: Int64[Tensor, "segments"]
    step: int

    @classmethod
    def rows_of(cls, scores: Float[Tensor, "rows columns"]) -> "Segments":
        """Each row of a matrix, strided as it is."""
        firsts = torch.arange(scores.shape[0], device=scores.device) * scores.stride(0)
        return cls(scores, firsts, torch.full_like(firsts, scores.shape[1]), scores.stride(1))

    def best(self, counts: Int64[Tensor, "segments"], total: int) -> Int64[Tensor, "winners"]:
        """Places within its segment, in order, of the ``counts[i]`` best of each segment ``i``; ``total`` in all."""
        thresholds = torch.empty_like(counts)
        ties = torch.empty_like(counts)
        winners = torch.empty(total, dtype=torch.int64, device=counts.device)
        if total == 0:
            return winners
        with on_device_of(self.scores):
            _last_winners[(counts.numel(),)](
                self.scores,
                self.firsts,
                self.lengths,
                self.step,
                counts,
                thresholds,
                ties,
                WIDE=_is_wide(self.scores),
                BITS=_bits(self.scores),
                BLOCK=_BLOCK,
            )
        self.write_winners(thresholds, ties, starts_of(counts), winners)
        return winners

    def count_around(self, thresholds: Int64[Tensor, "segments"]) -> tuple[Tensor, Tensor]:
        """How many scores of each segment lie above its (sortable) threshold, and how many equal it."""
        above, equal = torch.empty_like(thresholds), torch.empty_like(thresholds)
        with on_device_of(self.scores):
            _count_around[(thresholds.numel(),)](
                self.scores,
                self.firsts,
                self.lengths,
                self.step,
                thresholds,
                above,
                equal,
                WIDE=_is_wide(self.scores),
                BLOCK=_BLOCK,
            )
        return above, equal

    def write_winners(self, thresholds: Tensor, ties: Tensor, starts: Tensor, winners: Tensor) -> None:
        """List each segment's winners from ``winners[starts[i]]`` on."""
        with on_device_of(self.scores):
            _write_winners[(ties.numel(),)](
                self.scores,
                self.firsts,
                self.lengths,
                self.step,
                thresholds,
                ties,
                starts,
                winners,
                WIDE=_is_wide(self.scores),
                BLOCK=_BLOCK,
            )


def select_rows(scores: Float[Tensor, "rows columns"], count: int) -> Places:
    """The ``count`` best of each row: a program per row."""
    rows = scores.shape[0]
    counts = torch.full((rows,), count, device=scores.device)
    return starts_of(counts), Segments.rows_of(scores).best(counts, rows * count)


def select_columns(scores: Float[Tensor, "rows columns"], quotas: Int64[Tensor, "columns"]) -> Places:
    """The ``quotas[i]`` best of each column ``i``: columns are transposed, some at a time, and treated as rows."""
    rows, columns = scores.shape
    together = max(1, _TRANSPOSED // max(rows, 1))
    winners = []
    for first in range(0, columns, together):
        part = quotas[first : first + together].contiguous()
        transposed = scores[:, first : first + together].T.contiguous()
        winners.append(Segments.rows_of(transposed).best(part, int(part.sum())))
    row = torch.cat(winners) if winners else quotas.new_empty(0)
    # The winners by column, read as a matrix in CSR order, are the transpose of what is wanted.
    crow, col, _ = by_column(starts_of(quotas), row, rows)
    return crow, col


def select_total(scores: Float[Tensor, "rows columns"], count: int) -> Places:
    """The ``count`` best of all: a few programs count digits, then a program per row writes its winners."""
    rows = scores.shape[0]
    if count == 0:
        return torch.zeros(rows + 1, dtype=torch.int64, device=scores.device), _no_places(scores)
    threshold, ties = _last_winner_of_all(scores, count)
    segments = Segments.rows_of(scores)
    thresholds = threshold.expand(rows).contiguous()
    above, equal = segments.count_around(thresholds)
    winning_ties = (ties - starts_of(equal)[:-1]).clamp(min=0).minimum(equal)
    crow = starts_of(above + winning_ties)
    col = torch.empty(count, dtype=torch.int64, device=scores.device)
    segments.write_winners(thresholds, winning_ties, crow, col)
    return crow, col


def best_of_list(scores: Float[Tensor, "entries"], count: int) -> Int64[Tensor, "count"]:
    """Places, in order, of the ``count`` best of one long list; of equals the first."""
    chunk = min(_CHUNK, max(1, scores.numel()))
    # A program per row of a matrix keeps the whole GPU busy; what fills up the last row loses to everything finite.
    missing = -scores.numel() % chunk
    matrix = torch.nn.functional.pad(scores, (0, missing), value=-math.inf).view(-1, chunk)
    crow, col = select_total(matrix, count)
    return torch.repeat_interleave(crow.diff(), output_size=count) * chunk + col


def select_above(scores: Float[Tensor, "rows columns"], limits: Float[Tensor, "columns"]) -> Places:
    """Every entry strictly above its column's limit: count, then fill."""
    rows = scores.shape[0]
    counts = torch.zeros(rows, dtype=torch.int64, device=scores.device)
    _run_above(scores, limits, counts, starts_of(counts), _no_places(scores), write=False)
    crow = starts_of(counts)
    col = torch.empty(int(crow[-1]), dtype=torch.int64, device=scores.device)
    if col.numel():
        _run_above(scores, limits, counts, crow, col, write=True)
    return crow, col


def starts_of(counts: Int64[Tensor, "groups"]) -> Int64[Tensor, "groups_plus_1"]:
    """Where each group starts if they are stored one after another, and where the last one ends."""
    starts = counts.new_zeros(counts.numel() + 1)
    torch.cumsum(counts, dim=0, out=starts[1:])
    return starts


def _last_winner_of_all(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The sortable score of the last of ``count`` winners, and how many of its equals win; both int64 [1]."""
    rows, columns = scores.shape
    blocks_per_row = triton.cdiv(columns, _BLOCK)
    blocks = rows * blocks_per_row
    programs = min(blocks, _COUNTERS)
    histograms = torch.empty(programs, 256, dtype=torch.int32, device=scores.device)
    found = torch.zeros(1, dtype=torch.int64, device=scores.device)
    left = torch.full((1,), count, device=scores.device)
    for shift in range(_bits(scores) - _DIGIT, -1, -_DIGIT):
        with on_device_of(scores):
            _count_digits[(programs,)](
                scores,
                found,
                histograms,
                blocks,
                blocks_per_row,
                columns,
                scores.stride(0),
                scores.stride(1),
                SHIFT=shift,
                WIDE=_is_wide(scores),
                BLOCK=_BLOCK,
            )
        histogram = histograms.sum(dim=0, dtype=torch.int64)
        reaching = histogram.sum() - histogram.cumsum(0) + histogram
        digit = (reaching >= left).sum(dim=0, keepdim=True) - 1
        left = left - (reaching - histogram).gather(0, digit)
        found = (found << _DIGIT) | digit
    return found, left


def _run_above(scores: Tensor, limits: Tensor, counts: Tensor, starts: Tensor, winners: Tensor, write: bool) -> None:
    rows, columns = scores.shape
    if rows == 0:
        return
    with on_device_of(scores):
        _above[(rows,)](
            scores,
            limits.contiguous(),
            counts,
            starts,
            winners,
            columns,
            scores.stride(0),
            scores.stride(1),
            WRITE=write,
            TYPE=tl.float64 if _is_wide(scores) else tl.float32,
            BLOCK=_BLOCK,
        )


def _no_places(scores: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=scores.device)


def _is_wide(scores: Tensor) -> bool:
    return scores.dtype == torch.float64


def _bits(scores: Tensor) -> int:
    return 64 if _is_wide(scores) else 32
