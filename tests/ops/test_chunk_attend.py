"""Attention over chunks equals its definition, keys as they are or rebuilt, with exact ones beside or without."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from apportion.ops import attend_chunks
from apportion.ops.attend import reference as attend_reference
from apportion.ops.chunk_attend import cpu, reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Shape(NamedTuple):
    """Sizes of a case; ``rank`` None: keys as they are; ``half`` None: not rotated; ``exact``: sizes of the tables."""

    batch: int = 2
    groups: int = 2
    group: int = 3
    chunks: int = 9
    size: int = 4
    chosen: int = 5
    width: int = 16
    value_width: int = 16
    rank: int | None = 7
    half: int | None = 8
    exact: tuple[int, ...] = (8, 11)
    one_basis: bool = False


SHAPES = {
    "ordinary": Shape(),
    "no head shares": Shape(group=1),
    "one basis": Shape(one_basis=True),
    "not rotated": Shape(half=None),
    "a part is rotated": Shape(half=3, width=11, value_width=5),
    "keys as they are": Shape(rank=None),
    "nothing exact": Shape(exact=()),
    "one exact table": Shape(exact=(7,)),
    "an empty table": Shape(exact=(0, 3)),
    "more tables than a kernel takes": Shape(exact=(3, 4, 5)),
    "no chunk": Shape(chosen=0),
    "rank below what is taken at once": Shape(rank=2, batch=1),
    "all chunks of one token": Shape(size=1, chosen=9),
    "more than a register holds": Shape(width=83, value_width=70, half=40, rank=9),
    "one head for all": Shape(groups=1),
    "no batch": Shape(batch=0),
}


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short lists have several parts, and chunks that lie in two of them."""
    monkeypatch.setattr(cpu, "_PART", 6)
    monkeypatch.setattr(cpu, "_EXACT", 5)


def make_case(shape: Shape, dtype: torch.dtype = torch.float64) -> list[Any]:
    draw = torch.Generator().manual_seed(0)

    def numbers(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=draw, dtype=torch.float64).to(dtype)

    tokens, of_lists = shape.chunks * shape.size + 3, (shape.batch, shape.groups)
    chunks = torch.rand(*of_lists, shape.chunks, generator=draw).argsort(-1)[..., : shape.chosen].sort(-1).values
    queries = numbers(shape.batch, shape.groups * shape.group, shape.width)
    basis = cos = sin = None
    if shape.rank is None:
        keys = numbers(*of_lists, tokens, shape.width)
    else:
        keys = numbers(shape.batch, tokens, shape.rank)
        basis = numbers(1 if shape.one_basis else shape.batch, shape.groups, shape.rank, shape.width)
        if shape.half is not None:
            angles = numbers(1 if shape.one_basis else shape.batch, tokens, shape.half)
            cos, sin = angles.cos(), angles.sin()
    exact_keys = [numbers(*of_lists, size, shape.width) for size in shape.exact]
    exact_values = [numbers(*of_lists, size, shape.value_width) for size in shape.exact]
    values = numbers(*of_lists, tokens, shape.value_width)
    return [queries, chunks, shape.size, keys, basis, cos, sin, values, exact_keys, exact_values, 0.3]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_it_equals_its_definition(name: str, dtype: torch.dtype, softcap: float | None) -> None:
    case = make_case(SHAPES[name], dtype)
    wide = [
        [one.double() for one in each] if isinstance(each, list) else
        each.double() if isinstance(each, Tensor) and each.is_floating_point() else each
        for each in case
    ]  # fmt: skip
    exact = reference.attend_chunks(*wide, softcap)
    found = attend_chunks(*case, softcap)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


def test_the_definition_is_attention_over_all_keys_under_a_mask() -> None:
    queries, chunks, size, keys, _, _, _, values, *exact, scaling = make_case(Shape(rank=None))
    mask = torch.zeros(2, 2, keys.shape[2] + 19, dtype=torch.bool)
    mask[:, :, keys.shape[2] :] = True
    for token in range(size):
        mask.scatter_(2, chunks * size + token, True)
    every, read = torch.cat([keys, *exact[0]], dim=2), torch.cat([values, *exact[1]], dim=2)
    of_heads = mask.repeat_interleave(3, dim=1)[:, :, None]
    wanted = attend_reference.attend(queries[:, :, None], every, read, of_heads, scaling, None)[:, :, 0]
    torch.testing.assert_close(
        attend_chunks(queries, chunks, size, keys, None, None, None, values, *exact, scaling), wanted
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tables_are_read_as_they_lie(dtype: torch.dtype) -> None:
    case = make_case(Shape(), dtype)
    wanted = attend_chunks(*case)
    for place in (3, 7):
        room = torch.full((*case[place].shape[:-2], 60, case[place].shape[-1]), torch.nan, dtype=dtype)
        room[..., : case[place].shape[-2], :] = case[place]
        case[place] = room[..., : case[place].shape[-2], :]
    for place in (5, 6):  # as a model hands them out: halves of longer rows
        case[place] = torch.cat([case[place], case[place]], dim=-1)[..., :8]
    case[1] = case[1].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attend_chunks(*case), wanted)


def test_torch_knows_the_op() -> None:
    torch.library.opcheck(torch.ops.apportion.attend_chunks.default, tuple(make_case(Shape(), torch.float32)))
    torch.library.opcheck(
        torch.ops.apportion.attend_chunks.default, tuple(make_case(Shape(rank=None, exact=()), torch.float32))
    )
