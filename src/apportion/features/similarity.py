"""How alike are two dictionaries? By the directions they write, and by the tokens on which they write them.

- **Best match**: for every feature of one the feature of the other with the largest decoder cosine (its mean is the
  mean max cosine similarity of Sharkey et al. 2022). Several features may share a best match: a narrow dictionary's
  feature is often split into many of a wide one's.
- **One-to-one**: the assignment of largest total cosine (Hungarian algorithm; as in Paulo & Belrose 2025, *SAEs
  Trained on the Same Data Learn Different Features*, arXiv 2501.16615). Its time grows with the cube of the size; above
  ``hungarian_limit`` features it is replaced by a greedy assignment, which the result says.
- **Shared**: partners whose cosine reaches ``shared_at`` (default 0.7); the others are unique to their dictionary.
- **Activations**: for partners, the correlation of their codes and the share of tokens with either on which both fire;
  and for every feature the feature of the other whose code correlates most with its own.

Codes are not negative, so a direction and its opposite are different features: cosines keep their sign throughout. (By
the absolute cosine a feature without a like would be given something near its opposite for a partner.)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.errors import InputError
from apportion.features.contexts import SparseEncoder

SHARED_AT = 0.7
HUNGARIAN_LIMIT = 6144
# What the greedy assignment may choose from; a feature whose nearest are all taken stays alone.
_CANDIDATES = 32


@dataclass(frozen=True)
class BestMatches:
    """For every feature of one dictionary the one of another that is most like it, and how much."""

    indices: Int[np.ndarray, " features"]
    similarity: Float[np.ndarray, " features"]


@dataclass(frozen=True)
class Matching:
    """Pairs in which every feature is at most once, most alike (by |cosine|) first.

    Attributes:
        a, b: the features of each pair.
        cosine: of their directions, with its sign.
        method: ``hungarian`` (the best total) or ``greedy`` (the most alike first).
    """

    a: Int[np.ndarray, " pairs"]
    b: Int[np.ndarray, " pairs"]
    cosine: Float[np.ndarray, " pairs"]
    method: Literal["hungarian", "greedy"]

    def shared(self, at: float = SHARED_AT) -> int:
        """How many pairs have a cosine of at least ``at``."""
        return int((self.cosine >= at).sum())

    def alone(self, n_a: int, n_b: int, at: float = SHARED_AT) -> tuple[np.ndarray, np.ndarray]:
        """The features of each dictionary without a partner of cosine ``at``."""
        kept = self.cosine >= at
        return np.setdiff1d(np.arange(n_a), self.a[kept]), np.setdiff1d(np.arange(n_b), self.b[kept])


@dataclass(frozen=True)
class PairActivations:
    """How partners fire on the same tokens.

    Attributes:
        correlation: of their codes over all tokens (0 where one of them never fires).
        overlap: tokens on which both fire, as a share of those on which either does (0 where neither does).
        fires_a, fires_b: tokens on which each fires.
        tokens: looked at.
    """

    correlation: Float[np.ndarray, " pairs"]
    overlap: Float[np.ndarray, " pairs"]
    fires_a: Int[np.ndarray, " pairs"]
    fires_b: Int[np.ndarray, " pairs"]
    tokens: int


# --- directions ------------------------------------------------------------------------------------------------------


def best_matches(
    a: Float[Tensor, "features_a d"], b: Float[Tensor, "features_b _"], *, chunk: int = 1024
) -> BestMatches:
    """For every direction of ``a`` the one of ``b`` with the largest cosine, a chunk of ``a`` at a time.

    Raises:
        InputError: see ``one_to_one``.
    """
    left, right = _unit_rows(a, b)
    best = [(rows @ right.T).max(dim=1) for rows in left.split(chunk)]
    return BestMatches(
        torch.cat([each.indices for each in best]).cpu().numpy(),
        torch.cat([each.values for each in best]).clamp(-1, 1).cpu().numpy(),
    )


def one_to_one(
    a: Float[Tensor, "features_a d"],
    b: Float[Tensor, "features_b _"],
    *,
    hungarian_limit: int = HUNGARIAN_LIMIT,
    chunk: int = 1024,
) -> Matching:
    """Partners for as many features as the smaller dictionary has, by cosine.

    Args:
        a: one direction a row, of any length.
        b: the other dictionary's.
        hungarian_limit: features (of the larger) above which the assignment is greedy: each feature of ``a`` then
            chooses among its 32 nearest, and memory stays at ``chunk`` times the features of ``b``.
        chunk: features of ``a`` at a time.

    Raises:
        InputError: the directions are of different widths, or there are none.
    """
    left, right = _unit_rows(a, b)
    is_large = max(len(left), len(right)) > hungarian_limit
    rows, columns = _greedy(left, right, chunk) if is_large else _hungarian(left, right)
    cosine = (left[rows] * right[columns]).sum(dim=1).clamp(-1, 1).cpu().numpy()
    order = np.argsort(-cosine, kind="stable")
    return Matching(rows[order], columns[order], cosine[order], "greedy" if is_large else "hungarian")


def _unit_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape[1] != b.shape[1]:
        raise InputError(
            f"one dictionary writes width {a.shape[1]}, the other {b.shape[1]}: only directions in the same space can "
            "be compared"
        )
    if not len(a) or not len(b):
        raise InputError("a dictionary has no features to compare")
    left, right = (torch.nn.functional.normalize(each.detach().float(), dim=1) for each in (a, b))
    return left, right.to(left.device)


def _hungarian(left: Tensor, right: Tensor) -> tuple[np.ndarray, np.ndarray]:
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment((left @ right.T).cpu().numpy(), maximize=True)
    return rows, columns


def _greedy(left: Tensor, right: Tensor, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    k = min(_CANDIDATES, len(right))
    near = [(rows @ right.T).topk(k) for rows in left.split(chunk)]
    likeness = torch.cat([each.values for each in near]).flatten().cpu().numpy()
    columns = torch.cat([each.indices for each in near]).flatten().cpu().numpy()
    rows = np.repeat(np.arange(len(left)), k)
    free_rows, free_columns = np.ones(len(left), bool), np.ones(len(right), bool)
    chosen = []
    for place in np.argsort(-likeness, kind="stable").tolist():
        if free_rows[rows[place]] and free_columns[columns[place]]:
            free_rows[rows[place]] = free_columns[columns[place]] = False
            chosen.append(place)
    return rows[chosen], columns[chosen]


# --- activations -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare_activations(
    a: SparseEncoder,
    b: SparseEncoder,
    batches: Iterable[tuple[Tensor, Tensor]],
    matching: Matching,
    *,
    chunk: int = 512,
) -> tuple[PairActivations, BestMatches]:
    """How partners, and best matches by correlation, fire on the same tokens.

    Args:
        a: one dictionary, in evaluation mode.
        b: the other.
        batches: the same tokens for both, as activations for ``a`` and for ``b`` (one tensor twice, if both read the
            same site). All codes are held in memory, as sparse matrices.
        matching: the partners.
        chunk: features of ``a`` correlated with all of ``b`` at a time.

    Returns:
        How partners fire, and for every feature of ``a`` the feature of ``b`` of the largest correlation (feature 0
        with correlation 0 for one that never fires).

    Raises:
        InputError: no tokens.
    """
    from scipy import sparse

    parts: tuple[list[Any], list[Any]] = ([], [])
    for of_a, of_b in batches:
        for codes, kept in ((a.encode(of_a), parts[0]), (b.encode(of_b), parts[1])):
            active = codes.active()
            kept.append(
                sparse.csr_matrix(
                    (
                        active.values.float().cpu().numpy(),
                        active.col_indices.cpu().numpy(),
                        active.crow_indices.cpu().numpy(),
                    ),
                    shape=active.shape,
                )
            )
    if not parts[0]:
        raise InputError("there are no tokens to compare activations on: give held-out text")
    left, right = (sparse.vstack(each).tocsc() for each in parts)
    tokens = left.shape[0]
    left_mean, left_deviation = _mean_and_deviation(left)
    right_mean, right_deviation = _mean_and_deviation(right)

    def correlation(products: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        spread = left_deviation[rows] * right_deviation[columns]
        covariance = products / tokens - left_mean[rows] * right_mean[columns]
        return np.divide(covariance, spread, out=np.zeros_like(covariance), where=spread > 0)

    mine, theirs = left[:, matching.a], right[:, matching.b]
    products = np.asarray(mine.multiply(theirs).sum(axis=0), dtype=np.float64).ravel()
    both = np.asarray(((mine > 0).multiply(theirs > 0)).sum(axis=0)).ravel()
    fires_a, fires_b = mine.getnnz(axis=0), theirs.getnnz(axis=0)
    either = fires_a + fires_b - both
    pairs = PairActivations(
        correlation(products, matching.a, matching.b),
        np.divide(both, either, out=np.zeros(len(both)), where=either > 0),
        fires_a,
        fires_b,
        tokens,
    )
    indices, best = np.zeros(left.shape[1], dtype=np.int64), np.zeros(left.shape[1])
    everyone = np.arange(right.shape[1])
    for start in range(0, left.shape[1], chunk):
        block = (left[:, start : start + chunk].T @ right).toarray().astype(np.float64)
        rows = np.arange(start, start + len(block))
        found = correlation(block, rows[:, None], everyone[None, :])
        indices[rows], best[rows] = found.argmax(axis=1), found.max(axis=1)
    indices[best <= 0] = 0
    return pairs, BestMatches(indices, np.maximum(best, 0.0))


def _mean_and_deviation(codes: Any) -> tuple[np.ndarray, np.ndarray]:
    mean = np.asarray(codes.mean(axis=0), dtype=np.float64).ravel()
    squares = np.asarray(codes.multiply(codes).mean(axis=0), dtype=np.float64).ravel()
    return mean, np.sqrt(np.maximum(squares - mean**2, 0.0))
