"""Keys rebuilt from a low-rank factorisation equal their definition, and that equals rotating everything first."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from apportion.models.key_memory import Rotation
from apportion.ops import low_rank_keys
from apportion.ops.low_rank_keys import cpu, reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


class Shape(NamedTuple):
    """Sizes of a case; ``half`` None: keys that are not rotated."""

    batch: int = 2
    groups: int = 3
    tokens: int = 23
    kept: int = 7
    rank: int = 5
    width: int = 16
    half: int | None = 8
    one_basis: bool = False
    one_rotation: bool = False


SHAPES = {
    "ordinary": Shape(),
    "one basis, one rotation": Shape(one_basis=True, one_rotation=True),
    "no rotation": Shape(half=None),
    "a part of the width is rotated": Shape(half=3),
    "odd width": Shape(width=11, half=5),
    "rank one": Shape(rank=1),
    "rank none": Shape(rank=0),
    "one group": Shape(groups=1, batch=1),
    "all tokens and more": Shape(kept=40),
    "no token": Shape(kept=0),
    "no batch": Shape(batch=0),
}


class Case(NamedTuple):
    """What the op is given."""

    factors: Tensor
    basis: Tensor
    tokens: Tensor
    cos: Tensor | None
    sin: Tensor | None

    def to(self, dtype: torch.dtype) -> "Case":
        factors, basis, tokens, cos, sin = self
        return Case(
            factors.to(dtype),
            basis.to(dtype),
            tokens,
            None if cos is None else cos.to(dtype),
            None if sin is None else sin.to(dtype),
        )


def make_case(shape: Shape, seed: int = 0) -> Case:
    draw = torch.Generator().manual_seed(seed)
    factors = torch.randn(shape.batch, shape.tokens, shape.rank, generator=draw, dtype=torch.float64)
    some = 1 if shape.one_basis else shape.batch
    basis = torch.randn(some, shape.groups, shape.rank, shape.width, generator=draw, dtype=torch.float64)
    tokens = torch.randint(shape.tokens, (shape.batch, shape.groups, shape.kept), generator=draw)
    if shape.half is None:
        return Case(factors, basis, tokens, None, None)
    rows = 1 if shape.one_rotation else shape.batch
    angles = 6 * torch.rand(rows, shape.tokens, shape.half, generator=draw, dtype=torch.float64)
    return Case(factors, basis, tokens, angles.cos(), angles.sin())


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few tokens have several blocks."""
    monkeypatch.setattr(cpu, "_TOGETHER", 4)


@pytest.mark.parametrize("name", SHAPES)
def test_the_reference_is_all_keys_rotated_of_which_some_are_taken(name: str) -> None:
    factors, basis, tokens, cos, sin = make_case(SHAPES[name])
    everything = factors[:, None] @ basis
    if cos is not None and sin is not None:
        everything = Rotation(cos, sin).apply(everything)
    wanted = everything.gather(2, tokens[..., None].expand(-1, -1, -1, basis.shape[-1]))
    torch.testing.assert_close(reference.low_rank_keys(factors, basis, tokens, cos, sin), wanted)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_it_equals_its_reference(name: str, dtype: torch.dtype, seed: int) -> None:
    case = make_case(SHAPES[name], seed).to(dtype)
    exact = reference.low_rank_keys(*case.to(torch.float64))
    found = low_rank_keys(*case)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tables_are_read_as_they_lie(dtype: torch.dtype) -> None:
    case = make_case(Shape(tokens=20)).to(dtype)
    assert case.cos is not None
    assert case.sin is not None
    exact = reference.low_rank_keys(*case.to(torch.float64))
    room = torch.full((2, 30, 5), torch.nan, dtype=dtype)
    room[:, :20] = case.factors
    transposed = case.factors.transpose(1, 2).contiguous().transpose(1, 2)
    # As a model hands them out: cosine and sine as halves of longer rows.
    cos = torch.cat([case.cos, case.cos], dim=-1)[..., :8]
    tokens = case.tokens.transpose(1, 2).contiguous().transpose(1, 2)
    for factors in (room[:, :20], transposed):
        found = low_rank_keys(factors, case.basis, tokens, cos, case.sin)
        torch.testing.assert_close(found.double(), exact, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


def test_angles_may_be_of_another_type_than_keys() -> None:
    case = make_case(Shape())
    exact = reference.low_rank_keys(*case)
    found = low_rank_keys(*case.to(torch.bfloat16)[:3], *case.to(torch.float32)[3:])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=4e-2, atol=1e-1)


def test_inputs_stay_as_they_were() -> None:
    case = make_case(Shape(groups=1)).to(torch.float32)
    before = [each.clone() for each in case if each is not None]
    low_rank_keys(*case)
    assert all(one.equal(two) for one, two in zip(before, case, strict=True) if two is not None)


def test_torch_knows_the_op() -> None:
    torch.library.opcheck(low_rank_keys, tuple(make_case(Shape()).to(torch.float32)))
    torch.library.opcheck(low_rank_keys, tuple(make_case(Shape(half=None))[:3]))
