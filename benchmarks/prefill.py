"""How long a prompt's attention takes when blocks of queries read few blocks of keys, against dense attention.

One layer of SmolLM2's shape in float32. The blocks are drawn, the row's own always among them, as many in every row as
`BlockRule` says for a share of the causal triangle; what is chosen does not change how long it takes. The gate that
would choose them is timed along in one case: pooling, an untrained gate's scores, and the choice.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from apportion.keys.blocks import BlockGrid, BlockRule, RandomBlocks
from apportion.keys.seer_attention import GateBlocks, PromptGates
from apportion.keys.seer_attention.gate import GateShape, rotary_frequencies
from apportion.keys.stores import ExactStore
from apportion.models.key_memory import LayerFacts, Rotation, Step
from apportion.ops.block_attend import block_attend
from benchmarks.registry import Case, Race, RacePlan, benchmark, timed

_DENSE = "dense SDPA"
_SPARSITIES = (0.5, 0.75, 0.9)
_LENGTHS = (2048, 4096, 8192, 16_384)
_SHAPE = {"heads": 9, "groups": 3, "width": 64, "block": 64}
_SMALL = {"heads": 4, "groups": 2, "width": 8, "block": 8}


@benchmark("prefill", "how long does a prompt's attention take in few blocks?", rounds=5, share=2)
def plans(smoke: bool) -> Sequence[RacePlan]:
    """One race a length."""
    shape, lengths = (_SMALL, (64,)) if smoke else (_SHAPE, _LENGTHS)
    return [
        RacePlan(
            f"{tokens:,} tokens",
            {"tokens": tokens, **shape},
            lambda tokens=tokens: _race(tokens, **shape),  # type: ignore[misc]
            varies="tokens",
            share=float(tokens**2),
        )
        for tokens in lengths
    ]


def _race(tokens: int, heads: int, groups: int, width: int, block: int) -> Race:
    draw = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(1, rows, tokens, width, generator=draw) for rows in (heads, groups, groups))
    angles = torch.arange(tokens)[None, :, None] * 1e5 ** -(torch.arange(width // 2) / (width // 2))
    real = torch.ones(1, tokens, dtype=torch.bool)
    step = Step(queries, keys, values, real, width**-0.5, None, Rotation(angles.cos(), angles.sin()))
    # Copied before the clock starts: dense attention need not share keys among heads for this comparison.
    many_keys, many_values = (each.repeat_interleave(heads // groups, dim=1) for each in (keys, values))

    def dense(turn: int) -> Tensor:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(queries, many_keys, many_values, is_causal=True, scale=step.scaling)

    cases = [Case(_DENSE, timed(dense), "keys and values already copied to all heads")]
    grid, store = BlockGrid(block, tokens, tokens), ExactStore()
    store.append(step)
    there = torch.ones(1, len(grid.key_starts), dtype=torch.bool)
    for sparsity in _SPARSITIES:
        rule = BlockRule(sparsity=sparsity, dense_rows=0)
        kept = rule.choose(RandomBlocks().scores(step, store, grid), grid, there)
        cases.append(Case(f"blocks, {sparsity:.0%} left out", timed(_reading(step, kept, block)), "attention alone"))
    cases.append(
        Case(f"gate and blocks, {_SPARSITIES[-1]:.0%} left out", timed(_gated(step, store, grid, heads, groups)), "all")
    )
    return Race(cases, _DENSE)


def _reading(step: Step, kept: Tensor, block: int) -> Callable[[int], Tensor]:
    return lambda turn: block_attend(step.queries, step.keys, step.values, kept, block, step.scaling)


def _gated(step: Step, store: ExactStore, grid: BlockGrid, heads: int, groups: int) -> Callable[[int], Tensor]:
    shape = GateShape(size=grid.size)
    frequencies = rotary_frequencies(step, shape.width)
    assert frequencies is not None
    facts = LayerFacts(0, heads, groups, step.queries.shape[-1], 1)
    gate = PromptGates(shape, [facts], frequencies[None]).requires_grad_(False).gate
    rule = BlockRule(sparsity=_SPARSITIES[-1], dense_rows=0)
    there = torch.ones(1, len(grid.key_starts), dtype=torch.bool)

    def read(turn: int) -> Tensor:
        scorer = GateBlocks(gate, shape)
        scorer.extend(step)
        kept = rule.choose(scorer.scores(step, store, grid), grid, there)
        return block_attend(step.queries, step.keys, step.values, kept, grid.size, step.scaling)

    return read
