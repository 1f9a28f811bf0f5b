"""One array of multiply-add units, register by register and cycle by cycle: what the cycle model of SAT is checked by.

It is slow and knows no formula. Every unit has registers for what comes from the west and from the north; nothing moves
further than to the next unit in a cycle; a sum that was added to cannot be used before the adder's latency is over, and
the machine stops with an error where it would be.
"""

import math

import torch
from torch import Tensor


class Hazard(Exception):
    """A sum was used before it was there."""


def compact(b: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Values and places of the entries that stay: ``[k / m, n, q]``; ``b`` has at most n non-zeros a group."""
    groups = b.reshape(-1, m, b.shape[1])
    places = (groups != 0).long().argsort(dim=1, descending=True, stable=True)[:, :n]
    return groups.gather(1, places), places


def output_stationary(
    a: Tensor, b: Tensor, n: int, m: int, *, rows: int, columns: int, latency: int, interleave: int
) -> tuple[Tensor, int]:
    """The product ``a @ b`` and its cycles: sums stay, tiles share the units in turn, then leave southwards."""
    values, places = compact(b, n, m)
    p, q = a.shape[0], b.shape[1]
    groups = a.reshape(p, -1, m)
    out = torch.zeros(p, q, dtype=a.dtype)
    tiles = [(i, j) for i in range(0, p, rows) for j in range(0, q, columns)]
    clock = 0
    for start in range(0, len(tiles), interleave):
        bundle = tiles[start : start + interleave]
        clock += _sum_bundle(groups, values, places, bundle, out, rows, columns, latency)
    return out, clock


def _sum_bundle(groups, values, places, bundle, out, rows, columns, latency):
    steps = values.shape[0] * values.shape[1]
    turn = max(len(bundle), latency)  # between two additions to the same sum
    from_west = [[None] * columns for _ in range(rows)]
    from_north = [[None] * columns for _ in range(rows)]
    sums = [[[torch.zeros((), dtype=out.dtype) for _ in bundle] for _ in range(columns)] for _ in range(rows)]
    ready = [[[0] * len(bundle) for _ in range(columns)] for _ in range(rows)]

    def sent(clock, lane, fetch):
        """What enters a lane at a cycle: lanes start one cycle after each other."""
        slot = clock - lane
        if not 0 <= slot < steps * turn:
            return None
        step, tile = divmod(slot, turn)
        if tile >= len(bundle):
            return None  # a bubble: too few tiles to hide the latency
        return fetch(step, tile)

    def west(step, tile, row):
        place = bundle[tile][0] + row
        group = groups[place, step // values.shape[1]] if place < len(groups) else torch.zeros_like(groups[0, 0])
        return tile, group

    def north(step, tile, column):
        place = bundle[tile][1] + column
        at = (step // values.shape[1], step % values.shape[1])
        if place >= values.shape[2]:
            return tile, values.new_zeros(()), 0
        return tile, values[(*at, place)], int(places[(*at, place)])

    clock, to_do = 0, rows * columns * steps * len(bundle)
    while True:
        for row in reversed(range(rows)):
            for column in reversed(range(columns)):
                from_west[row][column] = (
                    from_west[row][column - 1] if column else sent(clock, row, lambda s, t, row=row: west(s, t, row))
                )
                from_north[row][column] = (
                    from_north[row - 1][column]
                    if row
                    else sent(clock, column, lambda s, t, column=column: north(s, t, column))
                )
        for row in range(rows):
            for column in range(columns):
                left, above = from_west[row][column], from_north[row][column]
                if (left is None) != (above is None):
                    raise Hazard("operands do not meet")
                if left is None:
                    continue
                (tile, group), (other, value, index) = left, above
                if tile != other:
                    raise Hazard("operands of different tiles meet")
                if clock < ready[row][column][tile]:
                    raise Hazard(f"a sum is used {ready[row][column][tile] - clock} cycles too early")
                to_do -= 1
                sums[row][column][tile] = sums[row][column][tile] + group[index] * value
                ready[row][column][tile] = clock + latency
        clock += 1
        # The first tile leaves once its sums are there and no unit has more to add.
        last = max(ready[row][column][0] for row in range(rows) for column in range(columns))
        if to_do == 0 and clock >= last:
            break
    for tile, (i, j) in enumerate(bundle):
        for row in reversed(range(rows)):  # the southernmost row leaves first
            for column in range(columns):
                if clock < ready[row][column][tile]:
                    raise Hazard("a sum leaves before it is there")
                if i + row < out.shape[0] and j + column < out.shape[1]:
                    out[i + row, j + column] = sums[row][column][tile]
            clock += 1
    return clock


def weight_stationary(
    a: Tensor, b: Tensor, n: int, m: int, *, rows: int, columns: int, hop: int = 1
) -> tuple[Tensor, int]:
    """The product ``a @ b`` and its cycles: a group of weights stays in each unit, partial sums travel southwards."""
    values, places = compact(b, n, m)
    p, q = a.shape[0], b.shape[1]
    groups = a.reshape(p, -1, m)
    out = torch.zeros(p, q, dtype=a.dtype)
    clock = rows * n  # the first tile's weights come in: a row each n cycles
    for first_group in range(0, len(values), rows):
        for first_column in range(0, q, columns):
            clock += _stream_rows(groups, values, places, out, first_group, first_column, rows, columns, n, hop)
    return out, clock


def _stream_rows(groups, values, places, out, first_group, first_column, rows, columns, n, hop):
    """One tile: rows of A pass, each unit takes n cycles for one, while the next tile's weights come in above."""
    p = max(len(groups), rows)  # as many rows as the next weights need, empty ones at the end
    local = [[torch.zeros((), dtype=out.dtype) for _ in range(columns)] for _ in range(rows)]
    travelling = {}  # (row of A, unit's row, column) -> (cycle it arrives there, partial sum)
    clock = left = 0
    while left < p * columns:
        for row in range(rows):
            for column in range(columns):
                slot = clock - row * hop - column
                if not 0 <= slot < p * n:
                    continue
                place, step = divmod(slot, n)
                group, at = first_group + row, first_column + column
                if place < len(groups) and group < len(values) and at < values.shape[2]:
                    index = int(places[group, step, at])
                    local[row][column] = local[row][column] + groups[place, group, index] * values[group, step, at]
                if step < n - 1:
                    continue
                arrival, above = (clock, torch.zeros((), dtype=out.dtype))
                if row:
                    arrival, above = travelling.pop((place, row, column))
                if arrival > clock:
                    raise Hazard("a partial sum comes too late")
                total, local[row][column] = above + local[row][column], torch.zeros((), dtype=out.dtype)
                if row < rows - 1:
                    travelling[place, row + 1, column] = (clock + hop, total)
                    continue
                left += 1
                if place < len(groups) and at < out.shape[1]:
                    out[place, at] += total
        clock += 1
    return clock


def masked_product(p: int, k: int, q: int, n: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random operands, the second with n non-zeros of every m in each column; whole numbers, so that sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-8, 9, (p, k), generator=generator).double()
    b = torch.randint(1, 9, (k, q), generator=generator).double()
    order = torch.rand(math.ceil(k / m), m, q, generator=generator).argsort(dim=1)
    return a, b * (order < n).reshape(k, q)
