"""The encode of the CPU: blocks of scores win what the whole wins, and screening by bfloat16 drops no winner."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apportion.ops import encode_select
from apportion.ops.encode import composed, cpu, reference
from apportion.ops.encode.cpu import scores_memory
from apportion.ops.encode.reference import Codes

HOWS = ["rows", "total", "columns", "above"]


@pytest.fixture(params=["screened", "unscreened"], autouse=True)
def screening(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor is taken for one that multiplies bfloat16 natively; torch imitates it where it is not."""
    screened = request.param == "screened"
    monkeypatch.setattr(cpu, "native_bfloat16", lambda: ("avx512_bf16",) if screened else ())
    return screened


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


Problem = tuple[Tensor, Tensor, Tensor]
ROWS, COLUMNS, WIDTH = 70, 700, 48


def plain(generator: torch.Generator) -> Problem:
    return (
        torch.randn(ROWS, WIDTH, generator=generator),
        torch.randn(COLUMNS, WIDTH, generator=generator),
        torch.randn(COLUMNS, generator=generator),
    )


def near_ties(generator: torch.Generator) -> Problem:
    """Families of features that differ by less than bfloat16 can tell."""
    x, weight, bias = plain(generator)
    weight = weight[: COLUMNS // 7].repeat_interleave(7, dim=0) + 1e-4 * torch.randn(
        COLUMNS, WIDTH, generator=generator
    )
    return x, weight, 1e-4 * bias


def sinks(generator: torch.Generator) -> Problem:
    """Some rows a thousand times as long, some empty, and features of every length."""
    x, weight, bias = plain(generator)
    x[::9] *= 1000
    x[4::9] = 0
    return x, weight * torch.logspace(-3, 2, COLUMNS)[:, None], bias


def hidden(generator: torch.Generator) -> Problem:
    """Rows whose length lies where no feature looks: rounding them moves scores by more than the scores differ."""
    x, weight, bias = plain(generator)
    weight[:, :4] = 1e-6
    x[:, :4] = 1e4 * (1 + 0.003 * torch.rand(ROWS, 4, generator=generator))
    return x, weight, 0.01 * bias


