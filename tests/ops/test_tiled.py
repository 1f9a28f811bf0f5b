"""Features in tiles win what they win all at once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from apportion.ops import encode_select
from apportion.ops.encode import reference, scores_memory

HOWS = ["rows", "total", "columns", "above"]


def choice(how: str, rows: int, columns: int, much: bool) -> tuple[int, Tensor | None]:
    if how == "rows":
        return (columns if much else 3), None
    if how == "total":
        return (rows * columns - 1 if much else 2 * rows), None
    if how == "columns":
        return 0, torch.arange(columns) % (rows + 1)
    return 0, torch.linspace(-2, 2, columns, dtype=torch.float64)


@pytest.mark.parametrize("much", [False, True])
@pytest.mark.parametrize("tile", [1, 2, 5, 23])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_tiles_win_what_the_whole_wins(how: str, tile: int, much: bool, ties: bool, exact: bool) -> None:
    rows, columns, width = 9, 23, 4
    generator = torch.Generator().manual_seed(tile)
    shapes = (rows, width), (columns, width), (columns,)
    draw: Any = torch.randn
    if ties:
        draw = lambda *shape, **more: torch.randint(-2, 3, shape, **more).double()  # noqa: E731
        parts = [draw(*shape, generator=generator) for shape in shapes]
    else:
        parts = [draw(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    wanted = reference.encode_select(*parts, how, *choice(how, rows, columns, much))
    with scores_memory(tile * rows * 8):
        found = encode_select(*parts, how, *choice(how, rows, columns, much), "float32", exact)
    assert found[0].equal(wanted[0])
    assert found[1].equal(wanted[1])
    torch.testing.assert_close(found[2], wanted[2])


@pytest.mark.parametrize("how", HOWS)
def test_no_rows_and_no_winners(how: str) -> None:
    weight, bias = torch.randn(7, 3), torch.randn(7)
    limits = torch.zeros(7, dtype=torch.int64) if how == "columns" else torch.full((7,), torch.inf)
    with scores_memory(8):
        for rows in (0, 2):
            crow, col, values = encode_select(torch.randn(rows, 3), weight, bias, how, 0, limits, "float32", False)
            assert crow.tolist() == [0] * (rows + 1)
            assert col.numel() == values.numel() == 0


@pytest.mark.parametrize("how", HOWS)
def test_gradients_do_not_see_the_tiles(how: str) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(6, 4), torch.randn(11, 4), torch.randn(11)]
    count, limits = choice(how, 6, 11, much=False)
    limits = limits.float() if how == "above" and limits is not None else limits

    def gradients() -> tuple[Tensor, ...]:
        leaves = [each.clone().requires_grad_() for each in parts]
        values = encode_select(*leaves, how, count, limits, "float32", False)[2]
        return torch.autograd.grad(values.square().sum(), leaves)

    whole = gradients()
    with scores_memory(6 * 4 * 3):
        torch.testing.assert_close(gradients(), whole)


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="limit=0"), scores_memory(0):
        pass
