"""Scores by labels equal their definition however labels are stored; packed ones are as close as their bits allow."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from apportion.errors import InputError
from apportion.ops import label_scores, pack_labels, packed_label_scores, unpack_labels
from apportion.ops.label_scores import BITS, cpu, pack_channels_into, reference


class Shape(NamedTuple):
    """Sizes of a case; ``group`` heads share the labels of a row."""

    batch: int = 2
    rows: int = 3
    group: int = 1
    new: int = 1
    tokens: int = 37
    channels: int = 16


SHAPES = {
    "labels of each head": Shape(),
    "three heads share": Shape(group=3, new=2),
    "four heads share": Shape(group=4),
    "odd channels": Shape(channels=7),
    "one channel": Shape(channels=1),
    "no channel": Shape(channels=0),
    "one token": Shape(tokens=1),
    "no token": Shape(tokens=0),
    "no batch": Shape(batch=0),
    "a whole tile and nothing more": Shape(tokens=32, channels=9),
}


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few tokens have several tiles."""
    monkeypatch.setattr(cpu, "_TILE", 16)


def make_case(shape: Shape, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Queries and labels; the second label is constant where there is one."""
    draw = torch.Generator().manual_seed(seed)
    queries = torch.randn(shape.batch, shape.rows * shape.group, shape.new, shape.channels, generator=draw)
    labels = torch.randn(shape.batch, shape.rows, shape.tokens, shape.channels, generator=draw)
    labels[:, :, 1:2] = -1.7
    return queries.to(dtype), labels.to(dtype)


def planar(labels: Tensor) -> Tensor:
    """The same labels, with the tokens of a channel side by side in memory."""
    return labels.transpose(-1, -2).contiguous().transpose(-1, -2)


def in_room(labels: Tensor) -> Tensor:
    """The same labels as a view of a longer table."""
    room = torch.full((*labels.shape[:2], labels.shape[2] + 5, labels.shape[3]), 99).to(labels.dtype)
    room[:, :, : labels.shape[2]] = labels
    return room[:, :, : labels.shape[2]]


def planar_in_room(labels: Tensor) -> Tensor:
    """The same labels, planar, as a view of a longer table."""
    batch, rows, tokens, channels = labels.shape
    room = torch.full((batch, rows, channels, tokens + 5), 99).to(labels.dtype)
    room[..., :tokens] = labels.transpose(-1, -2)
    return room[..., :tokens].transpose(-1, -2)


LAYOUTS = {"token by token": torch.clone, "planar": planar, "room": in_room, "planar room": planar_in_room}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_scores_equal_their_reference(name: str, dtype: torch.dtype, layout: str) -> None:
    for seed in range(3):
        queries, labels = make_case(SHAPES[name], seed, dtype)
        exact = reference.label_scores(queries.double(), labels.double())
        found = label_scores(queries, LAYOUTS[layout](labels))
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", SHAPES)
def test_packed_scores_equal_those_of_what_was_unpacked(name: str, bits: int, layout: str) -> None:
    for seed in range(3):
        queries, labels = make_case(SHAPES[name], seed)
        codes, ranges = pack_labels(labels, bits)
        assert codes.shape == (*labels.shape[:3], -(-labels.shape[3] * bits // 8))
        unpacked = unpack_labels(codes, ranges, bits, labels.shape[3])
        exact = reference.label_scores(queries.double(), unpacked.double())
        place = LAYOUTS[layout]
        found = packed_label_scores(queries, place(codes), place(ranges), bits)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-5)


def test_queries_that_are_strided_or_of_another_type_are_read_as_they_are() -> None:
    queries, labels = make_case(Shape(group=2, new=3))
    exact = reference.label_scores(queries.double(), labels.double())
    strided = queries.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(label_scores(strided, planar(labels)).double(), exact, rtol=1e-5, atol=1e-5)
    half = label_scores(queries.bfloat16(), planar(labels))
    torch.testing.assert_close(half, label_scores(queries.bfloat16().float(), planar(labels)))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_a_packed_label_is_off_by_at_most_half_a_step(bits: int, scale: float, channels: int) -> None:
    _, labels = make_case(Shape(channels=channels))
    labels = labels * scale
    codes, ranges = pack_labels(labels, bits)
    unpacked = unpack_labels(codes, ranges, bits, channels)
    spread = labels.double().amax(-1) - labels.double().amin(-1)
    bound = spread / (2**bits - 1) / 2 + 4 * torch.finfo(torch.float32).eps * labels.abs().amax(-1).double()
    assert ((unpacked.double() - labels.double()).abs().amax(-1) <= bound).all()
    assert unpacked[:, :, 1].equal(labels[:, :, 1]), "a constant label is exact"
    assert (ranges[..., 0] == labels.amin(-1)).all()


@pytest.mark.parametrize("bits", BITS)
def test_tokens_are_packed_each_by_itself(bits: int) -> None:
    _, labels = make_case(Shape())
    codes, ranges = pack_labels(labels, bits)
    for token in (0, 1, 36):
        alone = pack_labels(labels[:, :, token : token + 1], bits)
        assert alone[0].equal(codes[:, :, token : token + 1])
        assert alone[1].equal(ranges[:, :, token : token + 1])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("channels", [1, 5, 16])
def test_a_token_is_packed_from_its_vectors_into_its_place(bits: int, channels: int) -> None:
    draw = torch.Generator().manual_seed(channels)
    vectors = torch.randn(2, 3, 7, 16, generator=draw)[:, :, 4:5]
    chosen = torch.rand(6, 16, generator=draw).argsort(-1)[:, :channels]  # of two heads for each vector
    places = (torch.arange(6)[:, None] // 2 * 16 + chosen).flatten()
    picked = vectors.repeat_interleave(2, dim=1).gather(3, chosen[None, :, None].expand(2, -1, 1, -1))
    wanted = pack_labels(picked, bits)
    for pack in (pack_channels_into, reference.pack_channels_into):
        for layout in (planar, torch.clone):
            codes = layout(torch.full((2, 6, 9, wanted[0].shape[3]), 77, dtype=torch.uint8))
            ranges = layout(torch.full((2, 6, 9, 2), 77.0))
            pack(vectors, places, bits, codes.transpose(2, 3), ranges.transpose(2, 3), 3)
            for room, packed in zip((codes, ranges), wanted, strict=True):
                assert room[:, :, 3:4].equal(packed)
                assert (room[:, :, [*range(3), *range(4, 9)]] == 77).all(), "nothing else is written"


def test_labels_as_far_apart_as_floats_go_are_packed() -> None:
    largest = torch.finfo(torch.float32).max
    labels = torch.tensor([-largest, 0.0, largest]).view(1, 1, 1, 3)
    codes, ranges = pack_labels(labels, 8)
    assert codes.flatten().tolist() == [0, 128, 255]
    assert ranges.isfinite().all()


@pytest.mark.parametrize("bits", [0, 1, 3, 5, 16])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match=f"bits={bits}: labels are packed in 2, 4, 8 bits"):
        pack_labels(torch.ones(1, 1, 1, 4), bits)


def test_torch_knows_the_ops() -> None:
    queries, labels = make_case(Shape(group=2))
    torch.library.opcheck(label_scores, (queries, labels))
    torch.library.opcheck(label_scores, (queries.double(), planar(labels.double())))
    torch.library.opcheck(packed_label_scores, (queries, *pack_labels(labels, 4), 4))
