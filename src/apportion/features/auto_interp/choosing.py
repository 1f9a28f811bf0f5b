"""Choosing examples: a pass over the text that samples windows of every feature, and one that reads them."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from apportion.errors import InputError
from apportion.features.auto_interp.examples import TEST, TRAIN, Examples, ExampleSettings
from apportion.features.contexts import (
    ContextCodes,
    ContextView,
    SparseEncoder,
    first_in_groups,
    hash_unit,
    with_progress,
)
from apportion.features.geometry import nearest_features
from apportion.models.spelling import Spelled

_LONGEST_RUN = 16
_TOP_SHARE_OF_MIX = 0.2


@torch.no_grad()
def collect_examples(
    sae: SparseEncoder,
    view: ContextView,
    features: Sequence[int] | None = None,
    settings: ExampleSettings | None = None,
    *,
    embed: Callable[[Sequence[str]], Tensor] | None = None,
    spell: Callable[[Sequence[int]], Spelled] | None = None,
    batch_tokens: int = 8192,
    progress: bool = True,
) -> Examples:
    """Choose the windows of some features; the text is encoded once to choose, and once to read the activations.

    Which windows a feature gets does not depend on which other features are asked for.

    Args:
        sae: the dictionary; used in evaluation mode.
        view: the text and its activations, whole contexts in order.
        features: their numbers; default all.
        settings: see there.
        embed: unit vectors of texts, for negatives by ``similar``.
        spell: what tokens say, for the same.
        batch_tokens: tokens encoded at once.
        progress: show bars when the error stream is a terminal.

    Raises:
        InputError: no such feature; windows longer than contexts; ``similar`` without an encoder; text on one side
        only.
    """
    settings = settings or ExampleSettings()
    numbers = np.arange(sae.n_features) if features is None else np.unique(np.asarray(features, dtype=np.int64))
    if len(numbers) == 0 or numbers[0] < 0 or numbers[-1] >= sae.n_features:
        raise InputError(f"features: give numbers from 0 to {sae.n_features - 1}")
    if "similar" in settings.negatives and (embed is None or spell is None):
        raise InputError("negatives by 'similar' need a sentence encoder: give embed and spell")
    was_training = bool(getattr(sae, "training", False))
    if was_training:
        sae.eval()  # type: ignore[attr-defined]
    try:
        windows = _Windows(view, settings)
        step = max(1, batch_tokens // windows.context) * windows.per_context
        survey = _Survey(sae.n_features, windows, settings)
        for start in with_progress(range(0, windows.n_contexts, step), progress, "choosing examples"):
            survey.add(ContextCodes.encode(sae, windows, start, min(start + step, windows.n_contexts)))
        survey.finish()
        choice = _Choice(survey, numbers, getattr(sae, "decoder_weight", None))
        for start in with_progress(range(0, windows.n_contexts, step), progress, "reading examples"):
            stop = min(start + step, windows.n_contexts)
            if choice.wants(start, stop):
                choice.read(ContextCodes.encode(sae, windows, start, stop))
        return choice.examples(embed, spell)
    finally:
        if was_training:
            sae.train()  # type: ignore[attr-defined]


class _Windows:
    """A view whose contexts are windows; knows the side of each."""

    def __init__(self, view: ContextView, settings: ExampleSettings) -> None:
        if view.n_contexts < 2:
            raise InputError("the text has fewer than two contexts: harvest more")
        self.view, self.width = view, settings.window
        self.context = view.contexts(0, 1)[0].shape[1]
        if self.width > self.context:
            raise InputError(
                f"window={self.width}: the text was harvested in contexts of {self.context} tokens; take a shorter one"
            )
        # A rest that fills no window is left out.
        self.per_context = self.context // self.width
        self.n_contexts = view.n_contexts * self.per_context
        self.document = np.concatenate(list(self._documents()))
        self.side = np.repeat(self._sides(settings), self.per_context)
        for side, name in ((TRAIN, "explainer"), (TEST, "scorers")):
            if not (self.side == side).any():
                raise InputError(
                    f"split={settings.split!r} leaves no text for the {name}: give more documents, or split by context"
                )

    def contexts(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Windows ``start`` to ``stop - 1``; both are multiples of the windows a context."""
        token_ids, activations, valid, document = self.view.contexts(
            start // self.per_context, stop // self.per_context
        )
        kept = self.per_context * self.width
        return (
            token_ids[:, :kept].reshape(-1, self.width),
            activations[:, :kept].reshape(-1, self.width, activations.shape[-1]),
            valid[:, :kept].reshape(-1, self.width),
            document.repeat_interleave(self.per_context),
        )

    def _documents(self) -> Iterator[np.ndarray]:
        first_documents = getattr(self.view, "first_documents", None)
        if first_documents is not None:  # without reading any activation
            yield first_documents()
            return
        for start in range(0, self.view.n_contexts, 64):
            yield self.view.contexts(start, start + 64)[3].cpu().numpy()

    def _sides(self, settings: ExampleSettings) -> np.ndarray:
        n = self.view.n_contexts
        if settings.split == "context":
            return (hash_unit(np.full(n, settings.seed), np.arange(n)) < 0.5).astype(np.int8)
        # Neighbouring documents tend to be alike: runs of them take sides.
        run = int(np.clip((self.document.max() + 1) // 64, 1, _LONGEST_RUN))
        mine = self.document // run
        following = np.append(mine[1:], mine[-1])
        # The context ends in the document in which the next one begins, or before it.
        return np.where(mine == following, mine % 2, -1).astype(np.int8)


class _Sample:
    """For each of many groups the windows that come first by some order, bounded in number."""

    def __init__(self, groups: int, size: int) -> None:
        self.window = np.full((groups, size), -1, dtype=np.int32)
        self.value = np.zeros((groups, size), dtype=np.float32)
        self.order = np.full((groups, size), np.inf, dtype=np.float32)

    def offer(self, group: np.ndarray, order: np.ndarray, window: np.ndarray, value: np.ndarray) -> None:
        order = order.astype(np.float32)
        good = order < self.order[group, -1]
        group, order, window, value = group[good], order[good], window[good], value[good]
        if not len(group):
            return
        touched = np.unique(group)
        row, column = np.nonzero(self.window[touched] >= 0)
        held = touched[row]
        group = np.concatenate([held, group])
        order = np.concatenate([self.order[held, column], order])
        window = np.concatenate([self.window[held, column], window])
        value = np.concatenate([self.value[held, column], value])
        kept, rank = first_in_groups(group, order, self.window.shape[1])
        place = group[kept], rank
        self.window[place], self.value[place], self.order[place] = window[kept], value[kept], order[kept]


class _Survey:
    """The first pass: samples of every feature's windows, counts, and the pool."""

    def __init__(self, n_features: int, windows: _Windows, settings: ExampleSettings) -> None:
        self.n_features, self.windows, self.settings = n_features, windows, settings
        self.sample = _Sample(2 * n_features, settings.reservoir * max(settings.train, settings.test))
        self.strongest = _Sample(n_features, settings.train) if settings.choice in ("top", "mix") else None
        self.n_windows = np.zeros(n_features, dtype=np.int64)
        self.fires = np.zeros(n_features, dtype=np.int64)
        self.largest = np.zeros(n_features, dtype=np.float32)
        self.n_tokens = 0
        rate = 2 * settings.pool / max(1, int((windows.side >= 0).sum()))
        every = np.arange(windows.n_contexts)
        in_pool = (hash_unit(np.full(len(every), settings.seed + 1), every) < rate) & (windows.side >= 0)
        self.pool = np.flatnonzero(in_pool)
        self._in_pool = in_pool
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, codes: ContextCodes) -> None:
        """Note a batch of windows."""
        self.n_tokens += codes.n_tokens
        peaks = codes.peaks()
        feature, count = np.unique(codes.key // codes.n_flat, return_counts=True)
        self.fires[feature] += count
        window = codes.first_context + peaks.flat // codes.length
        self.n_windows += np.bincount(peaks.feature, minlength=self.n_features)
        np.maximum.at(self.largest, peaks.feature, peaks.value)
        side = self.windows.side[window]
        there = side >= 0
        feature, window, value, side = peaks.feature[there], window[there], peaks.value[there], side[there]
        hashed = hash_unit(feature + self.settings.seed, window)
        self.sample.offer(2 * feature + side, hashed, window, value)
        if self.strongest is not None:
            own = side == TRAIN
            self.strongest.offer(feature[own], -value[own], window[own], value[own])
        pooled = self._in_pool[window]
        self._pairs.append((feature[pooled].astype(np.int32), window[pooled].astype(np.int32)))

    def finish(self) -> None:
        """Index the pool by feature."""
        feature = np.concatenate([pair[0] for pair in self._pairs])
        window = np.concatenate([pair[1] for pair in self._pairs])
        order = np.argsort(feature, kind="stable")
        self._pool_window = window[order]
        self._pool_start = np.searchsorted(feature[order], np.arange(self.n_features + 1))
        self._pairs = []
        self.pool_of = [self.pool[self.windows.side[self.pool] == side] for side in (TRAIN, TEST)]

    def active_in_pool(self, feature: int) -> np.ndarray:
        """Windows of the pool in which a feature fires."""
        return self._pool_window[self._pool_start[feature] : self._pool_start[feature + 1]]

    def silent_in_pool(self, feature: int, side: int) -> np.ndarray:
        """Windows of the pool in which it does not, in an order of the feature's own."""
        silent = np.setdiff1d(self.pool_of[side], self.active_in_pool(feature), assume_unique=True)
        return silent[np.argsort(hash_unit(np.full(len(silent), feature + self.settings.seed), silent))]

    def cooccurring(self, features: np.ndarray, top: int) -> np.ndarray:
        """For some features those that fire in most of the same windows, by Jaccard's index on the pool."""
        from scipy import sparse

        rows = np.searchsorted(self.pool, self._pool_window)
        shape = (len(self.pool), self.n_features)
        matrix = sparse.csc_matrix((np.ones(len(rows), dtype=np.float32), rows, self._pool_start), shape=shape)
        counts = np.diff(self._pool_start).astype(np.float32)
        found = np.full((len(features), top), -1, dtype=np.int64)
        for start in range(0, len(features), 512):
            part = features[start : start + 512]
            both = (matrix[:, part].T @ matrix).tocsr()
            for row, feature in enumerate(part.tolist()):
                others = both.indices[both.indptr[row] : both.indptr[row + 1]]
                common = both.data[both.indptr[row] : both.indptr[row + 1]]
                jaccard = common / (counts[feature] + counts[others] - common)
                own = others != feature
                best = np.lexsort((others[own], -jaccard[own]))[:top]
                found[start + row, : len(best)] = others[own][best]
        return found


class _Choice:
    """The second pass: which windows, and the activations on their tokens."""

    def __init__(self, survey: _Survey, features: np.ndarray, decoder_weight: Tensor | None) -> None:
        self.survey, self.features, self.settings = survey, features, survey.settings
        settings = self.settings
        n, slots = len(features), settings.train + settings.test
        self.window = np.full((n, slots), -1, dtype=np.int64)
        self.quantile = np.full((n, slots), -1, dtype=np.int8)
        for row, feature in enumerate(features.tolist()):
            for side, place, wanted in ((TRAIN, 0, settings.train), (TEST, settings.train, settings.test)):
                window, quantile = self._positives(feature, side, wanted)
                self.window[row, place : place + len(window)] = window
                self.quantile[row, place : place + len(window)] = quantile
        self.activations = np.zeros((n, slots, settings.window), dtype=np.float16)
        self._suspects = self._neighbours_windows(decoder_weight)
        every = np.concatenate([self.window, *self._suspects.values()], axis=1)
        self._silent = np.zeros(every.shape, dtype=np.bool_)
        rows, slot = np.nonzero(every >= 0)
        order = np.argsort(every[rows, slot], kind="stable")
        self._row, self._slot = rows[order], slot[order]
        self._wanted = every[self._row, self._slot]

    def _positives(self, feature: int, side: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        settings, sample = self.settings, self.survey.sample
        held = sample.window[2 * feature + side] >= 0
        window, value = sample.window[2 * feature + side][held], sample.value[2 * feature + side][held]
        # By strength, equals by the sample's own order; into groups that differ in size by one at most.
        rank = np.argsort(np.argsort(value, kind="stable"), kind="stable")
        quantile = rank * settings.quantiles // max(len(window), 1)
        choice = settings.choice if side == TRAIN else "quantiles"
        if choice == "random":
            return window[:wanted], quantile[:wanted]
        if choice == "quantiles":
            chosen = _evenly(quantile, wanted, settings.quantiles)
            return window[chosen], quantile[chosen]
        assert self.survey.strongest is not None
        top = self.survey.strongest.window[feature]
        top = top[top >= 0][: wanted if choice == "top" else max(1, round(_TOP_SHARE_OF_MIX * wanted))]
        others = ~np.isin(window, top)
        chosen = np.flatnonzero(others)[_evenly(quantile[others], wanted - len(top), settings.quantiles)]
        if choice == "top":
            chosen = chosen[:0]
        highest = np.full(len(top), settings.quantiles - 1)
        return np.concatenate([top, window[chosen]]), np.concatenate([highest, quantile[chosen]])

    def _neighbours_windows(self, decoder_weight: Tensor | None) -> dict[str, np.ndarray]:
        """Test windows of related features, a few of each, some of which the feature itself may fire in."""
        settings, found = self.settings, {}
        for source in settings.negatives:
            if source == "cooccurring":
                related = self.survey.cooccurring(self.features, settings.neighbours)
            elif source == "neighbour":
                if decoder_weight is None:
                    raise InputError("negatives by 'neighbour' need a dictionary with decoder_weight")
                related = nearest_features(decoder_weight, top=settings.neighbours).indices[self.features]
            else:
                continue
            kept = self.survey.sample.window[2 * related + TEST][:, :, : 2 * settings.per_neighbour].astype(np.int64)
            kept[related < 0] = -1
            found[source] = kept.reshape(len(self.features), -1)
        return found

    def wants(self, start: int, stop: int) -> bool:
        """Whether any of these windows was chosen."""
        return bool(np.searchsorted(self._wanted, start) < np.searchsorted(self._wanted, stop))

    def read(self, codes: ContextCodes) -> None:
        """Read the activations of chosen windows."""
        start, stop = codes.first_context, codes.first_context + codes.n_contexts
        part = slice(*np.searchsorted(self._wanted, [start, stop]))
        row, slot, window = self._row[part], self._slot[part], self._wanted[part] - start
        flat = (window * codes.length)[:, None] + np.arange(codes.length)
        found = codes.activations(self.features[row], flat)
        positive = slot < self.window.shape[1]
        # Shares of the maximum: half precision holds neither large nor tiny activations.
        largest = np.maximum(self.survey.largest[self.features[row]], np.finfo(np.float32).tiny)
        self.activations[row[positive], slot[positive]] = (found / largest[:, None])[positive]
        self._silent[row, slot] = ~found.any(axis=1)

    def examples(
        self, embed: Callable[[Sequence[str]], Tensor] | None, spell: Callable[[Sequence[int]], Spelled] | None
    ) -> Examples:
        """All that was chosen, with one table of windows."""
        settings, survey = self.settings, self.survey
        negatives: dict[str, np.ndarray] = {}
        at = self.window.shape[1]
        for source in settings.negatives:
            if source in self._suspects:
                suspects = self._suspects[source]
                silent = self._silent[:, at : at + suspects.shape[1]]
                at += suspects.shape[1]
                negatives[source] = self._of_neighbours(np.where(silent, suspects, -1))
            elif source == "random":
                negatives[source] = self._random(TEST, settings.non_activating)
        if settings.near_misses:
            negatives["near"] = self._random(TRAIN, settings.near_misses)
        if "similar" in settings.negatives:
            assert embed is not None
            assert spell is not None
            negatives["similar"] = self._similar(embed, spell)
        table = np.unique(np.concatenate([self.window.ravel(), *(each.ravel() for each in negatives.values())]))
        table = table[table >= 0]

        def rows(windows: np.ndarray) -> np.ndarray:
            return np.where(windows >= 0, np.searchsorted(table, windows), -1).astype(np.int32)

        return Examples(
            settings=settings,
            features=self.features,
            n_windows=survey.n_windows[self.features],
            density=(survey.fires / max(survey.n_tokens, 1))[self.features],
            window_density=(survey.n_windows / survey.windows.n_contexts)[self.features],
            largest=survey.largest[self.features],
            chosen=rows(self.window),
            quantile=self.quantile,
            activations=self.activations,
            negatives={source: rows(windows) for source, windows in negatives.items()},
            numbers=table,
            token_ids=_read_tokens(survey.windows, table),
            documents=survey.windows.document[table // survey.windows.per_context],
        )

    def _random(self, side: int, wanted: int) -> np.ndarray:
        found = np.full((len(self.features), wanted), -1, dtype=np.int64)
        for row, feature in enumerate(self.features.tolist()):
            silent = self.survey.silent_in_pool(feature, side)[:wanted]
            found[row, : len(silent)] = silent
        return found

    def _of_neighbours(self, windows: np.ndarray) -> np.ndarray:
        settings = self.settings
        per = 2 * settings.per_neighbour
        found = np.full((len(windows), settings.non_activating), -1, dtype=np.int64)
        for row, suspects in enumerate(windows):
            kept: list[int] = []
            for start in range(0, len(suspects), per):
                fresh = [each for each in suspects[start : start + per].tolist() if each >= 0 and each not in kept]
                kept += fresh[: settings.per_neighbour]
            kept = kept[: settings.non_activating]
            found[row, : len(kept)] = kept
        return found

    def _similar(
        self, embed: Callable[[Sequence[str]], Tensor], spell: Callable[[Sequence[int]], Spelled]
    ) -> np.ndarray:
        """Silent windows of the pool whose vectors are nearest to the mean of the train windows' vectors."""
        survey = self.survey
        pool = survey.pool_of[TEST]
        own = self.window[:, : self.settings.train]
        needed = np.unique(np.concatenate([pool, own[own >= 0]]))
        vectors = embed([spell(ids.tolist()).text for ids in _read_tokens(survey.windows, needed)]).numpy()
        of_pool = vectors[np.searchsorted(needed, pool)]
        found = np.full((len(self.features), self.settings.non_activating), -1, dtype=np.int64)
        for row, feature in enumerate(self.features.tolist()):
            train = own[row][own[row] >= 0]
            if not len(train):
                continue
            likeness = of_pool @ vectors[np.searchsorted(needed, train)].mean(axis=0)
            likeness[np.isin(pool, survey.active_in_pool(feature))] = -np.inf
            best = np.argsort(-likeness, kind="stable")[: self.settings.non_activating]
            best = best[np.isfinite(likeness[best])]
            found[row, : len(best)] = pool[best]
        return found


def _evenly(quantile: np.ndarray, wanted: int, quantiles: int) -> np.ndarray:
    """Places of as many entries of every group as of any other (plus or minus one), the first ones of each."""
    if wanted >= len(quantile):
        return np.arange(len(quantile))
    members = [np.flatnonzero(quantile == group) for group in range(quantiles)]
    chosen: list[int] = []
    turn = 0
    while len(chosen) < wanted:
        # The strongest group first, where the last round does not reach all.
        fresh = [int(group[turn]) for group in reversed(members) if turn < len(group)]
        chosen += fresh[: wanted - len(chosen)]
        turn += 1
    return np.array(chosen, dtype=np.int64)


def _read_tokens(windows: _Windows, numbers: np.ndarray) -> np.ndarray:
    """Token ids of some windows, ascending."""
    context, place = np.divmod(numbers, windows.per_context)
    columns = (place * windows.width)[:, None] + np.arange(windows.width)
    needed, inverse = np.unique(context, return_inverse=True)
    read = getattr(windows.view, "token_ids_of", None)
    if read is not None:
        token_ids = read(needed)
    else:
        each = [windows.view.contexts(number, number + 1)[0].cpu().numpy() for number in needed.tolist()]
        token_ids = np.concatenate(each) if each else np.zeros((0, windows.context), dtype=np.int64)
    return token_ids[inverse[:, None], columns].astype(np.int32)
