"""What a dictionary's features fire on: one streaming pass that keeps, for every feature, a few telling contexts.

For each feature the pass keeps the ``top`` contexts by peak activation and, for each of ``quantiles`` equal intervals
of activation / maximum, ``per_quantile`` contexts sampled by a hash. Top contexts alone flatter a feature; the
sample from every interval shows whether it still means the same thing when it fires weakly (Bricken et al. 2023,
"Towards Monosemanticity", section on interval sampling).

Three choices, and what they cost:

- A context stands for a feature by its *peak*: the token on which the feature is strongest within that context. Each
  context therefore appears at most once per feature, so ten near-identical windows of one sentence cannot fill a list.
- One pass, since encoding is nearly all of the cost. The intervals are taken relative to the *running* maximum and
  every kept context is filed again whenever its feature is touched, and at the end. Membership is always right at the
  end, but an interval may hold fewer than ``per_quantile`` contexts although the text had more. The top list is exact
  and does not depend on the size of the batches.
- Memory is bounded by the number of features: ``features * (top + quantiles * per_quantile) * window`` tokens and
  activations (8 bytes a pair), a histogram row, and one batch. Nothing grows with the length of the text.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int

from apportion.data.files import read_json, write_atomically, write_json
from apportion.errors import InputError

BINS_PER_OCTAVE = 8
_LOWEST_OCTAVE, _HIGHEST_OCTAVE = -16, 16
_N_BINS = BINS_PER_OCTAVE * (_HIGHEST_OCTAVE - _LOWEST_OCTAVE)
_FORMAT_VERSION = 1


@runtime_checkable
class SparseEncoder(Protocol):
    """What this pass needs of a dictionary; `apportion.features.SparseAutoencoder` is one."""

    @property
    def n_features(self) -> int:
        """Number of features."""

    def encode(self, x: torch.Tensor) -> Any:
        """Codes of ``x [tokens, d_in]`` as an `apportion.allocate.Allocation` of shape ``[tokens, n_features]``."""


@runtime_checkable
class ContextView(Protocol):
    """What this pass needs of an activation store; `apportion.models.ActivationStore` and its splits are such views."""

    @property
    def n_contexts(self) -> int:
        """Number of contexts."""

    def contexts(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids ``[c, T]``, activations ``[c, T, d_in]``, valid ``[c, T]`` and document numbers ``[c]``."""


