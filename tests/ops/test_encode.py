"""Encode and allocate in one op: the winners are right, differentiable, and (exact) the same in any company."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from apportion.ops import csr_sampled_product, encode_select
from apportion.ops.encode import composed, reference
from apportion.ops.encode.reference import Codes
from apportion.ops.select import reference as select

HOWS = ["rows", "total", "columns", "above"]
Encode = Callable[..., Codes]


@dataclass(frozen=True)
class Dictionary:
    """Inputs of the op, and a way to choose for each way of allocating."""

    x: Tensor
    weight: Tensor
    bias: Tensor

    def choice(self, how: str) -> tuple[int, Tensor | None]:
        """(count, limits)"""
        columns = self.weight.shape[0]
        if how == "rows":
            return columns // 3, None
        if how == "total":
            return self.x.shape[0] * 2, None
        if how == "columns":
            return 0, torch.arange(columns) % (self.x.shape[0] + 1)
        limits = torch.linspace(-2, 2, columns, dtype=self.x.dtype)
        limits[0], limits[1] = torch.inf, -torch.inf
        return 0, limits

    def encode(self, how: str, precision: str = "float32", exact: bool = False) -> Codes:
        return encode_select(self.x, self.weight, self.bias, how, *self.choice(how), precision, exact)


def gaussian(rows: int, columns: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, width), (columns, width), (columns,)
    return Dictionary(*(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes))


def whole_numbers(rows: int, columns: int, width: int, dtype: torch.dtype) -> Dictionary:
    """Small enough that every product is exact, in bfloat16 too, and so few that most scores tie."""
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, width), (columns, width), (columns,)
    return Dictionary(*(torch.randint(-2, 3, shape, generator=generator).to(dtype) for shape in shapes))


def same_bits(ours: Codes, theirs: Codes) -> bool:
    return all(one.dtype == two.dtype and one.equal(two) for one, two in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("needs_x", [False, True])
def test_the_weight_is_kept_only_for_the_gradient_to_x(needs_x: bool) -> None:
    dictionary = gaussian(5, 40, 7)
    x, weight = dictionary.x.clone().requires_grad_(needs_x), dictionary.weight.clone().requires_grad_()
    codes = encode_select(x, weight, dictionary.bias, "rows", 3, None, "float32", False)
    kept = [each.data_ptr() for each in codes[2].grad_fn.saved_tensors if each is not None]
    assert (weight.data_ptr() in kept) == needs_x
    codes[2].sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("how", HOWS)
def test_a_sparse_gradient_holds_the_bits_of_the_winners_rows(how: str) -> None:
    dictionary = gaussian(5, 40, 7)

    def gradients(sparse: bool) -> tuple[Tensor, ...]:
        leaves = [each.clone().requires_grad_() for each in (dictionary.x, dictionary.weight, dictionary.bias)]
        codes = encode_select(*leaves, how, *dictionary.choice(how), "float32", False, sparse)
        return (*torch.autograd.grad(codes[2].square().sum(), leaves), codes[1])

    to_x, to_weight, to_bias, col = gradients(True)
    assert to_weight.is_coalesced()
    assert to_weight.indices()[0].equal(col.unique())
    assert all(
        one.equal(other)
        for one, other in zip((to_x, to_weight.to_dense(), to_bias, col), gradients(False), strict=True)
    )


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 3, 1), (7, 11, 5), (20, 13, 8), (0, 6, 4)])
def test_ties_and_winners_are_the_references(
    rows: int, columns: int, width: int, how: str, dtype: torch.dtype, precision: str, exact: bool
) -> None:
    numbers = whole_numbers(rows, columns, width, dtype)
    wanted = reference.encode_select(numbers.x, numbers.weight, numbers.bias, how, *numbers.choice(how))
    assert same_bits(numbers.encode(how, precision, exact), wanted)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("how", HOWS)
def test_values_and_gradients_equal_the_references(how: str, exact: bool, seed: int) -> None:
    numbers = gaussian(17, 23, 9, seed)
    inputs = numbers.x, numbers.weight, numbers.bias

    def run(function: Callable[..., Codes], *tail: object) -> tuple[Codes, tuple[Tensor, ...]]:
        leaves = [each.clone().requires_grad_() for each in inputs]
        codes = function(*leaves, how, *numbers.choice(how), *tail)
        upstream = torch.linspace(-1, 1, codes[2].numel(), dtype=torch.float64)
        return codes, torch.autograd.grad(codes[2], leaves, upstream)

    (crow, col, values), gradients = run(encode_select, "float32", exact)
    (wanted_crow, wanted_col, wanted_values), wanted_gradients = run(reference.encode_select)
    assert crow.equal(wanted_crow)
    assert col.equal(wanted_col)
    torch.testing.assert_close(values, wanted_values)
    torch.testing.assert_close(gradients, wanted_gradients)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("how", HOWS)
def test_values_and_gradients_are_computed_in_full_precision(how: str, exact: bool, precision: str, seed: int) -> None:
    numbers = gaussian(40, 61, 33, seed, dtype=torch.float32)
    leaves = [each.clone().requires_grad_() for each in (numbers.x, numbers.weight, numbers.bias)]
    crow, col, values = encode_select(*leaves, how, *numbers.choice(how), precision, exact)
    rows = torch.repeat_interleave(crow.diff())
    wide = [each.detach().double().requires_grad_() for each in leaves]
    wanted = torch.addmm(wide[2], wide[0], wide[1].T)[rows, col]
    torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-5)
    for actual, definition in zip(
        torch.autograd.grad(values.square().sum(), leaves),
        torch.autograd.grad(wanted.square().sum(), wide),
        strict=True,
    ):
        torch.testing.assert_close(actual.double(), definition, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("how", "exact"), [("rows", False), ("total", False), ("columns", False), ("rows", True), ("above", True)]
)
def test_derivatives_are_right(how: str, exact: bool) -> None:
    numbers = gaussian(2, 4, 2, seed=4)
    inputs = tuple(each.clone().requires_grad_() for each in (numbers.x, numbers.weight, numbers.bias))
    assert torch.autograd.gradcheck(
        lambda *three: encode_select(*three, how, *numbers.choice(how), "float32", exact)[2], inputs
    )


def test_losers_get_no_gradient_at_all() -> None:
    numbers = gaussian(6, 40, 4)
    bias = numbers.bias.clone().requires_grad_()
    weight = numbers.weight.clone().requires_grad_()
    _, col, values = encode_select(numbers.x, weight, bias, "rows", 2, None, "float32", False)
    values.sum().backward()
    won = torch.bincount(col, minlength=40) > 0
    assert 0 < int(won.sum()) < 40
    assert bias.grad is not None
    assert weight.grad is not None
    assert bias.grad.ne(0).equal(won)
    assert weight.grad.ne(0).any(dim=1).equal(won)


def test_only_the_wanted_gradients_are_computed() -> None:
    numbers = gaussian(4, 6, 3)
    bias = numbers.bias.clone().requires_grad_()
    encode_select(numbers.x, numbers.weight, bias, "total", 7, None, "float32", False)[2].sum().backward()
    assert bias.grad is not None
    assert bias.grad.sum() == 7


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("count", [0, 1, 12])
def test_none_one_and_all_of_a_row(count: int, exact: bool) -> None:
    numbers = gaussian(5, 12, 7)
    crow, col, values = encode_select(numbers.x, numbers.weight, numbers.bias, "rows", count, None, "float32", exact)
    assert crow.tolist() == [count * row for row in range(6)]
    best = (numbers.x @ numbers.weight.T + numbers.bias).topk(count, dim=1)
    torch.testing.assert_close(values.view(5, count).sort(dim=1, descending=True).values, best.values)
    assert col.view(5, count).equal(best.indices.sort(dim=1).values)


@pytest.mark.parametrize("how", HOWS)
def test_strided_inputs_give_the_same_winners(how: str) -> None:
    plain = gaussian(6, 10, 8)
    strided = Dictionary(
        plain.x.T.contiguous().T, plain.weight.T.contiguous().T, torch.stack([plain.bias, plain.bias], dim=1)[:, 0]
    )
    assert not strided.x.is_contiguous()
    assert not strided.weight.is_contiguous()
    for exact in (False, True):
        ours, theirs = strided.encode(how, exact=exact), plain.encode(how, exact=exact)
        assert ours[0].equal(theirs[0])
        assert ours[1].equal(theirs[1])
        torch.testing.assert_close(ours[2], theirs[2])


@pytest.mark.parametrize("how", ["columns", "above", "best"])
@pytest.mark.parametrize("exact", [False, True])
def test_an_impossible_order_names_the_argument(how: str, exact: bool) -> None:
    numbers = gaussian(3, 4, 2)
    with pytest.raises(ValueError, match=rf"how='{how}', limits=None: use rows, total, columns or above"):
        encode_select(numbers.x, numbers.weight, numbers.bias, how, 1, None, "float32", exact)
    with pytest.raises(ValueError, match=rf"how='{how}', limits=None: use rows, total, columns or above"):
        reference.encode_select(numbers.x, numbers.weight, numbers.bias, how, 1, None)


@pytest.mark.parametrize("how", HOWS)
def test_the_op_keeps_torch_librarys_contract(how: str) -> None:
    numbers = gaussian(4, 6, 3)
    inputs = numbers.x, numbers.weight, numbers.bias
    torch.library.opcheck(encode_select, (*inputs, how, *numbers.choice(how), "float32", True))
    # opcheck's fourth test sums all outputs before it differentiates and trips over the whole-number ones; the compiled
    # function below stands in for it.
    torch.library.opcheck(
        encode_select,
        (*(each.clone().requires_grad_() for each in inputs), how, *numbers.choice(how), "float32", True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("how", HOWS)
def test_a_compiled_function_computes_the_same(how: str) -> None:
    numbers = gaussian(4, 6, 3)
    weight = numbers.weight.clone().requires_grad_()
    count, limits = numbers.choice(how)

    def loss(weight: Tensor) -> Tensor:
        chosen = encode_select(numbers.x * 2, weight, numbers.bias, how, count, limits, "float32", False)
        return chosen[2].square().sum()

    # How many win by columns or above a limit depends on the data: dynamo goes through in one graph when told so.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        plain, compiled = loss(weight), torch.compile(loss, backend="aot_eager", fullgraph=True)(weight)
        torch.testing.assert_close(compiled, plain)
        torch.testing.assert_close(*(torch.autograd.grad(each, weight) for each in (compiled, plain)))


# Who else is in the batch -------------------------------------------------------------------------------------------
WIDTH, COLUMNS, ROWS, COUNT = 576, 2000, 40, 32


@dataclass(frozen=True)
class CloseCall:
    """Scores so close to what decides that a matrix product's rounding could decide instead."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    how: str
    limits: Tensor | None

    def encode(
        self, rows: Tensor, precision: str, exact: bool, op: Encode = encode_select
    ) -> list[tuple[Tensor, Tensor]]:
        """(columns, values) of each of these rows, encoded together."""
        count = COUNT if self.how == "rows" else 0
        crow, col, values = op(self.x[rows], self.weight, self.bias, self.how, count, self.limits, precision, exact)
        sizes = crow.diff().tolist()
        return list(zip(col.split(sizes), values.split(sizes), strict=True))


