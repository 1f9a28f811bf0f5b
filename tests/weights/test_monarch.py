"""Monarch matrices against explicit block-diagonal and permutation matrices, and the projection against brute force."""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies
from scipy.linalg import dft, hadamard
from torch import Tensor

from apportion.errors import InputError
from apportion.weights.monarch import (
    MonarchFactors,
    MonarchLinear,
    materialise,
    multiply,
    project,
    projection_error,
)
from apportion.weights.monarch_shape import MonarchShape

# The sheet's shapes, then padding on both sides, blocks that do not divide q, a block without rank, one block.
SHAPES = [
    MonarchShape(16, 16, 4, 4, 16),
    MonarchShape(64, 96, 4, 4, 64),
    MonarchShape(36, 60, 3, 2, 18),
    MonarchShape(13, 17, 4, 3, 12),
    MonarchShape(10, 7, 3, 5, 15),
    MonarchShape(6, 9, 3, 2, 6),
    MonarchShape(22, 10, 4, 4, 12),
    MonarchShape(9, 5, 1, 1, 5),
]


def _draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _factors(shape: MonarchShape, dtype: torch.dtype = torch.float64, seed: int = 0) -> MonarchFactors:
    return MonarchFactors(_draw(*shape.first, dtype=dtype, seed=seed), _draw(*shape.second, dtype=dtype, seed=seed + 1))


def _stride_permutation(rows: int, columns: int) -> Tensor:
    """P with (P x)[j * rows + i] = x[i * columns + j]: the transpose of a matrix that was written row by row."""
    permutation = torch.zeros(rows * columns, rows * columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            permutation[j * rows + i, i * columns + j] = 1
    return permutation


def _by_definition(factors: MonarchFactors, shape: MonarchShape) -> Tensor:
    """P2 L P1 R as four explicit matrices."""
    first, second = (torch.block_diag(*factor) for factor in factors)
    gather = _stride_permutation(shape.read, shape.out_blocks)
    interleave = _stride_permutation(shape.out_blocks, shape.out_width)
    return (interleave @ second @ gather @ first)[: shape.out_features, : shape.in_features]


def _entry(factors: MonarchFactors, shape: MonarchShape, row: int, column: int) -> float:
    """The sheet's formula of one entry, l dividing q."""
    (s, b), (k, p) = divmod(row, shape.out_blocks), divmod(column, shape.in_width)
    rho = shape.taken // shape.out_blocks
    return sum(
        float(factors.second[b, s, k * rho + t] * factors.first[k, t * shape.out_blocks + b, p]) for t in range(rho)
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_that_of_block_diagonals_and_permutations(shape: MonarchShape) -> None:
    factors = _factors(shape)
    explicit = _by_definition(factors, shape)
    torch.testing.assert_close(materialise(factors, shape), explicit)
    layer = _layer(shape, factors)
    torch.testing.assert_close(layer.weight, explicit)
    # Few rows and many go different ways.
    for rows in ((2, 3), (5, 7)):
        x = _draw(*rows, shape.in_features, seed=5)
        torch.testing.assert_close(layer(x), x @ explicit.T + layer.bias)
        torch.testing.assert_close(layer.to_linear()(x), layer(x))


def _layer(shape: MonarchShape, factors: MonarchFactors | None = None) -> MonarchLinear:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer = MonarchLinear(shape.in_features, shape.out_features, shape=shape, dtype=torch.float64)
    if factors is not None:
        with torch.no_grad():
            layer.first.copy_(factors.first)
            layer.second.copy_(factors.second)
    return layer


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]], ids=str)
def test_an_entry_is_the_sum_that_the_paper_gives(shape: MonarchShape) -> None:
    factors = _factors(shape)
    dense = materialise(factors, shape)
    for row, column in ((0, 0), (5, 7), (shape.out_features - 1, 3), (11, shape.in_features - 1)):
        assert float(dense[row, column]) == pytest.approx(_entry(factors, shape, row, column), abs=1e-12)


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients_are_right(dtype: torch.dtype, rows: int) -> None:
    shape = MonarchShape(6, 9, 3, 2, 6)
    first, second = (each.requires_grad_() for each in _factors(shape, dtype))
    x = _draw(rows, shape.padded_in, dtype=dtype, seed=9).requires_grad_()
    assert torch.autograd.gradcheck(multiply, (x, first, second))


