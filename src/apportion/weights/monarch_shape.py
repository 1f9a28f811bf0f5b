"""The sizes of a Monarch matrix: how features are divided into blocks, and what that costs. See `monarch`."""

import math
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from apportion.errors import InputError


@dataclass(frozen=True)
class MonarchShape:
    """How a matrix of ``out_features`` by ``in_features`` is divided.

    Attributes:
        in_features, out_features: n and m; padded with zeros up to whole blocks.
        in_blocks, out_blocks: k and l.
        middle: numbers between the factors, a multiple of both.

    Raises:
        InputError: sizes that cannot be; the message names them and what would do.
    """

    in_features: int
    out_features: int
    in_blocks: int
    out_blocks: int
    middle: int

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features", "in_blocks", "out_blocks", "middle"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name}={value} cannot work: it must be at least 1")
        for blocks, features in (("in_blocks", "in_features"), ("out_blocks", "out_features")):
            if getattr(self, blocks) > getattr(self, features):
                raise InputError(
                    f"{blocks}={getattr(self, blocks)} is more than {features}={getattr(self, features)}: "
                    f"a block has at least one feature; take at most {getattr(self, features)}"
                )
        common = math.lcm(self.in_blocks, self.out_blocks)
        for blocks in ("in_blocks", "out_blocks"):
            if self.middle % getattr(self, blocks):
                raise InputError(
                    f"middle={self.middle} is not a multiple of {blocks}={getattr(self, blocks)}: between the factors "
                    f"each block has equally many numbers; take a multiple of {common}"
                )
        rank, most = -(-self.taken // self.out_blocks), min(self.in_width, self.out_width)
        if rank > most:
            raise InputError(
                f"middle={self.middle} gives blocks of rank {rank}, but blocks of {self.out_width} x {self.in_width} "
                f"have no more than {most}: take middle={self.in_blocks * self.out_blocks * most} or less"
            )

    @classmethod
    def of(cls, in_features: int, out_features: int, *, nblocks: int = 4, rank: int | None = None) -> "MonarchShape":
        """``nblocks`` blocks on both sides.

        Args:
            in_features: n.
            out_features: m.
            nblocks: k = l; the paper's models have 4.
            rank: of every block of the grid. None is the published layer's rule: every block of the smaller side is
                square, so that the width between the factors is that of the smaller side.

        Raises:
            InputError: ``nblocks`` or ``rank`` is too large, or below 1.
        """
        for name, value in (("nblocks", nblocks), ("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                raise InputError(f"{name}={value} cannot work: it must be at least 1")
        fewest = min(in_features, out_features)
        if nblocks > fewest:
            raise InputError(
                f"nblocks={nblocks} is more than the smaller of in_features={in_features} and "
                f"out_features={out_features}: take at most {fewest}"
            )
        most = -(-fewest // nblocks)
        if rank is None:
            return cls(in_features, out_features, nblocks, nblocks, nblocks * most)
        if not 1 <= rank <= most:
            raise InputError(
                f"rank={rank} cannot work: blocks of {-(-out_features // nblocks)} x {-(-in_features // nblocks)} "
                f"have rank 1 to {most}"
            )
        return cls(in_features, out_features, nblocks, nblocks, nblocks * nblocks * rank)

    @classmethod
    def square(cls, features: int) -> "MonarchShape":
        """The textbook's class of square matrices: about sqrt(n) blocks of about sqrt(n), rank 1, 2 n sqrt(n) entries.

        The blocks are the two factors of ``features`` nearest its root. A prime has none but 1 and itself, which is
        the dense matrix: a warning says so.

        Raises:
            InputError: ``features`` is below 1.
        """
        if features < 1:
            raise InputError(f"features={features} cannot work: it must be at least 1")
        fewer = next(each for each in range(math.isqrt(features), 0, -1) if features % each == 0)
        if fewer == 1 and features > 1:
            warnings.warn(
                f"features={features} is a prime, whose only blocks are 1 and {features}: this saves nothing. "
                "MonarchShape.of(..., nblocks=...) pads it to whole blocks",
                stacklevel=2,
            )
        return cls(features, features, fewer, features // fewer, features)

    @property
    def in_width(self) -> int:
        """Inputs of a block, p."""
        return -(-self.in_features // self.in_blocks)

    @property
    def out_width(self) -> int:
        """Outputs of a block, s."""
        return -(-self.out_features // self.out_blocks)

    @property
    def taken(self) -> int:
        """Numbers that an input block makes, q."""
        return self.middle // self.in_blocks

    @property
    def read(self) -> int:
        """Numbers that an output block reads, r."""
        return self.middle // self.out_blocks

    @property
    def padded_in(self) -> int:
        """Inputs, padded to whole blocks."""
        return self.in_blocks * self.in_width

    @property
    def padded_out(self) -> int:
        """Outputs, padded to whole blocks."""
        return self.out_blocks * self.out_width

    @property
    def first(self) -> tuple[int, int, int]:
        """Shape of the first factor."""
        return self.in_blocks, self.taken, self.in_width

    @property
    def second(self) -> tuple[int, int, int]:
        """Shape of the second factor."""
        return self.out_blocks, self.out_width, self.read

    @property
    def ranks(self) -> Int[Tensor, "in_blocks out_blocks"]:
        """The rank that each block of the grid is given; they differ by one where ``out_blocks`` does not divide q."""
        number = torch.arange(self.middle)
        pairs = number // self.taken * self.out_blocks + number % self.out_blocks
        return pairs.bincount(minlength=self.in_blocks * self.out_blocks).view(self.in_blocks, self.out_blocks)

    @property
    def parameters(self) -> int:
        """Entries of both factors, those of padding too; the bias is not counted."""
        return self.middle * (self.in_width + self.out_width)

    @property
    def density(self) -> float:
        """Parameters, as a share of the dense matrix's."""
        return self.parameters / (self.in_features * self.out_features)

    def flops(self, rows: int = 1) -> int:
        """Of the product with so many rows: a multiplication and an addition for each parameter."""
        return 2 * rows * self.parameters
