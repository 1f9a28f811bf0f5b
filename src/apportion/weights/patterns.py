"""What a mask may look like: any weights of a layer, a row or a network; N of every M; whole blocks.

The rules are those of `apportion.allocate`; a pattern says over which candidates they allocate. Counts are exact, and
ties go to the weight that comes first.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.allocate import NofM
from apportion.allocate.rules import check_scores
from apportion.errors import InputError
from apportion.ops import select_rows, select_total

Scope = Literal["row", "layer", "global"]


def kept_of(candidates: int, sparsity: float) -> int:
    """How many of so many weights stay at a sparsity: ``(1 - sparsity) * candidates`` rounded, but never none."""
    return max(1, round((1 - sparsity) * candidates))


def keep_best(scores: Float[Tensor, "out in"], count: int) -> Bool[Tensor, "out in"]:
    """The mask of exactly ``count`` weights of a layer: those with the largest scores.

    Raises:
        InputError: there are not so many.
        ValueError: a score is not finite.
    """
    check_scores(scores)
    rows, columns = scores.shape
    if not 0 <= count <= rows * columns:
        raise InputError(f"count={count}: a layer of {rows} x {columns} weights can keep 0 to {rows * columns}")
    crow, col = select_total(scores, count)
    return _mask(crow, col, (rows, columns))


class Pattern(ABC):
    """Says which weights of a layer stay, given a score for each."""

    @property
    @abstractmethod
    def density(self) -> float:
        """The share of weights that stay, but for rounding."""

    @abstractmethod
    def check(self, shape: tuple[int, int], name: str = "the weight") -> None:
        """Refuse a matrix ``[out, in]`` that the pattern does not fit.

        Raises:
            InputError: names the layer and the dimension.
        """

    @abstractmethod
    def keep(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """The mask, True for weights that stay: those with the largest scores."""

    @abstractmethod
    def __str__(self) -> str:
        """As `parse_pattern` reads it."""


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any weights.

    Args:
        sparsity: the share that goes, at least 0 and below 1.
        scope: who competes: the weights of each output (``row``, as Wanda has it), of a ``layer``, or of all layers
            that are pruned together (``global``).

    Raises:
        InputError: a value that cannot work.
    """

    sparsity: float
    scope: Scope = "layer"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1 or not math.isfinite(self.sparsity):
            raise InputError(
                f"sparsity={self.sparsity}: use a share of weights to remove, at least 0 and below 1, such as 0.5"
            )
        if self.scope not in ("row", "layer", "global"):
            raise InputError(f"scope={self.scope!r}: use row, layer or global")

    @property
    def density(self) -> float:
        """The share of weights that stay."""
        return 1 - self.sparsity

    def check(self, shape: tuple[int, int], name: str = "the weight") -> None:
        """Every shape will do."""

    def keep(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """The best of each row, or of the matrix (which is all there is of a network, where the scope is global)."""
        rows, columns = scores.shape
        if self.scope != "row":
            return keep_best(scores, kept_of(rows * columns, self.sparsity))
        check_scores(scores)
        crow, col = select_rows(scores, kept_of(columns, self.sparsity))
        return _mask(crow, col, (rows, columns))

    def __str__(self) -> str:
        return f"{self.sparsity:g}"


@dataclass(frozen=True)
class NofMPattern(Pattern):
    """At most ``n`` of every ``m`` consecutive weights stay: 2:4, 4:8, 1:16.

    Args:
        n: weights that stay. (Wanda's code counts those that go.)
        m: in a group.
        dim: along which groups lie: the inputs of the forward product, or its outputs, which the backward product sums
            over.

    Raises:
        InputError: a value that cannot work.
    """

    n: int
    m: int
    dim: Literal["in", "out"] = "in"

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise InputError(f"n={self.n}, m={self.m}: N:M keeps n of m weights, so use 1 <= n <= m, such as 2:4")
        if self.dim not in ("in", "out"):
            raise InputError(f"dim={self.dim!r}: use in or out")

    @property
    def density(self) -> float:
        """The share of weights that stay."""
        return self.n / self.m

    def check(self, shape: tuple[int, int], name: str = "the weight") -> None:
        """The dimension must be a multiple of ``m``.

        Raises:
            InputError: it is none.
        """
        size = shape[1] if self.dim == "in" else shape[0]
        if size % self.m:
            raise InputError(
                f"{name} has {size} {self.dim}puts, which is not a multiple of {self.m}: "
                f"{self.n}:{self.m} does not fit it; leave it out (exclude), or choose a pattern that divides {size}"
            )

    def keep(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """The best of each group."""
        rows, columns = scores.shape
        self.check((rows, columns))
        rule = NofM(self.n, self.m)
        return rule.mask(scores) if self.dim == "in" else rule.mask(scores.T).T

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class BlockPattern(Pattern):
    """Whole blocks stay or go together; a block's score is the sum of its weights'.

    Args:
        height: rows (outputs) of a block.
        width: columns (inputs).
        sparsity: the share of blocks that goes.
        scope: ``row``: the blocks of a row of blocks compete; ``layer``: those of the layer.

    Raises:
        InputError: a value that cannot work.
    """

    height: int
    width: int
    sparsity: float = 0.5
    scope: Literal["row", "layer"] = "layer"

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise InputError(f"block {self.height} x {self.width}: both sides must be at least 1")
        Unstructured(self.sparsity, self.scope)

    @property
    def density(self) -> float:
        """The share of weights that stay."""
        return 1 - self.sparsity

    def check(self, shape: tuple[int, int], name: str = "the weight") -> None:
        """Both dimensions must be multiples of the block's.

        Raises:
            InputError: one is none.
        """
        for size, side, what in zip(shape, (self.height, self.width), ("outputs", "inputs"), strict=True):
            if size % side:
                raise InputError(
                    f"{name} has {size} {what}, which is not a multiple of {side}: blocks of {self.height} x "
                    f"{self.width} do not fit it; leave it out (exclude), or choose smaller blocks"
                )

    def keep(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """The best blocks."""
        rows, columns = scores.shape
        self.check((rows, columns))
        blocks = scores.reshape(rows // self.height, self.height, columns // self.width, self.width).sum(dim=(1, 3))
        won = Unstructured(self.sparsity, self.scope).keep(blocks)
        return won.repeat_interleave(self.height, dim=0).repeat_interleave(self.width, dim=1)

    def __str__(self) -> str:
        side = str(self.height) if self.height == self.width else f"{self.height}x{self.width}"
        return f"block:{side}:{self.sparsity:g}"


def parse_pattern(text: str, scope: Literal["row", "layer", "global"] = "row") -> Pattern:
    """Read a pattern as people write it.

    Args:
        text: ``0.6`` (sparsity), ``2:4`` (weights that stay of each group), ``block:16``, ``block:16x32`` or
            ``block:16:0.7`` (side, or outputs x inputs, and sparsity, a half if none is given).
        scope: of an unstructured pattern; blocks compete over the layer.

    Raises:
        InputError: it is none of these, or says something impossible.
    """
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        return NofMPattern(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"block:(\d+)(?:x(\d+))?(?::([0-9.]+))?", text):
        height = int(found[1])
        return BlockPattern(height, int(found[2] or height), _number(found[3] or "0.5", text))
    return Unstructured(_number(text, text), scope)


def choose_masks(scores: Mapping[str, Float[Tensor, "out in"]], pattern: Pattern) -> dict[str, Bool[Tensor, "out in"]]:
    """The masks of several layers, given scores of all their weights.

    Args:
        scores: by the layers' names.
        pattern: where its scope is global, the weights of all layers compete, and each layer keeps at least its best
            one, which comes on top of the count.

    Raises:
        InputError: the pattern does not fit a layer; ``scores`` is empty.
        ValueError: a score is not finite.
    """
    if not scores:
        raise InputError("scores is empty: there is no layer to choose weights of")
    for name, each in scores.items():
        pattern.check((each.shape[0], each.shape[1]), name)
    if not (isinstance(pattern, Unstructured) and pattern.scope == "global"):
        return {name: pattern.keep(each) for name, each in scores.items()}
    flat = torch.cat([each.reshape(1, -1) for each in scores.values()], dim=1)
    won = pattern.keep(flat).squeeze(0)
    masks, start = {}, 0
    for name, each in scores.items():
        mask = won[start : start + each.numel()].view(each.shape).clone()
        start += each.numel()
        if not bool(mask.any()):
            mask.view(-1)[each.argmax()] = True
        masks[name] = mask
    return masks


def _mask(crow: Tensor, col: Tensor, shape: tuple[int, int]) -> Bool[Tensor, "out in"]:
    mask = torch.zeros(shape[0] * shape[1], dtype=torch.bool, device=col.device)
    rows = torch.repeat_interleave(crow.diff(), output_size=col.numel())
    mask[rows * shape[1] + col] = True
    return mask.view(shape)


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"{whole!r} is no pattern: use a sparsity such as 0.6, N:M such as 2:4 (2 of 4 stay), or blocks such as "
            "block:16 or block:16:0.7"
        ) from None