def first_rows_are_different(generator: torch.Generator) -> Problem:
    """Hardly any of the rows that the cut of all winners is estimated from has a winner, or all winners are there."""
    x, weight, bias = plain(generator)
    scale = torch.full((ROWS, 1), 0.01)
    scale[:: max(1, ROWS // 32)] = float(torch.randint(0, 2, (1,), generator=generator)) * 50
    return x * scale, weight, 0.001 * bias


PROBLEMS = [plain, near_ties, sinks, hidden, first_rows_are_different]


def asked(how: str) -> tuple[int, Tensor | None]:
    if how == "rows":
        return 9, None
    if how == "total":
        return 5 * ROWS, None
    if how == "columns":
        return 0, torch.arange(COLUMNS) % 11
    limits = torch.linspace(5, 30, COLUMNS)
    limits[0], limits[1] = torch.inf, -torch.inf
    return 0, limits


def wide_scores(problem: Problem) -> Tensor:
    x, weight, bias = (each.double() for each in problem)
    return x @ weight.T + bias


def loses_nothing(codes: Codes, problem: Problem, how: str) -> None:
    """Every loser's true score is at most the worst winner's beside it, up to the rounding of float32."""
    scores = wide_scores(problem)
    x, weight, _ = problem
    rounding = 2e-6 * (1 + x.norm(dim=1).double()[:, None]) * (1 + weight.norm(dim=1).double())
    crow, col, values = codes
    rows = torch.repeat_interleave(crow.diff())
    assert bool(((values.double() - scores[rows, col]).abs() <= rounding[rows, col]).all())
    won = torch.zeros_like(scores, dtype=torch.bool)
    won[rows, col] = True
    count, limits = asked(how)
    if limits is not None and how == "above":
        assert bool((scores[won] > (limits.double() - rounding)[won]).all())
        assert bool((scores[~won] <= (limits.double() + rounding)[~won]).all())
        return
    sizes = {"rows": won.sum(dim=1), "columns": won.sum(dim=0), "total": won.sum()}[how]
    wanted = limits if limits is not None else torch.full_like(sizes, count)
    assert sizes.equal(wanted)
    dims = {"rows": (1,), "columns": (0,), "total": (0, 1)}[how]
    worst_winner = (scores + rounding).masked_fill(~won, torch.inf).amin(dim=dims, keepdim=True)
    assert bool((scores - rounding <= worst_winner)[~won].all())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_float32_winners_are_the_best(
    problem: Callable[[torch.Generator], Problem], how: str, exact: bool, seed: int
) -> None:
    parts = problem(torch.Generator().manual_seed(seed))
    loses_nothing(encode_select(*parts, how, *asked(how), "float32", exact), parts, how)


@pytest.mark.parametrize("how", HOWS)
def test_winners_do_not_depend_on_blocks(how: str) -> None:
    parts = near_ties(torch.Generator().manual_seed(0))
    whole = encode_select(*parts, how, *asked(how), "float32", True)
    for bytes_ in (400, 4_000, 40_000):
        with scores_memory(bytes_):
            for ours, theirs in zip(encode_select(*parts, how, *asked(how), "float32", True), whole, strict=True):
                assert ours.equal(theirs)


def test_bounds_hold_whatever_is_rounded(screening: bool) -> None:
    for problem in PROBLEMS:
        for seed in range(3):
            parts = problem(torch.Generator().manual_seed(seed))
            product = cpu._Product(*parts, "float32", True)
            scores = wide_scores(parts) - parts[2].double()
            for block in product.blocks():
                rows = slice(block.first_row, block.first_row + block.scores.shape[0])
                columns = slice(block.first_column, block.first_column + block.scores.shape[1])
                found = torch.from_numpy(block.scores).double()
                part = torch.from_numpy(block.tight if block.precise[0] else block.loose).double()
                bound = torch.from_numpy(block.norms).double()[:, None] * part + block.unit * found.abs()
                error = (found - scores[rows, columns]).abs()
                assert bool((error <= bound).all())
                if screening and problem is plain:
                    # A bound ten times too wide would drop nothing, and nobody would notice but by the clock.
                    assert float((error / bound).max()) > 0.1


def watch(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a dense detour is taken."""
    taken = {"precise rows": 0, "whole": 0, "given up": 0}
    make_precise, give_up, whole = cpu._Product.make_precise, cpu._Product.give_up_screening, composed.choose

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            taken[name] += len(arguments[2]) if name == "precise rows" else 1
            return function(*arguments)

        return call

    monkeypatch.setattr(cpu._Product, "make_precise", counted("precise rows", make_precise))
    monkeypatch.setattr(cpu._Product, "give_up_screening", counted("given up", give_up))
    monkeypatch.setattr(composed, "choose", counted("whole", whole))
    return taken


def test_usual_scores_take_no_detour(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = watch(monkeypatch)
    parts = plain(torch.Generator().manual_seed(0))
    for how in HOWS:
        count, limits = asked(how)
        limits = torch.full((COLUMNS,), 15.0) if how == "above" else limits
        encode_select(*parts, how, count, limits, "float32", False)
    assert taken == {"precise rows": 0, "whole": 0, "given up": 0}


@pytest.mark.parametrize("how", ["rows", "total", "above"])  # a column of so few rows is never hopeless
def test_rows_that_bfloat16_cannot_tell_apart_are_multiplied_in_full(
    how: str, screening: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = watch(monkeypatch)
    parts = hidden(torch.Generator().manual_seed(0))
    count, limits = asked(how)
    limits = torch.full((COLUMNS,), 15.0) if how == "above" else limits
    encode_select(*parts, how, count, limits, "float32", True)
    assert (taken["precise rows"] > 0) == screening


def test_where_most_win_screening_is_given_up(screening: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = watch(monkeypatch)
    parts = plain(torch.Generator().manual_seed(0))
    with scores_memory(40_000):
        codes = encode_select(*parts, "above", 0, torch.zeros(COLUMNS), "float32", False)
    assert taken["given up"] == int(screening)
    wanted = wide_scores(parts) > 0
    assert abs(int(codes[0][-1]) - int(wanted.sum())) <= 2


@pytest.mark.parametrize("too_few", [1, 3, 20])
def test_a_cut_that_too_few_truly_reach_is_not_believed(too_few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Long rows have wide bounds: theirs seem to reach a cut that entries of short rows, which are better, miss.
    x, weight, _ = plain(torch.Generator().manual_seed(0))
    x[::2] *= torch.logspace(0, 1, x[::2].shape[0])[:, None]
    x[::2, : WIDTH // 2] = 0
    weight[:, WIDTH // 2 :] *= 0.3
    parts = x, weight, torch.zeros(COLUMNS)
    count = ROWS * 5
    monkeypatch.setattr(cpu, "_cuts", lambda product, count: iter([-float("inf")]))
    wanted = encode_select(*parts, "total", count, None, "float32", True)
    cut = wanted[2].sort(descending=True).values[count - too_few].item()
    monkeypatch.setattr(cpu, "_cuts", lambda product, count: iter([cut, -float("inf")]))
    found = encode_select(*parts, "total", count, None, "float32", True)
    assert found[0].equal(wanted[0])
    assert found[1].equal(wanted[1])


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 3e38])
def test_weights_that_break_the_bounds_give_as_many_winners_of_the_matrix(how: str, wrong: float) -> None:
    # What they win matters to nobody (training stops at the loss); but places outside the matrix would end the process.
    x, weight, bias = plain(torch.Generator().manual_seed(0))
    weight[::3] = wrong
    count, limits = asked(how)
    crow, col, _ = encode_select(x, weight, bias, how, count, limits, "float32", False)
    assert crow.shape == (ROWS + 1,)
    assert int(crow[-1]) == col.numel()
    assert bool(((col >= 0) & (col < COLUMNS)).all())
    wanted = {"rows": ROWS * count, "total": count, "columns": int(asked("columns")[1].sum())}
    assert col.numel() == wanted.get(how, col.numel())
