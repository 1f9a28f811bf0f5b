"""Double Sparsity: a few channels say which few tokens are read.

Yang, Sheng, Gonzalez, Stoica, Zheng 2024, *Post-Training Sparse Attention with Double Sparsity*, arXiv 2408.07092.

Two budgets: T tokens that a query reads in full, and r of d channels of every key by which the T are found. Channels
are chosen once, per layer and query head: those in which the mean of ``|q_c k_c|`` over calibration is largest. A
token's label is its key in these channels, in few bits; a query reads the T tokens whose labels fit its own best.

=====================  ==============================================================
T                      ``budget``: 1/16 of the tokens that a query sees
r                      ``width // group_factor``; at 4 and 4 bits, 1/16 of a 16-bit key
outlier channels       `ChannelStatistics`; "qk": query and key of one and the same token
label cache            `LabelTable`
s = q_C . k_C          `LabelSelector.scores`
=====================  ==============================================================

Departures. The statistic is accumulated over all of calibration (the code published with the paper overwrites it with
each batch's). "q" and "k" are taken from rotated vectors, as the labels are; "unrotated q" is what the published code
calls "q". The smallest channel and the step of each label are kept and counted (8 bytes a label), which the paper's
1/16 leaves out. Queries are rounded as the labels are, as in the published code. Where no more than T tokens are there,
everything is read. Labels of one set of channels for a whole key-value head (``channels="group"``) are ours.

The offload variant must fetch a layer's tokens before its queries are there, and guesses them: `prefetch_hit_rate`
measures how well. Nothing is moved or timed here.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.budget import KeyBudget
from apportion.keys.labels import LABEL_BITS, LabelTable
from apportion.keys.selecting import SelectingMethod
from apportion.keys.selection import KeySelection, WholeLists
from apportion.keys.selectors import TopKeys, across_group, best_tokens, visible
from apportion.keys.stores import ExactStore, Store
from apportion.keys.trace import Trace, encode_texts, part_of, watch_steps
from apportion.models import LanguageModel
from apportion.models.key_door import layer_facts, queries_of
from apportion.models.key_memory import LayerFacts, Step
from apportion.ops.key_choice import GROUPS

STATISTICS = ("qk", "q", "k", "unrotated q")
CHANNELS = ("head", "group")


class ChannelStatistics:
    """How large each channel is for each query head of a layer: a mean over tokens, padding left out.

    Args:
        statistic: ``qk``: of ``|query * key|``, both of the token itself; ``q`` and ``k``: of the one's magnitude;
            ``unrotated q``: before the rotary embedding.
    """

    def __init__(self, statistic: str = "qk") -> None:
        if statistic not in STATISTICS:
            raise InputError(f"statistic={statistic!r}: one of {', '.join(STATISTICS)}")
        self.statistic = statistic
        self._total: Tensor | None = None
        self._count = 0

    def add(self, step: Step) -> None:
        """Take in the tokens of a step; in which order and in how many parts does not matter."""
        values = self._of(step).double() * step.real[:, None, :, None]
        total = values.sum(dim=(0, 2))
        self._total = total if self._total is None else self._total + total
        self._count += int(step.real.sum())

    @property
    def mean(self) -> Float[Tensor, "heads width"]:
        """So far.

        Raises:
            InputError: there was no token.
        """
        if self._total is None or not self._count:
            raise InputError("calibration had no token that is no padding: give texts")
        return (self._total / self._count).float()

    def _of(self, step: Step) -> Float[Tensor, "batch heads new width"]:
        if self.statistic == "q":
            return step.queries.abs()
        if self.statistic == "unrotated q":
            return step.unrotated_queries().abs()
        keys = step.keys.abs().repeat_interleave(step.group, dim=1)
        return keys if self.statistic == "k" else step.queries.abs() * keys


class LabelSelector(TopKeys):
    """The tokens whose labels fit a query's channels best.

    Args:
        channels: of each query head, or of each key-value head whose query heads share labels.
        bits: see `LabelTable`.
        budget: how many tokens.
        group: see `TopKeys`.
        at_close: told how many tokens a prompt had.
    """

    def __init__(
        self,
        channels: Int[Tensor, "rows channels"],
        bits: int,
        budget: KeyBudget,
        group: str = "head",
        at_close: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(budget, group)
        self.channels, self.labels = channels, LabelTable(bits, channels.shape[1])
        self._places: dict[tuple[int, torch.device], Int[Tensor, " all_channels"]] = {}
        self._at_close = at_close

    @override
    def extend(self, step: Step, store: Store) -> None:
        if step.new == 1:
            self.labels.append_one(step.keys, self._places_in(step.keys))
        else:
            self.labels.append(self.pick_channels(step.keys))

    @override
    def close(self, store: Store) -> None:
        if self._at_close is not None:
            self._at_close(store.length)

    @override
    def select(self, step: Step, store: Store) -> KeySelection | None:
        count = self.budget.tokens(store.length)
        one = step.new == 1 and self.group in GROUPS and count < store.length
        if not one or not store.all_real:
            return super().select(step, store)
        asked, groups = (step.queries, self._places_in(step.queries)), step.keys.shape[1]
        chosen = self.labels.choose(*asked, count, self.budget, groups, self.group if step.group > 1 else "head")
        return WholeLists(chosen)

    @override
    def scores(self, step: Step, store: Store) -> Float[Tensor, "batch heads new tokens"]:
        return self.labels.scores(self.pick_channels(step.queries))

    @override
    def bytes_held(self) -> int:
        return self.labels.bytes

    @override
    def bytes_scanned(self) -> int:
        return self.labels.bytes

    @override
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        self.labels.pick_rows(rows)

    def pick_channels(
        self, vectors: Float[Tensor, "batch rows new width"]
    ) -> Float[Tensor, "batch wanted new channels"]:
        """The chosen channels: a key has those of every row that reads it, a query those of its row."""
        if vectors.shape[2] == 1:
            return self._pick_of_one(vectors)
        channels = self.channels.to(vectors.device)
        wanted = max(len(channels), vectors.shape[1])
        vectors = vectors.repeat_interleave(wanted // vectors.shape[1], dim=1)
        channels = channels.repeat_interleave(wanted // len(channels), dim=0)
        return vectors.gather(3, channels[None, :, None].expand(len(vectors), -1, vectors.shape[2], -1))

    def _pick_of_one(self, vectors: Float[Tensor, "batch rows 1 width"]) -> Float[Tensor, "batch wanted 1 channels"]:
        """The same of one token: a step of decoding, where every operation counts."""
        picked = vectors.flatten(1).index_select(1, self._places_in(vectors))
        return picked.view(len(vectors), -1, 1, self.labels.channels)

    def _places_in(self, vectors: Float[Tensor, "batch rows 1 width"]) -> Int[Tensor, " all_channels"]:
        """Where the chosen channels are in one token's vectors side by side."""
        rows, width = vectors.shape[1], vectors.shape[3]
        key = rows, vectors.device
        if key not in self._places:
            wanted = max(len(self.channels), rows)
            channels = self.channels.to(vectors.device).repeat_interleave(wanted // len(self.channels), dim=0)
            row = torch.arange(wanted, device=vectors.device) // (wanted // rows)
            self._places[key] = (row[:, None] * width + channels).flatten()
        return self._places[key]


@dataclass(eq=False)
class DoubleSparsity(SelectingMethod):
    """Tokens chosen by the labels of a few channels, which `fit` finds.

    Attributes:
        group_factor: width of a head over channels of a label, d / r.
        bits: of a label's channel: 16, 8, 4 or 2.
        statistic: by which channels are chosen; see `ChannelStatistics`.
        channels: ``head``: each query head has channels, and so labels, of its own; ``group``: one set for the query
            heads of a key-value head, by the mean of their statistics, at a fraction of the labels' bytes.

    Raises:
        InputError: a setting that is not known, or see `SelectingMethod`.
    """

    slug: ClassVar[str] = "double_sparsity"
    needs_fit: ClassVar[bool] = True
    group_factor: int = 4
    bits: int = 4
    statistic: str = "qk"
    channels: str = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_factor < 1:
            raise InputError(f"group_factor={self.group_factor}: 1 (all channels) or above, such as 4")
        if self.bits not in LABEL_BITS:
            raise InputError(f"bits={self.bits}: one of {', '.join(map(str, LABEL_BITS))}")
        if self.channels not in CHANNELS:
            raise InputError(f"channels={self.channels!r}: one of {', '.join(CHANNELS)}")
        ChannelStatistics(self.statistic)
        self._has_warned = False

    @override
    def fit(  # type: ignore[override]
        self, model: LanguageModel, texts: Sequence[str], *, tokens: int = 512
    ) -> "DoubleSparsity":
        """Rank the channels of every head. The paper takes 256 texts of 512 tokens; a handful gives the same channels.

        Args:
            model: a decoder.
            texts: calibration texts.
            tokens: of each at most.

        Raises:
            InputError: no texts, or too short ones.
        """
        found = {each.layer: ChannelStatistics(self.statistic) for each in layer_facts(model)}
        watch_steps(model, encode_texts(model, texts, tokens), lambda layer, step: found[layer].add(step))
        self.fitted = {f"layer.{layer}.importance": statistics.mean for layer, statistics in found.items()}
        self.fitted_to = model.fingerprint
        return self

    @override
    def check(self, model: Any) -> None:
        super().check(model)
        for facts in layer_facts(model):
            self._check_shape(facts)

    @override
    def selector(self, facts: LayerFacts) -> LabelSelector:
        return LabelSelector(self.heavy_channels(facts), self.bits, self.budget, self.group, self._note_short_prompt)

    def heavy_channels(self, facts: LayerFacts) -> Int[Tensor, "rows channels"]:
        """The channels of a layer's labels, in order, for each query head or each key-value head.

        Raises:
            InputError: nothing was fitted for such a layer, or fewer channels are there than ``group_factor``.
        """
        importance = self._check_shape(facts)
        if self.group_factor > facts.width:
            raise InputError(f"group_factor={self.group_factor}: a head has {facts.width} channels; no label is left")
        if self.channels == "group":
            importance = importance.view(facts.groups, -1, facts.width).mean(1)
        best = importance.topk(facts.width // self.group_factor, dim=-1).indices
        return best.sort(dim=-1).values

    def _check_shape(self, facts: LayerFacts) -> Float[Tensor, "heads width"]:
        importance = self.of_layer(facts.layer).get("importance")
        found = None if importance is None else tuple(importance.shape)
        if importance is None or found != (facts.heads, facts.width):
            raise InputError(
                f"layer {facts.layer} has {facts.heads} heads of width {facts.width}, but channels were found for "
                f"{'no such layer' if found is None else found}: they are of another model; fit to this one"
            )
        return importance

    def _note_short_prompt(self, tokens: int) -> None:
        keys = self.budget.keys
        if keys is None or tokens > keys or self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            f"the prompt has {tokens} tokens and keys={keys}: everything is read until there are more; give a smaller "
            "number, or a share",
            stacklevel=2,
        )


@torch.no_grad()
def prefetch_hit_rate(
    model: LanguageModel, trace: Trace, method: DoubleSparsity, *, queries: int = 64
) -> dict[int, float]:
    """How many of the tokens that a layer chooses were guessed one layer before (Double Sparsity-Offload).

    The guess: the layer's own query projection applied to what the layer *before* projects, and the layer's labels.

    Args:
        model: whose trace it is.
        trace: recorded with ``hidden=True``; a layer is measured where the one before it is in the trace.
        method: fitted; its budget and labels choose.
        queries: the last tokens of each text, whose choices count; the others are context.

    Returns:
        By layer: the share of the chosen (head, token) pairs that were guessed, a mean over texts. A guess as good as
        chance has about the budget's share.

    Raises:
        InputError: the trace has no hidden states or no two layers in a row; a text is too short.
    """
    layers = [layer for layer in trace.layers if layer - 1 in trace.steps]
    if not layers:
        raise InputError(f"the trace has layers {trace.layers}: no layer comes right after another")
    return {
        layer: sum(
            _guessed(model, method, trace.facts[layer], before, step, queries)
            for before, step in zip(trace.steps[layer - 1], trace.steps[layer], strict=True)
        )
        / len(trace.steps[layer])
        for layer in layers
    }


def _guessed(
    model: LanguageModel, method: DoubleSparsity, facts: LayerFacts, before: Step, step: Step, queries: int
) -> float:
    if before.hidden is None:
        raise InputError("the trace has no hidden states: record it with hidden=True")
    if not 1 <= queries <= step.new:
        raise InputError(f"queries={queries}: a text of the trace has {step.new} tokens")
    store, selector = ExactStore(), method.selector(facts)
    store.append(step)
    selector.extend(step, store)
    true = part_of(step, step.new - queries, step.new)
    guess = queries_of(model, facts.layer, before.hidden, before.rotation)[:, :, -queries:]
    seen = visible(true, store)
    masks = []
    for asked in (true.queries, guess):
        scores = selector.labels.scores(selector.pick_channels(asked))
        scores = across_group(scores, seen, step.group, method.group)
        masks.append(best_tokens(scores, seen, method.budget).mask(store.length))
    return float((masks[0] & masks[1]).sum() / masks[0].sum())
