"""Choosing keys on the CPU: the kernels of scoring and selection one after the other, without leaving compiled code.

They are called as they are, so that scores, and with them ties, are those of the ops themselves. Numba's cache does not
see changes of ``label_scores.cpu`` and ``select.cpu``: who changes them must touch this file too (or delete
``__pycache__``).
"""

import math
from typing import no_type_check

import numba
import numpy as np
import torch
from torch import Tensor

from apportion.ops.key_choice import reference
from apportion.ops.label_scores import cpu as labels_cpu
from apportion.ops.numbers import exp_below, flat
from apportion.ops.select import cpu as select_cpu
from apportion.ops.threads import matching_threads

_score_labels, _score_packed = labels_cpu._label_scores, labels_cpu._packed_label_scores
_pack_label = labels_cpu.pack_label
_few, _many = select_cpu._rows, select_cpu._rows_by_cut
_TILE = 2048  # tokens whose scores a thread lets agree at a time


@numba.njit(parallel=True, cache=True)
@no_type_check
def _agree(scores, mean, sinks, recent, tile, agreed):
    """``agreed[list, token]`` of ``scores[list, head, token]``, infinite where a token is in every list."""
    tokens, heads = scores.shape[2], scores.shape[1]
    tiles = (tokens + tile - 1) // tile
    for task in numba.prange(scores.shape[0] * tiles):
        row, first = task // tiles, task % tiles * tile
        last = min(tokens, first + tile)
        out = agreed[row, first:last]
        out[:] = scores[row, 0, first:last]
        for head in range(1, heads):
            of_head = scores[row, head, first:last]
            for token in range(last - first):
                out[token] = out[token] + of_head[token] if mean else max(out[token], of_head[token])
        if mean:
            for token in range(last - first):
                out[token] /= np.float32(heads)
        for token in range(first, min(last, sinks)):
            agreed[row, token] = np.inf
        for token in range(max(first, tokens - recent), last):
            agreed[row, token] = np.inf


@numba.njit(cache=True)
@no_type_check
def _by_labels(queries, channels, labels, steps, rows, tile, mean, sinks, recent, agreed_tile, out, agreed, winners):
    _score_labels(queries, channels, labels, steps, rows, tile, out)
    _agree(out.reshape(agreed.shape[0], -1, agreed.shape[1]), mean, sinks, recent, agreed_tile, agreed)
    _select(agreed, winners)


@numba.njit(cache=True)
@no_type_check
def _by_packed_labels(
    queries, channels, codes, code_steps, ranges, range_steps, bits, rows, tile, mean, sinks, recent, agreed_tile, out,
    agreed, winners,
):  # fmt: skip
    _score_packed(queries, channels, codes, code_steps, ranges, range_steps, bits, rows, tile, out)
    _agree(out.reshape(agreed.shape[0], -1, agreed.shape[1]), mean, sinks, recent, agreed_tile, agreed)
    _select(agreed, winners)


_LARGE_HEAP, _ROW_SAMPLE = select_cpu._LARGE_HEAP, select_cpu._ROW_SAMPLE


