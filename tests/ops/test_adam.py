"""A step of Adam in one pass is torch's, by a whole or a compact gradient, and the projection is its definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from apportion.ops import adam_step_, project_rows_
from apportion.ops.adam import cpu, reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
# Larger steps than anybody takes, so that a wrong one shows.
NUMBERS = {"lr": 0.03, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3}

SHAPES = {
    "ordinary": (7, 5),
    "more rows than a block, odd width": (131, 67),
    "one row": (1, 300),
    "width one": (70, 1),
    "no rows": (0, 4),
    "width zero": (3, 0),
}
# Which rows have a gradient; None is the whole matrix.
TOUCHED = {"whole": None, "half": 0.5, "few": 0.1, "none": 0.0, "all": 1.0}


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def numbers(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def gradient(
    shape: tuple[int, int], touched: float | None, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """A gradient, and the rows that it is of."""
    if touched is None:
        return numbers(*shape, dtype=dtype, generator=generator), None
    rows = (torch.rand(shape[0], generator=generator) < touched).nonzero().flatten()
    return numbers(rows.numel(), shape[1], dtype=dtype, generator=generator), rows


def written_out(grad: Tensor, rows: Tensor | None, shape: tuple[int, int]) -> Tensor:
    return grad if rows is None else grad.new_zeros(shape).index_copy_(0, rows, grad)


def five_steps(step: Any, shape: tuple[int, int], touched: float | None, dtype: torch.dtype, seed: int, **more: Any):
    generator = torch.Generator().manual_seed(seed)
    state = [numbers(*shape, dtype=dtype, generator=generator), *torch.zeros(2, *shape, dtype=dtype)]
    for number in range(1, 6):
        step(*state, *gradient(shape, touched, dtype, generator), number, *NUMBERS.values(), *more.values())
    return state


def by_torch(
    shape: tuple[int, int], touched: float | None, dtype: torch.dtype, seed: int, weight_decay: float, unit_rows: bool
) -> list[Tensor]:
    """The same by torch's own optimiser and a normalisation after it."""
    generator = torch.Generator().manual_seed(seed)
    param = torch.nn.Parameter(numbers(*shape, dtype=dtype, generator=generator))
    betas = NUMBERS["beta1"], NUMBERS["beta2"]
    optimizer = torch.optim.Adam(
        [param], lr=NUMBERS["lr"], betas=betas, eps=NUMBERS["eps"], weight_decay=weight_decay, foreach=False
    )
    for _ in range(5):
        param.grad = written_out(*gradient(shape, touched, dtype, generator), shape)
        optimizer.step()
        if unit_rows:
            param.data.div_(param.data.norm(dim=1, keepdim=True).clamp(min=1e-12))
    return [param.detach(), optimizer.state[param]["exp_avg"], optimizer.state[param]["exp_avg_sq"]]


