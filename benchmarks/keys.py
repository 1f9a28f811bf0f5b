"""Decoding with few keys against dense attention: one attention layer by context length, and whole tokens of a model.

The methods are composed here from the ops they stand on (labels of a few channels as Double Sparsity has them,
landmarks and low-rank keys as ShadowKV has them), and run as the room runs them: memories with accounts. Nothing is
fitted; keys and queries are random, which changes nothing but how scattered the chosen tokens lie: more than in text.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Int
from torch import Tensor

from apportion.errors import InputError
from apportion.keys import ComposedMemory, KeyBudget
from apportion.keys.double_sparsity import LabelSelector
from apportion.keys.shadow_kv import ShadowKV
from apportion.models import LanguageModel, load
from apportion.models.key_door import Door, attend_with, close_prompt, layer_facts
from apportion.models.key_memory import LayerFacts, Rotation, Step
from apportion.ops import attend_chunks, attend_selected, choose_by_labels, choose_chunks, pack_labels
from apportion.ops.attend import attend
from benchmarks.registry import Case, Race, RacePlan, Unavailable, benchmark, timed

_BASELINE = "dense SDPA"
_SHARE = 1 / 16  # of the keys are read
_CHUNK = 8  # tokens of a landmark
_SINKS, _RECENT = 4, 32
_COLD = 128_000_000  # bytes of keys and values that take turns, so that none is found in a cache
_MODEL = "smollm2"
_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Shape:
    """One attention layer that decodes one token.

    Attributes:
        context: tokens there are.
        heads: of queries.
        groups: key-value heads.
        width: of a head.
        channels: of a label.
        rank: of the key factorisation.
    """

    context: int
    heads: int
    groups: int
    width: int
    channels: int
    rank: int


class Layer:
    """Random keys, values and side tables of one layer; what does not lie in time order is planar."""

    def __init__(self, shape: Shape, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        groups, tokens, width = shape.groups, shape.context, shape.width
        self.shape = shape
        self.keys = torch.randn(1, groups, tokens, width, generator=draw)
        self.values = torch.randn(1, groups, tokens, width, generator=draw)

    @cached_property
    def labels(self) -> Tensor:
        """A few channels of every key, for each key-value head."""
        return _planar(self.keys[..., :: self.shape.width // self.shape.channels])

    @cached_property
    def short_labels(self) -> Tensor:
        """The same in bfloat16."""
        return _planar(self.labels.bfloat16())

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor]:
        """The same in 4 bits."""
        codes, ranges = pack_labels(self.labels, 4)
        return _planar(codes), _planar(ranges)

    @cached_property
    def packed_of_heads(self) -> tuple[Tensor, Tensor]:
        """Labels of channels of their own for each query head, in 4 bits."""
        labels = self.labels.repeat_interleave(self.shape.heads // self.shape.groups, dim=1)
        codes, ranges = pack_labels(labels, 4)
        return _planar(codes), _planar(ranges)

    @cached_property
    def landmarks(self) -> Tensor:
        """Means of chunks of keys."""
        return _planar(self.keys.unflatten(2, (-1, _CHUNK)).mean(3))

    @cached_property
    def candidates(self) -> Tensor:
        """Of the chunks, all."""
        return torch.ones(1, self.shape.groups, self.shape.context // _CHUNK, dtype=torch.bool)

    @cached_property
    def label_memory(self) -> ComposedMemory:
        """The layer as Double Sparsity keeps it, every query head with labels and a list of its own."""
        return self._filled(ComposedMemory(self._facts, selector=_label_selector(self._facts, "head")))

    @cached_property
    def chunk_memory(self) -> ComposedMemory:
        """The layer as ShadowKV keeps it, with the paper's outliers and local chunks."""
        rank = self.shape.rank / self.shape.groups / self.shape.width
        # The paper's 48 are more than all of a smoke test's chunks.
        outliers = min(48, self.shape.context // _CHUNK // 8)
        return self._filled(ShadowKV(KeyBudget(share=_SHARE), rank_share=rank, outliers=outliers).memory(self._facts))

    @property
    def _facts(self) -> LayerFacts:
        return LayerFacts(0, self.shape.heads, self.shape.groups, self.shape.width, 1)

    def _filled(self, memory: ComposedMemory) -> ComposedMemory:
        _, _, cos, sin = self.factors
        real = torch.ones(1, self.shape.context, dtype=torch.bool)
        nobody = self.keys.new_zeros(1).expand(1, self.shape.heads, self.shape.context, self.shape.width)
        memory.take_in(Step(nobody, self.keys, self.values, real, 1.0, rotation=Rotation(cos, sin)))
        memory.close()
        return memory

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Factors and basis of a key factorisation (random, of the right shape), cosines and sines."""
        draw = torch.Generator().manual_seed(0)
        shape = self.shape
        factors = torch.randn(1, shape.context, shape.rank, generator=draw)
        basis = torch.randn(1, shape.groups, shape.rank, shape.width, generator=draw)
        angles = torch.rand(1, shape.context, shape.width // 2, generator=draw)
        return factors, basis, angles.cos(), angles.sin()


def _label_selector(facts: LayerFacts, group: str) -> LabelSelector:
    """Every other so many channels of a key as its label, in 4 bits; of query heads, or one for those of a group."""
    channels = torch.arange(0, facts.width, 4)
    rows = facts.heads if group == "head" else facts.groups
    return LabelSelector(channels.expand(rows, -1), 4, KeyBudget(share=_SHARE, sinks=_SINKS, recent=_RECENT), group)


def _planar(table: Tensor) -> Tensor:
    return table.transpose(-1, -2).contiguous().transpose(-1, -2)


class Decoding:
    """One token's attention in every way, on layers that take turns."""

    def __init__(self, shape: Shape, cold: int = _COLD) -> None:
        self.shape = shape
        bytes_of_layer = 8 * shape.context * shape.groups * shape.width
        self.layers = [Layer(shape, seed) for seed in range(max(2, -(-cold // bytes_of_layer)))]
        self.queries = torch.randn(1, shape.heads, 1, shape.width, generator=torch.Generator().manual_seed(99))
        self.scaling = shape.width**-0.5
        self.budget = KeyBudget(share=_SHARE, sinks=_SINKS, recent=_RECENT)

    def layer(self, turn: int) -> Layer:
        return self.layers[turn % len(self.layers)]

    def transformers(self, layer: Layer) -> Tensor:
        """The call that transformers makes for one token without padding."""
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(self.queries, layer.keys, layer.values, scale=self.scaling, enable_gqa=True)

    def dense(self, layer: Layer) -> Tensor:
        return attend(self.queries, layer.keys, layer.values, self.scaling)

    def short_labels(self, layer: Layer) -> Tensor:
        return self._read(layer, layer.short_labels, None, 16, "max")

    def packed_labels(self, layer: Layer) -> Tensor:
        return self._read(layer, *layer.packed, 4, "max")

    def packed_labels_of_heads(self, layer: Layer) -> Tensor:
        return self._read(layer, *layer.packed_of_heads, 4, "head")

    def landmarks(self, layer: Layer) -> Tensor:
        stored = (layer.keys, None, None, None, layer.values)
        return attend_chunks(self._asked, self._chunks(layer), _CHUNK, *stored, [], [], self.scaling)

    def low_rank(self, layer: Layer) -> Tensor:
        stored = (*layer.factors, layer.values)
        return attend_chunks(self._asked, self._chunks(layer), _CHUNK, *stored, [], [], self.scaling)

    def label_memory(self, layer: Layer) -> Tensor:
        return layer.label_memory.attend(self.step)

    def chunk_memory(self, layer: Layer) -> Tensor:
        return layer.chunk_memory.attend(self.step)

    @cached_property
    def step(self) -> Step:
        """One more token, as a memory is given it."""
        layer = self.layers[0]
        one = layer.keys[:, :, :1], layer.values[:, :, :1]
        return Step(self.queries, *one, torch.ones(1, 1, dtype=torch.bool), self.scaling)

    @cached_property
    def _asked(self) -> Tensor:
        return self.queries[:, :, 0]

    @cached_property
    def _shortened(self) -> Tensor:
        return self._asked[..., :: self.shape.width // self.shape.channels].contiguous()

    def _read(self, layer: Layer, labels: Tensor, ranges: Tensor | None, bits: int, group: str) -> Tensor:
        count = self.budget.tokens(self.shape.context)
        given = (labels, ranges, bits, count, _SINKS, _RECENT, self.shape.groups, group)
        chosen = choose_by_labels(self._shortened, *given)[:, :, None]
        kept = torch.ones_like(chosen, dtype=torch.bool)
        return attend_selected(self.queries, layer.keys, layer.values, chosen, kept, self.scaling)

    def _chunks(self, layer: Layer) -> Int[Tensor, "batch groups kept"]:
        """The chunks whose landmarks some head of the group wants most."""
        count = int(self.shape.context * _SHARE) // _CHUNK
        return choose_chunks(self._asked, layer.landmarks, layer.candidates, count, self.scaling)


def _layer_plan(title: str, shape: Shape, cold: int = _COLD) -> RacePlan:
    def build() -> Race:
        decoding = Decoding(shape, cold)

        def case(label: str, way: Callable[[Layer], Tensor], includes: str) -> Case:
            for layer in decoding.layers:  # side tables are made before the first measurement
                way(layer)
            return Case(label, timed(lambda turn: way(decoding.layer(turn))), includes)

        labels = f"scores by {shape.channels} of {shape.width} channels of each key, 1/16 of the keys chosen, {{}}"
        whole = "with the new token's key, value and label appended, and accounts kept"
        chunks = (
            f"scores by means of {_CHUNK} keys, 1/16 of the keys chosen in whole chunks for each key-value head, {{}}"
        )
        cases = [
            case(_BASELINE, decoding.transformers, "scaled_dot_product_attention as transformers calls it"),
            case("dense, apportion", decoding.dense, "the same, with the heads of a group packed as queries"),
            case("labels 16 bit", decoding.short_labels, labels.format("a list for each key-value head")),
            case("labels 4 bit", decoding.packed_labels, labels.format("a list for each key-value head")),
            case("labels 4 bit, heads", decoding.packed_labels_of_heads, labels.format("a list for each query head")),
            case("landmarks", decoding.landmarks, chunks.format("read from the cache")),
            case(f"landmarks, rank {shape.rank}", decoding.low_rank, chunks.format("rebuilt and rotated")),
            case(
                "Double Sparsity, memory", decoding.label_memory, "the method's own step: labels 4 bit, heads; " + whole
            ),
            case("ShadowKV, memory", decoding.chunk_memory, "the method's own step: landmarks, rank; " + whole),
        ]
        return Race(cases, _BASELINE)

    return RacePlan(title, asdict(shape), build, varies="context", share=float(shape.context * shape.groups))


@benchmark(
    "keys", "how fast is decoding with 1/16 of the keys, against dense attention?", rounds=15, share=4, warm_ups=2
)
def plans(smoke: bool) -> Sequence[RacePlan]:
    """One layer of SmolLM2's shape and one of an 8B model's, by context length."""
    if smoke:
        return [_layer_plan("smoke", Shape(256, 6, 2, 16, 4, 8), cold=0)]
    contexts = (8192, 16384, 32768)
    small = [_layer_plan(f"SmolLM2's shape, {each:,} tokens", Shape(each, 9, 3, 64, 16, 30)) for each in contexts]
    large = [_layer_plan(f"an 8B shape, {each:,} tokens", Shape(each, 32, 8, 128, 32, 160)) for each in contexts]
    return small + large


class Generation:
    """A model that decodes one token a turn, its cache filled with random keys, since a long prompt takes minutes."""

    def __init__(self, lm: LanguageModel, context: int) -> None:
        self.lm, self.context = lm, context
        self.token = torch.tensor([[1]])
        self.caches: dict[str, object] = {}

    def plain(self, label: str, turn: int) -> None:
        """Transformers' own cache and attention."""
        if label not in self.caches:
            self.caches[label] = self._plain_cache()
        self._decode(label)

    def remembered(self, label: str, make: Callable[[LayerFacts], ComposedMemory], turn: int) -> None:
        """A cache of memories."""
        with attend_with(self.lm, make) as door:
            if label not in self.caches:
                self.caches[label] = self._filled(door)
            self._decode(label)

    @torch.no_grad()
    def _decode(self, label: str) -> None:
        self.lm.model(self.token, past_key_values=self.caches[label], logits_to_keep=1)

    def _plain_cache(self) -> object:
        import transformers

        cache = transformers.DynamicCache(config=self.lm.model.config)
        for facts in layer_facts(self.lm):
            cache.update(*self._random(facts), facts.layer)
        return cache

    @torch.no_grad()
    def _filled(self, door: Door) -> object:
        """Let the model make a cache, and give its stores and selectors the rest of a prompt, which nobody reads.

        The memories go on counting from the first token, so that positions are wrong; time does not depend on them.
        """
        self.lm.model(self.token, logits_to_keep=1, use_cache=True)
        for facts, memory in zip(layer_facts(self.lm), door.memories(), strict=True):
            assert isinstance(memory, ComposedMemory)
            keys, values = self._random(facts)
            nobody = keys.new_zeros(1).expand(1, facts.heads, self.context, facts.width)
            step = Step(nobody, keys, values, torch.ones(1, self.context, dtype=torch.bool), 1.0)
            memory.store.append(step)
            if memory.selector is not None:
                memory.selector.extend(step, memory.store)
        close_prompt(door.cache)
        return door.cache

    def _random(self, facts: LayerFacts) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(facts.layer)
        shape = (1, facts.groups, self.context, facts.width)
        return torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)


def _generation_plan(lm: LanguageModel, context: int) -> RacePlan:
    def build() -> Race:
        generation = Generation(lm, context)

        def few(facts: LayerFacts) -> ComposedMemory:
            return ComposedMemory(facts, selector=_label_selector(facts, "max"))

        ways = {
            "transformers": (partial(generation.plain, "transformers"), "its DynamicCache and SDPA"),
            "dense memory": (
                partial(generation.remembered, "dense memory", ComposedMemory),
                "a cache that grows without copying, everything read",
            ),
            "labels 4 bit": (
                partial(generation.remembered, "labels 4 bit", few),
                "the same cache, 1/16 of the keys read in every layer",
            ),
        }
        cases = [Case(label, timed(way), includes) for label, (way, includes) in ways.items()]
        return Race(cases, "transformers")

    return RacePlan(f"{context:,} tokens", {"context": context}, build, varies="context", share=float(context + 8192))


@benchmark(
    "generation", "from which context on is a token faster with 1/16 of the keys?", rounds=5, share=4, warm_ups=1
)
def generation_plans(smoke: bool) -> Sequence[RacePlan]:
    """One token of SmolLM2, by context length."""
    try:
        # Packaged models are never fetched here: a benchmark must not wait for a network.
        lm = load(_MODEL)
    except InputError as error:
        raise Unavailable(str(error)) from error
    return [_generation_plan(lm, context) for context in ((64,) if smoke else _LENGTHS)]
