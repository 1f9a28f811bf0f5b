"""Kernels are told addresses, so what they write to must have their type, whatever torch makes new tensors of."""

import contextlib

import pytest
import torch

from apportion.ops import (
    attend_chunks,
    attend_selected,
    bitmap_matmul,
    block_matmul,
    choose_by_labels,
    csr_narrow_matmul,
    label_scores,
    pack_labels,
    packed_label_scores,
)
from apportion.ops.spmm.formats import Bitmap, Blocks, NarrowCSR


@contextlib.contextmanager
def default_type(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DRAW = torch.Generator().manual_seed(0)
QUERIES, KEYS, VALUES = torch.randn(1, 4, 1, 16, generator=DRAW), *torch.randn(2, 1, 2, 64, 16, generator=DRAW)
WEIGHT = torch.randn(32, 48, generator=DRAW) * (torch.rand(32, 48, generator=DRAW) < 0.3)
X = torch.randn(3, 48, generator=DRAW)
LIST = torch.arange(0, 64, 3).expand(1, 2, 1, -1)


def labels_packed():
    return pack_labels(KEYS[..., ::4].contiguous(), 4)


def labels_scored():
    asked = QUERIES[..., ::4].contiguous()
    return label_scores(asked, KEYS[..., ::4].contiguous()), packed_label_scores(asked, *LABELS, 4)


def labels_chosen():
    return choose_by_labels(QUERIES[:, :, 0, ::4].contiguous(), *LABELS, 4, 16, 1, 4, 2, "max")


def keys_read():
    return attend_selected(QUERIES, KEYS, VALUES, LIST, torch.ones_like(LIST, dtype=torch.bool), 0.25)


def chunks_read():
    chosen = torch.tensor([[[1, 3], [0, 5]]])
    return attend_chunks(QUERIES[:, :, 0], chosen, 8, KEYS, None, None, None, VALUES, [], [], 0.25)


def bitmap_product(way):
    packed = Bitmap.pack(WEIGHT)
    return bitmap_matmul(X, packed.words(), packed.starts(), packed.values, way)


def csr_product():
    packed = NarrowCSR.pack(WEIGHT)
    return csr_narrow_matmul(X, packed.starts.long(), packed.columns, packed.values)


def block_product():
    packed = Blocks.pack(WEIGHT, height=16, width=16)
    return block_matmul(X, packed.starts.long(), packed.columns.long(), packed.blocks)


LABELS = labels_packed()


@pytest.mark.parametrize(
    "compute",
    [
        labels_packed,
        labels_scored,
        labels_chosen,
        keys_read,
        chunks_read,
        lambda: bitmap_product("nonzeros"),
        lambda: bitmap_product("panels"),
        csr_product,
        block_product,
    ],
    ids=["labels packed", "scored", "chosen", "keys", "chunks", "bitmap", "bitmap in panels", "csr", "blocks"],
)
def test_another_default_type_changes_nothing(compute):
    wanted = compute()
    with default_type(torch.float64):
        found = compute()
    for each, other in zip(wanted, found, strict=True) if isinstance(wanted, tuple) else [(wanted, found)]:
        assert each.dtype == other.dtype
        assert torch.equal(each, other)
