"""SEA: a small estimated map says which keys are worth reading, and they are read exactly.

*SEA: Sparse Linear Attention with Estimated Attention Mask* (Lee, Kim, Willette, Hwang 2024, arXiv 2310.01777).

What is allocated: ``H * k`` keys to each token, shared by its ``H`` heads: one head may take three times ``k``, another
half of it. An estimator of linear cost gives each head a row of ``K`` probabilities, each for about ``n / K`` keys that
lie side by side; the best entries of all heads win, and attention is exact over the keys that they stand for. What is
not read speaks through a mean of all values. A dense teacher trains it (`sea_distillation`).

Symbols: ``k`` = keys, ``K`` = columns, ``H`` = heads, ``len_i`` = `row_lengths`, ``b_i`` = `row_budget`, ``A^`` =
`SeaOutput.estimate`, ``V_I`` = places, ``sigma(s)`` = `SeaOutput.read`, ``sigma(p)`` = a scale of what is read.

Departures from the paper and its code: where there are fewer keys than columns, columns without a key cannot be chosen
and the budget counts keys (the code spends part of it on empty columns); a head that gets no key reads its own token;
what mixes the two branches, and the mean of all values, send no gradient into the estimator, so that it learns from its
two losses alone; decoding keeps running sums and the last rows of the convolutions and gives what a whole pass gives
(the code computes everything again). It saves work and no memory: all keys and values are kept.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.sea_estimator import CausalDecoder, Estimator, EstimatorState, WholeDecoder
from apportion.keys.sea_lists import (
    KeyLists,
    Sharing,
    attend_lists,
    choose_columns,
    columns_of,
    key_starts,
    lists_of_columns,
    row_budget,
    row_lengths,
)

# Columns by which training moves a key that it moves.
_JITTER = 0.75


@dataclass(frozen=True)
class SeaSettings:
    """Settings of `SeaAttention`; the defaults are the paper's for causal models (OPT). For BERT: `SeaSettings.whole`.

    Attributes:
        heads: of the layer.
        head_width: of each.
        keys: a head reads on average.
        columns: of the estimated map.
        length: tokens of the longest text.
        causal: a token reads none that comes later.
        sharing: whose places are one pool; a causal layer can share among heads or not at all.
        feature_factor: linear attention has ``feature_factor * d * ln(d)`` features.
        positions: whether the estimator is told where tokens stand; an ablation otherwise.
        jitter: share of keys that a pass in training counts to a column up to 0.75 away.
        redraw_every: passes in training after which random features are drawn anew; None for never.

    Raises:
        InputError: a value that cannot work.
    """

    heads: int = 12
    head_width: int = 64
    keys: int = 64
    columns: int = 256
    length: int = 2048
    causal: bool = True
    sharing: Sharing = "heads"
    feature_factor: float = 8.0
    positions: bool = True
    jitter: float = 0.1
    redraw_every: int | None = 1000

    def __post_init__(self) -> None:
        for name in ("heads", "head_width", "keys", "columns", "length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: at least 1")
        down = (CausalDecoder if self.causal else WholeDecoder).DOWN
        if self.columns % down:
            raise InputError(f"columns={self.columns}: the decoder needs a multiple of {down}")
        if self.columns > self.length:
            raise InputError(f"columns={self.columns} is more than length={self.length}: give at most one a token")
        check_keys(self.keys, self)
        if self.causal and self.sharing in ("queries", "all"):
            raise InputError(f"sharing={self.sharing!r}: a causal layer would leak; use 'heads' or 'none'")
        if not 0 <= self.jitter <= 1 or self.feature_factor <= 0:
            raise InputError(f"jitter={self.jitter}, feature_factor={self.feature_factor}: a share, and above 0")

    @classmethod
    def whole(cls, heads: int = 12, head_width: int = 64, length: int = 512) -> "SeaSettings":
        """The paper's for BERT, where every token reads on both sides."""
        return cls(heads, head_width, 64, 128, length, causal=False, feature_factor=1.0)

    @property
    def features(self) -> int:
        """Of the linear attention."""
        return max(1, round(self.feature_factor * self.head_width * math.log(self.head_width)))


def check_keys(keys: int, settings: SeaSettings) -> None:
    """Refuse a number of keys that no text could have.

    Raises:
        InputError: below 1, or more than the longest text.
    """
    if not 1 <= keys <= settings.length:
        raise InputError(f"keys={keys}: from 1 to length={settings.length}")


@dataclass(frozen=True, eq=False)
class SeaOutput:
    """What `SeaAttention` gives.

    Attributes:
        context: of each head, before any output projection; zeros for padding.
        estimate: probabilities of the columns; the only way for gradients into the estimator.
        lists: keys that were read, as numbers among the real tokens of a text: padding is not counted.
        read: weight of what was read, against the mean of all values. Report its mean: the mean branch hides failures.
    """

    context: Float[Tensor, "batch heads n d"]
    estimate: Float[Tensor, "batch heads n columns"]
    lists: KeyLists
    read: Float[Tensor, "batch heads n 1"]


