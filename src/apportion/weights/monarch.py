"""Monarch matrices: two block-diagonal factors with a fixed permutation between them, in place of a dense matrix.

Dao, Chen, Sohoni, Desai, Poli, Grogan, Liu, Rao, Rudra, Ré 2022, *Monarch: Expressive Structured Matrices for Efficient
and Accurate Training*, arXiv 2204.00595.

What is allocated: the parameters (and so the multiplications) of a layer. The candidates are the entries of two
block-diagonal factors; where they are is fixed, so nothing is scored when a layer is trained from scratch. A dense
matrix is *projected*: the squared error is what its best Monarch matrix leaves over.

=============================  ==============================================================================
n, m                           ``in_features``, ``out_features`` (padded: ``in_blocks * in_width`` and so on)
k, p                           ``in_blocks``, ``in_width``: the inputs are k runs of p
l, s                           ``out_blocks``, ``out_width``: output ``i * l + b`` is number i of block b
R = w1 [k, q, p]               ``first``
L = w2 [l, s, r]               ``second``
k q = l r                      ``middle``: how many numbers lie between the factors
rho                            ``rank``
nblocks                        ``nblocks``: k = l
=============================  ==============================================================================

Number j between the factors is made by input block ``j // q`` and read by output block ``j % l``: with the inputs in k
runs and the outputs of a block together, a Monarch matrix is a k by l grid of s by p blocks, each the sum of as many
rank-one matrices as there are such j. The best approximation of a dense matrix is therefore the truncated singular
value decomposition of every block of it by itself.

Departures. Any shape works: features that blocks do not divide are padded with zeros, as the published layer does, and
the projection, which was published for square matrices and rank 1 only, takes the same shapes, also those where l does
not divide q, in which the blocks' ranks differ by one. ``match_linear`` (off, as published) makes up for the two
factors' default start, whose outputs are 1/sqrt(3) of `torch.nn.Linear`'s.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Inexact, Shaped
from torch import Tensor, nn
from typing_extensions import override

from apportion.errors import InputError
from apportion.weights.monarch_shape import MonarchShape

# So many rows are worth turning x and the result over for (measured on a CPU at widths of 512 to 4096).
_FEW_ROWS = 8


class MonarchFactors(NamedTuple):
    """The two block-diagonal factors.

    Attributes:
        first: R, which the inputs meet.
        second: L.
    """

    first: Inexact[Tensor, "in_blocks taken in_width"]
    second: Inexact[Tensor, "out_blocks out_width read"]


def multiply(
    x: Inexact[Tensor, "*rows padded_in"],
    first: Inexact[Tensor, "in_blocks taken in_width"],
    second: Inexact[Tensor, "out_blocks out_width read"],
) -> Inexact[Tensor, "*rows padded_out"]:
    """The product of a Monarch matrix with every row of x: two batched products, a permutation after each.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    (in_blocks, taken, in_width), (out_blocks, out_width, read) = first.shape, second.shape
    if in_blocks * taken != out_blocks * read:
        raise ValueError(
            f"first {tuple(first.shape)} makes {in_blocks * taken} numbers and second {tuple(second.shape)} reads "
            f"{out_blocks * read}: first.shape[0] * first.shape[1] must be second.shape[0] * second.shape[2]"
        )
    if x.shape[-1] != in_blocks * in_width:
        raise ValueError(f"x has {x.shape[-1]} columns: first {tuple(first.shape)} wants {in_blocks * in_width}")
    rows = math.prod(x.shape[:-1])
    by_block = x.reshape(rows, in_blocks, in_width)
    if rows < _FEW_ROWS:
        middle = torch.bmm(by_block.transpose(0, 1), first.mT).transpose(0, 1).reshape(rows, read, out_blocks)
        out = torch.bmm(middle.permute(2, 0, 1), second.mT).permute(1, 2, 0)
    else:
        # Features before rows: then both permutations move whole rows of memory, and the first moves nothing at all.
        middle = torch.bmm(first, by_block.permute(1, 2, 0)).view(read, out_blocks, rows)
        out = torch.bmm(second, middle.transpose(0, 1)).transpose(0, 1).reshape(out_width * out_blocks, rows).T
    return out.reshape(*x.shape[:-1], out_blocks * out_width).contiguous()


