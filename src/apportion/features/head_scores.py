"""Scores of attention heads in one type, whatever gave them, and how well they find the heads that matter.

Labels come from exact patching: the heads with the largest mean effect, positive or negative. With 13 to 27 such heads
a ROC AUC has a standard deviation of .05 to .08, so an interval goes with it; each resample draws prompts anew (which
heads are labelled) and heads anew (which are judged).
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.errors import InputError


@dataclass(frozen=True, eq=False)
class HeadScores:
    """How much each head is thought to belong to a circuit.

    Attributes:
        name: of the method.
        scores: higher is more; only their order counts.
        seconds: that the method took, the model's forward passes included.
        notes: figures about how they came about, such as the L0 of a dictionary.
    """

    name: str
    scores: Float[Tensor, "layers heads"]
    seconds: float = 0.0
    notes: dict[str, float] = field(default_factory=dict)

    def top(self, count: int) -> list[tuple[int, int]]:
        """The ``count`` best heads as (layer, head), the best first.

        Raises:
            InputError: more heads than there are, or none.
        """
        if not 1 <= count <= self.scores.numel():
            raise InputError(f"count is {count}: choose 1 to {self.scores.numel()} heads")
        order = self.scores.flatten().sort(descending=True, stable=True).indices[:count].tolist()
        return [divmod(index, self.scores.shape[1]) for index in order]

    def mask(self, count: int) -> Bool[Tensor, "layers heads"]:
        """True for the ``count`` best heads; for `apportion.models.keep_heads`."""
        chosen = torch.zeros(self.scores.shape, dtype=torch.bool, device=self.scores.device)
        for layer, head in self.top(count):
            chosen[layer, head] = True
        return chosen


def label_heads(effects: Float[Tensor, "pairs layers heads"], share: float = 0.05) -> Bool[Tensor, "layers heads"]:
    """The heads that matter: the ``share`` of all heads whose mean effect is largest in size.

    Args:
        effects: of `apportion.models.patch_heads` or `ablate_heads`.
        share: of all heads, between 0 and 1; at least one head is labelled.

    Raises:
        InputError: a share that labels all heads.
    """
    size = effects.mean(0).abs()
    count = max(1, int(share * size.numel()))
    if not 0 < share < 1 or count >= size.numel():
        raise InputError(f"share is {share}: it must lie between 0 and 1, and leave some heads unlabelled")
    labels = torch.zeros(size.numel(), dtype=torch.bool, device=size.device)
    labels[size.flatten().topk(count).indices] = True
    return labels.view(size.shape)


def roc_auc(scores: Float[Tensor, "layers heads"], labels: Bool[Tensor, "layers heads"]) -> float:
    """The chance that a labelled head scores above an unlabelled one; ties count half.

    Raises:
        InputError: all heads are labelled, or none.
    """
    return float(_wins(scores, labels).mean())


def auc_interval(
    scores: Float[Tensor, "layers heads"],
    effects: Float[Tensor, "pairs layers heads"],
    share: float = 0.05,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """A 95 % bootstrap interval of the ROC AUC.

    Each resample draws the prompts whose mean effect labels the heads, and then labelled and unlabelled heads.

    Args:
        scores: of one method.
        effects: as for `label_heads`.
        share: as for `label_heads`.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    generator = np.random.default_rng(seed)
    pairs, heads = len(effects), scores.numel()
    count = int(label_heads(effects, share).sum())
    drawn = np.stack([np.bincount(generator.integers(pairs, size=pairs), minlength=pairs) for _ in range(resamples)])
    means = np.abs(drawn @ effects.flatten(1).double().cpu().numpy())
    order = np.argsort(-means, axis=1)
    inside = _multiplicities(generator, order[:, :count], heads)
    outside = _multiplicities(generator, order[:, count:], heads)
    flat = scores.flatten().double().cpu().numpy()
    wins = (flat[:, None] > flat) + 0.5 * (flat[:, None] == flat)
    found = ((inside @ wins) * outside).sum(1) / (count * (heads - count))
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def _multiplicities(generator: np.random.Generator, members: np.ndarray, heads: int) -> np.ndarray:
    """How often each head is in a resample of the members of each row: [resamples, heads]."""
    resamples, size = members.shape
    chosen = np.take_along_axis(members, generator.integers(size, size=members.shape), axis=1)
    places = chosen + heads * np.arange(resamples)[:, None]
    return np.bincount(places.ravel(), minlength=resamples * heads).reshape(resamples, heads).astype(float)


def _wins(scores: Tensor, labels: Tensor) -> np.ndarray:
    """1 where the labelled head (row) beats the unlabelled one (column), 0.5 where they tie."""
    inside, outside = scores[labels].double().cpu().numpy(), scores[~labels].double().cpu().numpy()
    if not inside.size or not outside.size:
        raise InputError(f"{inside.size} of {labels.numel()} heads are labelled: a ROC curve needs some of both kinds")
    return (inside[:, None] > outside) + 0.5 * (inside[:, None] == outside)


def mean_difference(
    positive: Float[Tensor, "prompts layers heads d"],
    negative: Float[Tensor, "prompts layers heads d"],
    standardised: bool = False,
) -> Float[Tensor, "layers heads"]:
    """The distance between a head's mean output on positive and on negative prompts: the plain baseline.

    Args:
        positive: what each head writes, per prompt.
        negative: likewise.
        standardised: divide by the pooled standard deviation within both classes, over all coordinates.
    """
    distance = (positive.mean(0) - negative.mean(0)).norm(dim=-1)
    if not standardised:
        return distance
    within = sum((each - each.mean(0)).square().sum((0, -1)) for each in (positive, negative))
    variance = torch.as_tensor(within) / max(1, len(positive) + len(negative) - 2)
    return distance / variance.sqrt().clamp(min=1e-12)


def output_norm(
    positive: Float[Tensor, "prompts layers heads d"], negative: Float[Tensor, "prompts layers heads d"]
) -> Float[Tensor, "layers heads"]:
    """The mean norm of what a head writes: the trivial baseline, which contrasts nothing."""
    return torch.cat([positive, negative]).norm(dim=-1).mean(0)