@dataclass(eq=False)
class SeaState:
    """What `SeaAttention.step` needs of the tokens before: all keys and values, and the estimator's state."""

    keys: Float[Tensor, "batch heads tokens d"]
    values: Float[Tensor, "batch heads tokens d"]
    value_sums: Float[Tensor, "batch heads 1 d"]
    lengths: Int[Tensor, " batch"]
    estimator: EstimatorState


class SeaAttention(nn.Module):
    """Attention of estimated sparsity on queries, keys and values by head; projections are the caller's.

    Args:
        settings: see `SeaSettings`.

    Examples:
        >>> import torch
        >>> from apportion.keys import SeaAttention, SeaSettings
        >>> sea = SeaAttention(SeaSettings(heads=2, head_width=16, keys=8, columns=16, length=64)).eval()
        >>> queries, keys, values = torch.randn(3, 1, 2, 64, 16)
        >>> sea(queries, keys, values).lists.counts().shape
        torch.Size([1, 2, 64])
    """

    def __init__(self, settings: SeaSettings) -> None:
        super().__init__()
        self.settings = settings
        self.estimator = Estimator(
            settings.heads,
            settings.head_width,
            settings.columns,
            settings.length,
            causal=settings.causal,
            features=settings.features,
            positions=settings.positions,
            redraw_every=settings.redraw_every,
        )
        self.mixing = nn.Linear(2 * settings.head_width, 2)

    @override
    def forward(
        self,
        queries: Float[Tensor, "batch heads n d"],
        keys: Float[Tensor, "batch heads n d"],
        values: Float[Tensor, "batch heads n d"],
        real: Bool[Tensor, "batch n"] | None = None,
        *,
        budget: int | None = None,
    ) -> SeaOutput:
        """Read.

        Args:
            queries: of all heads, rotated where the model does so.
            keys: of all heads; those of key-value heads repeated.
            values: likewise.
            real: False for padding, on either side; None where nothing is padded.
            budget: keys a head reads on average; as in the settings if None. It may differ from training's.

        Raises:
            InputError: other shapes than the settings', more tokens, a budget that is no number of keys.
        """
        self._check(queries, budget)
        order, real = _real_first(queries, real)
        queries, keys, values = (_pick(each, order) for each in (queries, keys, values))
        logits, encoded = self.estimator(queries, keys, values, real)
        output = self._read(logits, encoded, queries, keys, values, real, budget)
        back = order.argsort(dim=1)
        context, estimate, read = (_pick(each, back) for each in (output.context, output.estimate, output.read))
        return SeaOutput(context, estimate, output.lists, read)

    @torch.no_grad()
    def begin(
        self, queries: Tensor, keys: Tensor, values: Tensor, real: Tensor | None = None, *, budget: int | None = None
    ) -> tuple[Float[Tensor, "batch heads n d"], SeaState]:
        """Read a prompt and remember what the tokens after it need.

        Raises:
            InputError: the layer is not causal; see ``forward``.
        """
        if not self.settings.causal:
            raise InputError("causal=False: such a layer does not decode")
        self._check(queries, budget)
        order, real = _real_first(queries, real)
        queries, keys, values = (_pick(each, order) for each in (queries, keys, values))
        logits, encoded, estimator = self.estimator.begin(queries, keys, values, real)
        output = self._read(logits, encoded, queries, keys, values, real, budget)
        sums = (values * real[:, None, :, None]).sum(2, keepdim=True)
        state = SeaState(keys, values, sums, real.sum(1), estimator)
        return _pick(output.context, order.argsort(dim=1)), state

    @torch.no_grad()
    def step(
        self,
        queries: Float[Tensor, "batch heads 1 d"],
        keys: Float[Tensor, "batch heads 1 d"],
        values: Float[Tensor, "batch heads 1 d"],
        state: SeaState,
        *,
        budget: int | None = None,
    ) -> Float[Tensor, "batch heads 1 d"]:
        """Read as the next token of every row; ``state`` is brought up to date.

        Raises:
            InputError: the text has become longer than the settings allow.
        """
        if int(state.lengths.max()) >= self.settings.length:
            raise InputError(f"one token more than length={self.settings.length}, which the layer was made for")
        logits, encoded = self.estimator.step(queries, keys, values, state.lengths, state.estimator)
        rows = torch.arange(len(state.lengths), device=keys.device)
        state.keys, state.values = (pad(each, (0, 0, 0, 1)) for each in (state.keys, state.values))
        state.keys[rows, :, state.lengths], state.values[rows, :, state.lengths] = keys[:, :, 0], values[:, :, 0]
        state.value_sums = state.value_sums + values
        own, state.lengths = state.lengths[:, None], state.lengths + 1
        lengths = state.lengths[:, None]
        estimate = self._probabilities(logits, lengths)
        chosen = self._choose(estimate, lengths, budget)
        lists = lists_of_columns(chosen, lengths, own, state.keys.shape[2])
        found = attend_lists(queries, state.keys, state.values, lists, self.settings.head_width**-0.5)
        context, _ = self._mix(found, encoded, state.value_sums / lengths[:, None, :, None])
        return context

    def _check(self, queries: Tensor, budget: int | None) -> None:
        settings = self.settings
        if (queries.shape[1], queries.shape[3]) != (settings.heads, settings.head_width):
            raise InputError(
                f"{queries.shape[1]} heads of width {queries.shape[3]}: this layer has heads={settings.heads} of "
                f"head_width={settings.head_width}"
            )
        if queries.shape[2] > settings.length:
            raise InputError(f"{queries.shape[2]} tokens: this layer was made for length={settings.length} at most")
        if budget is not None:
            check_keys(budget, settings)

    def _read(
        self,
        logits: Tensor,
        encoded: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        real: Tensor,
        budget: int | None,
    ) -> SeaOutput:
        """Everything after the estimator; real tokens come first."""
        lengths = row_lengths(real, self.settings.causal)
        estimate = self._probabilities(logits, lengths)
        chosen = self._choose(estimate.detach(), lengths, budget)
        own = (real.cumsum(1) - 1).clamp_min(0)
        if self.training and self.settings.jitter > 0:
            lists = self._jittered(chosen, lengths, own)
        else:
            lists = lists_of_columns(chosen, lengths, own, keys.shape[2])
        found = attend_lists(queries, keys, values, lists, self.settings.head_width**-0.5)
        context, read = self._mix(found, encoded, self._mean_values(estimate.detach(), values, real))
        return SeaOutput(context * real[:, None, :, None], estimate, lists, read)

    def _probabilities(self, logits: Tensor, lengths: Tensor) -> Tensor:
        """Softmax over the columns that have a key; evenly over all where there is none."""
        return logits.masked_fill(~self._with_keys(lengths), -1e30).softmax(-1)

    def _with_keys(self, lengths: Tensor) -> Tensor:
        """Which columns have a key: [batch, 1, n, columns]. All, where there are as many keys as columns."""
        return (key_starts(lengths, self.settings.columns).diff(dim=-1) > 0)[:, None]

    def _choose(self, estimate: Tensor, lengths: Tensor, budget: int | None) -> Tensor:
        settings = self.settings
        wanted = row_budget(lengths, budget or settings.keys, settings.heads, settings.columns)
        return choose_columns(estimate.masked_fill(~self._with_keys(lengths), -torch.inf), wanted, settings.sharing)

    def _jittered(self, chosen: Tensor, lengths: Tensor, own: Tensor) -> KeyLists:
        """The lists with some keys counted to a column nearby, by way of a table of all pairs."""
        n, columns = chosen.shape[2], chosen.shape[3]
        place = torch.arange(n, device=chosen.device)
        valid = place < lengths[..., None]
        column = columns_of(lengths, place.expand(*lengths.shape, n), columns)
        noise = (torch.rand(column.shape, device=column.device) * 2 - 1) * _JITTER
        inside = torch.rand(column.shape, device=column.device)
        moved = (column + inside + noise).floor().long().clamp(0, columns - 1)
        move = torch.rand(column.shape, device=column.device) < self.settings.jitter
        column = torch.where(move, moved, column)[:, None].expand(-1, chosen.shape[1], -1, -1)
        mask = chosen.gather(3, column) & valid[:, None]
        alone = ~mask.any(-1, keepdim=True) & valid[:, None]
        return KeyLists.of_mask(mask | (alone & (place == own[..., None])[:, None]))

    def _mean_values(self, estimate: Tensor, values: Tensor, real: Tensor) -> Tensor:
        """What speaks for the keys that are not read: a running mean, or a mean weighted by the map's columns."""
        real_values = values * real[:, None, :, None]
        if self.settings.causal:
            return real_values.cumsum(2) / real.cumsum(1).clamp_min(1)[:, None, :, None]
        by_column = (estimate * real[:, None, :, None]).sum(2)
        place = torch.arange(values.shape[2], device=values.device).expand(real.shape)
        column = columns_of(real.sum(1), place, self.settings.columns)
        weight = by_column.gather(2, column[:, None].expand(-1, values.shape[1], -1)) * real[:, None]
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-30)
        return (weight[:, :, None] @ real_values).expand_as(values)

    def _mix(self, found: Tensor, encoded: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        read, scale = self.mixing(encoded.detach()).sigmoid().split(1, dim=-1)
        return read * scale * found + (1 - read) * mean, read


def _real_first(queries: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """An order in which padding stands only behind what counts, and which tokens are real in it."""
    real = torch.ones_like(queries[:, 0, :, 0], dtype=torch.bool) if real is None else real
    order = (~real).int().argsort(dim=1, stable=True)
    return order, real.gather(1, order)


def _pick(rows: Tensor, order: Tensor) -> Tensor:
    """Rows of [batch, heads, n, width] in an order."""
    return rows.gather(2, order[:, None, :, None].expand_as(rows))