@dataclass(frozen=True)
class FeatureContexts:
    """Firing statistics and example contexts of every feature, as plain numpy arrays.

    A *slot* is a place for one context: slots ``0 .. top-1`` hold the strongest contexts, strongest first; then come
    ``per_quantile`` slots for each interval of activation / maximum, the highest interval first. A context is
    never in both. Empty slots have ``peak == -1``.

    Attributes:
        n_tokens: number of tokens encoded (those marked valid by the view).
        top, quantiles, per_quantile: the layout of the slots.
        fires: number of tokens on which each feature is above zero.
        activation_sum: sum of each feature's activations.
        max_activation: largest activation seen, 0 for a feature that never fired.
        histogram: activations per bin, bins as in ``histogram_edges``.
        histogram_edges: logarithmic bin edges, ``BINS_PER_OCTAVE`` to a doubling.
        winners_per_token: entry ``l`` is the number of tokens with exactly ``l`` active features.
        token_ids: tokens of each window, -1 where the window is shorter than the widest.
        activations: the feature's activation on each token of the window.
        peak: column of the window's strongest token, -1 for an empty slot.
        position: where in the view the window begins: context number * context length + offset.
        document: document the context belongs to.
    """

    n_tokens: int
    top: int
    quantiles: int
    per_quantile: int
    fires: Int[np.ndarray, " features"]
    activation_sum: Float[np.ndarray, " features"]
    max_activation: Float[np.ndarray, " features"]
    histogram: Int[np.ndarray, "features bins"]
    histogram_edges: Float[np.ndarray, " edges"]
    winners_per_token: Int[np.ndarray, " counts"]
    token_ids: Int[np.ndarray, "features slots width"]
    activations: Float[np.ndarray, "features slots width"]
    peak: Int[np.ndarray, "features slots"]
    position: Int[np.ndarray, "features slots"]
    document: Int[np.ndarray, "features slots"]

    @property
    def n_features(self) -> int:
        """Number of features, dead ones included."""
        return len(self.fires)

    @property
    def density(self) -> Float[np.ndarray, " features"]:
        """Share of tokens on which each feature fires."""
        return self.fires / max(self.n_tokens, 1)

    @property
    def mean_activation(self) -> Float[np.ndarray, " features"]:
        """Mean activation over the tokens on which the feature fires, 0 where it never does."""
        return self.activation_sum / np.maximum(self.fires, 1)

    def slot_groups(self) -> list[tuple[slice, float, float]]:
        """Slots that belong together with the interval of activation / maximum they were drawn from, as displayed."""
        groups = [(slice(0, self.top), 0.0, 1.0)]
        for rank in range(self.quantiles):
            start = self.top + rank * self.per_quantile
            high = (self.quantiles - rank) / self.quantiles
            groups.append((slice(start, start + self.per_quantile), high - 1 / self.quantiles, high))
        return groups

    def save(self, folder: Path | str) -> None:
        """Write ``contexts.safetensors`` and ``contexts.json`` into ``folder``."""
        from safetensors.numpy import save_file

        arrays: dict[str, np.ndarray] = {}
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                arrays[field.name] = np.ascontiguousarray(value)
            else:
                plain[field.name] = value
        with write_atomically(Path(folder) / "contexts.safetensors") as temporary:
            save_file(arrays, temporary)
        write_json(Path(folder) / "contexts.json", {"version": _FORMAT_VERSION, **plain})

    @classmethod
    def load(cls, folder: Path | str) -> "FeatureContexts":
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing, damaged or of another version; names the file.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        plain = read_json(Path(folder) / "contexts.json")
        if not isinstance(plain, dict) or plain.pop("version", None) != _FORMAT_VERSION:
            raise InputError(f"{folder}/contexts.json is not of version {_FORMAT_VERSION}: collect the contexts again")
        path = Path(folder) / "contexts.safetensors"
        try:
            arrays: dict[str, Any] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read ({error}): collect the contexts again") from error
        try:
            return cls(**plain, **arrays)
        except TypeError as error:
            raise InputError(f"{folder} does not hold feature contexts ({error}): collect them again") from error


