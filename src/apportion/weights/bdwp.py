"""BDWP, bidirectional weight pruning for N:M training (Fang et al. 2023, arXiv 2309.13015).

Allocated are N of every M weights, twice, by the magnitude of the same dense master weight: along the inputs, which the
forward product sums over, and along the outputs, which the backward product sums over. Both products are N:M then; the
gradient of the weights is dense and goes to the master weight in full.

| paper | here |
|---|---|
| FF: Y = X W_ff^T | groups along the inputs, `NofMPattern` ``dim="in"`` |
| BP: dX = dY W_bp | groups along the outputs, ``dim="out"`` |
| WU: dW = dY^T X | dense, plus SR-STE's pull of weights that FF prunes |
| BDWP; SR-STE; SDWP | ``scheme``: both; FF alone, the gradient exact; BP alone |
| W_ff | what `finish` leaves |

``dX`` is *not* the gradient of what the forward pass computes: it takes other weights. With ``transposable`` masks, one
mask that is N:M both ways (Hubara et al. 2021, arXiv 2102.08124), it is; such masks are found exactly up to M = 4, and
greedily beyond, where a few groups keep less than N.

Departures: whether the paper's results have the pull is not known to us; it is on by default, as in SR-STE, which has
an author in common. The compared SDGP, which prunes output gradients, is not here. ``refresh`` is ours.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from apportion.errors import InputError
from apportion.weights.layers import WeightLayer, prunable
from apportion.weights.masks import masked, straight_through
from apportion.weights.patterns import NofMPattern
from apportion.weights.training_shapes import WeightSparsity

Scheme = Literal["bdwp", "sr_ste", "sdwp", "transposable"]
_EXACT = 4  # up to this M all masks of a tile are tried: 90 for 2:4


@dataclass(frozen=True)
class Bdwp:
    """Settings of bidirectional N:M training.

    Args:
        n: weights that stay.
        m: of so many.
        scheme: which products have N:M weights; see the module's description.
        pull: SR-STE's lambda, towards 0 for weights that FF prunes.
        refresh: forward passes in train mode between new masks.

    Raises:
        InputError: a value that cannot work.
    """

    n: int = 2
    m: int = 8
    scheme: Scheme = "bdwp"
    pull: float = 2e-4
    refresh: int = 1

    def __post_init__(self) -> None:
        NofMPattern(self.n, self.m)
        if self.scheme not in get_args(Scheme):
            raise InputError(f"scheme={self.scheme!r}: use one of {', '.join(get_args(Scheme))}")
        if not 0 <= self.pull < math.inf:
            raise InputError(f"pull={self.pull}: use 0 or a small positive number, such as 2e-4")
        if self.refresh < 1:
            raise InputError(f"refresh={self.refresh}: use at least 1 forward pass")

    @property
    def sparsity(self) -> WeightSparsity:
        """Which products are N:M, for counting (`training_macs`) and for `Sat`."""
        return WeightSparsity(self.n, self.m, forward=self.scheme != "sdwp", backward=self.scheme != "sr_ste")

    def start(self, network: nn.Module, layers: Sequence[WeightLayer] | None = None) -> list[WeightLayer]:
        """Make layers of a network train this way, in place; they keep their parameters and names.

        Args:
            network: any.
            layers: linear ones and two-dimensional convolutions. If None, all prunable ones but the first, which hardly
                has inputs to choose among, and the last, usually a classifier. Where M does not divide a layer's
                channels, that product stays dense.

        Returns:
            The layers.

        Raises:
            InputError: a layer is of another kind; there is none between the first and the last.
        """
        if layers is None:
            layers = prunable(network)[1:-1]
            if not layers:
                raise InputError(
                    f"{type(network).__name__} has no layer between its first and its last: name the layers to start"
                )
        for layer in layers:
            if type(layer.module) not in _KINDS:
                raise InputError(
                    f"{layer.name} is a {type(layer.module).__name__}: use plain Linear or Conv2d layers without masks"
                )
        for layer in layers:
            # The class changes, as torch's parametrisations do it, so that whoever holds the module or its weight, such
            # as an optimiser or a parent, need not be told.
            made: Any = layer.module
            made.__class__ = _KINDS[type(layer.module)]
            made.begin(self)
        return list(layers)


class _Bidirectional(nn.Module):
    """What both kinds of layers share: two views of one weight."""

    weight: Tensor
    bdwp: Bdwp
    age: Tensor
    forward_mask: Tensor | None
    backward_mask: Tensor | None

    def begin(self, settings: Bdwp) -> None:
        """Take the settings."""
        self.bdwp = settings
        if settings.refresh > 1:
            self.register_buffer("age", torch.zeros((), dtype=torch.int64, device=self.weight.device))
            for name, mask in zip(("forward_mask", "backward_mask"), self.choose(), strict=True):
                self.register_buffer(name, mask)

    def end(self) -> None:
        """A plain layer again, with the weight that the forward pass has."""
        weight, _ = self.views()
        self.weight.data.copy_(weight.detach())
        for name in ("age", "forward_mask", "backward_mask"):
            self._buffers.pop(name, None)
        del self.bdwp
        self.__class__ = _PLAIN[type(self)]

    def views(self) -> tuple[Tensor, Tensor]:
        """The weights of both products; through the forward one's, gradients pass to the master weight."""
        forward, backward = self._masks()
        raw = self.weight
        used = raw if forward is None else straight_through(raw, forward, pull=self.bdwp.pull)
        return used, raw.detach() if backward is None else masked(raw.detach(), backward)

    @torch.no_grad()
    def choose(self) -> tuple[Tensor | None, Tensor | None]:
        """Masks of the forward and of the backward product; None where one is dense."""
        layer, settings = WeightLayer("this layer", self), self.bdwp
        sizes = layer.summed_over
        fits = {dim: size % settings.m == 0 for dim, size in sizes.items()}
        scores = layer.to_matrix(self.weight.detach().abs())

        def of(matrix: Tensor) -> Tensor:
            return layer.from_matrix(matrix).contiguous()

        if settings.scheme == "transposable":
            both = of(transposable_mask(scores, settings.n, settings.m)) if all(fits.values()) else None
            return both, both
        forward = backward = None
        if settings.scheme != "sdwp" and fits["in"]:
            forward = of(NofMPattern(settings.n, settings.m).keep(scores))
        if settings.scheme == "sr_ste":
            return forward, forward  # the exact gradient, whose weights are no N:M pattern along the outputs
        if fits["out"]:
            backward = of(NofMPattern(settings.n, settings.m, "out").keep(scores))
        return forward, backward

    def _masks(self) -> tuple[Tensor | None, Tensor | None]:
        if self.bdwp.refresh == 1:
            return self.choose()
        if self.training:
            if int(self.age) % self.bdwp.refresh == 0:
                self.forward_mask, self.backward_mask = self.choose()
            self.age += 1
        return self.forward_mask, self.backward_mask


