"""The Triton kernels of Adam's step and the projection equal their definition; without a GPU, interpreted."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (`pip install 'apportion[gpu]'`) to run the CUDA kernels")

from apportion.ops import adam_step_, project_rows_
from apportion.ops.adam import cuda, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
NUMBERS = {"lr": 0.03, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3}

SHAPES = {
    "ordinary": (5, 7),
    "a row longer than a part": (2, 1100),
    "width one": (3, 1),
    "no rows": (0, 4),
    "width zero": (3, 0),
}
TOUCHED = {"whole": None, "half": 0.5, "none": 0.0, "all": 1.0}


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    wide = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return wide.to(dtype).to(DEVICE)


def gradient(
    shape: tuple[int, int], touched: float | None, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor | None]:
    if touched is None:
        return numbers(*shape, dtype=dtype, seed=seed), None
    rows = (torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) < touched).nonzero().flatten()
    return numbers(rows.numel(), shape[1], dtype=dtype, seed=seed), rows.to(DEVICE)


def close(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


def both_are_right(shape: tuple[int, int], touched: float | None, dtype: torch.dtype, seed: int) -> None:
    for weight_decay, unit_rows in ((0.0, True), (0.1, False)):
        results = []
        for step in (reference.adam_step_, cuda.adam_step_):
            state = [numbers(*shape, dtype=dtype, seed=seed), *torch.zeros(2, *shape, dtype=dtype, device=DEVICE)]
            for number in (1, 2, 3):
                grad = gradient(shape, touched, dtype, 10 * seed + number)
                step(*state, *grad, number, *NUMBERS.values(), weight_decay, unit_rows)
            results.append(state)
        close(*results, dtype)
    unit = torch.nn.functional.normalize(numbers(*shape, dtype=dtype, seed=seed))
    grad, rows = gradient(shape, touched, dtype, seed)
    found, wanted = grad.clone(), grad.clone()
    reference.project_rows_(wanted, unit, rows)
    cuda.project_rows_(found, unit, rows)
    close([found], [wanted], dtype)


@pytest.mark.parametrize("touched", TOUCHED.values(), ids=TOUCHED.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_kernels_equal_their_definitions_on_every_shape(shape: tuple[int, int], touched: float | None) -> None:
    both_are_right(shape, touched, torch.float32, 0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_kernels_equal_their_definitions_in_every_type(dtype: torch.dtype, seed: int) -> None:
    both_are_right((6, 10), 0.4, dtype, seed)


def test_a_compact_gradient_gives_the_bits_of_the_whole_one() -> None:
    rows = torch.tensor([1, 4], device=DEVICE)
    grad = numbers(2, 7, dtype=torch.float32, seed=0)
    results = []
    for given in ((grad, rows), (grad.new_zeros(6, 7).index_copy_(0, rows, grad), None)):
        state = [numbers(6, 7, dtype=torch.float32, seed=seed) for seed in (1, 2)]
        state.append(state[1].square())
        cuda.adam_step_(*state, *given, 4, *NUMBERS.values(), 0.0, True)
        results.append(state)
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


def test_what_is_not_a_number_is_not_hidden_and_what_is_hardly_one_becomes_zero() -> None:
    tiny = torch.finfo(torch.float32).tiny
    moments = torch.tensor([[2 * tiny, -2 * tiny, tiny, torch.nan]], device=DEVICE)
    state = [torch.ones(1, 4, device=DEVICE), moments.clone(), moments.abs()]
    cuda.adam_step_(*state, torch.zeros(1, 4, device=DEVICE), None, 9, 1e-3, 0.9, 0.9, 1e-8, 0.0, False)
    for moment in state[1:]:
        assert (moment != 0).tolist() == [[True, True, False, True]]
    assert [each.isnan().tolist()[0] for each in state] == [[False, False, False, True]] * 3
    cuda.adam_step_(*state, torch.zeros(1, 4, device=DEVICE), None, 9, 1e-3, 0.9, 0.9, 1e-8, 0.0, True)
    assert state[0].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("touched", [None, 0.3])
def test_the_ops_use_the_kernels_on_cuda_tensors(touched: float | None) -> None:
    shape = (400, 576)
    grad, rows = gradient(shape, touched, torch.float32, 0)
    results = []
    for step in (adam_step_, cuda.adam_step_):
        state = [numbers(*shape, dtype=torch.float32, seed=seed) for seed in (1, 2)]
        state.append(state[1].square())
        step(*state, grad, rows, 4, *NUMBERS.values(), 0.1, True)
        results.append(state)
    assert all(one.equal(other) for one, other in zip(*results, strict=True))
    unit = torch.nn.functional.normalize(numbers(*shape, dtype=torch.float32, seed=3))
    projected = grad.clone()
    project_rows_(projected, unit, rows)
    cuda.project_rows_(grad, unit, rows)
    assert projected.equal(grad)
    torch.library.opcheck(adam_step_, (*results[0], grad, rows, 2, *NUMBERS.values(), 0.1, True))
