"""The gate, and what it is taught: pooled queries and keys of a text with the attention that blocks really got."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.blocks import POOLS, BlockGrid, attention_tiles, pool_blocks
from apportion.models.key_memory import LayerFacts, Rotation, Step
from apportion.ops.attend import causal, reference


@dataclass(frozen=True)
class GateShape:
    """What a gate's weights are made for.

    Attributes:
        size: tokens of a block.
        width: of the gate's queries and keys; even, since they turn in pairs.
        query_pooling: of ``mean``, ``max``, ``min``; SeerAttention-R does not pool queries.
        key_pooling: likewise.
        norm: scale the gate's queries and keys to unit mean square (SeerAttention-R's option).

    Raises:
        InputError: one of them cannot be.
    """

    size: int = 64
    width: int = 128
    query_pooling: tuple[str, ...] = ("mean",)
    key_pooling: tuple[str, ...] = ("max", "min", "mean")
    norm: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"size={self.size}: a block has at least 1 token")
        if self.width < 2 or self.width % 2:
            raise InputError(f"width={self.width}: an even number of at least 2, since coordinates turn in pairs")
        for name in ("query_pooling", "key_pooling"):
            pools = getattr(self, name)
            if not pools or len(set(pools)) < len(pools) or set(pools) - set(POOLS):
                raise InputError(f"{name}={pools}: some of {', '.join(POOLS)}, each once")

    def has_query_weight(self, head_width: int) -> bool:
        """Whether queries are mapped at all: a single pooling of the gate's own width is taken as it is."""
        return len(self.query_pooling) > 1 or self.width != head_width


@dataclass(frozen=True, eq=False)
class Gate:
    """Scores of queries for blocks of keys; for several layers at once, or for one and every row of a batch.

    Attributes:
        key_weight: its rows are query heads where queries are not mapped, else key-value heads.
        query_weight: None where queries are taken as they are.
        frequencies: radians a token, by which the halves of queries and keys turn; None for none.
        query_scale: of normalised queries; None for queries that are not normalised.
        key_scale: likewise.
    """

    key_weight: Float[Tensor, "layers rows pooled width"]
    query_weight: Float[Tensor, "layers heads query_pooled width"] | None = None
    frequencies: Float[Tensor, "layers half"] | None = None
    query_scale: Float[Tensor, "layers width"] | None = None
    key_scale: Float[Tensor, "layers width"] | None = None

    def queries(
        self, pooled: Float[Tensor, "batch heads query_blocks query_pooled"], starts: Int[Tensor, " query_blocks"]
    ) -> Float[Tensor, "batch heads query_blocks width"]:
        """The gate's queries, turned by the slot at which each begins."""
        mapped = pooled if self.query_weight is None else pooled @ self.query_weight
        return self._turned(_scaled(mapped, self.query_scale), starts)

    def keys(
        self, pooled: Float[Tensor, "batch groups key_blocks pooled"], starts: Int[Tensor, " key_blocks"]
    ) -> Float[Tensor, "batch rows key_blocks width"]:
        """The gate's keys, turned by the slot at which each block begins."""
        shared = self.key_weight.shape[1] // pooled.shape[1]
        mapped = pooled.repeat_interleave(shared, dim=1) @ self.key_weight
        return self._turned(_scaled(mapped, self.key_scale), starts)

    def logits(
        self,
        queries: Float[Tensor, "batch heads query_blocks width"],
        keys: Float[Tensor, "batch rows key_blocks width"],
    ) -> Float[Tensor, "batch heads query_blocks key_blocks"]:
        """How much each query wants each block."""
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        return queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5

    def _turned(self, vectors: Tensor, starts: Tensor) -> Tensor:
        if self.frequencies is None:
            return vectors
        angles = starts.to(vectors.device)[None, :, None] * self.frequencies[:, None, :]
        return Rotation(angles.cos(), angles.sin()).apply(vectors)