@torch.no_grad()
def collect_contexts(
    sae: SparseEncoder,
    view: ContextView,
    *,
    top: int = 10,
    quantiles: int = 4,
    per_quantile: int = 3,
    window: tuple[int, int] = (16, 8),
    batch_tokens: int = 8192,
    progress: bool = True,
) -> FeatureContexts:
    """Encode every context of ``view`` once and keep the most telling ones for every feature.

    Args:
        sae: the dictionary; switched to evaluation (threshold inference) for the pass and back afterwards.
        view: whole contexts with their activations, in order.
        top: strongest contexts to keep per feature.
        quantiles: number of equal intervals of activation / maximum to sample from.
        per_quantile: contexts to sample from each interval.
        window: tokens to keep before and after the peak. A window that would leave its context is moved inside.
        batch_tokens: tokens encoded at once; bounds the working memory.
        progress: show a progress bar when the error stream is a terminal.

    Raises:
        ValueError: a count is negative, ``top`` is zero, or the view has no contexts.
    """
    if top < 1 or quantiles < 0 or per_quantile < 0 or min(window) < 0 or batch_tokens < 1:
        raise ValueError(
            f"top={top}, quantiles={quantiles}, per_quantile={per_quantile}, window={window}, "
            f"batch_tokens={batch_tokens}: counts must not be negative, top and batch_tokens must be at least 1"
        )
    if view.n_contexts < 1:
        raise ValueError("the view holds no contexts: harvest more text, or hold out a larger share")
    length = view.contexts(0, 1)[0].shape[1]
    width = min(sum(window) + 1, length)
    statistics = _Statistics(sae.n_features)
    strongest = _Reservoir(sae.n_features, 1, top, width)
    sampled = _Reservoir(sae.n_features, quantiles, per_quantile, width)

    def by_strength(feature: np.ndarray, value: np.ndarray, hashed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros_like(feature), -value.astype(np.float64)

    def by_interval(feature: np.ndarray, value: np.ndarray, hashed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        share = value / statistics.max_activation[feature]
        # Interval 0 is the highest, so that slots come in the order in which they are shown.
        return np.clip(np.ceil(quantiles * (1 - share)).astype(np.int64) - 1, 0, quantiles - 1), hashed

    step = max(1, batch_tokens // length)
    was_training = bool(getattr(sae, "training", False))
    if was_training:
        sae.eval()  # type: ignore[attr-defined]
    try:
        for start in with_progress(range(0, view.n_contexts, step), progress):
            batch = ContextCodes.encode(sae, view, start, min(start + step, view.n_contexts))
            statistics.add(batch)
            peaks = batch.peaks()
            strongest.offer(peaks, by_strength, batch, window)
            if quantiles * per_quantile > 0:
                sampled.offer(peaks, by_interval, batch, window)
    finally:
        if was_training:
            sae.train()  # type: ignore[attr-defined]
    if quantiles * per_quantile > 0:
        sampled.file_again(by_interval)
        sampled.drop_contexts_of(strongest, length)
        sampled.sort_within_groups()
    return statistics.with_contexts(strongest, sampled)


class Peaks(NamedTuple):
    """One entry per (feature, context) in which the feature fires: its strongest token."""

    feature: np.ndarray
    value: np.ndarray
    flat: np.ndarray  # context within the batch * T + offset
    hashed: np.ndarray


class ContextCodes:
    """The codes of whole contexts, as (feature, token) events sorted by feature and then token."""

    def __init__(self, token_ids: np.ndarray, document: np.ndarray, first_context: int) -> None:
        self.token_ids, self.document, self.first_context = token_ids, document, first_context
        self.n_contexts, self.length = token_ids.shape
        self.n_flat = token_ids.size

    @classmethod
    def encode(cls, sae: SparseEncoder, view: ContextView, start: int, stop: int) -> "ContextCodes":
        """Encode the contexts ``start`` to ``stop - 1`` of a view."""
        token_ids, activations, valid, document = view.contexts(start, stop)
        batch = cls(token_ids.cpu().numpy().astype(np.int32), document.cpu().numpy().astype(np.int64), start)
        weight = getattr(sae, "decoder_weight", None)
        inputs = activations[valid].float()
        codes = sae.encode(inputs.to(weight.device) if isinstance(weight, torch.Tensor) else inputs)
        row, column, value = (
            part.detach().cpu().numpy() for part in (codes.row_indices(), codes.col_indices, codes.values.float())
        )
        fired = value > 0  # a rule that spends its whole budget may allocate zeros, which are not activity
        row, column, value = row[fired], column[fired], value[fired]
        flat_of_row = np.flatnonzero(valid.cpu().numpy().reshape(-1))
        batch.n_tokens = len(flat_of_row)
        batch.winners = np.bincount(row, minlength=batch.n_tokens)
        key = column * batch.n_flat + flat_of_row[row]
        order = np.argsort(key, kind="stable")
        batch.key, batch.value = key[order], value[order]
        return batch

    n_tokens: int
    winners: np.ndarray
    key: np.ndarray
    value: np.ndarray

    def peaks(self) -> Peaks:
        """The strongest token of every (feature, context), the earliest one of equals."""
        if not len(self.key):
            empty = np.zeros(0, dtype=np.int64)
            return Peaks(empty, np.zeros(0, dtype=np.float32), empty, np.zeros(0))
        pair = self.key // self.length
        starts = np.flatnonzero(np.diff(pair, prepend=pair[0] - 1))
        highest = np.maximum.reduceat(self.value, starts)
        sizes = np.diff(starts, append=len(pair))
        candidates = np.where(self.value == np.repeat(highest, sizes), np.arange(len(pair)), len(pair))
        event = np.minimum.reduceat(candidates, starts)
        feature, flat = np.divmod(self.key[event], self.n_flat)
        return Peaks(feature, highest, flat, hash_unit(feature, self.first_context + flat // self.length))

    def activations(
        self, feature: Int[np.ndarray, " n"], flat: Int[np.ndarray, "n width"]
    ) -> Float[np.ndarray, "n width"]:
        """A feature's activation on each of some tokens, given as context within the batch * T + offset."""
        if not len(self.key):
            return np.zeros(flat.shape, dtype=np.float32)
        wanted = (feature * self.n_flat)[:, None] + flat
        found = np.minimum(np.searchsorted(self.key, wanted), len(self.key) - 1)
        return np.where(self.key[found] == wanted, self.value[found], np.float32(0))

    def windows(self, feature: np.ndarray, flat: np.ndarray, window: tuple[int, int]) -> dict[str, np.ndarray]:
        """Tokens around each peak with the feature's activation on them; rows of the reservoir."""
        width = min(sum(window) + 1, self.length)
        context, offset = np.divmod(flat, self.length)
        begin = np.clip(offset - window[0], 0, self.length - width)
        columns = begin[:, None] + np.arange(width)
        return {
            "token_ids": self.token_ids[context[:, None], columns],
            "activations": self.activations(feature, (context * self.length)[:, None] + columns),
            "peak": (offset - begin).astype(np.int16),
            "position": (self.first_context + context) * self.length + begin,
            "document": self.document[context],
        }


class _Statistics:
    """Counts, sums, maxima and histograms, exact and independent of how the text was cut into batches."""

    def __init__(self, n_features: int) -> None:
        self.n_tokens = 0
        self.fires = np.zeros(n_features, dtype=np.int64)
        self.activation_sum = np.zeros(n_features, dtype=np.float64)
        self.max_activation = np.zeros(n_features, dtype=np.float32)
        self.histogram = torch.zeros(n_features * _N_BINS, dtype=torch.int32)
        self.winners_per_token = np.zeros(1, dtype=np.int64)

    def add(self, batch: ContextCodes) -> None:
        self.n_tokens += batch.n_tokens
        counts = np.bincount(batch.winners, minlength=len(self.winners_per_token))
        counts[: len(self.winners_per_token)] += self.winners_per_token
        self.winners_per_token = counts
        if not len(batch.key):
            return
        feature = batch.key // batch.n_flat
        starts = np.flatnonzero(np.diff(feature, prepend=feature[0] - 1))
        seen = feature[starts]
        self.fires[seen] += np.diff(starts, append=len(feature))
        self.activation_sum[seen] += np.add.reduceat(batch.value.astype(np.float64), starts)
        self.max_activation[seen] = np.maximum(self.max_activation[seen], np.maximum.reduceat(batch.value, starts))
        octave_bin = np.floor(BINS_PER_OCTAVE * (np.log2(batch.value) - _LOWEST_OCTAVE)).astype(np.int64)
        cell = torch.from_numpy(feature * _N_BINS + np.clip(octave_bin, 0, _N_BINS - 1))
        self.histogram.index_add_(0, cell, torch.ones(len(cell), dtype=torch.int32))

    def with_contexts(self, strongest: "_Reservoir", sampled: "_Reservoir") -> FeatureContexts:
        histogram = self.histogram.view(-1, _N_BINS).numpy()
        used = np.flatnonzero(histogram.any(axis=0))
        first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
        both: dict[str, Any] = {
            name: np.concatenate([strongest.rows[name], sampled.rows[name]], axis=1)
            for name in ("token_ids", "activations", "peak", "position", "document")
        }
        return FeatureContexts(
            n_tokens=self.n_tokens,
            top=strongest.per_group,
            quantiles=sampled.n_groups,
            per_quantile=sampled.per_group,
            fires=self.fires,
            activation_sum=self.activation_sum,
            max_activation=self.max_activation,
            histogram=histogram[:, first : last + 1].copy(),
            histogram_edges=np.exp2(np.arange(first, last + 2) / BINS_PER_OCTAVE + _LOWEST_OCTAVE),
            winners_per_token=self.winners_per_token,
            **both,
        )


_Filing = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class _Reservoir:
    """For every feature ``n_groups * per_group`` slots; each group keeps the entries that come first in its order."""

    def __init__(self, n_features: int, n_groups: int, per_group: int, width: int) -> None:
        self.n_features, self.n_groups, self.per_group = n_features, n_groups, per_group
        slots = n_groups * per_group
        self.rows: dict[str, np.ndarray] = {
            "token_ids": np.full((n_features, slots, width), -1, dtype=np.int32),
            "activations": np.zeros((n_features, slots, width), dtype=np.float32),
            "peak": np.full((n_features, slots), -1, dtype=np.int16),
            "position": np.zeros((n_features, slots), dtype=np.int64),
            "document": np.full((n_features, slots), -1, dtype=np.int64),
            "value": np.zeros((n_features, slots), dtype=np.float32),
            "hashed": np.zeros((n_features, slots), dtype=np.float64),
        }
        # The order of the last entry of each full group: what a newcomer must beat.
        self.bar = np.full((n_features, n_groups), np.inf)

    def offer(self, peaks: Peaks, filing: _Filing, batch: ContextCodes, window: tuple[int, int]) -> None:
        """Let the peaks of a batch compete for the slots of their features."""
        group, order = filing(peaks.feature, peaks.value, peaks.hashed)
        promising = np.flatnonzero(order < self.bar[peaks.feature, group])
        # Bound the pool, and so the memory, before windows are cut: no more newcomers than slots per group.
        kept, _ = first_in_groups(
            peaks.feature[promising] * self.n_groups + group[promising], order[promising], self.per_group
        )
        newcomers = promising[kept]
        if not len(newcomers):
            return
        feature, flat = peaks.feature[newcomers], peaks.flat[newcomers]
        incoming = batch.windows(feature, flat, window)
        incoming |= {"value": peaks.value[newcomers], "hashed": peaks.hashed[newcomers]}
        self._fill(np.unique(feature), filing, feature, incoming)

    def file_again(self, filing: _Filing) -> None:
        """Move every entry to the group it belongs to now."""
        nobody = {name: rows[:0, 0] for name, rows in self.rows.items()}
        self._fill(np.arange(self.n_features), filing, np.zeros(0, dtype=np.int64), nobody)

    def _fill(self, touched: np.ndarray, filing: _Filing, feature: np.ndarray, incoming: dict[str, np.ndarray]) -> None:
        held_row, held_slot = np.nonzero(self.rows["peak"][touched] >= 0)
        owner = np.concatenate([touched[held_row], feature])
        pool = {
            name: np.concatenate([rows[touched[held_row], held_slot], incoming[name]])
            for name, rows in self.rows.items()
        }
        group, order = filing(owner, pool["value"], pool["hashed"])
        kept, rank = first_in_groups(owner * self.n_groups + group, order, self.per_group)
        owner, group, order = owner[kept], group[kept], order[kept]
        for name, rows in self.rows.items():
            rows[touched] = -1 if name in ("token_ids", "peak", "document") else 0
            rows[owner, group * self.per_group + rank] = pool[name][kept]
        self.bar[touched] = np.inf
        last = rank == self.per_group - 1
        self.bar[owner[last], group[last]] = order[last]

    def drop_contexts_of(self, other: "_Reservoir", length: int) -> None:
        """Empty the slots whose context the same feature already shows in ``other``."""
        mine, theirs = self.rows["position"] // length, other.rows["position"] // length
        taken = other.rows["peak"] >= 0
        for slot in range(mine.shape[1]):
            repeated = ((mine[:, slot, None] == theirs) & taken).any(axis=1)
            self.rows["peak"][repeated, slot] = -1
            self.rows["token_ids"][repeated, slot] = -1
            self.rows["activations"][repeated, slot] = 0
            self.rows["value"][repeated, slot] = 0
            self.rows["document"][repeated, slot] = -1

    def sort_within_groups(self) -> None:
        """Order each group by activation, strongest first, empty slots last."""
        for group in range(self.n_groups):
            slots = slice(group * self.per_group, (group + 1) * self.per_group)
            order = np.argsort(-self.rows["value"][:, slots], axis=1, kind="stable")
            for rows in self.rows.values():
                index = order if rows.ndim == 2 else order[:, :, None]
                rows[:, slots] = np.take_along_axis(rows[:, slots], index, axis=1)


def first_in_groups(group: np.ndarray, order: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and ranks of the ``limit`` entries of each group that come first by ``order``, the earlier of equals."""
    by_group = np.lexsort((order, group))
    if not len(by_group):
        return by_group, by_group
    sorted_group = group[by_group]
    starts = np.flatnonzero(np.diff(sorted_group, prepend=sorted_group[0] - 1))
    rank = np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))
    kept = rank < limit
    return by_group[kept], rank[kept]


def hash_unit(feature: np.ndarray, context: np.ndarray) -> np.ndarray:
    """A number in [0, 1) from (feature, context) alone (splitmix64): samples do not depend on the order of work."""
    mixed = feature.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + context.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53


def with_progress(steps: range, progress: bool, what: str = "collecting contexts") -> Iterator[int]:
    """The steps, with a bar on a terminal's error stream."""
    if not progress or not sys.stderr.isatty():
        yield from steps
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(steps, description=what, console=Console(stderr=True))