def close(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("touched", TOUCHED.values(), ids=TOUCHED.keys())
def test_several_steps_are_those_of_torch(
    touched: float | None, weight_decay: float, unit_rows: bool, seed: int, dtype: torch.dtype
) -> None:
    more = {"weight_decay": weight_decay, "unit_rows": unit_rows}
    wanted = by_torch((70, 33), touched, dtype, seed, **more)
    for step in (reference.adam_step_, adam_step_):
        close(five_steps(step, (70, 33), touched, dtype, seed, **more), wanted, dtype)


@pytest.mark.parametrize("touched", TOUCHED.values(), ids=TOUCHED.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_kernel_equals_the_reference_on_every_shape(
    shape: tuple[int, int], touched: float | None, dtype: torch.dtype
) -> None:
    for more in ({"weight_decay": 0.0, "unit_rows": False}, {"weight_decay": 0.1, "unit_rows": True}):
        wanted = five_steps(reference.adam_step_, shape, touched, dtype, 3, **more)
        close(five_steps(cpu.adam_step_, shape, touched, dtype, 3, **more), wanted, dtype)


def test_a_compact_gradient_gives_the_bits_of_the_whole_one() -> None:
    shape, generator = (200, 17), torch.Generator().manual_seed(0)
    grad, rows = gradient(shape, 0.3, torch.float32, generator)
    start = [numbers(*shape, dtype=torch.float32, generator=generator) for _ in range(2)]
    start.append(start[1].square())
    results = []
    for given in ((grad, rows), (written_out(grad, rows, shape), None)):
        state = [each.clone() for each in start]
        adam_step_(*state, *given, 4, *NUMBERS.values(), 0.0, True)
        results.append(state)
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


def test_rows_without_a_gradient_go_on_with_their_momentum() -> None:
    param, mean, square = torch.zeros(3, 2), torch.ones(3, 2), torch.ones(3, 2)
    adam_step_(
        param, mean, square, torch.empty(0, 2), torch.empty(0, dtype=torch.int64), 1, 0.1, 0.9, 0.9, 1e-8, 0, False
    )
    assert (param < 0).all()
    torch.testing.assert_close(mean, torch.full((3, 2), 0.9))


@pytest.mark.parametrize("unit_rows", [False, True])
def test_rows_have_unit_norm_only_if_asked_to(unit_rows: bool, dtype: torch.dtype) -> None:
    param, *_ = five_steps(adam_step_, (9, 40), 0.5, dtype, 0, weight_decay=0.0, unit_rows=unit_rows)
    distance = (param.norm(dim=1) - 1).abs()
    assert bool((distance < 1e-6).all()) == unit_rows


def test_a_row_of_zeros_stays_one() -> None:
    state = [torch.zeros(2, 3) for _ in range(3)]
    adam_step_(*state, torch.zeros(2, 3), None, 1, *NUMBERS.values(), 0.0, True)
    assert not any(bool(each.any()) for each in state)


def test_what_is_not_a_number_is_not_hidden() -> None:
    for wrong in (torch.nan, torch.inf):
        param, mean, square = torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, 2)
        adam_step_(param, mean, square, torch.tensor([[wrong, 1.0]]), None, 1, *NUMBERS.values(), 0.0, True)
        assert param.isnan().all()
        assert not mean[0, 0].isfinite()
        assert not square[0, 0].isfinite()


def test_moments_too_small_for_a_normal_number_become_zero() -> None:
    for dtype in TOLERANCE:
        tiny = torch.finfo(dtype).tiny
        moments = torch.tensor([[2 * tiny, -2 * tiny, tiny, -tiny]], dtype=dtype)
        param, mean, square = torch.ones(1, 4, dtype=dtype), moments.clone(), moments.abs()
        adam_step_(param, mean, square, torch.zeros_like(param), None, 9, 1e-3, 0.9, 0.9, 1e-8, 0.0, False)
        assert (mean != 0).tolist() == (square != 0).tolist() == [[True, True, False, False]]


def test_more_threads_change_no_bit() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(five_steps(adam_step_, (300, 33), 0.3, torch.float32, 0, weight_decay=0.0, unit_rows=True))
    finally:
        torch.set_num_threads(before)
    assert all(one.equal(two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("touched", TOUCHED.values(), ids=TOUCHED.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_projection_leaves_nothing_along_the_rows(
    shape: tuple[int, int], touched: float | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(5)
    unit = torch.nn.functional.normalize(numbers(*shape, dtype=dtype, generator=generator))
    grad, rows = gradient(shape, touched, dtype, generator)
    of_rows = unit if rows is None else unit[rows]
    wanted, found = grad.clone(), grad.clone()
    reference.project_rows_(wanted, unit, rows)
    project_rows_(found, unit, rows)
    close([found], [wanted], dtype)
    close([found], [grad - (grad * of_rows).sum(dim=1, keepdim=True) * of_rows], dtype)
    assert bool(((found * of_rows).sum(dim=1).abs() < 1e-5).all())


def state_of(*shape: int, **more: Any) -> list[Tensor]:
    return [torch.ones(*shape, **more) for _ in range(4)]


def test_strided_gradients_are_fine_and_other_strided_matrices_refused() -> None:
    rows = torch.tensor([0, 0, 2, 0])[::2]
    found, wanted = state_of(4, 3), state_of(4, 3)
    grad = torch.randn(3, 2).T
    adam_step_(*found[:3], grad, rows, 1, *NUMBERS.values(), 0.0, False)
    adam_step_(*wanted[:3], grad.contiguous(), rows.contiguous(), 1, *NUMBERS.values(), 0.0, False)
    assert all(one.equal(other) for one, other in zip(found, wanted, strict=True))
    for place, name in enumerate(("param", "exp_avg", "exp_avg_sq")):
        state = state_of(4, 3)
        state[place] = torch.ones(3, 4).T
        with pytest.raises(ValueError, match=f"{name} has strides"):
            adam_step_(*state, None, 1, *NUMBERS.values(), 0.0, False)
    with pytest.raises(ValueError, match="grad has strides"):
        project_rows_(torch.ones(3, 4).T, torch.ones(4, 3), None)
    project_rows_(grad.contiguous(), torch.ones(3, 4).T, rows)


def test_what_does_not_fit_is_refused() -> None:
    def step(*tensors: Any) -> None:
        adam_step_(*tensors, 1, *NUMBERS.values(), 0.0, False)

    with pytest.raises(TypeError, match="param is bfloat16"):
        step(*state_of(4, 3, dtype=torch.bfloat16), None)
    with pytest.raises(ValueError, match=r"exp_avg is float64 \(4, 3\), but param is float32"):
        step(torch.ones(4, 3), torch.ones(4, 3).double(), *state_of(4, 3)[:2], None)
    with pytest.raises(ValueError, match=r"grad has shape \(3, 3\) for 4 rows"):
        step(*state_of(4, 3)[:3], torch.ones(3, 3), None)
    with pytest.raises(ValueError, match=r"grad has shape \(3, 3\) for 2 rows"):
        step(*state_of(4, 3)[:3], torch.ones(3, 3), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="grad is float64"):
        step(*state_of(4, 3)[:3], torch.ones(4, 3).double(), None)
    with pytest.raises(ValueError, match="give two dimensions"):
        step(*state_of(4), None)
    with pytest.raises(ValueError, match="grad_rows goes from 0 to 4: there are 4 rows"):
        project_rows_(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 4]))


@pytest.mark.parametrize("rows", [None, [0, 3], []])
def test_the_ops_keep_torch_librarys_contract(rows: list[int] | None) -> None:
    places = None if rows is None else torch.tensor(rows, dtype=torch.int64)
    grad = torch.randn(4 if rows is None else len(rows), 3)
    state = [torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3)]
    torch.library.opcheck(adam_step_, (*state, grad, places, 2, *NUMBERS.values(), 0.1, True))
    torch.library.opcheck(project_rows_, (grad, state[0], places))
