"""Encode and allocate on CUDA without ever writing the ``rows x columns`` scores, compiled by Triton.

One kernel multiplies tile by tile, and each tile appends to one list those of its scores that could still win: at least
their row's floor and above their column's limit. Sorted by place, that list is the same whichever tile came first. For
``above`` the limits are given. The other ways estimate floors or limits from a sample of the scores, check that enough
candidates were found, and choose among these exactly. Where the estimate was wrong (a row or column fell short) the few
in question are scored in full, and where it is hopeless (most scores are candidates) everything is, as on the CPU.

The product of float32 operands is taken in float32 throughout (no TF32), that of bfloat16 operands with float32 sums.
Right under Triton's interpreter; **speed is unmeasured**, and so are the tile sizes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from apportion.ops.csr.cuda import by_column
from apportion.ops.csr.reference import row_of_each_entry
from apportion.ops.encode.composed import DenseScores, choose
from apportion.ops.encode.reference import Codes
from apportion.ops.select.cuda import Segments, best_of_list, starts_of
from apportion.ops.triton_support import on_device_of

_GROUP = 8  # tiles of rows that walk along the columns together, so that a tile of the weight is read from cache
_SAMPLE_SHARE = 32  # a sample is this part of the scores: it adds some 3 % to the product
_SMALLEST_SAMPLE = 256
_SCORED_TOGETHER = 2**25  # sampled or repeated scores held at any time: 128 MiB in float32
_WORTH = 4  # where the whole is less than so many samples, it is scored at once
_HOPELESS = 8  # where more than one score in so many is a candidate, the list would need the space of the matrix
_SLACK = 4096  # room for candidates beyond the estimate, for when the estimate is small


@triton.jit
@no_type_check
def _collect(
    x,
    weight,
    bias,
    floors,
    limits,
    found,
    keys,
    scores,
    capacity,
    rows,
    columns,
    width,
    OPERAND: tl.constexpr,
    SUM: tl.constexpr,
    SCORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Append a tile's candidates to ``keys`` (``row * columns + column``) and ``scores``; ``found`` counts them all."""
    tile = tl.program_id(0)
    row_tiles = tl.cdiv(rows, ROWS)
    per_group = GROUP * tl.cdiv(columns, COLUMNS)
    first_of_group = tile // per_group * GROUP
    group_size = tl.minimum(row_tiles - first_of_group, GROUP)
    row = (first_of_group + tile % per_group % group_size) * ROWS + tl.arange(0, ROWS)
    column = tile % per_group // group_size * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row < rows, column < columns
    row, column = row.to(tl.int64), column.to(tl.int64)

    within = tl.arange(0, WIDTH)
    left = x + row[:, None] * width + within[None, :]
    right = weight + column[None, :] * width + within[:, None]
    product = tl.zeros([ROWS, COLUMNS], SUM)
    for start in range(0, width, WIDTH):
        is_within = within < width - start
        ours = tl.load(left, mask=is_row[:, None] & is_within[None, :], other=0.0)
        theirs = tl.load(right, mask=is_column[None, :] & is_within[:, None], other=0.0)
        product = tl.dot(ours.to(OPERAND), theirs.to(OPERAND), product, input_precision="ieee", out_dtype=SUM)
        left += WIDTH
        right += WIDTH

    score = product.to(SCORE) + tl.load(bias + column, mask=is_column, other=0.0)[None, :]
    floor = tl.load(floors + row, mask=is_row, other=0.0)
    limit = tl.load(limits + column, mask=is_column, other=0.0)
    wins = (score >= floor[:, None]) & (score > limit[None, :]) & is_row[:, None] & is_column[None, :]
    counted = wins.to(tl.int32)
    of_row = tl.sum(counted, axis=1)
    # Only where the tile's part of the list begins depends on who comes first; the list is sorted afterwards.
    start_of_tile = tl.atomic_add(found, tl.sum(of_row).to(tl.int64), sem="relaxed")
    # Places within the tile's part: 32 bits, for the registers are full of scores.
    place = (tl.cumsum(of_row, axis=0) - of_row)[:, None] + tl.cumsum(counted, axis=1) - 1
    room = tl.minimum(tl.maximum(capacity - start_of_tile, 0), ROWS * COLUMNS).to(tl.int32)
    is_kept = wins & (place < room)
    tl.store(keys + start_of_tile + place, row[:, None] * columns + column[None, :], mask=is_kept)
    tl.store(scores + start_of_tile + place, score, mask=is_kept)


