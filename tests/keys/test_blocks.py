"""Blocks of keys for a prompt: grids, pooling, rules, scorers, and the memory that reads by them."""

import itertools
from typing import Any

import pytest
import torch

from apportion.errors import InputError
from apportion.keys import ComposedMemory
from apportion.keys.blocks import (
    BlockGrid,
    BlockMemory,
    BlockRule,
    BlockScorer,
    FirstAndRecentBlocks,
    MeanPooledBlocks,
    OracleBlocks,
    RandomBlocks,
    attention_tiles,
    blocks_there,
    pool_blocks,
)
from apportion.keys.stores import ExactStore
from apportion.keys.trace import exact_weights, part_of
from apportion.keys.vertical_slash import VerticalSlashBlocks
from apportion.models.key_memory import LayerFacts
from apportion.ops.attend import causal

SCORERS = {
    "oracle": OracleBlocks,
    "mean-pooled": MeanPooledBlocks,
    "first and recent": FirstAndRecentBlocks,
    "random": RandomBlocks,
    "columns and diagonals": VerticalSlashBlocks,
}


@pytest.mark.parametrize(("size", "new", "tokens"), [(4, 12, 12), (4, 10, 10), (8, 3, 3), (4, 5, 11), (3, 1, 8)])
def test_a_grid_counts_what_a_mask_would(size: int, new: int, tokens: int) -> None:
    grid = BlockGrid(size, new, tokens)
    seen = causal(new, tokens)
    for row, queries in enumerate(seen.split(size)):
        for column, tile in enumerate(queries.split(size, dim=1)):
            assert grid.pairs[row, column] == tile.sum()
            assert grid.visible[row, column] == tile.any()
            slots = set(range(column * size, min(tokens, column * size + size)))
            first = tokens - new + row * size
            assert grid.own[row, column] == bool(slots & set(range(first, first + len(queries))))


@pytest.mark.parametrize("padding", [0, 3, 5])
def test_pooling_looks_at_tokens_alone(padding: int) -> None:
    vectors = torch.randn(1, 2, 11, 6) + 5  # far from the zeros that padding might bring in
    real = torch.arange(11)[None] >= padding
    pooled = pool_blocks(vectors, real, 4, ("max", "min", "mean"))
    assert pooled.shape == (1, 2, 3, 18)
    for block in range(3):
        slots = [slot for slot in range(block * 4, min(11, block * 4 + 4)) if slot >= padding]
        tokens = vectors[0, :, slots]
        if not slots:
            assert pooled[0, :, block].abs().max() == 0
            continue
        expected = torch.cat([tokens.amax(1), tokens.amin(1), tokens.mean(1)], dim=-1)
        torch.testing.assert_close(pooled[0, :, block], expected)


@pytest.mark.parametrize(("new", "padding"), [(13, 0), (13, 3), (6, 2)])
def test_tiles_in_strips_are_the_pooled_full_map(make_step: Any, new: int, padding: int) -> None:
    step = make_step(13, padding=padding)
    weights = exact_weights(step, 13 - new)
    asking = part_of(step, 13 - new, 13)
    grid = BlockGrid(4, new, 13)
    peak, mass = attention_tiles(asking, step.keys, step.real, grid)
    for row, strip in enumerate(weights.split(4, dim=2)):
        for column, tile in enumerate(strip.split(4, dim=3)):
            torch.testing.assert_close(peak[:, :, row, column], tile.amax((2, 3)))
            torch.testing.assert_close(mass[:, :, row, column], tile.sum((2, 3)))


def everywhere(blocks: int, rows: int = 1) -> torch.Tensor:
    return torch.ones(rows, blocks, dtype=torch.bool)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.75, 0.9])
