"""Encode and allocate when the scores would not fit in memory: features in tiles, of which only candidates remain.

Each tile's winners are found as if it were alone; then they compete with those of the tiles before it. For ``above``
and ``columns`` a feature's winners do not depend on other features at all. For ``rows`` and ``total`` a candidate that
has ``count`` better ones among the tiles so far is dropped for good, so that few more than the winners are ever kept.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from apportion.ops.csr.reference import row_of_each_entry
from apportion.ops.encode import composed

Codes = tuple[Tensor, Tensor, Tensor]  # crow_indices, col_indices, values

_scores_memory = 1 << 30


@contextlib.contextmanager
def scores_memory(limit: int) -> Iterator[None]:
    """Let the scores of a batch take at most about ``limit`` bytes at a time (1 GiB by default), on every thread.

    Raises:
        ValueError: a limit below 1.
    """
    global _scores_memory
    if limit < 1:
        raise ValueError(f"limit={limit}: the scores need at least 1 byte; a few hundred million work well")
    before, _scores_memory = _scores_memory, limit
    try:
        yield
    finally:
        _scores_memory = before


def encode_select(
    x: Tensor, weight: Tensor, bias: Tensor, how: str, count: int, limits: Tensor | None, precision: str, exact: bool
) -> Codes:
    """See ``apportion.ops.encode.encode_select``."""
    rows, columns = x.shape[0], weight.shape[0]
    width = max(1, _scores_memory // max(1, rows * x.element_size()))
    if width >= columns:
        return composed.encode_select(x, weight, bias, how, count, limits, precision, exact)
    best = _Best(rows, columns, count) if how == "total" else None
    kept: list[Codes] = []
    for start in range(0, columns, width):
        tile = slice(start, min(start + width, columns))
        own_limits = None if limits is None else limits[tile]
        size = tile.stop - tile.start
        if best is not None:
            if best.cut is None:
                wanted = min(count, rows * size)
                part = composed.encode_select(x, weight[tile], bias[tile], "total", wanted, None, precision, False)
            else:
                # Ties with the cut stay in: a later tile may hold one that comes first, in a lower row.
                below = torch.nextafter(best.cut, best.cut.new_tensor(-torch.inf)).expand(size)
                part = composed.encode_select(x, weight[tile], bias[tile], "above", 0, below, precision, False)
            best.add(part, start)
            continue
        wanted = min(count, size)
        crow, col, values = composed.encode_select(
            x, weight[tile], bias[tile], how, wanted, own_limits, precision, exact
        )
        kept.append((crow, col + start, values))
        if how == "rows":
            kept = [_best_of_rows(kept, count)]
    return best.codes() if best is not None else _side_by_side(kept)


class _Best:
    """The ``count`` best entries so far, with all that tie with the last of them."""

    def __init__(self, rows: int, columns: int, count: int) -> None:
        self.rows, self.columns, self.count = rows, columns, count
        self.cut: Tensor | None = None
        self.places: Tensor | None = None
        self.values: Tensor | None = None

    def add(self, tile: Codes, start: int) -> None:
        crow, col, values = tile
        places = row_of_each_entry(crow) * self.columns + (col + start)
        if self.values is not None and self.places is not None:
            values, places = torch.cat([self.values, values]), torch.cat([self.places, places])
        if 0 < self.count <= values.numel():
            self.cut = values.kthvalue(values.numel() - self.count + 1).values
            keep = values >= self.cut
            values, places = values[keep], places[keep]
        self.values, self.places = values, places

    def codes(self) -> Codes:
        """In the order of rows and columns, which is also the order in which ties win."""
        assert self.values is not None
        assert self.places is not None
        order = self.places.argsort()
        places, values = self.places[order], self.values[order]
        if self.cut is not None:
            ties = values == self.cut
            wins = values > self.cut
            wins |= ties & (ties.cumsum(0) <= self.count - wins.sum())
            places, values = places[wins], values[wins]
        row = places // self.columns
        return _pointers(row, self.rows), places - row * self.columns, values


def _best_of_rows(parts: list[Codes], count: int) -> Codes:
    """The ``count`` best of each row among tiles that each give every row the same number."""
    rows = parts[0][0].numel() - 1
    crow, col, values = parts[0]
    if len(parts) > 1:
        col = torch.cat([each[1].view(rows, -1) if rows else each[1].view(0, 0) for each in parts], dim=1)
        values = torch.cat([each[2].view(rows, -1) if rows else each[2].view(0, 0) for each in parts], dim=1)
        # Columns ascend from tile to tile, so a stable sort lets the lower column win a tie.
        best = values.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
        col, values = col.gather(1, best), values.gather(1, best)
        crow = torch.arange(rows + 1, device=col.device) * best.shape[1]
    return crow, col.reshape(-1), values.reshape(-1)


def _side_by_side(parts: list[Codes]) -> Codes:
    """Tiles next to each other: rows joined, columns ascending."""
    if len(parts) == 1:
        return parts[0]
    rows = parts[0][0].numel() - 1
    row = torch.cat([row_of_each_entry(crow) for crow, _, _ in parts])
    order = row.argsort(stable=True)
    col, values = (torch.cat([part[which] for part in parts])[order] for which in (1, 2))
    return _pointers(row, rows), col, values


def _pointers(row: Tensor, rows: int) -> Tensor:
    crow = torch.zeros(rows + 1, dtype=torch.int64, device=row.device)
    torch.cumsum(torch.bincount(row, minlength=rows), dim=0, out=crow[1:])
    return crow