def test_an_empty_batch_and_a_single_row_pass() -> None:
    layer = MonarchLinear(10, 7, nblocks=3)
    assert layer(torch.zeros(0, 10)).shape == (0, 7)
    assert layer(torch.zeros(2, 0, 10)).shape == (2, 0, 7)
    assert layer(torch.zeros(10)).shape == (7,)


# --- projection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_projection_leaves_the_tails_and_projects_itself_onto_itself(
    shape: MonarchShape, dtype: torch.dtype
) -> None:
    weight = _draw(shape.out_features, shape.in_features, dtype=dtype)
    nearest = materialise(project(weight, shape), shape)
    tail = 0.0
    for k in range(shape.in_blocks):
        for b in range(shape.out_blocks):
            block = weight[b :: shape.out_blocks, k * shape.in_width : (k + 1) * shape.in_width]
            rank = sum(j // shape.taken == k and j % shape.out_blocks == b for j in range(shape.middle))
            tail += float(torch.linalg.svdvals(block)[rank:].square().sum())
    assert float((weight - nearest).norm()) == pytest.approx(math.sqrt(tail), rel=1e-10)
    assert projection_error(weight, shape) == pytest.approx(math.sqrt(tail), rel=1e-10)
    torch.testing.assert_close(materialise(project(nearest, shape), shape), nearest, rtol=0, atol=1e-10)


def test_a_monarch_matrix_is_projected_onto_itself() -> None:
    for shape in SHAPES:
        dense = materialise(_factors(shape), shape)
        torch.testing.assert_close(materialise(project(dense, shape), shape), dense, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("n", "m", "nblocks"), [(12, 12, 4), (12, 20, 4), (13, 7, 3), (8, 8, 1)])
def test_full_rank_gives_the_weight_itself(n: int, m: int, nblocks: int) -> None:
    shape = MonarchShape.of(n, m, nblocks=nblocks, rank=-(-min(n, m) // nblocks))
    weight = _draw(m, n)
    torch.testing.assert_close(materialise(project(weight, shape), shape), weight, rtol=0, atol=1e-10)


def _alternating_least_squares(weight: Tensor, shape: MonarchShape, seed: int) -> float:
    """The error that a random start reaches by fitting each factor in turn, by a least-squares solve of all of it.

    Knows nothing of blocks or singular values: the matrix is linear in each factor, and the linear map is found by
    putting in unit factors.
    """
    first, second = _factors(shape, seed=seed)
    for _ in range(200):
        for turn in (0, 1):
            changed = (first, second)[turn]
            columns = []
            for unit in torch.eye(changed.numel(), dtype=torch.float64):
                given = (unit.view_as(first), second) if turn == 0 else (first, unit.view_as(second))
                columns.append(_by_definition(MonarchFactors(*given), shape).flatten())
            solved = torch.linalg.lstsq(torch.stack(columns, dim=1), weight.flatten(), driver="gelsd").solution
            if turn == 0:
                first = solved.view_as(first)
            else:
                second = solved.view_as(second)
    return float((weight - _by_definition(MonarchFactors(first, second), shape)).norm())


@pytest.mark.parametrize("shape", [MonarchShape(4, 4, 2, 2, 4), MonarchShape(4, 5, 2, 3, 6)], ids=str)
def test_no_alternating_least_squares_beats_the_projection(shape: MonarchShape) -> None:
    weight = _draw(shape.out_features, shape.in_features, seed=4)
    least = projection_error(weight, shape)
    reached = [_alternating_least_squares(weight, shape, seed) for seed in range(4)]
    assert min(reached) >= least - 1e-9
    assert min(reached) == pytest.approx(least, rel=1e-3), "brute force gets there: both look at the same class"


@hypothesis.given(
    sizes=strategies.tuples(*[strategies.integers(1, 12)] * 2),
    blocks=strategies.tuples(*[strategies.integers(1, 4)] * 2),
    seed=strategies.integers(0, 100),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_no_perturbation_of_the_factors_is_nearer(sizes: tuple[int, int], blocks: tuple[int, int], seed: int) -> None:
    in_blocks, out_blocks = min(blocks[0], sizes[0]), min(blocks[1], sizes[1])
    shape = MonarchShape(*sizes, in_blocks, out_blocks, math.lcm(in_blocks, out_blocks))
    weight = _draw(sizes[1], sizes[0], seed=seed)
    first, second = project(weight, shape)
    least = float((weight - materialise(MonarchFactors(first, second), shape)).norm())
    assert least == pytest.approx(projection_error(weight, shape), abs=1e-9)
    for trial in range(100):
        size = 10.0 ** -(trial % 4)
        moved = [each + size * _draw(*each.shape, seed=seed + 7 * trial + 1) for each in (first, second)]
        assert float((weight - materialise(MonarchFactors(*moved), shape)).norm()) >= least - 1e-9


def test_singular_values_are_shared_out_evenly() -> None:
    shape = MonarchShape.of(12, 8, nblocks=2, rank=2)
    first, second = project(_draw(8, 12), shape)
    # Number j between the factors is row j of the first and column (j // l) of block j % l of the second.
    for j in range(shape.middle):
        row = first.reshape(shape.middle, -1)[j]
        column = second[j % shape.out_blocks, :, j // shape.out_blocks]
        assert float(row.norm()) == pytest.approx(float(column.norm()))


def test_half_precision_is_decomposed_in_single_and_comes_back_as_it_was() -> None:
    shape = MonarchShape.of(16, 8, nblocks=2)
    weight = _draw(8, 16).to(torch.bfloat16)
    found = project(weight, shape)
    assert {each.dtype for each in found} == {torch.bfloat16}
    wanted = project(weight.float(), shape)
    torch.testing.assert_close(found.first, wanted.first.to(torch.bfloat16))


def test_the_fourier_matrix_is_monarch_after_a_permutation_of_its_inputs() -> None:
    n, root = 64, 8
    fourier = torch.from_numpy(dft(n))
    shape = MonarchShape.square(n)
    order = torch.arange(n).view(root, root).T.flatten()
    assert projection_error(fourier[:, order], shape) < 1e-10 * n
    assert projection_error(fourier, shape) ** 2 > 0.8 * float(fourier.norm()) ** 2


def test_hadamard_matrices_are_monarch_and_circulants_are_not() -> None:
    shape = MonarchShape.square(64)
    assert projection_error(torch.from_numpy(hadamard(64)).double(), shape) < 1e-10
    column = _draw(64)
    circulant = torch.stack([column.roll(i) for i in range(64)], dim=1)
    assert projection_error(circulant, shape) > 0.3 * float(circulant.norm())


def test_a_monarch_matrix_is_of_full_rank_though_its_blocks_are_not() -> None:
    shape = MonarchShape.square(64)
    assert torch.linalg.matrix_rank(materialise(_factors(shape), shape)) == 64


# --- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "k", "rho"), [(64, 96, 4, 4), (96, 64, 4, 2), (13, 10, 3, 1), (30, 30, 5, 6)])
def test_parameters_and_flops_are_those_of_k_l_rho_times_s_and_p(n: int, m: int, k: int, rho: int) -> None:
    shape = MonarchShape.of(n, m, nblocks=k, rank=rho)
    p, s = math.ceil(n / k), math.ceil(m / k)
    layer = MonarchLinear(n, m, nblocks=k, rank=rho)
    assert shape.parameters == k * k * rho * (s + p) == layer.first.numel() + layer.second.numel()
    assert shape.flops(rows=3) == 6 * k * k * rho * (s + p)
    assert (shape.ranks == rho).all()


def test_the_default_shape_is_the_published_one() -> None:
    assert MonarchShape.of(576, 1536).density == pytest.approx(0.34375)
    assert MonarchShape.of(512, 512).density == 0.5
    wide, narrow = MonarchShape.of(10, 30), MonarchShape.of(30, 10)
    assert (wide.first, wide.second) == ((4, 3, 3), (4, 8, 3))
    assert (narrow.first, narrow.second) == ((4, 3, 8), (4, 3, 3))


def test_a_square_of_blocks_has_two_n_sqrt_n_parameters() -> None:
    shape = MonarchShape.square(64)
    assert (shape.first, shape.second) == ((8, 8, 8), (8, 8, 8))
    assert shape.parameters == 2 * 64 * 8
    assert MonarchShape.square(12).in_blocks == 3


def test_a_prime_warns_that_nothing_is_saved() -> None:
    with pytest.warns(UserWarning, match="features=13 is a prime"):
        shape = MonarchShape.square(13)
    assert projection_error(_draw(13, 13), shape) < 1e-10
    assert shape.density > 1


@torch.no_grad()
def test_the_start_is_the_published_one_and_can_match_a_linear_layer() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 256)
    dense = torch.nn.Linear(256, 256, bias=False)(x).std()
    published = MonarchLinear(256, 256, bias=False)
    assert float(published.first.detach().abs().max()) == pytest.approx(1 / 8, rel=1e-2)
    assert float(published(x).std() / dense) == pytest.approx(3**-0.5, rel=0.1)
    assert float(MonarchLinear(256, 256, bias=False, match_linear=True)(x).std() / dense) == pytest.approx(1, rel=0.1)
    assert float(MonarchLinear(16, 256).bias.detach().abs().max()) <= 1 / 16


def test_a_layer_from_a_linear_one_keeps_dtype_bias_and_whether_it_is_trained() -> None:
    dense = torch.nn.Linear(13, 10, dtype=torch.float64).eval()
    dense.bias.requires_grad_(False)
    before = torch.get_rng_state()
    layer = MonarchLinear.from_linear(dense, nblocks=2, rank=5)
    assert torch.equal(before, torch.get_rng_state()), "nothing is drawn"
    x = _draw(4, 13)
    torch.testing.assert_close(layer(x), dense(x))
    assert (layer.first.requires_grad, layer.bias.requires_grad, layer.training) == (True, False, False)
    assert layer.bias is not dense.bias
    back = layer.to_linear()
    assert (back.weight.requires_grad, back.bias.requires_grad, back.training) == (True, False, False)


def test_a_layer_shows_what_it_is() -> None:
    assert "blocks=4x4, middle=16, 50.0% of dense" in repr(MonarchLinear(16, 16))


def test_complex_layers_work() -> None:
    layer = MonarchLinear(9, 6, nblocks=3, dtype=torch.complex64)
    x = _draw(5, 9, dtype=torch.complex64)
    torch.testing.assert_close(layer(x), layer.to_linear()(x))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 8, 2, 3, 4), "middle=4 is not a multiple of out_blocks=3"),
        ((8, 8, 3, 2, 4), "middle=4 is not a multiple of in_blocks=3"),
        ((8, 8, 9, 2, 18), "in_blocks=9 is more than in_features=8"),
        ((8, 4, 2, 5, 10), "out_blocks=5 is more than out_features=4"),
        ((8, 8, 2, 2, 20), "gives blocks of rank 5, but blocks of 4 x 4 have no more than 4: take middle=16"),
        ((8, 8, 2, 2, 0), "middle=0"),
        ((0, 8, 2, 2, 4), "in_features=0"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MonarchShape(*sizes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nblocks": 9}, "nblocks=9 is more than the smaller of in_features=8 and out_features=12: take at most 8"),
        ({"nblocks": 0}, "nblocks=0"),
        ({"rank": 3}, r"rank=3 cannot work: blocks of 3 x 2 have rank 1 to 2"),
        ({"rank": 0}, "rank=0"),
        ({"dtype": torch.int32}, "dtype is of torch.int32"),
        ({"shape": MonarchShape.of(8, 8)}, "but the layer has 8 inputs, 12 outputs"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MonarchLinear(8, 12, **arguments)


def test_what_cannot_be_projected_is_refused() -> None:
    shape = MonarchShape.of(8, 12)
    with pytest.raises(InputError, match=r"weight has shape \[8, 12\].*MonarchShape.of\(12, 8\)"):
        project(torch.zeros(8, 12), shape)
    with pytest.raises(InputError, match="weight has entries that are not finite"):
        project(torch.full((12, 8), math.nan), shape)
    with pytest.raises(InputError, match="features=0"):
        MonarchShape.square(0)
    integers = torch.nn.Linear(8, 12)
    integers.weight = torch.nn.Parameter(torch.zeros(12, 8, dtype=torch.int64), requires_grad=False)
    with pytest.raises(InputError, match=r"weight is of torch\.int64"):
        MonarchLinear.from_linear(integers)


def test_factors_and_inputs_of_other_sizes_are_refused() -> None:
    shape = MonarchShape.of(8, 12)
    factors = _factors(shape)
    with pytest.raises(InputError, match=r"factors.first has shape \[4, 2, 2\]"):
        materialise(factors, MonarchShape.of(16, 12))
    with pytest.raises(ValueError, match=r"makes 8 numbers and second .* reads 4"):
        multiply(torch.zeros(1, 8).double(), factors.first, factors.second[..., :1])
    with pytest.raises(ValueError, match="x has 7 columns"):
        multiply(torch.zeros(1, 7).double(), *factors)
    with pytest.raises(ValueError, match="the input has 7 features: this layer wants in_features=8"):
        MonarchLinear(8, 12)(torch.zeros(1, 7))
