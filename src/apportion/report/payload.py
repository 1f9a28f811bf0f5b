"""Feature data as compressed blocks that a page can hold by the thousand and open one at a time.

A block is deflate(JSON header + raw little-endian arrays), in base64. The header says where each array lies. Text
travels only inside such blocks, so that nothing in a corpus can be read as HTML.

The windows of different features overlap heavily, so the text is stored once (``corpus``); a window is a place in it.
"""

import base64
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from apportion.report.data import ExplainedFeature, ReportData

CHUNK_FEATURES = 128


def readable(text: str) -> str:
    """``text`` without lone surrogates, which no encoding can carry (halves that form a pair are joined)."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def encode_block(arrays: Mapping[str, np.ndarray], plain: Any = None) -> str:
    """Arrays and anything JSON can hold, as the base64 of one deflated block."""
    layout, parts, offset = {}, [], 0
    for name, array in arrays.items():
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        raw = array.tobytes()
        layout[name] = [array.dtype.str.lstrip("<|"), offset, array.size]
        # JavaScript's typed arrays must begin at a multiple of their item size.
        parts.append(raw + bytes(-len(raw) % 8))
        offset += len(parts[-1])
    header = json.dumps({"arrays": layout, "plain": plain}, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    header += b" " * (-(len(header) + 4) % 8)
    packed = zlib.compress(len(header).to_bytes(4, "little") + header + b"".join(parts), 7)
    return base64.b64encode(packed).decode("ascii")


def decode_block(block: str) -> tuple[dict[str, np.ndarray], Any]:
    """The inverse of `encode_block`; what the page's script does, for tests and for other programs."""
    raw = zlib.decompress(base64.b64decode(block))
    size = int.from_bytes(raw[:4], "little")
    header = json.loads(raw[4 : 4 + size])
    arrays = {
        name: np.frombuffer(raw, dtype=f"<{kind}", count=count, offset=4 + size + offset)
        for name, (kind, offset, count) in header["arrays"].items()
    }
    return arrays, header["plain"]