def test_top_k_keeps_the_closed_form_in_every_row_and_the_target_in_all(sparsity: float) -> None:
    blocks = 128
    grid = BlockGrid(4, 4 * blocks, 4 * blocks)
    rule = BlockRule(sparsity=sparsity, dense_rows=0)
    count = rule.blocks_for(blocks)
    kept = rule.choose(torch.randn(1, 2, blocks, blocks), grid, everywhere(blocks))
    assert (kept.sum(-1) == torch.arange(1, blocks + 1).clamp(max=count)).all()
    share = float(kept[0, 0].sum()) / (blocks * (blocks + 1) / 2)
    assert share == pytest.approx(1 - sparsity, abs=2 / blocks)


def test_the_last_rows_are_dense_and_forced_blocks_are_part_of_the_count() -> None:
    grid = BlockGrid(4, 40, 40)
    scores = torch.randn(1, 1, 10, 10)
    kept = BlockRule(blocks=3, dense_rows=2, always=("first", "own")).choose(scores, grid, everywhere(10))
    assert (kept.sum(-1).flatten() == torch.tensor([1, 2, 3, 3, 3, 3, 3, 3, 9, 10])).all()
    assert kept[..., 0].all()
    assert kept.diagonal(dim1=-2, dim2=-1).all()


def test_a_threshold_shares_the_budget_and_leaves_no_row_empty() -> None:
    grid = BlockGrid(4, 40, 40)
    scores = torch.zeros(1, 2, 10, 10)
    scores[0, 1, :, 0] = 5.0
    kept = BlockRule(threshold=0.15, dense_rows=0).choose(scores, grid, everywhere(10))
    flat, peaked = kept[0]
    # 1 / 6 is above the threshold, 1 / 7 below it; then of equals all are best.
    assert flat.equal(grid.visible)
    assert (peaked.sum(-1) == torch.tensor([1, *[2] * 9])).all(), "the peak and the row's own block"
    scores += torch.linspace(0, 1e-3, 10)
    flat = BlockRule(threshold=0.15, dense_rows=0).choose(scores, grid, everywhere(10))[0, 0]
    assert (flat.sum(-1) == torch.tensor([1, 2, 3, 4, 5, 6, 1, 1, 1, 1])).all()
    assert flat.diagonal().all()


def test_blocks_of_padding_are_neither_chosen_nor_counted() -> None:
    grid = BlockGrid(4, 40, 40)
    real = torch.arange(40)[None] >= 9
    there = blocks_there(real, 4)
    kept = BlockRule(blocks=2, dense_rows=1, always=("first",)).choose(torch.randn(1, 1, 10, 10), grid, there)
    assert not kept[..., :2].any()
    assert kept[0, 0, 2:, 2].all()
    assert (kept.sum(-1).flatten() == torch.tensor([0, 0, 1, 2, 2, 2, 2, 2, 2, 8])).all()


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("padding", [0, 5])
def test_a_memory_reads_what_the_rule_chose(make_step: Any, facts: LayerFacts, name: str, padding: int) -> None:
    step = make_step(22, padding=padding)
    memory = BlockMemory(facts, SCORERS[name](), BlockRule(blocks=2, dense_rows=1), 4)
    out = memory.attend(step)
    kept = memory.newest_blocks
    assert kept is not None
    assert (kept[1, :, 1:5].sum(-1) == 2).all()
    mask = kept.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :22, :22]
    seen = mask & causal(22, 22) & step.real[:, None, None]
    scores = step.queries @ step.keys.repeat_interleave(2, 1).transpose(-1, -2) * step.scaling
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(out, weights @ step.values.repeat_interleave(2, 1))
    usage = memory.usage
    assert usage.keys_read == (mask & causal(22, 22)).sum()
    assert usage.keys_there == 2 * 4 * 22 * 23 // 2
    assert usage.bytes_read < usage.bytes_dense