def materialise(factors: MonarchFactors, shape: MonarchShape) -> Inexact[Tensor, "out_features in_features"]:
    """The dense matrix that the factors stand for: their product with the identity; padding is cut off.

    Raises:
        InputError: the factors have other shapes than ``shape`` says.
    """
    for name, factor, wanted in (
        ("first", factors.first, shape.first),
        ("second", factors.second, shape.second),
    ):
        if factor.shape != wanted:
            raise InputError(f"factors.{name} has shape {list(factor.shape)}, but {shape} says {list(wanted)}")
    identity = torch.eye(shape.in_features, shape.padded_in, dtype=factors.first.dtype, device=factors.first.device)
    return multiply(identity, *factors)[:, : shape.out_features].T.contiguous()


def project(weight: Shaped[Tensor, "out_features in_features"], shape: MonarchShape) -> MonarchFactors:
    """The Monarch matrix nearest to a dense one in Frobenius norm, each singular value shared out by its square root.

    Half precision is decomposed in float32; the factors have the weight's dtype.

    Args:
        weight: real or complex.
        shape: of what is wanted.

    Raises:
        InputError: the weight has another shape, integers, or entries that are not finite.
    """
    left, values, right = torch.linalg.svd(_grid(weight, shape), full_matrices=False)
    number = torch.arange(shape.middle, device=weight.device)
    # Number j is term `place // l` of the block between input block j // q and output block j % l.
    place = number % shape.taken
    block, term = (number // shape.taken, number % shape.out_blocks), place // shape.out_blocks
    share = values[(*block, term)].sqrt()[:, None]
    rows, columns = right[(*block, term)] * share, left.mT[(*block, term)] * share
    first = rows.reshape(shape.first)
    second = columns.reshape(shape.read, shape.out_blocks, shape.out_width).permute(1, 2, 0)
    return MonarchFactors(first.to(weight.dtype).contiguous(), second.to(weight.dtype).contiguous())


def projection_error(weight: Shaped[Tensor, "out_features in_features"], shape: MonarchShape) -> float:
    """What `project` leaves over, in Frobenius norm: the root of all squared singular values that no block keeps.

    Raises:
        InputError: as `project`.
    """
    values = torch.linalg.svdvals(_grid(weight, shape))
    left_over = torch.arange(values.shape[-1], device=weight.device) >= shape.ranks.to(weight.device)[..., None]
    return float(values.double().square()[left_over].sum().sqrt())


def _grid(weight: Tensor, shape: MonarchShape) -> Inexact[Tensor, "in_blocks out_blocks out_width in_width"]:
    """The padded weight as the grid of blocks that a Monarch matrix approximates one by one."""
    _require_inexact(weight.dtype, "weight")
    if weight.shape != (shape.out_features, shape.in_features):
        raise InputError(
            f"weight has shape {list(weight.shape)}, but the Monarch shape is for [out_features, in_features] = "
            f"[{shape.out_features}, {shape.in_features}]: give it MonarchShape.of{tuple(weight.shape[::-1])}"
        )
    if not weight.isfinite().all():
        raise InputError("weight has entries that are not finite, which no projection can be near to: repair it first")
    wide = weight.detach()
    if wide.dtype in (torch.float16, torch.bfloat16):
        wide = wide.float()
    missing = (0, shape.padded_in - shape.in_features, 0, shape.padded_out - shape.out_features)
    padded = nn.functional.pad(wide, missing)
    grid = padded.reshape(shape.out_width, shape.out_blocks, shape.in_blocks, shape.in_width)
    return grid.permute(2, 1, 0, 3)


def _require_inexact(dtype: torch.dtype, name: str) -> None:
    if not (dtype.is_floating_point or dtype.is_complex):
        raise InputError(f"{name} is of {dtype}: a Monarch matrix has real or complex entries; convert with .float()")


class MonarchLinear(nn.Module):
    """`torch.nn.Linear` with a Monarch matrix.

    Args:
        in_features: of the input.
        out_features: of the output.
        bias: whether to add one.
        nblocks: blocks of both factors; the paper's models have 4.
        rank: of every block of the grid; None is the published layer's width between the factors, see
            `MonarchShape.of`.
        shape: any other structure, in place of ``nblocks`` and ``rank``.
        match_linear: start with outputs as large as `torch.nn.Linear`'s, not 1/sqrt(3) of that.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        InputError: a shape that cannot be, a shape for other features, or a dtype of integers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        nblocks: int = 4,
        rank: int | None = None,
        shape: MonarchShape | None = None,
        match_linear: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _require_inexact(dtype or torch.get_default_dtype(), "dtype")
        self.shape = shape or MonarchShape.of(in_features, out_features, nblocks=nblocks, rank=rank)
        if (self.shape.in_features, self.shape.out_features) != (in_features, out_features):
            raise InputError(f"shape is {self.shape}, but the layer has {in_features} inputs, {out_features} outputs")
        self.in_features, self.out_features, self.match_linear = in_features, out_features, match_linear
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.first = nn.Parameter(torch.empty(self.shape.first, **like))
        self.second = nn.Parameter(torch.empty(self.shape.second, **like))
        self.bias = nn.Parameter(torch.empty(out_features, **like)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew, as published: uniform within 1/sqrt(fan-in of a block), the bias 1/sqrt(m)."""
        for factor in (self.first, self.second):
            _fill_uniform(factor, factor.shape[2] ** -0.5)
        if self.match_linear:
            self.second.mul_(3**0.5)
        if self.bias is not None:
            _fill_uniform(self.bias, self.out_features**-0.5)

    @classmethod
    def from_dense(
        cls,
        weight: Shaped[Tensor, "out_features in_features"],
        bias: Inexact[Tensor, " out_features"] | None = None,
        *,
        nblocks: int = 4,
        rank: int | None = None,
        shape: MonarchShape | None = None,
    ) -> "MonarchLinear":
        """The layer whose matrix is nearest to a dense one (dense to sparse); the bias is copied.

        Raises:
            InputError: see `MonarchShape.of` and `project`.
        """
        _require_inexact(weight.dtype, "weight")
        out_features, in_features = weight.shape
        # On no device at first, so that nothing is drawn: it would move the caller's random stream for nothing.
        like: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
        structure: dict[str, Any] = {"nblocks": nblocks, "rank": rank, "shape": shape}
        made = cls(in_features, out_features, bias is not None, **structure, **like).to_empty(device=weight.device)
        factors = project(weight, made.shape)
        with torch.no_grad():
            made.first.copy_(factors.first)
            made.second.copy_(factors.second)
            if made.bias is not None:
                assert bias is not None
                made.bias.copy_(bias)
        return made

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, nblocks: int = 4, rank: int | None = None, shape: MonarchShape | None = None
    ) -> "MonarchLinear":
        """`from_dense` of a layer; what is trained stays trained, what is frozen frozen.

        Raises:
            InputError: see `MonarchShape.of` and `project`.
        """
        made = cls.from_dense(linear.weight, linear.bias, nblocks=nblocks, rank=rank, shape=shape)
        return made.trained_like(linear.weight, linear.bias).train(linear.training)

    def trained_like(self, weight: Tensor, bias: Tensor | None) -> "MonarchLinear":
        """Let factors and bias want gradients where a dense layer's weight and bias do."""
        self.first.requires_grad_(weight.requires_grad)
        self.second.requires_grad_(weight.requires_grad)
        if self.bias is not None and bias is not None:
            self.bias.requires_grad_(bias.requires_grad)
        return self

    def to_linear(self) -> nn.Linear:
        """The dense layer of the same function (sparse to dense); its bias is a copy."""
        dense = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device="meta",
            dtype=self.first.dtype,
        ).to_empty(device=self.first.device)
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if self.bias is not None:
                dense.bias.copy_(self.bias)
                dense.bias.requires_grad_(self.bias.requires_grad)
        dense.weight.requires_grad_(self.first.requires_grad)
        return dense.train(self.training)

    @property
    def weight(self) -> Inexact[Tensor, "out_features in_features"]:
        """The dense matrix, made anew at every reading: for code that looks at a layer's weight, not to multiply by."""
        return materialise(MonarchFactors(self.first, self.second), self.shape)

    @override
    def forward(self, x: Inexact[Tensor, "*rows in_features"]) -> Inexact[Tensor, "*rows out_features"]:
        shape = self.shape
        if x.shape[-1] != shape.in_features:
            raise ValueError(f"the input has {x.shape[-1]} features: this layer wants in_features={shape.in_features}")
        if shape.padded_in != shape.in_features:
            x = nn.functional.pad(x, (0, shape.padded_in - shape.in_features))
        out = multiply(x, self.first, self.second)
        if shape.padded_out != shape.out_features:
            out = out[..., : shape.out_features]
        return out if self.bias is None else out + self.bias

    @override
    def extra_repr(self) -> str:
        shape = self.shape
        return (
            f"in_features={shape.in_features}, out_features={shape.out_features}, bias={self.bias is not None}, "
            f"blocks={shape.in_blocks}x{shape.out_blocks}, middle={shape.middle}, {shape.density:.1%} of dense"
        )


def _fill_uniform(parameter: Tensor, bound: float) -> None:
    if parameter.is_meta:
        return
    # Of a complex number both parts are drawn, each with half the variance.
    if parameter.is_complex():
        torch.view_as_real(parameter).uniform_(-bound / 2**0.5, bound / 2**0.5)
    else:
        parameter.uniform_(-bound, bound)
