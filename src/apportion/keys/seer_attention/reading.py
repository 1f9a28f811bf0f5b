"""How fitted gates choose: for blocks of a prompt's queries, and for each later token."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.keys.blocks import BlockGrid, BlockScorer, blocks_there, pool_blocks
from apportion.keys.budget import KeyBudget
from apportion.keys.seer_attention.gate import Gate, GateShape, mixed_queries
from apportion.keys.selection import KeySelection
from apportion.keys.selectors import Selector, visible
from apportion.keys.stores import Growing, Store
from apportion.models.key_memory import Step


class CompressedKeys:
    """The gate's keys of all complete blocks so far, and the tokens after them, which wait for their block to be full.

    Args:
        gate: of one layer.
        shape: see `GateShape`.
    """

    def __init__(self, gate: Gate, shape: GateShape) -> None:
        self._gate, self._shape = gate, shape
        self.keys, self.there = Growing(2), Growing(1)
        self._rest: Float[Tensor, "batch groups rest width"] | None = None
        self._rest_real: Bool[Tensor, "batch rest"] | None = None

    def extend(self, step: Step) -> None:
        """Take in the newest tokens."""
        rest, real = step.unrotated_keys(), step.real
        if self._rest is not None and self._rest_real is not None:
            rest, real = torch.cat([self._rest, rest], dim=2), torch.cat([self._rest_real, real], dim=1)
        whole = rest.shape[2] // self._shape.size * self._shape.size
        if whole:
            self.keys.append(self._compressed(rest[:, :, :whole], real[:, :whole]))
            self.there.append(blocks_there(real[:, :whole], self._shape.size))
        self._rest, self._rest_real = rest[:, :, whole:].clone(), real[:, whole:].clone()

    def complete(self) -> tuple[Float[Tensor, "batch rows blocks width"], Bool[Tensor, "batch blocks"]] | None:
        """The gate's keys of complete blocks, and which of these hold a token; None while there is none."""
        return (self.keys.view, self.there.view) if self.keys.length else None

    def all(self) -> Float[Tensor, "batch rows blocks width"]:
        """The gate's keys of all blocks, the newest one as far as it has come."""
        assert self._rest is not None
        assert self._rest_real is not None
        parts = [self.keys.view] if self.keys.length else []
        if self._rest.shape[2]:
            parts.append(self._compressed(self._rest, self._rest_real))
        return torch.cat(parts, dim=2)

    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows of the batch, in this order."""
        self.keys.pick_rows(rows)
        self.there.pick_rows(rows)
        if self._rest is not None and self._rest_real is not None:
            rows = rows.to(self._rest.device)
            self._rest, self._rest_real = self._rest[rows], self._rest_real[rows]

    @property
    def bytes(self) -> int:
        """Of the gate's keys and of the tokens that wait."""
        waiting = 0 if self._rest is None else self._rest.numel() * self._rest.element_size()
        return self.keys.bytes + waiting

    def _compressed(self, keys: Tensor, real: Tensor) -> Tensor:
        size = self._shape.size
        pooled = pool_blocks(keys, real, size, self._shape.key_pooling).float()
        first = self.keys.length * size
        return self._gate.keys(pooled, torch.arange(first, first + keys.shape[2], size))


class GateBlocks(BlockScorer):
    """The gate's scores for a prompt.

    Args:
        gate: of one layer.
        shape: see `GateShape`.
    """

    def __init__(self, gate: Gate, shape: GateShape) -> None:
        self._gate, self._shape = gate, shape
        self._keys: CompressedKeys | None = CompressedKeys(gate, shape)

    @override
    def extend(self, step: Step) -> None:
        assert self._keys is not None, "the prompt is complete"
        self._keys.extend(step)

    @override
    def scores(self, step: Step, store: Store, grid: BlockGrid) -> Float[Tensor, "batch heads query_blocks key_blocks"]:
        assert self._keys is not None, "the prompt is complete"
        pooled = pool_blocks(step.unrotated_queries(), step.real, self._shape.size, self._shape.query_pooling)
        return self._gate.logits(self._gate.queries(pooled.float(), grid.query_starts), self._keys.all())

    @override
    def close(self) -> None:
        self._keys = None

    @override
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        if self._keys is not None:
            self._keys.pick_rows(rows)

    @override
    def bytes_held(self) -> int:
        return 0 if self._keys is None else self._keys.bytes


