"""What decoding runs on torch's threads gives the same bits on any number of them, time after time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from apportion.ops import attend_chunks, attend_selected, choose_by_labels, choose_chunks, pack_labels, team

HEADS, GROUPS, TOKENS, WIDTH = 6, 2, 5000, 24


def decode() -> list[Tensor]:
    """One token by each op, on lists of several tiles and parts."""
    draw = torch.Generator().manual_seed(0)
    queries, keys, values = (
        torch.randn(1, heads, size, WIDTH, generator=draw)
        for heads, size in ((HEADS, 1), (GROUPS, TOKENS), (GROUPS, TOKENS))
    )
    asked, labels = queries[:, :, 0], pack_labels(keys.repeat_interleave(3, dim=1), 4)
    tokens = choose_by_labels(asked, *labels, 4, 700, 2, 5, GROUPS, "head")
    shared = choose_by_labels(asked, keys, None, 16, 700, 2, 5, GROUPS, "mean")
    means = keys.unflatten(2, (-1, 4)).mean(3)
    chunks = choose_chunks(asked, means, torch.ones(means.shape[:3], dtype=torch.bool), 90, 0.2)
    exact = [keys[:, :, :600], keys[:, :, 600:610]], [values[:, :, :600], values[:, :, 600:610]]
    return [
        tokens,
        shared,
        chunks,
        attend_selected(queries, keys, values, tokens[:, :, None], None, 0.2),
        attend_chunks(asked, chunks, 4, keys, None, None, None, values, *exact, 0.2),
    ]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(*each) for each in zip(one, other, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_number_of_threads_finds_the_same_bits(threads: int) -> None:
    wanted, before = decode(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert all(same(decode(), wanted) for _ in range(5))
    finally:
        torch.set_num_threads(before)


def test_without_the_threads_of_torch_one_thread_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = decode()
    monkeypatch.setattr(team, "_parallel", lambda: None)
    assert same(decode(), wanted)


def test_who_counts_leaves_zeros_behind() -> None:
    decode()
    assert not team.counters(1).any()


def test_a_thread_has_scratch_of_its_own() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def address(take: Callable[[int], Tensor]) -> int:
        return take(10).data_ptr()

    with ThreadPoolExecutor(1) as other:
        for take in (team.scratch, team.counters):
            assert other.submit(address, take).result() != address(take) == address(take)
