"""Attention over lists of keys equals its definition, forwards and backwards, on every shape, type and layout."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from apportion.ops.attend import attend_selected, composed, cpu, reference

# Unit roundoffs of the result, with room for sums in another order.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


class Shape(NamedTuple):
    """Sizes of a case; ``shared``: the heads of a key-value head share a list."""

    batch: int = 2
    groups: int = 2
    group: int = 3
    new: int = 1
    tokens: int = 13
    chosen: int = 5
    width: int = 16
    value_width: int = 16
    shared: bool = True


SHAPES = {
    "one token, a list for each group": Shape(),
    "one token, a list for each head": Shape(shared=False),
    "several tokens, no head shares": Shape(group=1, new=4),
    "several tokens, four heads share": Shape(group=4, new=3),
    "all tokens": Shape(chosen=13, shared=False),
    "one key": Shape(tokens=1, chosen=1, batch=1, groups=1, group=1),
    "odd widths": Shape(width=7, value_width=33),
    "widths one": Shape(width=1, value_width=1),
    "values without width": Shape(value_width=0),
    "empty lists": Shape(chosen=0),
    "no batch": Shape(batch=0),
    "several parts of a list": Shape(batch=1, tokens=40, chosen=31),
}


class Case(NamedTuple):
    """What the op is given."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    indices: Tensor
    kept: Tensor

    def to(self, dtype: torch.dtype) -> "Case":
        return Case(*(each.to(dtype) for each in self[:3]), self.indices, self.kept)

    def moved(self, device: str) -> "Case":
        return Case(*(each.to(device) for each in self))