def one_by_one(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """All scores by the kernel that knows no company."""
    rows, columns = x.shape[0], weight.shape[0]
    crow, col = torch.arange(rows + 1) * columns, torch.arange(columns).repeat(rows)
    return csr_sampled_product(crow, col, x, weight).view(rows, columns) + bias


@pytest.fixture(scope="module", params=["above", "rows"])
def close_call(request: pytest.FixtureRequest) -> CloseCall:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    bias = torch.randn(COLUMNS, generator=generator)
    if request.param == "above":
        weight = torch.randn(COLUMNS, WIDTH, generator=generator)
        scores = one_by_one(x, weight, bias)
        # Each column's limit is its third best score, or the float just below: one row is always within a hair.
        third = scores.topk(3, dim=0).values[2]
        below = torch.nextafter(third, torch.tensor(-torch.inf))
        return CloseCall(x, weight, bias, "above", torch.where(torch.arange(COLUMNS) % 2 == 0, third, below))
    # Families of twenty columns that differ in the last bits only: the last winner's family never wins whole.
    families = torch.randn(COLUMNS // 20, WIDTH, generator=generator).repeat_interleave(20, dim=0)
    weight = families * (1 + 1e-7 * torch.randn(COLUMNS, WIDTH, generator=generator))
    return CloseCall(x, weight, torch.zeros(COLUMNS), "rows", None)


def companies() -> Iterator[Tensor]:
    """Random batches of many sizes, in random order, some rows more than once."""
    generator = torch.Generator().manual_seed(1)
    for size in (2, 3, 7, 8, 17, 31, 39):
        yield torch.randperm(ROWS, generator=generator)[:size]
    yield torch.randint(ROWS, (64,), generator=generator)


def changed_by_company(case: CloseCall, precision: str, exact: bool, op: Encode = encode_select) -> tuple[int, int]:
    """How many times a row's winners, and its values' bits, differ from those of the row alone."""
    alone = [case.encode(torch.tensor([row]), precision, exact, op)[0] for row in range(ROWS)]
    winners = values = 0
    for company in companies():
        for row, (col, value) in zip(company.tolist(), case.encode(company, precision, exact, op), strict=True):
            winners += not col.equal(alone[row][0])
            values += not value.equal(alone[row][1])
    return winners, values


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_exact_code_is_bit_identical_alone_and_in_any_company(close_call: CloseCall, precision: str) -> None:
    assert changed_by_company(close_call, precision, exact=True) == (0, 0)


def test_without_the_second_look_company_would_change_winners(close_call: CloseCall) -> None:
    winners, values = changed_by_company(close_call, "float32", exact=False, op=composed.encode_select)
    assert winners > 0
    assert values > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_second_look_misses_no_winner(close_call: CloseCall, precision: str) -> None:
    scores = one_by_one(close_call.x, close_call.weight, close_call.bias)
    if close_call.limits is None:
        crow, col = select.select_rows(scores, COUNT)
    else:
        crow, col = select.select_above(scores, close_call.limits)
    codes = close_call.encode(torch.arange(ROWS), precision, exact=True)
    assert torch.cat([each for each, _ in codes]).equal(col)
    assert torch.cat([each for _, each in codes]).equal(scores[torch.repeat_interleave(crow.diff()), col])


@pytest.mark.parametrize("how", ["above", "rows"])
def test_the_second_look_allows_for_the_worst_rounding_to_bfloat16(how: str) -> None:
    # Both operands and then the sum round down by nearly half a unit, all 578 products alike.
    worst = 1 + 2.0**-8 - 2.0**-20
    width = 578
    x, weight, bias = torch.full((1, width), worst), torch.full((2, width), worst), torch.zeros(2)
    rounded = torch.mm(x.bfloat16(), weight.bfloat16().T).float()
    true = width * worst**2
    assert rounded[0, 0] < true * (1 - 2.8 * 2**-8)
    if how == "above":
        limits = torch.full((2,), true * (1 - 1e-5))
        _, col, _ = encode_select(x, weight, bias, "above", 0, limits, "bfloat16", True)
        assert col.tolist() == [0, 1]
        return
    # Column 0 is exact in bfloat16 and scores a little less than column 1, which looks much worse than it is.
    weight[0] = 0
    bias[0] = true * (1 - 1e-5)
    _, col, values = encode_select(x, weight, bias, "rows", 1, None, "bfloat16", True)
    assert col.tolist() == [1]
    assert float(values[0]) == pytest.approx(true, rel=1e-6)
