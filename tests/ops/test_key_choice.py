"""Keys chosen in one go are those of scoring, agreeing and selecting one after the other, ties included."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from apportion.errors import InputError
from apportion.keys.budget import KeyBudget
from apportion.keys.labels import rounded
from apportion.keys.selectors import across_group, best_tokens
from apportion.ops import choose_by_labels, choose_chunks, label_scores, pack_labels, packed_label_scores
from apportion.ops.key_choice import cpu, reference
from apportion.ops.label_scores import cpu as labels_cpu


class Shape(NamedTuple):
    """Sizes of a case; ``rows``: of labels, one a head or one a key-value head."""

    batch: int = 2
    groups: int = 3
    group: int = 3
    by_head: bool = False
    tokens: int = 90
    channels: int = 16
    count: int = 9
    sinks: int = 0
    recent: int = 0


SHAPES = {
    "a list for three heads": Shape(),
    "labels of each head": Shape(by_head=True),
    "no head shares": Shape(group=1),
    "many winners": Shape(tokens=700, count=60),
    "sinks and recent": Shape(sinks=2, recent=3),
    "nothing but sinks and recent": Shape(sinks=4, recent=5),
    "many, with sinks and recent": Shape(tokens=700, count=60, sinks=4, recent=20),
    "odd channels": Shape(channels=5, batch=1),
    "all tokens": Shape(count=90),
    "one token": Shape(tokens=1, count=1),
    "no list": Shape(count=0),
    "no batch": Shape(batch=0),
}


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few tokens have several tiles."""
    monkeypatch.setattr(labels_cpu, "_TILE", 32)
    monkeypatch.setattr(cpu, "_TILE", 40)


def make_case(shape: Shape, ties: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Queries and labels; with ties they are small whole numbers, so that many products are equal."""
    draw = torch.Generator().manual_seed(0)
    rows = shape.groups * (shape.group if shape.by_head else 1)
    sizes = (shape.batch, shape.groups * shape.group, shape.channels), (shape.batch, rows, shape.tokens, shape.channels)
    if ties:
        return tuple(torch.randint(-1, 2, size, generator=draw).to(dtype) for size in sizes)  # type: ignore[return-value]
    return tuple(torch.randn(size, generator=draw).to(dtype) for size in sizes)  # type: ignore[return-value]


def planar(table: Tensor) -> Tensor:
    return table.transpose(-1, -2).contiguous().transpose(-1, -2)


def one_after_the_other(
    shape: Shape, queries: Tensor, labels: Tensor, ranges: Tensor | None, bits: int, group: str
) -> Tensor:
    asked = queries[:, :, None]
    if ranges is None:
        scores = label_scores(asked, labels)
    else:
        scores = packed_label_scores(rounded(asked, bits), labels, ranges, bits)
    seen = torch.ones(shape.batch, 1, shape.tokens, dtype=torch.bool)
    budget = KeyBudget(keys=shape.count, sinks=shape.sinks, recent=shape.recent)
    return best_tokens(across_group(scores, seen, shape.group, group), seen, budget).indices[:, :, 0]


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
@pytest.mark.parametrize("bits", [16, 4, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_tokens_are_those_of_scores_and_selection(name: str, bits: int, ties: bool) -> None:
    shape = SHAPES[name]
    queries, labels = make_case(shape, ties, torch.bfloat16 if bits == 16 else torch.float32)
    ranges = None
    if bits < 16:
        labels, ranges = (planar(each) for each in pack_labels(labels, bits))
    for group in ("head", "max", "mean") if shape.group > 1 else ("head",):
        given = queries, planar(labels), ranges, bits, shape.count, shape.sinks, shape.recent, shape.groups, group
        found = choose_by_labels(*given)
        assert found.dtype == torch.int64
        assert found.shape == (shape.batch, shape.groups * (shape.group if group == "head" else 1), shape.count)
        if shape.count and shape.batch:
            assert torch.equal(found, one_after_the_other(shape, queries, planar(labels), ranges, bits, group))
        if not ties or bits == 16:  # codes of whole numbers are off by rounding, which is not the reference's
            assert torch.equal(found, reference.choose_by_labels(*given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
@pytest.mark.parametrize("shape", [Shape(), Shape(group=1, count=40), Shape(tokens=700, count=60), Shape(count=0)])
def test_chunks_are_those_of_their_definition(
    shape: Shape, ties: bool, softcap: float | None, dtype: torch.dtype
) -> None:
    queries, means = make_case(shape, ties, dtype)
    candidates = torch.rand(means.shape[:3], generator=torch.Generator().manual_seed(1)) < 0.8
    found = choose_chunks(queries, planar(means), candidates, shape.count, 0.3, softcap)
    assert torch.equal(found, reference.choose_chunks(queries, means, candidates, shape.count, 0.3, softcap))
    assert candidates.gather(2, found).all()
    assert torch.equal(found, choose_chunks(queries, means, candidates, shape.count, 0.3, softcap))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [16, 4])
def test_channels_are_picked_from_whole_queries(bits: int, dtype: torch.dtype) -> None:
    shape, draw = Shape(channels=5), torch.Generator().manual_seed(2)
    _, labels = make_case(shape, False, dtype)
    queries = torch.randn(2, 9, 12, generator=draw, dtype=dtype)
    chosen = torch.rand(9, 12, generator=draw).argsort(-1)[:, :5]
    places = (torch.arange(9)[:, None] * 12 + chosen).flatten()
    picked = queries.gather(2, chosen.expand(2, -1, -1))
    table = (labels, None) if bits == 16 else pack_labels(labels, bits)
    given = (*table, bits, 9, 1, 1, 3, "max")
    wanted = choose_by_labels(picked, *given)
    assert torch.equal(choose_by_labels(queries, *given, places), wanted)
    assert torch.equal(choose_by_labels(queries.clone().requires_grad_(), *given, places), wanted)


def test_float64_is_compared_as_it_is() -> None:
    queries, labels = (each.double() for each in make_case(Shape(), False))
    given = (None, 16, 9, 1, 1, 3, "max")
    assert torch.equal(choose_by_labels(queries, labels, *given), reference.choose_by_labels(queries, labels, *given))


def test_an_unknown_agreement_is_refused() -> None:
    queries, labels = make_case(Shape(), False)
    with pytest.raises(InputError, match="group='union': one of head, max, mean"):
        choose_by_labels(queries, labels, None, 16, 4, 0, 0, 3, "union")


def test_torch_knows_the_ops() -> None:
    queries, labels = make_case(Shape(), False)
    codes, ranges = pack_labels(labels, 4)
    torch.library.opcheck(torch.ops.apportion.choose_by_labels.default, (queries, codes, ranges, 4, 5, 1, 1, 3, "max"))
    torch.library.opcheck(torch.ops.apportion.choose_by_labels.default, (queries, labels, None, 16, 5, 1, 1, 3, "head"))
    candidates = torch.ones(labels.shape[:3], dtype=torch.bool)
    torch.library.opcheck(torch.ops.apportion.choose_chunks.default, (queries, labels, candidates, 5, 0.3, None))