class Example(NamedTuple):
    """What gates are taught by one text, all layers together.

    Attributes:
        queries: the gate's input; heads are query heads, or key-value heads (SeerAttention-R).
        query_starts: slots.
        keys: pooled.
        key_starts: slots.
        truth: share of each block in a row's attention; rows of zeros teach nothing.
        visible: which blocks a row may choose.
    """

    queries: Float[Tensor, "layers heads asking query_pooled"]
    query_starts: Int[Tensor, " asking"]
    keys: Float[Tensor, "layers groups key_blocks pooled"]
    key_starts: Int[Tensor, " key_blocks"]
    truth: Float[Tensor, "layers heads asking key_blocks"]
    visible: Bool[Tensor, "asking key_blocks"]

    @staticmethod
    def of_layers(parts: Sequence["Example"]) -> "Example":
        """One text's layers, each an example of its own until now."""
        queries, keys, truth = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("queries", "keys", "truth")
        )
        first = parts[0]
        return Example(queries, first.query_starts, keys, first.key_starts, truth, first.visible)


class Gates(nn.Module):
    """Gates of several layers, being trained.

    Args:
        shape: of each.
        facts: the layers.
        frequencies: of each layer's rotary embedding, see `rotary_frequencies`; None for a model without.
    """

    query_weight: nn.Parameter | None
    key_weight: nn.Parameter
    frequencies: Tensor | None

    def __init__(
        self, shape: GateShape, facts: Sequence[LayerFacts], frequencies: Float[Tensor, "layers half"] | None
    ) -> None:
        super().__init__()
        self.shape, self.layers = shape, [each.layer for each in facts]
        self._set_weights(facts)
        self.query_scale = nn.Parameter(torch.ones(len(facts), shape.width)) if shape.norm else None
        self.key_scale = nn.Parameter(torch.ones(len(facts), shape.width)) if shape.norm else None
        self.register_buffer("frequencies", frequencies)

    @abstractmethod
    def _set_weights(self, facts: Sequence[LayerFacts]) -> None:
        """Make and initialise ``query_weight`` and ``key_weight``."""

    @staticmethod
    @abstractmethod
    def example(step: Step, shape: GateShape) -> Example:
        """What a text teaches one layer's gate; ``step`` holds all of the text."""

    @property
    def gate(self) -> Gate:
        """All layers, as they are now."""
        return Gate(self.key_weight, self.query_weight, self.frequencies, self.query_scale, self.key_scale)

    def forward(self, example: Example) -> Float[Tensor, "layers heads asking key_blocks"]:
        """Logits."""
        gate = self.gate
        queries = gate.queries(example.queries, example.query_starts)
        return gate.logits(queries, gate.keys(example.keys, example.key_starts))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a gate needs, by names as `KeyMethod.fitted` has them."""
        named = {**dict(self.named_parameters()), "frequencies": self.frequencies}
        return {
            f"layer.{layer}.{name}": tensor.detach()[place].clone()
            for name, tensor in named.items()
            if tensor is not None
            for place, layer in enumerate(self.layers)
        }


class PromptGates(Gates):
    """Pooled queries of each query head; the sheet's section 2.2 a to c."""

    @override
    def _set_weights(self, facts: Sequence[LayerFacts]) -> None:
        count, heads, groups, width = len(facts), facts[0].heads, facts[0].groups, facts[0].width
        mapped = self.shape.has_query_weight(width)
        key_rows = groups if mapped else heads
        pooled = len(self.shape.key_pooling) * width
        # The standard deviation with which the usual decoders are initialised.
        self.key_weight = nn.Parameter(torch.randn(count, key_rows, pooled, self.shape.width) * 0.02)
        self.query_weight = None
        if mapped:
            pooled = len(self.shape.query_pooling) * width
            self.query_weight = nn.Parameter(torch.randn(count, heads, pooled, self.shape.width) * 0.02)

    @override
    @staticmethod
    def example(step: Step, shape: GateShape) -> Example:
        peaks, _ = attention_tiles(step, step.keys, step.real, BlockGrid(shape.size, step.new, step.new))
        return PromptGates.example_of(step, shape, peaks)

    @staticmethod
    def example_of(
        step: Step, shape: GateShape, peaks: Float[Tensor, "batch heads query_blocks key_blocks"]
    ) -> Example:
        """The same, where the largest attention weights of all tiles are known already; see `attention_tiles`."""
        grid = BlockGrid(shape.size, step.new, step.new)
        # The first quarter of the rows is dropped: short rows are nearly one-hot, whatever the text.
        rows = slice(len(grid.query_starts) // 4, None)
        truth = peaks[:, :, rows]
        return Example(
            pool_blocks(step.unrotated_queries(), step.real, shape.size, shape.query_pooling)[:, :, rows].float(),
            grid.query_starts[rows],
            pool_blocks(step.unrotated_keys(), step.real, shape.size, shape.key_pooling).float(),
            grid.key_starts,
            (truth / truth.sum(-1, keepdim=True).clamp_min(1e-20)).float(),
            grid.visible[rows],
        )


class DecodeGates(Gates):
    """The queries of a key-value head's query heads, mixed, token by token; section 2.2 e (SeerAttention-R)."""

    asking = 1024

    @override
    def _set_weights(self, facts: Sequence[LayerFacts]) -> None:
        count, groups, width = len(facts), facts[0].groups, facts[0].width
        mixed, pooled = facts[0].heads // groups * width, len(self.shape.key_pooling) * width
        self.query_weight = nn.Parameter(torch.empty(count, groups, mixed, self.shape.width))
        self.key_weight = nn.Parameter(torch.empty(count, groups, pooled, self.shape.width))
        for weight in (self.query_weight, self.key_weight):
            for each in weight.data.flatten(0, 1):
                nn.init.xavier_uniform_(each)

    @override
    @staticmethod
    def example(step: Step, shape: GateShape) -> Example:
        half = step.new // 2
        chosen = torch.linspace(half, step.new - 1, min(DecodeGates.asking, step.new - half)).long()
        starts = torch.arange(0, step.new, shape.size)
        visible = starts + shape.size <= chosen[:, None] // shape.size * shape.size
        return Example(
            mixed_queries(step)[:, :, chosen].float(),
            chosen,
            pool_blocks(step.unrotated_keys(), step.real, shape.size, shape.key_pooling).float(),
            starts,
            _token_truth(step, chosen, visible, shape.size).float(),
            visible,
        )


def mixed_queries(step: Step) -> Float[Tensor, "batch groups new mixed"]:
    """The unrotated queries of each key-value head's query heads, side by side."""
    queries = step.unrotated_queries()
    batch, heads, new, width = queries.shape
    grouped = queries.view(batch, heads // step.group, step.group, new, width)
    return grouped.transpose(2, 3).reshape(batch, heads // step.group, new, step.group * width)


def _token_truth(
    step: Step, chosen: Int[Tensor, " asking"], visible: Bool[Tensor, "asking key_blocks"], size: int
) -> Float[Tensor, "batch groups asking key_blocks"]:
    keys = step.keys.repeat_interleave(step.group, dim=1).transpose(-1, -2)
    seen = causal(step.new, step.new, step.keys.device) & step.real[:, None, None, :]
    rows = []
    for part in chosen.split(size):
        weights = reference.weigh(step.queries[:, :, part] @ keys, seen[:, :, part], step.scaling, step.softcap)
        weights = nn.functional.pad(weights, (0, -step.new % size)).unflatten(-1, (-1, size))
        rows.append(weights.amax(-1).unflatten(1, (-1, step.group)).amax(2))
    truth = torch.cat(rows, dim=2) * visible
    return truth / truth.sum(-1, keepdim=True).clamp_min(1e-20)


def rotary_frequencies(step: Step, width: int) -> Float[Tensor, " half"] | None:
    """Radians a token of a rotary embedding like the step's, for vectors of another width.

    Frequencies are spaced evenly on a logarithmic scale; those of another width lie between the model's own.

    Args:
        step: its first two tokens are neighbours.
        width: of the vectors; all of it turns.
    """
    if step.rotation is None:
        return None
    angles = torch.atan2(step.rotation.sin[0, :2].double(), step.rotation.cos[0, :2].double())
    # Frequencies are at most 1, so that neighbours never differ by more than half a turn.
    own = torch.remainder(angles[1] - angles[0], 2 * torch.pi).clamp_min(1e-12)
    logarithms = own.log()
    half = len(own)
    places = torch.arange(width // 2, dtype=torch.float64, device=own.device) * half / (width // 2)
    low = places.floor().long().clamp(max=max(half - 2, 0))
    slope = logarithms[low + 1] - logarithms[low] if half > 1 else torch.zeros_like(places)
    return (logarithms[low] + (places - low) * slope).exp().float()


def _scaled(vectors: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return vectors
    normed = vectors * (vectors.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return normed * scale[:, None, None, :]