def encode_select(
    x: Tensor, weight: Tensor, bias: Tensor, how: str, count: int, limits: Tensor | None, precision: str, exact: bool
) -> Codes:
    """See ``apportion.ops.encode.encode_select``."""
    return choose(FusedScores(x, weight, bias, precision), how, count, limits, exact)


@dataclass(frozen=True)
class FusedScores(DenseScores):
    """The same ways to find entries; the matrix is written only where a way has to give up."""

    def rows(self, count: int) -> Codes:
        """Candidates reach their row's floor: the score of a certain rank among a sample of the columns."""
        rows, columns = self._shape()
        sample = _spread(columns, _sample_size(columns), self.x.device)
        rank = _safe_rank(count, sample.numel(), columns)
        if count == 0 or not _pays(rank, sample.numel(), columns):
            return super().rows(count)
        floors = self._ranked(self.x, self.weight[sample], rank, self.bias[sample].unsqueeze(0))
        found = self._candidates(floors, None, rank * columns / sample.numel() * rows)
        if found is None:
            return super().rows(count)
        crow, col, values = found.by_row(rows, columns)
        short = (crow.diff() < count).nonzero().squeeze(1)
        counts = torch.full((rows,), count, device=col.device).index_fill_(0, short, 0)
        codes = _best_of_each(crow, col, values, counts, count * (rows - short.numel()))
        if short.numel() == 0:
            return codes
        parts = [_Candidates.of(codes, columns)]
        for part in torch.split(short, max(1, _SCORED_TOGETHER // columns)):
            _, col, values = DenseScores(self.x[part], self.weight, self.bias, self.precision).rows(count)
            parts.append(_Candidates(part.repeat_interleave(count) * columns + col, values))
        return _Candidates.merged(parts).by_row(rows, columns)

    def columns(self, quotas: Tensor) -> Codes:
        """Candidates exceed their column's limit: the score of a certain rank among a sample of the rows."""
        rows, columns = self._shape()
        sample = _spread(rows, _sample_size(rows), self.x.device)
        most = int(quotas.max()) if columns else 0
        rank = _safe_rank(most, sample.numel(), rows)
        if most == 0 or not _pays(rank, sample.numel(), rows):
            return super().columns(quotas)
        limits = self._ranked(self.weight, self.x[sample], rank, self.bias.unsqueeze(1))
        limits = limits.masked_fill(quotas == 0, math.inf)
        found = self._candidates(None, limits, rank * rows / sample.numel() * columns)
        if found is None:
            return super().columns(quotas)
        pointers, row, values = found.by_column(rows, columns)
        short = (pointers.diff() < quotas).nonzero().squeeze(1)
        counts = quotas.index_fill(0, short, 0)
        pointers, row, values = _best_of_each(pointers, row, values, counts, int(counts.sum()))
        crow, col, places = by_column(pointers, row, rows)
        codes = crow, col, values[places]
        if short.numel() == 0:
            return codes
        parts = [_Candidates.of(codes, columns)]
        for part in torch.split(short, max(1, _SCORED_TOGETHER // rows)):
            scores = DenseScores(self.x, self.weight[part], self.bias[part], self.precision)
            crow, col, values = scores.columns(quotas[part])
            parts.append(_Candidates(row_of_each_entry(crow) * columns + part[col], values))
        return _Candidates.merged(parts).by_row(rows, columns)

    def total(self, count: int) -> Codes:
        """Candidates reach one floor: the score of a certain rank among all scores of some rows."""
        rows, columns = self._shape()
        sample = self._some_rows()
        if count == 0 or sample is None:
            return super().total(count)
        rank = count * sample.numel() / rows
        scores = self._part(sample).matrix.flatten()
        # Rows differ in how much they win; the sample's mean is off by about their spread over the sample's root.
        for margin in (2.0, 8.0):
            place = math.ceil(rank * (1 + margin / math.sqrt(sample.numel())) + margin)
            if not _pays(place, scores.numel(), rows * columns):
                break
            floor = scores.topk(place, sorted=False).values.min()
            found = self._candidates(floor.expand(rows), None, place * rows / sample.numel())
            if found is None:
                break
            if found.keys.numel() >= count:
                crow, col, values = found.by_row(rows, columns)
                best = best_of_list(values, count)
                return torch.searchsorted(best, crow), col[best], values[best]
        return super().total(count)

    def above(self, limits: Tensor) -> Codes:
        """The limits themselves decide; only the space for the winners is estimated."""
        sample = self._some_rows()
        if sample is None:
            return super().above(limits)
        wins = int((self._part(sample).matrix > limits).sum())
        found = self._candidates(None, limits, wins * self.x.shape[0] / sample.numel())
        return super().above(limits) if found is None else found.by_row(*self._shape())

    def reaching(self, floors: Tensor) -> Codes:
        """The floors themselves decide; only the space for the winners is estimated."""
        sample = self._some_rows()
        if sample is None:
            return super().reaching(floors)
        wins = int((self._part(sample).matrix >= floors[sample].unsqueeze(1)).sum())
        found = self._candidates(floors, None, wins * self.x.shape[0] / sample.numel())
        return super().reaching(floors) if found is None else found.by_row(*self._shape())

    def _shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.weight.shape[0]

    def _part(self, rows: Tensor) -> DenseScores:
        return DenseScores(self.x[rows], self.weight, self.bias, self.precision)

    def _some_rows(self) -> Tensor | None:
        """Rows to sample with all their scores; None where the matrix is so small that it had better be written."""
        rows, columns = self._shape()
        sample = min(_sample_size(rows), max(1, _SCORED_TOGETHER // max(columns, 1)))
        if columns == 0 or not _pays(1, sample * columns, rows * columns):
            return None
        return _spread(rows, sample, self.x.device)

    def _ranked(self, many: Tensor, sample: Tensor, rank: int, bias: Tensor) -> Tensor:
        """For each of many vectors the score of the given rank among its scores with the sample."""
        if self.precision == "bfloat16":
            sample = sample.bfloat16()
        ranked = []
        for part, its_bias in _in_parts(many, bias.expand(many.shape[0], sample.shape[0])):
            scores = torch.mm(part.to(sample.dtype), sample.T).to(bias.dtype) + its_bias
            ranked.append(scores.topk(rank, dim=1, sorted=False).values.amin(dim=1))
        return torch.cat(ranked)

    def _candidates(self, floors: Tensor | None, limits: Tensor | None, expected: float) -> "_Candidates | None":
        """All scores that reach their row's floor and exceed their column's limit; None where these are too many."""
        rows, columns = self._shape()
        most = rows * columns // _HOPELESS
        capacity = min(most, int(1.25 * expected) + _SLACK)
        lowest = self.bias.new_full((1,), -math.inf)
        x, weight = self.x, self.weight
        if self.precision == "bfloat16":
            x, weight = x.bfloat16(), weight.bfloat16()
        operands = [
            x.contiguous(),
            weight.contiguous(),
            self.bias.contiguous(),
            (lowest.expand(rows) if floors is None else floors).contiguous(),
            (lowest.expand(columns) if limits is None else limits).contiguous(),
        ]
        keys, scores, found = _run_collect(operands, capacity)
        if capacity < found <= most:
            # The list was too short, but now its length is known.
            keys, scores, found = _run_collect(operands, found)
        if found > most:
            return None
        return _Candidates(keys[:found], scores[:found])


@dataclass(frozen=True)
class _Candidates:
    """Places (``row * columns + column``) and their scores, in no particular order."""

    keys: Tensor
    scores: Tensor

    @classmethod
    def of(cls, codes: Codes, columns: int) -> "_Candidates":
        crow, col, scores = codes
        return cls(row_of_each_entry(crow) * columns + col, scores)

    @classmethod
    def merged(cls, parts: list["_Candidates"]) -> "_Candidates":
        return cls(torch.cat([part.keys for part in parts]), torch.cat([part.scores for part in parts]))

    def by_row(self, rows: int, columns: int) -> Codes:
        """In CSR order."""
        keys, order = self.keys.sort()
        edges = torch.arange(rows + 1, device=keys.device) * columns
        return torch.searchsorted(keys, edges), keys % columns, self.scores[order]

    def by_column(self, rows: int, columns: int) -> Codes:
        """In CSR order of the transpose: column pointers, the row of each entry and its score."""
        row = self.keys // columns
        return _Candidates((self.keys - row * columns) * rows + row, self.scores).by_row(columns, rows)


class _Tile(NamedTuple):
    """Scores that a program computes, how much of d it loads at once, and how it is spread over the hardware."""

    rows: int
    columns: int
    width: int
    warps: int
    stages: int


def _tile(dtype: torch.dtype) -> _Tile:
    if dtype == torch.bfloat16:
        return _Tile(128, 128, 64, warps=8, stages=3)
    if dtype == torch.float32:
        return _Tile(64, 128, 16, warps=8, stages=3)
    return _Tile(64, 64, 16, warps=4, stages=2)


def _operand_type(dtype: torch.dtype) -> tl.dtype:
    # Triton's interpreter multiplies the bits of bfloat16 numbers instead of the numbers (seen in 3.9.0). Products of
    # theirs are exact in float32, so widening them first is the same.
    if dtype == torch.bfloat16 and not triton.knobs.runtime.interpret:
        return tl.bfloat16
    return tl.float64 if dtype == torch.float64 else tl.float32


def _sample_size(population: int) -> int:
    return min(population, max(_SMALLEST_SAMPLE, population // _SAMPLE_SHARE))


def _spread(population: int, sample: int, device: torch.device) -> Tensor:
    """Evenly spaced places: a sample that is the same in every run."""
    return torch.arange(sample, device=device) * population // max(sample, 1)


def _safe_rank(count: int, sample: int, population: int) -> int:
    """A rank in a sample whose score ``count`` of the population reach, but for one time in some thousands."""
    expected = count * sample / max(population, 1)
    return math.ceil(expected + 3 * math.sqrt(expected) + 3)


def _pays(rank: int, sample: int, population: int) -> bool:
    """Whether the sample is small beside the population, and the candidates that it promises are few."""
    return sample * _WORTH <= population and rank * _HOPELESS <= sample


def _in_parts(many: Tensor, bias: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    together = max(1, _SCORED_TOGETHER // max(bias.shape[1], 1))
    return zip(torch.split(many, together), torch.split(bias, together), strict=True)


def _best_of_each(pointers: Tensor, places: Tensor, scores: Tensor, counts: Tensor, total: int) -> Codes:
    """The ``counts[i]`` best (``total`` in all) of each row ``i`` of a matrix in CSR order."""
    firsts = pointers[:-1].contiguous()
    within = Segments(scores, firsts, pointers.diff(), 1).best(counts, total)
    chosen = within + firsts.repeat_interleave(counts, output_size=total)
    return starts_of(counts), places[chosen], scores[chosen]


def _run_collect(operands: list[Tensor], capacity: int) -> tuple[Tensor, Tensor, int]:
    """Keys and scores of the first ``capacity`` candidates, and how many there are."""
    x, weight, bias, floors, limits = operands
    rows, columns, width = x.shape[0], weight.shape[0], x.shape[1]
    keys = torch.empty(capacity, dtype=torch.int64, device=x.device)
    scores = torch.empty(capacity, dtype=bias.dtype, device=x.device)
    found = torch.zeros(1, dtype=torch.int64, device=x.device)
    tile = _tile(x.dtype)
    with on_device_of(x):
        _collect[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
            x,
            weight,
            bias,
            floors,
            limits,
            found,
            keys,
            scores,
            capacity,
            rows,
            columns,
            width,
            OPERAND=_operand_type(x.dtype),
            SUM=tl.float64 if x.dtype == torch.float64 else tl.float32,
            SCORE=tl.float64 if bias.dtype == torch.float64 else tl.float32,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            WIDTH=tile.width,
            GROUP=_GROUP,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return keys, scores, int(found)
