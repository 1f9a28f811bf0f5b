"""How alike two dictionaries are, by what their features are said to mean."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from apportion.errors import InputError


@dataclass(frozen=True, eq=False)
class ExplanationSimilarity:
    """A one-to-one matching of the explained features of two dictionaries that makes the sum of cosines largest.

    Attributes:
        mean: of the cosines of matched explanations.
        first, second: numbers of the matched features, as many as the smaller side has.
        cosine: of each pair's explanations.
        chance: mean cosine of all pairs, what a matching at random would give.
    """

    mean: float
    first: Int[np.ndarray, " pairs"]
    second: Int[np.ndarray, " pairs"]
    cosine: Float[np.ndarray, " pairs"]
    chance: float


def explanation_similarity(
    first: Mapping[int, str], second: Mapping[int, str], encode: Callable[[Sequence[str]], Tensor]
) -> ExplanationSimilarity:
    """Match two dictionaries' features by the cosine of their explanations' vectors (the Hungarian method).

    A matching of the best always beats chance, the more so the more features there are: compare with a control of the
    same size, such as other seeds or shuffled tokens. (The paper's details are not published; this is ours.) Time
    grows with the cube of the number of features: some thousands are fine.

    Args:
        first: explanations by feature, of one dictionary.
        second: of the other.
        encode: unit vectors of texts, such as an `apportion.models.SentenceEncoder`.

    Raises:
        InputError: a side is empty.
    """
    from scipy.optimize import linear_sum_assignment

    if not first or not second:
        raise InputError("both dictionaries must have explanations: run `apportion explain` on each")
    names = [np.array(sorted(side), dtype=np.int64) for side in (first, second)]
    vectors = [
        encode([side[feature] for feature in own.tolist()]) for side, own in zip((first, second), names, strict=True)
    ]
    cosine = (vectors[0] @ vectors[1].T).double().numpy()
    rows, columns = linear_sum_assignment(cosine, maximize=True)
    matched = cosine[rows, columns]
    return ExplanationSimilarity(
        float(matched.mean()), names[0][rows], names[1][columns], matched, float(cosine.mean())
    )
