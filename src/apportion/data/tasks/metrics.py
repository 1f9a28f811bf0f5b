"""How a text that a model wrote is scored against the right answer, from 0 to 1 (SCBench's metrics, arXiv 2412.10319).

Words are compared whole and without regard to case: a two-digit answer must not be found inside a longer number.
"""

import difflib
import re
from collections.abc import Callable

from apportion.errors import InputError

SIMILAR_ENOUGH = 0.8
_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"\d+")


def contained(prediction: str, answer: str, context: str = "") -> float:
    """Whether the answer occurs in the text, as whole words."""
    pattern = rf"(?<!\w){re.escape(answer.strip())}(?!\w)"
    return float(bool(answer.strip()) and re.search(pattern, prediction, re.IGNORECASE) is not None)


def fraction(prediction: str, answer: str, context: str = "") -> float:
    """The share of the answer's words that occur in the text."""
    wanted = answer.split()
    return sum(contained(prediction, word) for word in wanted) / len(wanted) if wanted else 0.0


def first_number(prediction: str, answer: str, context: str = "") -> float:
    """Whether the first number of the text is the answer."""
    found = _NUMBER.search(prediction)
    return float(found is not None and found.group() == answer.strip())


def label(prediction: str, answer: str, context: str = "") -> float:
    """Whether the first word of the text is the answer: a text that names every label earns nothing by it."""
    found = _WORD.search(prediction)
    return float(found is not None and found.group().lower() == answer.strip().lower())


def most_similar(prediction: str, answer: str, context: str = "") -> float:
    """Whether, of all functions of the context, the text is most like the right one, and at least 0.8 like it.

    Likeness is the ratio of `difflib` over words and signs (RepoQA's is BLEU).
    """
    if not prediction.strip():
        return 0.0
    # A model goes on after the function; what comes after a blank stretch is not part of it.
    written = _signs(prediction.strip().split("\n\n\n")[0])
    right = answer.strip()
    scores = {each: _likeness(written, each) for each in (right, *functions_of(context))}
    return float(scores[right] >= SIMILAR_ENOUGH and scores[right] == max(scores.values()))


def functions_of(context: str) -> list[str]:
    """The functions of a context of `repo_qa`, in order."""
    return [part.strip() for part in context.split("\n\n\n") if part.strip().startswith("def ")]


METRICS: dict[str, Callable[[str, str, str], float]] = {
    "contained": contained,
    "fraction": fraction,
    "first_number": first_number,
    "label": label,
    "most_similar": most_similar,
}


def metric_score(metric: str, prediction: str, answer: str, context: str = "") -> float:
    """The score of a text by a metric.

    Args:
        metric: a name of ``METRICS``.
        prediction: what a model wrote after the question.
        answer: the right answer.
        context: what the question was about.

    Raises:
        InputError: there is no such metric.
    """
    if metric not in METRICS:
        raise InputError(f"metric {metric!r}: one of {', '.join(METRICS)}")
    return METRICS[metric](prediction, answer, context)


def _likeness(written: list[str], other: str) -> float:
    return difflib.SequenceMatcher(None, written, _signs(other), autojunk=False).ratio()


def _signs(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)
