"""Sparse controllability (Makelov et al. 2024, arXiv 2405.08366): how few features change one attribute.

Allocated: ``budget`` edits per activation, out of the features that are active in it (to be removed) and in the
activation it should become (to be added); they go to whatever brings the activation closest. The *true* activation is
edited, so that what a dictionary does not explain stays, and all edits are computed on clean activations.

| paper | here |
|---|---|
| a_s, a_t; alpha, beta | ``source``, ``target``; ``source_codes``, ``target_codes`` |
| R, A with abs(R) + abs(A) <= k | ``SparseEdit.removed``, ``added``; ``budget`` |
| min over R, A of the distance to a_t | ``sparse_edit`` (greedy), ``exact_edit`` (all subsets, for few candidates) |
| weight of a feature; edit magnitude | ``feature_weights``; ``edit_magnitude`` |
| edit accuracy | ``Agreement`` |
| interpretation-aware edits | ``interpretation_aware_edit`` |

What is a unit of budget differs. In the paper it is a *move*: one removal or one addition. In the authors' code it is a
*feature*, whose old value goes and whose new value comes in one. The paper spends the whole budget; here an edit that
would make things worse is not made (ours), unless ``spend_all``.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.errors import InputError

Unit = Literal["move", "feature"]
_MOST_CANDIDATES = 14


@dataclass(frozen=True, eq=False)
class SparseEdit:
    """Edits of a batch of activations, for every budget up to the one asked for (greedy choices are nested).

    Attributes:
        path: the edited activations after 0, 1, ... edits.
        removed: the features taken away (of those active in the source), by number of edits.
        added: the features put in (of those active in the target), by number of edits.
    """

    path: Float[Tensor, "pairs budget_plus_1 d"]
    removed: Bool[Tensor, "pairs budget_plus_1 features"]
    added: Bool[Tensor, "pairs budget_plus_1 features"]

    def distance(self, target: Float[Tensor, "pairs d"]) -> Float[Tensor, "pairs budget_plus_1"]:
        """How far from the target each edit ends."""
        return (self.path - target[:, None]).norm(dim=2)


@torch.no_grad()
def sparse_edit(
    source: Float[Tensor, "pairs d"],
    target: Float[Tensor, "pairs d"],
    source_codes: Float[Tensor, "pairs features"],
    target_codes: Float[Tensor, "pairs features"],
    decoder_weight: Float[Tensor, "features d"],
    budget: int,
    *,
    unit: Unit = "move",
    spend_all: bool = False,
) -> SparseEdit:
    """Edit activations greedily towards their targets.

    Each step makes the edit that leaves the least distance. All pairs go together: what is kept is the inner product of
    every direction with what is left to go, which an edit changes by a row of the Gram matrix of the directions.

    Args:
        source: true activations to edit.
        target: true activations that they should become.
        source_codes: of the source; features that are not zero may be removed.
        target_codes: of the target; features that are not zero may be added.
        decoder_weight: the directions, in the units of the activations.
        budget: edits per pair.
        unit: what an edit is: ``move`` (one removal or one addition) or ``feature`` (old value out, new value in).
        spend_all: make edits that lead away from the target too, as long as there are any.

    Raises:
        InputError: an unknown unit, a negative budget.
    """
    _check(budget, unit)
    features = decoder_weight.shape[0]
    # Only directions that some pair may use; of a wide dictionary these are few.
    used = ((source_codes != 0) | (target_codes != 0)).any(dim=0).nonzero().flatten()
    old, new, directions = source_codes[:, used], target_codes[:, used], decoder_weight[used]
    amounts = torch.cat([-old, new], dim=1) if unit == "move" else new - old
    repeats = 2 if unit == "move" else 1
    gram = directions @ directions.T
    squares = gram.diagonal().repeat(repeats)
    left = (target - source) @ directions.T
    free = amounts != 0
    chosen = torch.zeros_like(free)
    rows = torch.arange(source.shape[0], device=source.device)
    path, steps = [source], [chosen.clone()]
    for _ in range(budget):
        if used.numel() == 0:
            path, steps = [*path, path[-1]], [*steps, steps[-1]]
            continue
        # By how much the squared distance falls.
        gain = (2 * amounts * left.repeat(1, repeats) - amounts.square() * squares).masked_fill(~free, -torch.inf)
        best, which = gain.max(dim=1)
        makes = best.isfinite() if spend_all else best > 0
        amount = torch.where(makes, amounts[rows, which], 0.0)
        feature = which % used.numel()
        left = left - amount[:, None] * gram[feature]
        free[rows, which] &= ~makes
        chosen[rows, which] |= makes
        path.append(path[-1] + amount[:, None] * directions[feature])
        steps.append(chosen.clone())
    made = torch.stack(steps, dim=1)
    if unit == "move":
        taken, put = made[..., : used.numel()], made[..., used.numel() :]
    else:
        taken, put = made & (old != 0)[:, None], made & (new != 0)[:, None]
    shape = (source.shape[0], budget + 1, features)
    removed, added = (torch.zeros(shape, dtype=torch.bool, device=source.device) for _ in range(2))
    removed[:, :, used], added[:, :, used] = taken, put
    return SparseEdit(torch.stack(path, dim=1), removed, added)


@torch.no_grad()
def exact_edit(
    source: Float[Tensor, " d"],
    target: Float[Tensor, " d"],
    source_codes: Float[Tensor, " features"],
    target_codes: Float[Tensor, " features"],
    decoder_weight: Float[Tensor, "features d"],
    budget: int,
    *,
    unit: Unit = "move",
) -> Float[Tensor, " d"]:
    """The edit of one activation that ends nearest to its target, found by trying all: what greedy edits are held to.

    Raises:
        InputError: more than 14 candidates, whose subsets are too many to try; or as ``sparse_edit``.
    """
    _check(budget, unit)
    if unit == "move":
        vectors = torch.cat([-source_codes[:, None] * decoder_weight, target_codes[:, None] * decoder_weight])
        vectors = vectors[torch.cat([source_codes, target_codes]) != 0]
    else:
        change = target_codes - source_codes
        vectors = (change[:, None] * decoder_weight)[change != 0]
    count = vectors.shape[0]
    if count > _MOST_CANDIDATES:
        raise InputError(
            f"{count} candidates: all subsets can be tried for {_MOST_CANDIDATES} at most; use sparse_edit"
        )
    sets = [each for size in range(min(budget, count) + 1) for each in itertools.combinations(range(count), size)]
    members = torch.zeros(len(sets), count, dtype=source.dtype)
    for row, each in enumerate(sets):
        members[row, list(each)] = 1
    ends = source + members @ vectors
    return ends[int((ends - target).square().sum(dim=1).argmin())]


def _check(budget: int, unit: str) -> None:
    if unit not in ("move", "feature"):
        raise InputError(f"unit={unit!r}: one of move, feature")
    if budget < 0:
        raise InputError(f"budget={budget}: must not be negative")


@torch.no_grad()
def interpretation_aware_edit(
    source: Float[Tensor, "pairs d"],
    source_codes: Float[Tensor, "pairs features"],
    target_codes: Float[Tensor, "pairs features"],
    decoder_weight: Float[Tensor, "features d"],
    f1_before: Float[Tensor, "pairs features"],
    f1_after: Float[Tensor, "pairs features"],
    budget: int,
) -> SparseEdit:
    """Edit by what features are said to mean: no look at where the activation should end.

    Removes, of the features active in the source, the ``budget`` that say best that the attribute has its old value,
    and adds, of those active in the target and with the values they have there, as many that say best that it has the
    new one. Budget b thus makes up to b removals and b additions.

    Args:
        source: true activations to edit.
        source_codes: of the source.
        target_codes: of the target.
        decoder_weight: the directions, in the units of the activations.
        f1_before: F1 score of every feature for the value that each pair's attribute has (``f1_scores``).
        f1_after: the same for the value that it should have.
        budget: removals, and additions, per pair.

    Raises:
        InputError: a negative budget.
    """
    _check(budget, "move")
    removed = _best_first(f1_before, source_codes, budget)
    added = _best_first(f1_after, target_codes, budget)
    amounts = added * target_codes[:, None] - removed * source_codes[:, None]
    return SparseEdit(source[:, None] + amounts @ decoder_weight, removed, added)


def _best_first(f1: Tensor, codes: Tensor, budget: int) -> Tensor:
    """The up to 0, 1, ..., ``budget`` active features of highest F1 above zero, as masks."""
    ranked, order = f1.masked_fill(codes == 0, 0.0).sort(dim=1, descending=True, stable=True)
    masks = torch.zeros(f1.shape[0], budget + 1, f1.shape[1], dtype=torch.bool, device=f1.device)
    for count in range(1, budget + 1):
        masks[:, count].scatter_(1, order[:, :count], ranked[:, :count] > 0)
    return masks


@torch.no_grad()
def feature_weights(
    codes: Float[Tensor, "rows features"], decoder_weight: Float[Tensor, "features d"]
) -> Float[Tensor, "rows features"]:
    """The share of each feature in a reconstruction: ``alpha_j u_j . (a_hat - b) / |a_hat - b|^2``.

    Those of a row sum to one; a feature that points against the rest has a negative share. Zero for empty codes.
    """
    explained = codes @ decoder_weight
    square = explained.square().sum(dim=1, keepdim=True)
    shares = codes * (explained @ decoder_weight.T) / square.clamp(min=torch.finfo(codes.dtype).tiny)
    return torch.where(square > 0, shares, 0.0)


def edit_magnitude(
    removed: Bool[Tensor, "pairs *steps features"], weights: Float[Tensor, "pairs features"]
) -> Float[Tensor, "pairs *steps"]:
    """The share of the reconstruction that an edit takes away; near 1 everything was replaced and nothing steered."""
    for _ in range(removed.dim() - 2):
        weights = weights.unsqueeze(1)
    return (removed * weights).sum(dim=-1)


@torch.no_grad()
def ablate_subspace(
    x: Float[Tensor, "rows d"], directions: Float[Tensor, "features d"], mean: Float[Tensor, " d"] | None = None
) -> Float[Tensor, "rows d"]:
    """Take away what activations have in the span of some directions; with ``mean``, put the mean's part there instead.

    The other kind of edit of the authors' code. Directions may be dependent; with none nothing changes.
    """
    if directions.shape[0] == 0:
        return x
    _, sizes, basis = torch.linalg.svd(directions.double(), full_matrices=False)
    basis = basis[sizes > sizes.max() * 1e-6].to(x.dtype)
    centred = x if mean is None else x - mean
    return x - (centred @ basis.T) @ basis


@dataclass(frozen=True)
class Agreement:
    """How often an edit makes a model predict what the true counterfactual activation makes it predict.

    Attributes:
        accuracy: of the edit (the paper's edit accuracy).
        no_edit: of leaving the activation as it is. Where this is near 1 the accuracy of an edit says nothing.
        corrected: ``(accuracy - no_edit) / (1 - no_edit)``: 0 for no edit, 1 for a perfect one; NaN where there is
            nothing to gain.
        pairs: judged.
    """

    accuracy: float
    no_edit: float
    corrected: float
    pairs: int

    @classmethod
    def of(
        cls,
        edited: Float[Tensor, "pairs vocab"],
        patched: Float[Tensor, "pairs vocab"],
        clean: Float[Tensor, "pairs vocab"],
    ) -> "Agreement":
        """From logits with the edit, with the true counterfactual activation in place, and of the run left alone.

        The counterfactual *activation*, not the counterfactual prompt: no edit at this place could do more.
        """
        truth = patched.argmax(dim=1)
        accuracy = float((edited.argmax(dim=1) == truth).double().mean())
        no_edit = float((clean.argmax(dim=1) == truth).double().mean())
        corrected = (accuracy - no_edit) / (1 - no_edit) if no_edit < 1 else float("nan")
        return cls(accuracy, no_edit, corrected, edited.shape[0])
