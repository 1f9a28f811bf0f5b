"""Attention heads whose part in a task is known: some switch what they write and keep its mean, some only shift it.

The controlled proof of section 7 of the method sheet on discrete circuits (arXiv 2405.12522): a head writes a constant
of its own plus or minus a direction, the sign drawn by chance, so that its mean says nothing about the direction.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from apportion.errors import InputError


@dataclass(frozen=True, eq=False)
class SyntheticHeads:
    """What all heads write on prompts with and without the task; heads lie in one layer.

    Attributes:
        positive: with the task.
        negative: without.
        switches: heads that write along another axis on positives; their class means are equal in expectation.
        shifts: heads that write the same mixture in both, moved by a constant on positives.
    """

    positive: Float32[Tensor, "prompts layers heads d"]
    negative: Float32[Tensor, "prompts layers heads d"]
    switches: Bool[Tensor, "layers heads"]
    shifts: Bool[Tensor, "layers heads"]

    @property
    def others(self) -> Bool[Tensor, "layers heads"]:
        """Heads that have no part in the task."""
        return ~(self.switches | self.shifts)


def synthetic_heads(
    seed: int, prompts: int = 60, heads: int = 40, d: int = 32, each: int = 8, noise: float = 0.15
) -> SyntheticHeads:
    """Draw heads and what they write.

    Args:
        seed: of everything.
        prompts: of each class.
        heads: in all.
        d: width of what they write.
        each: how many switch, and how many shift; the others do neither.
        noise: standard deviation on every coordinate. Constants have 0.5, directions 1.

    Raises:
        InputError: fewer than two prompts, or no head that does neither.
    """
    if prompts < 2 or each < 1 or heads <= 2 * each:
        raise InputError(
            f"prompts={prompts}, heads={heads}, each={each}: 2 prompts, and heads that do neither, are needed"
        )
    draw = np.random.default_rng(np.random.SeedSequence([seed, 0x4EAD5]))
    constants = 0.5 * draw.standard_normal((heads, d))
    axes, other_axes, moves = draw.standard_normal((3, heads, d))
    place = np.arange(heads)
    switches, shifts = place < each, (place >= each) & (place < 2 * each)

    def written(on_positives: bool) -> Tensor:
        axis = np.where((switches & on_positives)[:, None], other_axes, axes)
        sign = draw.integers(0, 2, (prompts, heads, 1)) * 2 - 1
        move = moves * (shifts & on_positives)[:, None]
        values = constants + sign * axis + move + noise * draw.standard_normal((prompts, heads, d))
        return torch.from_numpy(values).float()[:, None]

    return SyntheticHeads(
        written(True), written(False), torch.from_numpy(switches)[None], torch.from_numpy(shifts)[None]
    )