@numba.njit(cache=True)
@no_type_check
def _select(scores, winners):
    """As ``select_rows`` does."""
    count = winners.shape[1]
    if count < _LARGE_HEAP:
        _few(scores, count, winners)
    else:
        _many(scores, count, max(1, scores.shape[1] // _ROW_SAMPLE), winners)


@numba.njit(parallel=True, cache=True)
@no_type_check
def _want(products, candidates, scaling, softcap, wanted):
    """The largest weight of each list's heads for each chunk, softmax by head over the candidates; -1 for others."""
    heads, chunks = products.shape[1:]
    for row in numba.prange(products.shape[0]):
        out = wanted[row]
        out[:] = -1
        weights = np.empty(chunks, np.float32)
        for head in range(heads):
            high = np.float32(-np.inf)
            for chunk in range(chunks):
                product = products[row, head, chunk] * scaling
                if softcap > 0:
                    product = softcap * np.float32(math.tanh(product / softcap))
                product = product if candidates[row, chunk] else np.float32(-np.inf)
                weights[chunk] = product
                high = max(high, product)
            total = np.float32(0.0)
            for chunk in range(chunks):
                weights[chunk] = exp_below(weights[chunk] - high)
                total += weights[chunk]
            for chunk in range(chunks):
                weight = weights[chunk] / total if candidates[row, chunk] else np.float32(-1.0)
                out[chunk] = max(out[chunk], weight)


@numba.njit(cache=True)
@no_type_check
def _chunks(queries, channels, means, steps, rows, tile, candidates, scaling, softcap, out, wanted, winners):
    _score_labels(queries, channels, means, steps, rows, tile, out)
    _want(out, candidates, scaling, softcap, wanted)
    _select(wanted, winners)


@numba.njit(cache=True)
@no_type_check
def _round(queries, bits):
    """In place: what packed labels of the queries would stand for, in the arithmetic of ``pack_labels``."""
    in_byte, mask = 8 // bits, np.uint8(2**bits - 1)
    codes = np.empty((queries.shape[1] * bits + 7) // 8, np.uint8)
    for row in range(queries.shape[0]):
        query = queries[row]
        codes[:] = 0
        low, step = _pack_label(query, bits, codes)
        for place in range(query.shape[0]):
            code = codes[place // in_byte] >> np.uint8(place % in_byte * bits) & mask
            query[place] = low + step * np.float32(code)


def choose_by_labels(
    queries: Tensor,
    labels: Tensor,
    ranges: Tensor | None,
    bits: int,
    count: int,
    sinks: int,
    recent: int,
    groups: int,
    group: str,
) -> Tensor:
    """See ``apportion.ops.key_choice.choose_by_labels``."""
    batch, heads, channels = queries.shape
    rows, tokens = labels.shape[1:3]
    if torch.float64 in (queries.dtype, labels.dtype) or 0 in (queries.numel(), labels.numel(), count):
        return reference.choose_by_labels(queries, labels, ranges, bits, count, sinks, recent, groups, group)
    lists = heads if group == "head" else groups
    asked = queries.detach().float().clone(memory_format=torch.contiguous_format)
    out, agreed = (
        np.empty((batch * rows, heads // rows, tokens), np.float32),
        np.empty((batch * lists, tokens), np.float32),
    )
    winners = torch.empty(batch, lists, count, dtype=torch.int64)
    of_lists = (group == "mean", sinks, recent, _TILE, out, agreed, winners.view(-1, count).numpy())
    with matching_threads():
        if ranges is not None:
            _round(asked.view(-1, channels).numpy(), bits)
            wanted = labels_cpu._padded(asked[:, :, None], rows).numpy()
            table = (flat(labels), labels.stride(), flat(ranges), ranges.stride(), bits)
            _by_packed_labels(wanted, channels, *table, rows, labels_cpu._TILE, *of_lists)
        else:
            if labels.dtype not in (torch.float32, torch.bfloat16):
                labels = labels.float()
            wanted = labels_cpu._padded(asked[:, :, None], rows).numpy()
            _by_labels(wanted, channels, flat(labels), labels.stride(), rows, labels_cpu._TILE, *of_lists)
    return winners


def choose_chunks(
    queries: Tensor, means: Tensor, candidates: Tensor, count: int, scaling: float, softcap: float | None
) -> Tensor:
    """See ``apportion.ops.key_choice.choose_chunks``."""
    batch, heads, width = queries.shape
    groups, chunks = means.shape[1:3]
    if torch.float64 in (queries.dtype, means.dtype) or 0 in (queries.numel(), means.numel(), count):
        return reference.choose_chunks(queries, means, candidates, count, scaling, softcap)
    if means.dtype not in (torch.float32, torch.bfloat16):
        means = means.float()
    out = np.empty((batch * groups, heads // groups, chunks), np.float32)
    wanted = np.empty((batch * groups, chunks), np.float32)
    winners = torch.empty(batch, groups, count, dtype=torch.int64)
    with matching_threads():
        _chunks(
            labels_cpu._padded(queries[:, :, None], groups).numpy(),
            width,
            flat(means),
            means.stride(),
            groups,
            labels_cpu._TILE,
            candidates.contiguous().view(batch * groups, chunks).numpy(),
            np.float32(scaling),
            np.float32(softcap or 0.0),
            out,
            wanted,
            winners.view(-1, count).numpy(),
        )
    return winners