def blocks(data: ReportData) -> Iterator[tuple[str, str]]:
    """Name and content of every block of a report, one at a time.

    Raises:
        ValueError: two windows disagree about the token at one position.
    """
    contexts = data.contexts
    starts, lengths, corpus = _shared_text(data)
    used = [corpus] if data.lens is None else [corpus, data.lens.promoted_ids, data.lens.suppressed_ids]
    token_ids = np.unique(np.concatenate([part.reshape(-1) for part in used])).astype(np.int64)

    def word(ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(token_ids, ids).astype(np.uint32)

    yield "about", encode_block({}, _about(data))
    yield (
        "vocabulary",
        encode_block(
            {"id": token_ids.astype(np.uint32)},
            [readable(data.token_text.get(token, f"⟨token {token}⟩")) for token in token_ids.tolist()],
        ),
    )
    yield (
        "list",
        encode_block(
            {
                "fires": contexts.fires.astype(np.uint32),
                "max": contexts.max_activation.astype(np.float32),
                "mean": contexts.mean_activation.astype(np.float32),
                "cosine": _first_column(None if data.nearest is None else data.nearest.cosine),
                "score": _headline_scores(data),
                "promoted": np.zeros(0, np.uint32) if data.lens is None else word(data.lens.promoted_ids),
            },
            {"labels": {str(feature): readable(label) for feature, label in _labels(data).items()}},
        ),
    )
    yield "corpus", encode_block({"tokens": word(corpus)})
    yield (
        "windows",
        encode_block(
            {
                "start": starts.astype(np.uint32),
                "length": lengths.astype(np.uint16),
                "peak": np.maximum(contexts.peak, 0).astype(np.uint16),
                "document": contexts.document.astype(np.int32),
            },
            {"documents": {str(number): readable(name) for number, name in data.document_names.items()}},
        ),
    )
    first_bin, histograms = _trimmed_histograms(contexts.histogram)
    scale = np.where(contexts.max_activation > 0, contexts.max_activation, 1).astype(np.float64)
    for start in range(0, contexts.n_features, CHUNK_FEATURES):
        part = slice(start, min(start + CHUNK_FEATURES, contexts.n_features))
        # Sixteen bits relative to the feature's maximum: more digits than anyone reads, half the bytes of a float.
        shares = np.rint(contexts.activations[part] / scale[part, None, None] * 65535).astype(np.uint16)
        arrays: dict[str, np.ndarray] = {
            "histogram_first": first_bin[part].astype(np.uint16),
            "histogram_size": np.array([len(row) for row in histograms[part]], dtype=np.uint16),
            "histogram": np.concatenate(histograms[part]).astype(np.uint32),
            "shares": shares,
        }
        if data.lens is not None:
            arrays |= {
                "promoted_logits": data.lens.promoted_logits[part].astype(np.float32),
                "suppressed": word(data.lens.suppressed_ids[part]),
                "suppressed_logits": data.lens.suppressed_logits[part].astype(np.float32),
            }
        if data.nearest is not None:
            arrays |= {
                "nearest": data.nearest.indices[part].astype(np.uint32),
                "nearest_cosine": data.nearest.cosine[part].astype(np.float32),
            }
        explained = {
            str(feature - start): _explained(data.explanations[feature])
            for feature in range(part.start, part.stop)
            if feature in data.explanations
        }
        yield f"features-{start // CHUNK_FEATURES}", encode_block(arrays, {"explained": explained})


def _about(data: ReportData) -> dict[str, Any]:
    contexts = data.contexts
    return {
        "features": contexts.n_features,
        "tokens": contexts.n_tokens,
        "chunk": CHUNK_FEATURES,
        "slots": contexts.peak.shape[1],
        "width": contexts.token_ids.shape[2],
        "groups": [[slots.start, slots.stop, low, high] for slots, low, high in contexts.slot_groups()],
        "edges": contexts.histogram_edges.tolist(),
        "lens": 0 if data.lens is None else data.lens.promoted_ids.shape[1],
        "nearest": 0 if data.nearest is None else data.nearest.indices.shape[1],
        "scorer": _headline_scorer(data),
    }


def _labels(data: ReportData) -> dict[int, str]:
    return {feature: explained.text for feature, explained in data.explanations.items()} | dict(data.labels)


def _headline_scorer(data: ReportData) -> str:
    """The scorer whose AUROC the list shows: the first that any explanation has."""
    return next((name for each in data.explanations.values() for name in each.scores), "")


def _headline_scores(data: ReportData) -> np.ndarray:
    scorer = _headline_scorer(data)
    if not scorer:
        return np.zeros(0, np.float32)
    found = np.full(data.contexts.n_features, np.nan, np.float32)
    for feature, explained in data.explanations.items():
        if scorer in explained.scores and (value := explained.scores[scorer].auroc) is not None:
            found[feature] = value
    return found


def _explained(explained: ExplainedFeature) -> dict[str, Any]:
    return {
        "text": readable(explained.text),
        "style": readable(explained.style),
        "judge": readable(explained.judge),
        "flagged": explained.flagged,
        "scores": [
            {
                "name": readable(name),
                "auroc": figures.auroc,
                "balanced": figures.balanced_accuracy,
                "precision": figures.expected_precision,
                "quantiles": list(figures.by_quantile),
                "sources": [[readable(source), value] for source, value in figures.by_source.items()],
                "failed": [[readable(kind), count] for kind, count in figures.failed.items()],
                "notes": [
                    [readable(what), readable(value) if isinstance(value, str) else value]
                    for what, value in figures.notes.items()
                    if value is not None
                ],
            }
            for name, figures in explained.scores.items()
        ],
    }


def _shared_text(data: ReportData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows as places in one run of tokens: starts, lengths and the tokens."""
    contexts = data.contexts
    there = contexts.token_ids >= 0
    lengths = there.sum(axis=2)
    place = contexts.position[:, :, None] + np.arange(contexts.token_ids.shape[2])
    positions, first, inverse = np.unique(place[there], return_index=True, return_inverse=True)
    shown = contexts.token_ids[there]
    corpus = shown[first]
    if (corpus[inverse] != shown).any():
        raise ValueError("contexts: two windows disagree about the token at one position; was `position` renumbered?")
    starts = np.searchsorted(positions, contexts.position)
    starts[lengths == 0] = 0
    return starts, lengths, corpus


def _trimmed_histograms(histogram: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """First used bin and the counts from there to the last used bin, per feature."""
    used = histogram > 0
    any_used = used.any(axis=1)
    first = np.where(any_used, used.argmax(axis=1), 0)
    stop = np.where(any_used, histogram.shape[1] - used[:, ::-1].argmax(axis=1), 0)
    return first, [row[begin:end] for row, begin, end in zip(histogram, first, stop, strict=True)]


def _first_column(array: np.ndarray | None) -> np.ndarray:
    if array is None or array.shape[1] == 0:
        return np.zeros(0, np.float32)
    return array[:, 0].astype(np.float32)