@pytest.mark.parametrize("rule", [BlockRule(threshold=0.0), BlockRule(sparsity=0.0), BlockRule(blocks=99)])
@pytest.mark.parametrize("name", SCORERS)
def test_a_rule_for_everything_is_dense_attention(
    make_step: Any, facts: LayerFacts, rule: BlockRule, name: str
) -> None:
    step = make_step(22, padding=3)
    dense = ComposedMemory(facts).attend(step)
    for parts in ([0, 22], [0, 3, 4, 22], [0, 1, 22]):
        memory = BlockMemory(facts, SCORERS[name](), rule, 4)
        found = [memory.attend(part_of(step, *ends)) for ends in itertools.pairwise(parts)]
        torch.testing.assert_close(torch.cat(found, dim=2), dense)
        assert memory.usage.share_read > 0.99  # a chunk of nothing but padding has no block to read


def test_after_the_prompt_everything_is_read(make_step: Any, facts: LayerFacts) -> None:
    step = make_step(22)
    memory = BlockMemory(facts, MeanPooledBlocks(), BlockRule(blocks=1, dense_rows=0), 4)
    dense = ComposedMemory(facts).attend(step)
    sparse = memory.attend(part_of(step, 0, 16))
    assert not torch.allclose(sparse, dense[:, :, :16])
    memory.close()
    for start, end in ((16, 20), (20, 21), (21, 22)):
        torch.testing.assert_close(memory.attend(part_of(step, start, end)), dense[:, :, start:end])
        assert memory.newest_blocks is None


class _Counting(BlockScorer):
    """Prefers the second block."""

    def scores(self, step: Any, store: Any, grid: BlockGrid) -> torch.Tensor:
        shape = (len(step.queries), step.queries.shape[1], *grid.visible.shape)
        return (torch.arange(shape[-1]) == 1).float().expand(shape)


def test_a_chunk_that_begins_within_a_block_leaves_no_query_with_nothing(make_step: Any, facts: LayerFacts) -> None:
    step = make_step(12)
    memory = BlockMemory(facts, _Counting(), BlockRule(blocks=1, dense_rows=0), 4)
    memory.attend(part_of(step, 0, 2))
    out = memory.attend(part_of(step, 2, 12))
    assert memory.newest_blocks is not None
    # Rows hold tokens 2-5, 6-9, 10-11: two blocks of their own each but for the last.
    assert memory.newest_blocks[0, 0].int().tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert (out.abs().sum(-1) > 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of them"),
        ({"threshold": 0.1, "blocks": 3}, "give one of them"),
        ({"threshold": 1.0}, "threshold=1.0"),
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"blocks": 0}, "blocks=0"),
        ({"blocks": 2, "dense_rows": -1}, "dense_rows=-1"),
        ({"blocks": 2, "always": ("sink",)}, "always=.*sink"),
    ],
)
def test_rules_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BlockRule(**settings)


@pytest.mark.parametrize(("new", "padding"), [(22, 0), (22, 5), (9, 0)])
def test_columns_and_diagonals_are_those_of_the_last_queries(
    make_step: Any, facts: LayerFacts, new: int, padding: int
) -> None:
    """Against loops over queries, keys and tiles, for a prompt in one piece and for a chunk."""
    step, size, last = make_step(22, padding=padding), 4, 6
    store = ExactStore()
    store.append(step)
    grid = BlockGrid(size, new, 22)
    found = VerticalSlashBlocks(last).scores(part_of(step, 22 - new, 22), store, grid)
    weights = exact_weights(step, 0)[:, :, -last:] / last
    columns = torch.stack([each.sum((2, 3)) for each in weights.split(size, dim=3)], dim=-1)
    for row, first in enumerate(range(22 - new, 22, size)):
        for column in range(6):
            of_tile = torch.zeros(2, 4)
            for query in range(first, first + size):
                for distance in (query - key for key in range(column * size, column * size + size)):
                    for asking in range(last):
                        key = 22 - last + asking - distance
                        if distance >= 0 and key >= 0:
                            of_tile += weights[:, :, asking, key] / size
            torch.testing.assert_close(found[:, :, row, column], torch.maximum(columns[..., column], of_tile))
    with pytest.raises(InputError, match="last=0"):
        VerticalSlashBlocks(0)