def make_case(shape: Shape, seed: int = 0) -> Case:
    """One in four entries is not kept, and the first list keeps nothing."""
    draw = torch.Generator().manual_seed(seed)
    heads = shape.groups * shape.group

    def numbers(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=draw, dtype=torch.float64)

    rows = shape.groups if shape.shared else heads
    order = torch.rand(shape.batch, rows, shape.new, shape.tokens, generator=draw).argsort(-1)[..., : shape.chosen]
    kept = torch.rand(order.shape, generator=draw) < 0.75
    if kept.numel():
        kept[0, 0, 0] = shape.tokens == 1
    return Case(
        numbers(shape.batch, heads, shape.new, shape.width) * 2,
        numbers(shape.batch, shape.groups, shape.tokens, shape.width),
        numbers(shape.batch, shape.groups, shape.tokens, shape.value_width),
        order,
        kept,
    )


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short lists have several parts."""
    monkeypatch.setattr(cpu, "_PART", 4)


def close(actual: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert actual.shape == wanted.shape
    torch.testing.assert_close(actual.double(), wanted, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_it_equals_its_reference(name: str, dtype: torch.dtype, seed: int, softcap: float | None) -> None:
    case = make_case(SHAPES[name], seed).to(dtype)
    exact = reference.attend_selected(*case.to(torch.float64), 0.3, softcap)
    # Torch's own operations round each intermediate to half precision.
    slack = 4 if dtype == torch.float16 else 1
    found = attend_selected(*case, 0.3, softcap)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    tolerance = slack * TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=4 * tolerance)
    if case.kept.numel() and not case.kept[0, 0, 0].any():
        assert found[0, 0, 0].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_are_read_as_they_lie(dtype: torch.dtype) -> None:
    case = make_case(Shape(tokens=12, width=8, value_width=8)).to(dtype)
    exact = reference.attend_selected(*case.to(torch.float64), 0.3, None)
    # A view of a longer table, as a growing cache gives; and heads that lie within tokens, as a projection leaves them.
    room = torch.full((2, 2, 20, 8), torch.nan, dtype=dtype)
    room[:, :, :12] = case.keys
    within = case.values.transpose(1, 2).contiguous().transpose(1, 2)
    reversed_width = case.keys.flip(-1).transpose(-1, -2).contiguous().transpose(-1, -2)
    for keys, queries in ((room[:, :, :12], case.queries), (reversed_width, case.queries.flip(-1))):
        strided = queries.transpose(1, 2).contiguous().transpose(1, 2)
        lists = case.indices.transpose(-1, -2).contiguous().transpose(-1, -2)
        close(attend_selected(strided, keys, within, lists, case.kept, 0.3), exact, dtype)


def test_scores_too_large_for_an_exponential_overflow_nothing() -> None:
    case = make_case(Shape(chosen=13)).to(torch.float32)
    case = case._replace(queries=case.queries * 1000)
    exact = reference.attend_selected(*case.to(torch.float64), 1.0, None)
    torch.testing.assert_close(attend_selected(*case, 1.0).double(), exact, rtol=1e-3, atol=1e-3)


def test_what_is_not_kept_is_not_read() -> None:
    case = make_case(Shape(shared=False)).to(torch.float32)
    exact = attend_selected(*case, 0.3)
    nobody = torch.ones(case.keys.shape[:3], dtype=torch.bool)
    heads = torch.arange(6) // 3
    for batch in range(2):
        for head in range(6):
            nobody[batch, heads[head], case.indices[batch, head][case.kept[batch, head]]] = False
    keys, values = (each.masked_fill(nobody[..., None], torch.nan) for each in case[1:3])
    assert attend_selected(case.queries, keys, values, case.indices, case.kept, 0.3).equal(exact)


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_said_of_what_is_kept_means_everything(name: str) -> None:
    case = make_case(SHAPES[name]).to(torch.float32)
    given = (case.queries, case.keys, case.values, case.indices)
    assert attend_selected(*given, None, 0.3).equal(attend_selected(*given, torch.ones_like(case.kept), 0.3))
    queries = case.queries.clone().requires_grad_()
    torch.testing.assert_close(attend_selected(queries, *given[1:], None, 0.3), attend_selected(*given, None, 0.3))


@pytest.mark.parametrize("width", [1, 15, 16, 17, 48, 64, 80, 131])
def test_vectors_of_every_width_are_read_to_their_end(width: int) -> None:
    case = make_case(Shape(width=width, value_width=width + 3)).to(torch.float32)
    exact = reference.attend_selected(*case.to(torch.float64), 0.3, None)
    torch.testing.assert_close(attend_selected(*case, 0.3).double(), exact, rtol=4e-6, atol=2e-5)


def test_a_list_gives_the_same_bits_alone_and_in_company() -> None:
    case = make_case(Shape(batch=3)).to(torch.float32)
    together = attend_selected(*case, 0.3)
    for row in range(3):
        assert attend_selected(*(each[row : row + 1] for each in case), 0.3).equal(together[row : row + 1])


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_equal_those_of_the_reference(name: str, seed: int, softcap: float | None) -> None:
    case = make_case(SHAPES[name], seed)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rounded = case.to(dtype)
        exact = [each.double().requires_grad_() for each in rounded[:3]]
        leaves = [each.clone().requires_grad_() for each in rounded[:3]]
        wanted = reference.attend_selected(*exact, case.indices, case.kept, 0.3, softcap)
        upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
        theirs = torch.autograd.grad(wanted, exact, upstream.double())
        ours = torch.autograd.grad(attend_selected(*leaves, case.indices, case.kept, 0.3, softcap), leaves, upstream)
        for actual, right in zip(ours, theirs, strict=True):
            assert actual.dtype == dtype
            tolerance = 8 * TOLERANCE[dtype]
            torch.testing.assert_close(actual.double(), right, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_the_composition_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    case = make_case(SHAPES[name]).to(dtype)
    exact = reference.attend_selected(*case.to(torch.float64), 0.3, 1.5)
    close(composed.attend_selected(*case, 0.3, 1.5), exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_torch_knows_the_op(dtype: torch.dtype, softcap: float | None) -> None:
    case = make_case(Shape()).to(dtype)
    leaves = [each.requires_grad_() for each in case[:3]]
    torch.library.opcheck(torch.ops.apportion.attend_selected.default, (*leaves, case.indices, case.kept, 0.3, softcap))
