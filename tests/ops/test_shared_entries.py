"""Shared entries are those that two lists have in common."""

import pytest
import torch

from apportion.ops.shared_entries import reference, shared_entries


@pytest.mark.parametrize(("length", "other_length"), [(7, 7), (3, 9), (12, 4), (1, 1), (5, 0), (0, 5)])
@pytest.mark.parametrize("seed", range(5))
def test_they_are_those_of_sets(length: int, other_length: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    lists, others = (
        torch.rand(2, 3, 14, generator=draw).argsort(-1)[..., :size].sort(-1).values for size in (length, other_length)
    )
    pairs = zip(lists.flatten(0, 1).tolist(), others.flatten(0, 1).tolist(), strict=True)
    wanted = sum(len(set(one) & set(other)) for one, other in pairs)
    assert shared_entries(lists, others) == reference.shared_entries(lists, others) == wanted


def test_lists_of_any_strides_are_read_as_they_are() -> None:
    lists = torch.arange(24).view(2, 3, 4)
    turned = lists.transpose(1, 2).contiguous().transpose(1, 2)
    assert shared_entries(turned, lists) == shared_entries(lists[..., ::2], turned) * 2 == 24
