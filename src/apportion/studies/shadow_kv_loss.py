"""Where ShadowKV loses what it loses: parts of it replaced by what they stand for, at the same keys read.

Chunks by exact attention weight in place of landmarks, or smaller ones; a list for each query head in place of one for
a key-value head; keys of higher rank. None of these could be used: they read what ShadowKV is there not to read.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.keys import ComposedMemory, KeyBudget
from apportion.keys.chunks import ChunkTable
from apportion.keys.landmarks import ChunkBudget, Landmarks
from apportion.keys.shadow_kv import ShadowKV
from apportion.keys.stores import Growing, Store
from apportion.models.key_memory import LayerFacts, Step
from apportion.ops.label_scores import label_scores


class ExactChunks(Landmarks):
    """The chunks with the largest share of a head's attention by exact keys; for rows without padding."""

    in_one_go = False

    def __init__(self, budget: ChunkBudget, turn: str = "each") -> None:
        super().__init__(budget, turn)
        self._keys = Growing(2)

    @override
    def extend(self, step: Step, store: Store) -> None:
        self._keys.append(step.keys)

    @override
    def products(self, step: Step, table: ChunkTable) -> Float[Tensor, "batch heads new chunks"]:
        size = table.rule.size
        keys = self._keys.view[:, :, : table.means.shape[2] * size]
        products = label_scores(step.queries, keys) * step.scaling
        if step.softcap is not None:
            products = step.softcap * torch.tanh(products / step.softcap)
        # The softmax of these is each chunk's share.
        return products.unflatten(-1, (-1, size)).logsumexp(-1)

    @override
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        super().pick_rows(rows)
        self._keys.pick_rows(rows)


class HeadLandmarks(Landmarks):
    """Landmarks of which every query head chooses for itself."""

    in_one_go = False

    @override
    def agree(
        self, weights: Float[Tensor, "batch groups heads_of_group asking chunks"]
    ) -> Float[Tensor, "batch lists asking chunks"]:
        return weights.flatten(1, 2)


# What is replaced, as changes of ShadowKV's settings and of its selector.
_FULL = {"rank_share": 1.0}
PARTS: dict[str, tuple[dict[str, float], type[Landmarks]]] = {
    "keys of full rank": (_FULL, Landmarks),
    "rank 60 of 192": ({"rank_share": 60 / 192}, Landmarks),
    "rank 96 of 192": ({"rank_share": 96 / 192}, Landmarks),
    "chunks by exact weight": ({}, ExactChunks),
    "chunks by exact weight, keys of full rank": (_FULL, ExactChunks),
    "smaller chunks by exact weight, keys of full rank": ({**_FULL, "chunk": 2}, ExactChunks),
    "a list for each query head": ({}, HeadLandmarks),
}


def with_part(
    name: str, chunk: int, outliers: int, local: int, keys: int, facts: LayerFacts, counted: str = "all"
) -> ComposedMemory:
    """A layer's memory of ShadowKV with one of `PARTS`, or of ShadowKV itself for another name."""
    changes, selector = PARTS.get(name, ({}, Landmarks))
    # As many tokens as ever are outliers and local.
    outliers, local = (each * chunk // int(changes.get("chunk", chunk)) for each in (outliers, local))
    chunk = int(changes.get("chunk", chunk))
    # Beside everything else whole chunks are selected.
    budget = KeyBudget(keys=keys if counted == "all" else keys // chunk * chunk)
    rank = changes.get("rank_share", ShadowKV.rank_share)
    settings = {"counted": counted, "chunk": chunk, "outliers": outliers, "local": local, "turn": "each"}
    memory = ShadowKV(budget, rank_share=rank, **settings).memory(facts)  # type: ignore[arg-type]
    memory.selector = selector(ChunkBudget(budget, counted), "each")
    return memory