class BidirectionalLinear(_Bidirectional, nn.Linear):
    """A linear layer with W_ff forward and W_bp backward."""

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Its output."""
        return _LinearProducts.apply(*_as_autocast(x, *self.views(), self.bias))


class BidirectionalConv2d(_Bidirectional, nn.Conv2d):
    """A convolution with W_ff forward and W_bp backward; groups of channels at each place of the kernel."""

    def forward(self, x: Float[Tensor, "batch in height width"]) -> Float[Tensor, "batch out h w"]:
        """Its output."""
        padding = self.padding
        if isinstance(padding, str) or self.padding_mode != "zeros":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = functional.pad(x, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
        settings = (self.stride, padding, self.dilation, self.groups)
        return _ConvolutionProducts.apply(*_as_autocast(x, *self.views(), self.bias), settings)


def finish(network: nn.Module) -> None:
    """Make all started layers plain ones with the weights of their forward products: exactly 0 where FF prunes."""
    for module in network.modules():
        if isinstance(module, _Bidirectional):
            module.end()


def transposable_mask(scores: Float[Tensor, "out in"], n: int, m: int) -> Bool[Tensor, "out in"]:
    """One mask that keeps at most n of every m weights along both dimensions.

    Args:
        scores: finite, not negative.
        n: weights that stay.
        m: of so many; both dimensions are multiples.

    Returns:
        The best mask for m up to 4; beyond, what is found by taking the largest weight that still fits, again and again
        (at least half of the best sum).

    Raises:
        InputError: m does not divide the matrix.
    """
    rows, columns = scores.shape
    for dim in ("in", "out"):
        NofMPattern(n, m, dim).check((rows, columns))
    tiles = scores.reshape(rows // m, m, columns // m, m).transpose(1, 2).reshape(-1, m * m)
    if m <= _EXACT:
        every = _tile_masks(n, m).to(scores.device)
        chosen = every[(tiles @ every.to(scores.dtype).T).argmax(dim=1)]
    else:
        chosen = _greedy(tiles, n, m)
    return chosen.reshape(rows // m, columns // m, m, m).transpose(1, 2).reshape(rows, columns)


@cache
def _tile_masks(n: int, m: int) -> Tensor:
    """All masks of an m x m tile with n in each row and column."""
    lines = [[float(i in chosen) for i in range(m)] for chosen in itertools.combinations(range(m), n)]
    every = torch.tensor(list(itertools.product(lines, repeat=m)))
    return every[(every.sum(dim=1) == n).all(dim=1)].reshape(-1, m * m).bool()


def _greedy(tiles: Tensor, n: int, m: int) -> Tensor:
    order = tiles.argsort(dim=1, descending=True, stable=True)
    in_row, in_column = (torch.zeros(len(tiles), m, dtype=torch.int64, device=tiles.device) for _ in range(2))
    kept = torch.zeros_like(tiles, dtype=torch.bool)
    for place in order.split(1, dim=1):
        row, column = place // m, place % m
        fits = (in_row.gather(1, row) < n) & (in_column.gather(1, column) < n)
        kept.scatter_(1, place, fits)
        in_row.scatter_add_(1, row, fits.long())
        in_column.scatter_add_(1, column, fits.long())
    return kept


class _LinearProducts(torch.autograd.Function):
    """The three products of a linear layer, the backward one with weights of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, backward_weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, backward_weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, Tensor | None]:
        x, backward_weight = ctx.saved_tensors
        of_input = gradient @ backward_weight if ctx.needs_input_grad[0] else None
        flat = gradient.reshape(-1, gradient.shape[-1])
        of_weight = flat.T @ x.reshape(-1, x.shape[-1])
        return of_input, of_weight, None, flat.sum(dim=0) if ctx.needs_input_grad[3] else None


class _ConvolutionProducts(torch.autograd.Function):
    """The same of a convolution; torch's backward takes weights for the input's gradient alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, backward_weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, backward_weight)
        ctx.settings, ctx.bias_size = settings, None if bias is None else list(bias.shape)
        return functional.conv2d(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, Tensor | None, None]:
        x, backward_weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        wanted = [ctx.needs_input_grad[0], True, ctx.bias_size is not None]
        of_input, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient, x, backward_weight, ctx.bias_size, stride, padding, dilation, False, (0, 0), groups, wanted
        )
        return of_input, of_weight, None, of_bias, None


def _as_autocast(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """Under autocast, in its type; an autograd function of one's own is not cast by itself."""
    if not torch.is_autocast_enabled(x.device.type):
        return [x, *others]
    dtype = torch.get_autocast_dtype(x.device.type)
    return [None if each is None else each.to(dtype) for each in (x, *others)]


_KINDS: dict[type, Any] = {nn.Linear: BidirectionalLinear, nn.Conv2d: BidirectionalConv2d}
_PLAIN: dict[type, Any] = {made: plain for plain, made in _KINDS.items()}
