"""Windows of text as a judge reads them: plain, or with the tokens on which a feature fires in ``<<`` and ``>>``."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

OPEN, CLOSE = "<<", ">>"
# A window's tokens above this share of its own maximum are the ones that are shown as active.
HIGHLIGHT = 0.3
_MARKER_OR_ESCAPED = re.compile(r"<<|>>|([<>])\\")


@dataclass(frozen=True, eq=False)
class Example:
    """One window.

    Attributes:
        number: of the window in the text.
        text: its decoded tokens.
        spans: where each token is in the text, see `apportion.models.spelling.Spelled`.
        activations: of the feature on each token; zeros where it is a negative.
        source: ``activating``, or where the negative is from, such as ``random`` or ``neighbour``.
        quantile: which interval of the feature's activating windows, by their maximum, it is from; 0 is the weakest.
            -1 for negatives.
    """

    number: int
    text: str
    spans: tuple[tuple[int, int], ...]
    activations: Float[np.ndarray, " tokens"]
    source: str = "activating"
    quantile: int = -1

    @property
    def activating(self) -> bool:
        """Whether the feature fires in it."""
        return self.source == "activating"

    @property
    def active(self) -> Bool[np.ndarray, " tokens"]:
        """Tokens whose activation is above ``HIGHLIGHT`` of the window's maximum."""
        largest = float(self.activations.max(initial=0.0))
        return self.activations > HIGHLIGHT * largest if largest > 0 else np.zeros(len(self.activations), np.bool_)

    def marked(self, tokens: Bool[np.ndarray, " tokens"] | None = None) -> str:
        """The text with some tokens between markers, by default the active ones."""
        return mark(self.text, self.spans, self.active if tokens is None else tokens)

    def token(self, place: int) -> str:
        """What one token says."""
        return self.text[slice(*self.spans[place])]


def mark(text: str, spans: Sequence[tuple[int, int]], tokens: Bool[np.ndarray, " tokens"]) -> str:
    """Put markers around some tokens of a text, one pair around a run of neighbours; `unmark` takes them off again.

    A ``<`` or ``>`` of the text that could be taken for a part of a marker is followed by a backslash.
    """
    opens, closes = set(), set()
    for start, stop in _runs(spans, tokens):
        opens.add(start)
        closes.add(stop)
    parts = []
    for place, character in enumerate(text):
        if place in closes:
            parts.append(CLOSE)
        if place in opens:
            parts.append(OPEN)
        parts.append(character)
        if character in "<>":
            after = place + 1
            follows = text[after : after + 1]
            if after in closes:
                follows = ">"
            elif after in opens:
                follows = "<"
            if follows in (character, "\\"):
                parts.append("\\")
    if len(text) in closes:
        parts.append(CLOSE)
    return "".join(parts)


def unmark(marked: str) -> str:
    """The text that `mark` was given."""
    return _MARKER_OR_ESCAPED.sub(lambda found: found[1] or "", marked)


def _runs(spans: Sequence[tuple[int, int]], tokens: np.ndarray) -> Iterator[tuple[int, int]]:
    start = stop = -1
    for (begin, end), chosen in zip(spans, tokens.tolist(), strict=True):
        if not chosen or begin == end:
            continue
        if begin > stop or stop < 0:
            if stop >= 0:
                yield start, stop
            start = begin
        stop = max(stop, end)
    if stop >= 0:
        yield start, stop


def levels(activations: Float[np.ndarray, " tokens"], largest: float) -> Int[np.ndarray, " tokens"]:
    """Activations as the whole numbers that a judge is shown: 10 is the feature's maximum, 0 is silence, tiny is 1."""
    if largest <= 0:
        return np.zeros(len(activations), dtype=np.int64)
    return np.clip(np.ceil(10 * activations / largest), 0, 10).astype(np.int64)
