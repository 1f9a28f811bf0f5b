"""Encode and allocate on the CPU: a block of scores at a time, of which only candidates remain.

A block is small enough to stay in the cache, so the ``rows x columns`` scores are never written to memory, and a
dictionary of a million features needs no more room than a small one.

Where the processor multiplies bfloat16 natively, float32 scores are first *screened* by a bfloat16 product, which takes
a third of the time. Rounding can move a score only so far: entries that cannot win, however their rounding fell, are
dropped, and the few that are left are computed in float32, which alone decides. So the winners are those of the float32
scores, and each score depends on its own row and column alone. A row that rounding leaves with too many candidates
is multiplied in float32 after all.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, no_type_check

import numba
import numpy as np
import torch
from torch import Tensor

from apportion.ops.csr import csr_sampled_product
from apportion.ops.csr.cpu import transpose
from apportion.ops.csr.reference import row_of_each_entry
from apportion.ops.encode import composed
from apportion.ops.encode.reference import Codes
from apportion.ops.processor import native_bfloat16
from apportion.ops.select.cpu import keep_best, offer
from apportion.ops.threads import matching_threads

# Of a block, of a bfloat16 product and of one in the operands' own type: the fastest of those tried on two cores with
# 32 MiB of cache. Larger products are no faster, and their scores would leave the cache.
_ROUNDED_BLOCK, _PRECISE_BLOCK = (1024, 4096), (2048, 2048)
_CHUNK = 16  # rows that a thread takes at a time
_GROUPS = 256  # of a row's scores, whose best ones bound the row's last winner from below
_SCANNED = 64  # scores looked at together
_CONVERTED = 2048  # rounded rows made wide at a time, to see what was rounded away
# A row of which this many times more entries *may* reach the cut than surely do is multiplied in full precision.
_HOPELESS, _FEW = 4, 64
_DENSE = 16  # where more than one entry in so many wins, recomputing the winners costs more than a float32 product
_SAMPLED_ROWS, _SAMPLED_COLUMNS = 32, 32_768
# Reassociation as in ``csr.cpu``: the order of a sum depends on its length and the machine alone.
_FAST = {"reassoc", "contract", "nsz"}

_scores_memory = 1 << 24


@contextlib.contextmanager
def scores_memory(limit: int) -> Iterator[None]:
    """Let the scores held at a time take at most about ``limit`` bytes (16 MiB by default), on every thread.

    Raises:
        ValueError: a limit below 1.
    """
    global _scores_memory
    if limit < 1:
        raise ValueError(f"limit={limit}: the scores need at least 1 byte; some ten million work well")
    before, _scores_memory = _scores_memory, limit
    try:
        yield
    finally:
        _scores_memory = before


def encode_select(
    x: Tensor, weight: Tensor, bias: Tensor, how: str, count: int, limits: Tensor | None, precision: str, exact: bool
) -> Codes:
    """See ``apportion.ops.encode.encode_select``."""
    x, weight, bias = (each.detach().contiguous() for each in (x, weight, bias))
    codes: Codes | None = None
    with matching_threads():
        if how == "rows":
            counts = torch.full((x.shape[0],), count, dtype=torch.int64)
            codes = _best_of_each(_Product(x, weight, bias, precision, exact), counts)
        elif how == "columns" and limits is not None:
            # The best rows of a column are the best columns of a row of the transposed product.
            product = _Product(weight, x, bias.new_zeros(x.shape[0]), precision, exact)
            codes = _transposed(_best_of_each(product, limits), bias, x.shape[0])
        elif how == "total":
            if count * _DENSE <= x.shape[0] * weight.shape[0]:
                codes = _best_of_all(_Product(x, weight, bias, precision, exact), count)
        elif how == "above" and limits is not None:
            product = _Product(x, weight, bias, precision, exact)
            codes = _decided(product, _reaching(product, limits.contiguous().numpy()), limits)
        else:
            raise composed.impossible(how, limits)
    if codes is None:
        # Hardly anything loses, or scores overflow or are NaN, so that nothing bounds them.
        return composed.encode_select(x, weight, bias, how, count, limits, precision, exact)
    crow, col, values = codes
    if precision == "bfloat16" and not exact:
        values = _recomputed(x, weight, bias, crow, col)
    return crow, col, values


class _Block(NamedTuple):
    """Scores without bias of some rows and columns, and how far they may lie from those of the float32 operands.

    The bound of an entry is ``norms[row] * loose[column] + unit * |score|``, or ``norms[row] * tight[column]`` in rows
    that are ``precise``.
    """

    first_row: int
    first_column: int
    scores: np.ndarray
    norms: np.ndarray
    loose: np.ndarray
    tight: np.ndarray
    unit: float
    precise: np.ndarray


class _Product:
    """``x @ weight.T + bias``, block by block.

    Attributes:
        bounded: whether scores are only known up to their bound, so that candidates are computed again.
        may_give_up: whether that is so for the sake of speed only.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, precision: str, exact: bool) -> None:
        self.x, self.weight, self.bias = x, weight, bias
        self.rounded = precision == "bfloat16" or (x.dtype == torch.float32 and bool(native_bfloat16()))
        self.bounded = exact or (self.rounded and precision != "bfloat16")
        self.may_give_up = self.rounded and not exact
        self._only_precise = False
        self._norms = torch.zeros(x.shape[0], dtype=x.dtype)
        self._residue = 0.0
        if self.rounded:
            self._rounded_x = x.bfloat16()
        if self.bounded and x.shape[0]:
            squares, residues = _squares(x, self._rounded_x if self.rounded else x)
            # The norm of (x, 1): the bias counts as one more product.
            self._norms = (1.01 * squares + 1).sqrt()
            self._residue = float((residues / squares.clamp(min=torch.finfo(x.dtype).tiny)).max().sqrt())

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the scores."""
        return self.x.shape[0], self.weight.shape[0]

    def give_up_screening(self, first: _Block) -> None:
        """From the first block on, every score is computed in full and holds as it is."""
        self._only_precise = True
        self.bounded = False
        first.loose[:] = first.tight[:] = 0

    def blocks(self) -> Iterator[_Block]:
        """All blocks, one at a time in the same memory: columns from first to last, for each the rows in order."""
        (rows, columns), dtype = self.shape, self.x.dtype
        most_rows, most_columns = _ROUNDED_BLOCK if self.rounded else _PRECISE_BLOCK
        width = max(1, min(columns, most_columns, _scores_memory // dtype.itemsize))
        height = max(1, min(rows, most_rows, _scores_memory // (dtype.itemsize * width)))
        scores = torch.empty(height * width, dtype=dtype)
        halves = torch.empty(height * width if self.rounded else 0, dtype=torch.bfloat16)
        for start in range(0, columns, width):
            weight = self.weight[start : start + width]
            size = weight.shape[0]
            rounded = weight.bfloat16() if self.rounded else weight
            loose, tight = self._bounds(weight, rounded, self.bias[start : start + width])
            for first in range(0, rows, height):
                x = self.x[first : first + height]
                precise = self._only_precise or not self.rounded
                block = scores[: x.shape[0] * size].view(x.shape[0], size)
                if precise:
                    torch.mm(x, weight.T, out=block)
                else:
                    half = halves[: x.shape[0] * size].view(x.shape[0], size)
                    torch.mm(self._rounded_x[first : first + height], rounded.T, out=half)
                    block.copy_(half)
                yield _Block(
                    first,
                    start,
                    block.numpy(),
                    self._norms[first : first + height].numpy(),
                    loose.numpy(),
                    tight.numpy(),
                    # The product itself is rounded to bfloat16, too.
                    2.0**-8 if self.bounded and not precise else 0.0,
                    np.full(x.shape[0], precise),
                )

    def make_precise(self, block: _Block, rows: np.ndarray) -> None:
        """Multiply these rows of a block again, in the operands' own type."""
        start, size = block.first_column, block.scores.shape[1]
        x = self.x[torch.from_numpy(rows) + block.first_row]
        block.scores[rows] = torch.mm(x, self.weight[start : start + size].T).numpy()
        block.precise[rows] = True

    def _bounds(self, weight: Tensor, rounded: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Each column's part of the bound: of a product of rounded operands, and of one of the operands themselves.

        A sum of d products is off by at most ``(d + 2) u`` times the product of the norms (Higham, *Accuracy and
        Stability of Numerical Algorithms*, section 3.1), with u the unit roundoff; the product and what it is compared
        with both err, hence twice that. What rounding the operands changes is bounded by Cauchy and Schwarz from the
        norms of what was rounded away.
        """
        if not self.bounded:
            return torch.zeros_like(bias), torch.zeros_like(bias)
        squares, residues = _squares(weight, rounded)
        norms = (1.01 * squares + bias.square()).sqrt()
        unit = torch.finfo(weight.dtype if not self.rounded else torch.float32).eps / 2
        tight = norms * (1.01 * 2 * (weight.shape[1] + 2) * unit)
        return tight + 1.01 * (residues.sqrt() + self._residue * norms), tight


class _Candidates(NamedTuple):
    """Entries in CSR order that may reach their cut, with bounds of their scores."""

    crow: Tensor
    col: Tensor
    lower: Tensor
    upper: Tensor


_Piece = tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # first row; counts by row; col, lower and upper


def _best_of_each(product: _Product, counts: Tensor) -> Codes | None:
    """The ``counts[i]`` best of each row ``i``: a row keeps its best so far, which few entries of a block reach."""
    rows = counts.numel()
    starts = torch.zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(counts, dim=0, out=starts[1:])
    values = torch.empty(int(starts[-1]), dtype=product.x.dtype)
    col = torch.empty(int(starts[-1]), dtype=torch.int64)
    sizes = np.zeros(rows, np.int64)
    winners = starts.numpy(), sizes, values.numpy(), col.numpy()
    operands = product.x.numpy(), product.weight.numpy(), product.bias.numpy()
    if values.numel():
        for block in product.blocks():
            everyone = np.arange(block.scores.shape[0])
            hopeless = np.zeros(everyone.size, np.bool_)
            _offer_rows(*block, everyone, *operands, product.bounded, *winners, hopeless)
            if hopeless.any():
                again = everyone[hopeless]
                product.make_precise(block, again)
                _offer_rows(*block, again, *operands, product.bounded, *winners, hopeless)
        if (sizes < counts.numpy()).any():
            return None
        _in_column_order(winners[0], winners[2], winners[3])
    return starts, col, values


def _best_of_all(product: _Product, count: int) -> Codes | None:
    """The ``count`` best of all: what reaches a cut estimated from a sample, if that is enough, ranked exactly."""
    rows, columns = product.shape
    if count == 0:
        return torch.zeros(rows + 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64), product.x.new_empty(0)
    for cut in _cuts(product, count):
        found = _reaching(product, np.full(columns, cut, dtype=product.bias.numpy().dtype))
        if found.col.numel() < count:
            continue
        floor = _best(found.lower, count)
        crow, col, values = _decided(product, _kept(found, found.upper >= floor), None)
        last_winner = _best(values, count)
        if last_winner > cut:
            # Whatever was not found lies at or below the cut, and so below the last winner.
            return _ranked(crow, col, values, last_winner, count)
    return None


def _cuts(product: _Product, count: int) -> Iterator[float]:
    """Cuts to try, from tight to one that everything reaches."""
    rows, columns = product.shape
    picked = torch.arange(0, rows, max(1, rows // _SAMPLED_ROWS))
    stride = max(1, columns // _SAMPLED_COLUMNS)
    weight, bias = product.weight[::stride], product.bias[::stride]
    sample = torch.addmm(bias, product.x[picked], weight.T).flatten()
    rank = count / (rows * columns) * sample.numel()
    for share in (1.5, 6.0):
        place = int(share * rank + 4 * rank**0.5 + 4)
        if place < sample.numel():
            yield _best(sample, place)
    yield -np.inf


def _reaching(product: _Product, cuts: np.ndarray) -> _Candidates:
    """Every entry whose score may lie above its column's cut."""
    rows = product.shape[0]
    bias = product.bias.numpy()
    pieces: list[_Piece] = []
    for block in product.blocks():
        height, width = block.scores.shape
        columns = slice(block.first_column, block.first_column + width)
        everyone, counts, sure = np.arange(height), np.zeros(height, np.int64), np.zeros(height, np.int64)
        _count_reaching(*block, everyone, bias[columns], cuts[columns], counts, sure)
        if product.bounded and not block.precise.all():
            if product.may_give_up and not pieces and sure.sum() * _DENSE > block.scores.size:
                product.give_up_screening(block)
            hopeless = (counts > _HOPELESS * sure + _FEW) | (not product.bounded)
            if hopeless.any():
                again = everyone[hopeless]
                product.make_precise(block, again)
                _count_reaching(*block, again, bias[columns], cuts[columns], counts, sure)
        ends = np.cumsum(counts)
        found = np.empty(ends[-1], np.int64), np.empty(ends[-1], bias.dtype), np.empty(ends[-1], bias.dtype)
        _gather_reaching(*block, bias[columns], cuts[columns], ends, *found)
        pieces.append((block.first_row, counts, *found))
        # Its scores would otherwise stay until everything is joined.
        del block
    return _joined(pieces, rows, product.x.dtype)


def _joined(pieces: list[_Piece], rows: int, dtype: torch.dtype) -> _Candidates:
    """Pieces in the order of blocks as one matrix in CSR order."""
    crow = np.zeros(rows + 1, np.int64)
    for first, counts, *_ in pieces:
        crow[1 + first : 1 + first + counts.size] += counts
    np.cumsum(crow, out=crow)
    cursor = crow[:-1].copy()
    col = torch.empty(int(crow[-1]), dtype=torch.int64)
    lower, upper = torch.empty(col.numel(), dtype=dtype), torch.empty(col.numel(), dtype=dtype)
    for first, counts, *found in pieces:
        _place(cursor[first : first + counts.size], counts, *found, col.numpy(), lower.numpy(), upper.numpy())
    return _Candidates(torch.from_numpy(crow), col, lower, upper)


def _decided(product: _Product, found: _Candidates, limits: Tensor | None) -> Codes:
    """Candidates with their scores; with ``limits`` only those that truly lie above them."""
    if not product.bounded:
        return found.crow, found.col, found.lower
    values = _recomputed(product.x, product.weight, product.bias, found.crow, found.col)
    if limits is None:
        return found.crow, found.col, values
    return composed.kept(found.crow, found.col, values, values > limits[found.col])


def _recomputed(x: Tensor, weight: Tensor, bias: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    """Scores in full precision, each by its own row and column alone."""
    products: Tensor = csr_sampled_product(crow, col, x, weight)
    return products + bias[col]


def _kept(found: _Candidates, keep: Tensor) -> _Candidates:
    crow, col, lower = composed.kept(found.crow, found.col, found.lower, keep)
    return _Candidates(crow, col, lower, found.upper[keep])


def _best(values: Tensor, rank: int) -> float:
    """The ``rank``-th largest."""
    array = values.numpy()
    return float(np.partition(array, array.size - rank)[array.size - rank])


def _ranked(crow: Tensor, col: Tensor, values: Tensor, last_winner: float, count: int) -> Codes:
    """The ``count`` best, whose last one's score is known; equal ones in order."""
    array = values.numpy()
    kept = keep_best(crow.numpy(), col.numpy(), array, array.dtype.type(last_winner), count)
    kept_crow, kept_col, kept_values = (torch.from_numpy(each) for each in kept)
    return kept_crow, kept_col, kept_values


def _squares(full: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's squared norm (the larger one of the two), and that of what rounding took away."""
    squares, residues = full.new_empty(full.shape[0]), full.new_empty(full.shape[0])
    for start in range(0, full.shape[0], _CONVERTED):
        part = slice(start, start + _CONVERTED)
        again = rounded[part].to(full.dtype)
        _row_squares(full[part].numpy(), again.numpy(), squares[part].numpy(), residues[part].numpy())
    return squares, residues


def _transposed(codes: tuple[Tensor, Tensor, Tensor] | None, bias: Tensor, columns: int) -> Codes | None:
    """Codes in CSR order, transposed, with each row's bias added."""
    if codes is None:
        return None
    crow, col, values = codes
    values = values + bias[row_of_each_entry(crow)]
    pointers, rows, places = transpose(crow.numpy(), col.numpy(), columns)
    return torch.from_numpy(pointers), torch.from_numpy(rows), values[torch.from_numpy(places)]


@numba.njit(parallel=True, fastmath=_FAST, cache=True)
@no_type_check
def _row_squares(full, rounded, squares, residues):
    for row in numba.prange(full.shape[0]):
        ours, theirs = full[row], rounded[row]
        square = full.dtype.type(0)
        rounded_square = full.dtype.type(0)
        residue = full.dtype.type(0)
        for j in range(ours.shape[0]):
            square += ours[j] * ours[j]
            rounded_square += theirs[j] * theirs[j]
            residue += (ours[j] - theirs[j]) * (ours[j] - theirs[j])
        squares[row] = max(square, rounded_square)
        residues[row] = residue


@numba.njit(parallel=True, cache=True)
@no_type_check
def _count_reaching(
    first_row, first_column, scores, norms, loose, tight, unit, precise, rows, bias, cuts, counts, sure
):
    """How many entries of each row may, and how many surely do, lie above their column's cut."""
    unit = scores.dtype.type(unit)
    for place in numba.prange(rows.shape[0]):
        row = rows[place]
        ours, norm = scores[row], norms[row]
        bounds, own_unit = (tight, scores.dtype.type(0)) if precise[row] else (loose, unit)
        found, certain = np.int32(0), np.int32(0)
        for j in range(ours.shape[0]):
            bound = norm * bounds[j] + own_unit * abs(ours[j])
            above = ours[j] + bias[j]
            found += above + bound > cuts[j]
            certain += above - bound > cuts[j]
        counts[row] = found
        sure[row] = certain


@numba.njit(parallel=True, cache=True)
@no_type_check
def _gather_reaching(
    first_row, first_column, scores, norms, loose, tight, unit, precise, bias, cuts, ends, col, lower, upper
):
    """The entries that `_count_reaching` has counted, with their bounds; a row's end before ``ends[row]``."""
    unit = scores.dtype.type(unit)
    width = scores.shape[1]
    for chunk in numba.prange((scores.shape[0] + _CHUNK - 1) // _CHUNK):
        above = np.empty(width, scores.dtype)
        found = np.empty(width, np.int64)
        for row in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, scores.shape[0])):
            ours, norm = scores[row], norms[row]
            bounds, own_unit = (tight, scores.dtype.type(0)) if precise[row] else (loose, unit)
            for j in range(width):
                above[j] = np.float32(ours[j] + bias[j] + (norm * bounds[j] + own_unit * abs(ours[j])) > cuts[j])
            count = _at_least(above, scores.dtype.type(1), found)
            for each in range(count):
                j = found[each]
                entry = ends[row] - count + each
                bound = norm * bounds[j] + own_unit * abs(ours[j])
                score = ours[j] + bias[j]
                col[entry] = first_column + j
                lower[entry] = score - bound
                upper[entry] = score + bound


@numba.njit(parallel=True, cache=True)
@no_type_check
def _place(cursor, counts, piece_col, piece_lower, piece_upper, col, lower, upper):
    """Copy a piece's rows to where they belong, and move the cursor behind them."""
    starts = np.cumsum(counts) - counts
    for row in numba.prange(counts.shape[0]):
        source, target = starts[row], cursor[row]
        for entry in range(counts[row]):
            col[target + entry] = piece_col[source + entry]
            lower[target + entry] = piece_lower[source + entry]
            upper[target + entry] = piece_upper[source + entry]
        cursor[row] += counts[row]


@numba.njit(fastmath=_FAST, cache=True)
@no_type_check
def _bounds_of_row(scores, bias, norm, bounds, unit, upper, best):
    """Fill in upper bounds of a row's scores, and the best lower bound in each group of every so many columns."""
    width, groups = scores.shape[0], best.shape[0]
    best[:] = -np.inf
    for first in range(0, width, groups):
        # Slices, since LLVM does not vectorise what may index from the end.
        ours, theirs = scores[first : first + groups], bias[first : first + groups]
        parts, above = bounds[first : first + groups], upper[first : first + groups]
        for group in range(ours.shape[0]):
            bound = norm * parts[group] + unit * abs(ours[group])
            score = ours[group] + theirs[group]
            above[group] = score + bound
            below = score - bound
            best[group] = below if below > best[group] else best[group]


@numba.njit(cache=True)
@no_type_check
def _last_of_best(values, count, heap):
    """The ``count``-th largest value, by a heap of the largest so far."""
    for place in range(count):
        child, value = place, values[place]
        while child > 0 and value < heap[(child - 1) // 2]:
            heap[child] = heap[(child - 1) // 2]
            child = (child - 1) // 2
        heap[child] = value
    for place in range(count, values.shape[0]):
        value = values[place]
        if value <= heap[0]:
            continue
        parent, child = 0, 1
        while child < count:
            if child + 1 < count and heap[child + 1] < heap[child]:
                child += 1
            if heap[child] >= value:
                break
            heap[parent] = heap[child]
            parent, child = child, 2 * child + 1
        heap[parent] = value
    return heap[0]


@numba.njit(cache=True)
@no_type_check
def _at_least(values, floor, found):
    """List in ``found`` where values are at least ``floor``; how many there are."""
    count, width = 0, values.shape[0]
    for first in range(0, width, _SCANNED):
        stretch = values[first : first + _SCANNED]
        # Most stretches have none, and to see that takes a few vector instructions.
        here = np.int32(0)
        for j in range(stretch.shape[0]):
            here += stretch[j] >= floor
        if here > 0:
            for j in range(stretch.shape[0]):
                if stretch[j] >= floor:
                    found[count] = first + j
                    count += 1
    return count


@numba.njit(parallel=True, fastmath=_FAST, cache=True)
@no_type_check
def _offer_rows(
    first_row, first_column, scores, norms, loose, tight, unit, precise, rows,
    x, weight, bias, bounded, starts, sizes, values, col, hopeless,
):  # fmt: skip
    """Offer every row's candidates of a block to the row's winners so far; leave hopeless rows alone and mark them."""
    width = scores.shape[1]
    groups = min(width, _GROUPS)
    unit = scores.dtype.type(unit)
    bias = bias[first_column : first_column + width]
    for chunk in numba.prange((rows.shape[0] + _CHUNK - 1) // _CHUNK):
        upper = np.empty(width, scores.dtype)
        best = np.empty(groups, scores.dtype)
        heap = np.empty(groups, scores.dtype)
        candidates = np.empty(width, np.int64)
        for place in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, rows.shape[0])):
            row = rows[place]
            start, stop = starts[first_row + row], starts[first_row + row + 1]
            capacity = stop - start
            size = sizes[first_row + row]
            if capacity == 0:
                continue
            bounds, own_unit = (tight, scores.dtype.type(0)) if precise[row] else (loose, unit)
            _bounds_of_row(scores[row], bias, norms[row], bounds, own_unit, upper, best)
            if size == capacity:
                floor = values[start]
            elif 2 * capacity <= groups:
                # The best of all groups are different entries: the last winner is no worse than the capacity-th best.
                floor = _last_of_best(best, capacity, heap)
            else:
                floor = scores.dtype.type(-np.inf)
            found = _at_least(upper, floor, candidates)
            if bounded and not precise[row] and found > 2 * _HOPELESS * capacity + _FEW:
                hopeless[row] = True
                continue
            for each in range(found):
                value = upper[candidates[each]]
                column = first_column + candidates[each]
                if size == capacity and value < values[start]:
                    continue
                if bounded:
                    theirs, ours = weight[column], x[first_row + row]
                    total = scores.dtype.type(0)
                    for j in range(ours.shape[0]):
                        total += ours[j] * theirs[j]
                    value = total + bias[candidates[each]]
                if size < capacity or value > values[start]:
                    size = offer(values[start:stop], col[start:stop], size, capacity, value, column)
            sizes[first_row + row] = size


@numba.njit(parallel=True, cache=True)
@no_type_check
def _in_column_order(starts, values, col):
    for row in numba.prange(starts.shape[0] - 1):
        start, stop = starts[row], starts[row + 1]
        order = np.argsort(col[start:stop])
        values[start:stop] = values[start:stop][order]
        col[start:stop] = col[start:stop][order]