class DecodeGate(Selector):
    """Blocks for every token after the prompt, one list for all query heads of a key-value head (SeerAttention-R).

    A token's own block, complete or not, is always read and never scored.

    Args:
        gate: of one layer.
        shape: see `GateShape`.
        budget: as many blocks as fit into it, at least the token's own; of these, sinks and recent tokens are covered
            first. None for a threshold.
        threshold: read every block whose share (the softmax over complete blocks) is above it, and the best one.
    """

    def __init__(self, gate: Gate, shape: GateShape, budget: KeyBudget | None, threshold: float | None) -> None:
        self._gate, self._shape, self._budget, self._threshold = gate, shape, budget, threshold
        self._keys = CompressedKeys(gate, shape)

    @override
    def extend(self, step: Step, store: Store) -> None:
        self._keys.extend(step)

    @override
    def select(self, step: Step, store: Store) -> KeySelection | None:
        length, complete = store.length, self._keys.complete()
        if complete is None or self._threshold == 0:
            return None
        if self._budget is not None and self._budget.tokens(length) >= length:
            return None
        size = self._shape.size
        own = torch.arange(length - step.new, length, device=step.keys.device)
        keys, there = complete
        before = torch.arange(keys.shape[2], device=own.device) < own[:, None] // size
        candidates = before & there[:, None, :]
        scores = self._gate.logits(self._gate.queries(mixed_queries(step).float(), own), keys)
        kept = self._chosen(scores, candidates[:, None], own)
        tokens = kept.repeat_interleave(size, dim=-1)
        tokens = torch.nn.functional.pad(tokens, (0, max(0, length - tokens.shape[-1])))[..., :length]
        within_own = torch.arange(length, device=own.device) >= own[:, None] // size * size
        return KeySelection.of_mask((tokens | within_own) & visible(step, store)[:, None])

    def _chosen(
        self,
        scores: Float[Tensor, "batch groups new blocks"],
        candidates: Bool[Tensor, "batch 1 new blocks"],
        own: Int[Tensor, " new"],
    ) -> Bool[Tensor, "batch groups new blocks"]:
        scores = scores.masked_fill(~candidates, -torch.inf)
        if self._threshold is not None:
            shares = scores.softmax(-1).nan_to_num(0.0)
            return ((shares > self._threshold) | (shares == shares.amax(-1, keepdim=True))) & candidates
        assert self._budget is not None
        size, budget = self._shape.size, self._budget
        place = candidates.cumsum(-1)
        # Blocks that cover sinks, and blocks that reach into the newest tokens, of which the token's own has some.
        reach = (own - budget.recent + 1).clamp_min(0) // size
        recent = torch.arange(scores.shape[-1], device=own.device) >= reach[:, None]
        forced = candidates & ((place * size < budget.sinks + size) | recent)
        count = torch.tensor([budget.tokens(int(each) + 1) // size - 1 for each in own], device=own.device)
        most = int(count.max().clamp(0, scores.shape[-1]))
        best = scores.masked_fill(forced, torch.inf).topk(most, dim=-1).indices
        within = torch.arange(most, device=own.device) < count[:, None]
        kept = torch.zeros_like(scores, dtype=torch.bool)
        return kept.scatter_(-1, best, within.expand_as(best)) & candidates

    @override
    def bytes_held(self) -> int:
        return self._keys.bytes

    @override
    def bytes_scanned(self) -> int:
        return self._keys.keys.bytes

    @override
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        self._keys.pick_rows(rows)
