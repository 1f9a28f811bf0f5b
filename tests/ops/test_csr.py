"""The three sparse products equal their definition, forward and backward, on every shape and type."""

import pytest
import torch
from torch import Tensor

from apportion.ops import csr_matmul, csr_sampled_product, csr_transposed_matmul
from apportion.ops.csr import reference, touched_columns

# Unit roundoffs of the result, with room for sums in another order.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

SHAPES = {
    "ordinary": (7, 11, 5, 0.4),
    "one row": (1, 9, 4, 0.5),
    "one column": (6, 1, 3, 0.5),
    "one wide row of everything": (1, 40, 33, 1.0),
    "everything won": (5, 6, 7, 1.0),
    "nothing won": (5, 6, 7, 0.0),
    "no rows": (0, 6, 7, 0.5),
    "width one": (8, 9, 1, 0.4),
    "width zero": (3, 4, 0, 0.5),
    "odd width beyond a vector": (13, 29, 67, 0.2),
}


def places(rows: int, columns: int, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random CSR places; with a share between 0 and 1 some rows stay empty."""
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share
    if 0 < share < 1 and rows > 2:
        mask[1] = False
    crow = torch.zeros(rows + 1, dtype=torch.int64)
    crow[1:] = mask.sum(dim=1).cumsum(0)
    return crow, mask.nonzero()[:, 1].contiguous()


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense_matrix(crow: Tensor, col: Tensor, values: Tensor, columns: int) -> Tensor:
    """The sparse matrix written out."""
    matrix = values.new_zeros(crow.numel() - 1, columns)
    matrix[reference.row_of_each_entry(crow), col] = values
    return matrix


def close(actual: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Equal to the float64 result up to the rounding of ``dtype``, relative to the size of the numbers summed."""
    assert actual.dtype == dtype
    assert actual.shape == wanted.shape
    torch.testing.assert_close(actual.double(), wanted, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@pytest.fixture(params=[0, 1, 2], ids=lambda seed: f"seed {seed}")
def seed(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def case(request: pytest.FixtureRequest, seed: int) -> tuple[Tensor, Tensor, int, int, int]:
    rows, columns, width, share = request.param
    return *places(rows, columns, share, seed), rows, columns, width


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


Case = tuple[Tensor, Tensor, int, int, int]


def test_the_references_are_dense_products(case: Case) -> None:
    crow, col, rows, columns, width = case
    values, left, right = numbers(col.numel()), numbers(rows, width), numbers(columns, width, seed=2)
    matrix = dense_matrix(crow, col, values, columns)
    at_places = (left @ right.T)[reference.row_of_each_entry(crow), col]
    torch.testing.assert_close(reference.csr_matmul(crow, col, values, right), matrix @ right)
    torch.testing.assert_close(reference.csr_transposed_matmul(crow, col, values, left, columns), matrix.T @ left)
    torch.testing.assert_close(reference.csr_sampled_product(crow, col, left, right), at_places)


def test_matmul_equals_its_reference(case: Case, dtype: torch.dtype) -> None:
    crow, col, _, columns, width = case
    values, dense = numbers(col.numel(), dtype=dtype), numbers(columns, width, dtype=dtype, seed=2)
    wanted = reference.csr_matmul(crow, col, values.double(), dense.double())
    close(csr_matmul(crow, col, values, dense), wanted, dtype)


def test_transposed_matmul_equals_its_reference(case: Case, dtype: torch.dtype) -> None:
    crow, col, rows, columns, width = case
    values, dense = numbers(col.numel(), dtype=dtype), numbers(rows, width, dtype=dtype, seed=2)
    wanted = reference.csr_transposed_matmul(crow, col, values.double(), dense.double(), columns)
    close(csr_transposed_matmul(crow, col, values, dense, columns), wanted, dtype)


def test_sampled_product_equals_its_reference(case: Case, dtype: torch.dtype) -> None:
    crow, col, rows, columns, width = case
    left, right = numbers(rows, width, dtype=dtype), numbers(columns, width, dtype=dtype, seed=2)
    wanted = reference.csr_sampled_product(crow, col, left.double(), right.double())
    close(csr_sampled_product(crow, col, left, right), wanted, dtype)


def gradients(function, inputs: list[Tensor]) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [each.clone().requires_grad_() for each in inputs]
    out = function(*leaves)
    return list(torch.autograd.grad(out, leaves, numbers(*out.shape, dtype=out.dtype, seed=9)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_equal_those_of_the_references(case: Case, dtype: torch.dtype) -> None:
    crow, col, rows, columns, width = case
    values = numbers(col.numel(), dtype=dtype)
    left, right = numbers(rows, width, dtype=dtype), numbers(columns, width, dtype=dtype, seed=2)
    for op, definition, inputs in (
        (csr_matmul, reference.csr_matmul, [values, right]),
        (csr_transposed_matmul, reference.csr_transposed_matmul, [values, left]),
        (csr_sampled_product, reference.csr_sampled_product, [left, right]),
    ):
        tail = (columns,) if op is csr_transposed_matmul else ()
        ours = gradients(lambda *both, op=op, tail=tail: op(crow, col, *both, *tail), inputs)
        wide = [each.double() for each in inputs]
        theirs = gradients(lambda *both, op=definition, tail=tail: op(crow, col, *both, *tail), wide)
        # The upstream gradient is rounded to the type as well, hence once more the tolerance.
        for actual, wanted in zip(ours, theirs, strict=True):
            assert actual.dtype == dtype
            tolerance = 3 * TOLERANCE[dtype]
            torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=10 * tolerance)


def test_a_sparse_gradient_holds_the_bits_of_the_rows_that_were_used(case: Case, dtype: torch.dtype) -> None:
    crow, col, _, columns, width = case
    inputs = [numbers(col.numel(), dtype=dtype), numbers(columns, width, dtype=dtype, seed=2)]
    whole = gradients(lambda values, dense: csr_matmul(crow, col, values, dense), inputs)
    found = gradients(lambda values, dense: csr_matmul(crow, col, values, dense, True), inputs)
    assert found[0].equal(whole[0])
    assert found[1].layout == torch.sparse_coo
    assert found[1].is_coalesced()
    assert found[1].sparse_dim() == 1
    assert found[1].indices()[0].equal(col.unique())
    assert found[1].to_dense().equal(whole[1])


def test_a_sparse_gradient_takes_no_memory_for_other_rows() -> None:
    # The whole one would take 8 TB.
    values = numbers(2, dtype=torch.float32)
    crow, col = torch.tensor([0, 2]), torch.tensor([5, 10**9])
    found = touched_columns(crow, col, values, torch.ones(1, 1000), 2 * 10**9)
    assert found.shape == (2 * 10**9, 1000)
    assert found.indices().tolist() == [[5, 10**9]]
    torch.testing.assert_close(found.values(), values.unsqueeze(1).expand(2, 1000))


def test_sparse_gradients_add_up() -> None:
    crow, col = places(6, 9, 0.2)
    values, dense = numbers(col.numel()), numbers(9, 3, seed=2)
    upstream = numbers(6, 3, seed=4)

    def added(*sparse: bool) -> Tensor:
        leaf = dense.clone().requires_grad_()
        shifted = (col + 1) % 9
        total = csr_matmul(crow, col, values, leaf, sparse[0]) + csr_matmul(crow, shifted, values, leaf, sparse[1])
        (total * upstream).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    assert added(True, True).is_sparse
    for which in ((True, True), (True, False), (False, True)):
        torch.testing.assert_close(added(*which).to_dense(), added(False, False))


def test_first_and_second_derivatives_are_right() -> None:
    crow, col = places(2, 3, 0.7, seed=3)
    values = numbers(col.numel()).requires_grad_()
    left, right = numbers(2, 2).requires_grad_(), numbers(3, 2, seed=2).requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda v, d: csr_matmul(crow, col, v, d), (values, right))
        assert check(lambda v, d: csr_transposed_matmul(crow, col, v, d, 3), (values, left))
        assert check(lambda a, b: csr_sampled_product(crow, col, a, b), (left, right))


@pytest.mark.parametrize("which", ["values", "dense"])
def test_only_the_wanted_gradient_is_computed(which: str) -> None:
    crow, col = places(4, 5, 0.5)
    values, dense = numbers(col.numel()), numbers(5, 3)
    wanted = values if which == "values" else dense
    wanted.requires_grad_()
    csr_matmul(crow, col, values, dense).sum().backward()
    assert wanted.grad is not None
    assert (values.grad is None) == (which == "dense")
    assert (dense.grad is None) == (which == "values")


def test_strided_and_transposed_inputs_give_the_same_bits() -> None:
    crow, col = places(6, 9, 0.4)
    values = numbers(2 * col.numel())[::2]
    left, right = numbers(4, 6).T, numbers(9, 8, seed=2)[:, ::2]
    assert not any(each.is_contiguous() for each in (values, left, right))
    spread_crow = torch.stack([crow, crow], dim=1)[:, 0]
    spread_col = torch.stack([col, col], dim=1)[:, 0]
    assert csr_matmul(spread_crow, spread_col, values, right).equal(
        csr_matmul(crow, col, values.contiguous(), right.contiguous())
    )
    assert csr_transposed_matmul(spread_crow, spread_col, values, left, 9).equal(
        csr_transposed_matmul(crow, col, values.contiguous(), left.contiguous(), 9)
    )
    assert csr_sampled_product(spread_crow, spread_col, left, right).equal(
        csr_sampled_product(crow, col, left.contiguous(), right.contiguous())
    )


def test_expanded_gradients_are_accepted() -> None:
    crow, col = places(4, 5, 0.6)
    values = numbers(col.numel()).requires_grad_()
    dense = numbers(5, 3)
    csr_matmul(crow, col, values, dense).sum().backward()
    torch.testing.assert_close(values.grad, dense.sum(dim=1)[col])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_row_is_the_same_bits_alone_and_in_company(dtype: torch.dtype) -> None:
    width, columns = 193, 50
    crow, col = places(20, columns, 0.3)
    values = numbers(col.numel(), dtype=dtype)
    left, right = numbers(20, width, dtype=dtype), numbers(columns, width, dtype=dtype, seed=2)
    together = csr_matmul(crow, col, values, right), csr_sampled_product(crow, col, left, right)
    for row in range(20):
        first, last = int(crow[row]), int(crow[row + 1])
        alone = torch.tensor([0, last - first])
        mine = col[first:last]
        assert csr_matmul(alone, mine, values[first:last], right).equal(together[0][row : row + 1])
        assert csr_sampled_product(alone, mine, left[row : row + 1], right).equal(together[1][first:last])


def test_more_threads_change_no_bit() -> None:
    crow, col = places(64, 40, 0.3)
    values = numbers(col.numel(), dtype=torch.float32)
    left, right = numbers(64, 33, dtype=torch.float32), numbers(40, 33, dtype=torch.float32, seed=2)

    def all_three() -> list[Tensor]:
        return [
            csr_matmul(crow, col, values, right),
            csr_transposed_matmul(crow, col, values, left, 40),
            csr_sampled_product(crow, col, left, right),
        ]

    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(all_three())
    finally:
        torch.set_num_threads(before)
    assert all(one.equal(two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_the_ops_keep_torch_librarys_contract(share: float) -> None:
    crow, col = places(4, 5, share)
    values = numbers(col.numel()).requires_grad_()
    left, right = numbers(4, 3).requires_grad_(), numbers(5, 3, seed=2).requires_grad_()
    torch.library.opcheck(csr_matmul, (crow, col, values, right))
    # Tracing has no sparse gradients: what is compiled keeps the whole ones.
    untraced = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(csr_matmul, (crow, col, values, right, True), test_utils=untraced)
    torch.library.opcheck(csr_transposed_matmul, (crow, col, values, left, 5))
    torch.library.opcheck(csr_sampled_product, (crow, col, left, right))


def test_a_compiled_function_computes_the_same() -> None:
    crow, col = places(4, 5, 0.5)
    values, right = numbers(col.numel()).requires_grad_(), numbers(5, 3)

    def score(values: Tensor) -> Tensor:
        rebuilt = csr_matmul(crow, col, values, right)
        return (rebuilt.square().sum() + csr_sampled_product(crow, col, rebuilt, right)).sum()

    compiled = torch.compile(score, backend="aot_eager", fullgraph=True)
    plain_value, compiled_value = score(values), compiled(values)
    torch.testing.assert_close(compiled_value, plain_value)
    torch.testing.assert_close(*(torch.autograd.grad(each, values) for each in (compiled_value, plain_value)))
