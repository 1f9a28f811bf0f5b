"""FAVOR+ features and the linear attention made of them (Performer).

*Rethinking Attention with Performers* (Choromanski et al. 2021, arXiv 2009.14794), in the form that SEA uses: queries
and keys are mapped to ``m`` positive features whose products stand in for the exponential of theirs, so that attention
is a running sum instead of a table of all pairs.

Symbols: ``phi`` = `PerformerFeatures`, ``m`` = features, ``omega`` = `PerformerFeatures.directions`.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override

CHUNK = 64
# So that no feature is exactly zero, and no sum of products either.
_FLOOR = {"softmax": 1e-6, "relu": 1e-3}


class PerformerFeatures(nn.Module):
    """Random positive features of a head's vectors.

    Args:
        width: of a head.
        features: how many; the error of the softmax kernel falls with the root of it.
        kernel: ``softmax`` estimates the exponential of the scaled product without bias; ``relu`` is the generalised
            kernel, which estimates nothing in particular and never leaves a small range.
        redraw_every: passes in training after which the directions are drawn anew; None for never.

    Attributes:
        directions: [features, width], orthogonal in blocks of ``width``. A buffer: what was trained with some
            directions is used with them.
    """

    directions: Tensor
    calls: Tensor

    def __init__(self, width: int, features: int, kernel: str, redraw_every: int | None = 1000) -> None:
        super().__init__()
        self.kernel, self.redraw_every = kernel, redraw_every
        self.register_buffer("directions", orthogonal_directions(features, width))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def maybe_redraw(self) -> None:
        """Count a pass in training, and draw new directions when it is time; to be called once a pass."""
        if not self.training or self.redraw_every is None:
            return
        self.calls += 1
        if self.calls % self.redraw_every == 0:
            drawn = orthogonal_directions(*self.directions.shape)
            self.directions.copy_(drawn.to(self.directions.device))

    @override
    def forward(
        self, vectors: Float[Tensor, "batch heads n d"], largest: Float[Tensor, "batch heads #n 1"] | None = None
    ) -> Float[Tensor, "batch heads n m"]:
        """The features.

        Args:
            vectors: queries or keys.
            largest: of the softmax kernel: what exponents are lowered by; the largest exponent of each vector if None.
                Keys of one head need a common one, or their features could not be compared.
        """
        scaled = vectors * vectors.shape[-1] ** -0.25
        products = scaled @ self.directions.to(vectors.dtype).T
        if self.kernel == "relu":
            return products.relu() + _FLOOR["relu"]
        exponents = products - scaled.square().sum(-1, keepdim=True) / 2
        largest = exponents.detach().amax(-1, keepdim=True) if largest is None else largest
        return (exponents - largest).exp() + _FLOOR["softmax"]

    def largest_exponent(
        self, keys: Float[Tensor, "batch heads n d"], real: Bool[Tensor, "batch n"]
    ) -> Float[Tensor, "batch heads 1 1"]:
        """Of all real keys of a head: what `forward` wants for keys."""
        scaled = keys.detach() * keys.shape[-1] ** -0.25
        exponents = (scaled @ self.directions.to(keys.dtype).T).amax(-1) - scaled.square().sum(-1) / 2
        return exponents.masked_fill(~real[:, None], -torch.inf).amax(2)[..., None, None].clamp_min(-1e30)


def orthogonal_directions(features: int, width: int) -> Float[Tensor, "features width"]:
    """Random directions of the lengths of Gaussian vectors, orthogonal in blocks of ``width``."""
    blocks = []
    for _ in range(math.ceil(features / width)):
        orthogonal, triangle = torch.linalg.qr(torch.randn(width, width))
        # The signs that a decomposition happens to give prefer one half of all directions.
        blocks.append((orthogonal * triangle.diagonal().sign()).T)
    lengths = torch.randn(features, width).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:features] * lengths


@dataclass(eq=False)
class LinearState:
    """What linear attention remembers: sums over the keys so far.

    Attributes:
        mixed: of products of key features and values.
        weight: of key features.
    """

    mixed: Float[Tensor, "batch heads m e"]
    weight: Float[Tensor, "batch heads m"]


def attend_linearly(
    queries: Float[Tensor, "batch heads n m"],
    keys: Float[Tensor, "batch heads n m"],
    values: Float[Tensor, "batch heads n e"],
    real: Bool[Tensor, "batch n"],
) -> Float[Tensor, "batch heads n e"]:
    """Attention whose weights are products of features, every query over all real tokens.

    Args:
        queries: features of the queries.
        keys: features of the keys.
        values: what is mixed.
        real: False for padding.
    """
    keys = keys * real[:, None, :, None]
    weight = (queries @ keys.sum(2)[..., None]).clamp_min(1e-9)
    return queries @ (keys.transpose(-1, -2) @ values) / weight


def attend_linearly_causal(
    queries: Float[Tensor, "batch heads n m"],
    keys: Float[Tensor, "batch heads n m"],
    values: Float[Tensor, "batch heads n e"],
    real: Bool[Tensor, "batch n"],
    state: LinearState | None = None,
) -> tuple[Float[Tensor, "batch heads n e"], LinearState]:
    """The same with every query over the real tokens up to its own, at a cost that grows with the length alone.

    Args:
        queries: features of the queries.
        keys: features of the keys.
        values: what is mixed.
        real: False for padding.
        state: of the tokens before these; None if there are none.

    Returns:
        The outputs, and the state with these tokens.
    """
    keys = keys * real[:, None, :, None]
    if state is None:
        shape = (*keys.shape[:2], keys.shape[3])
        state = LinearState(keys.new_zeros(*shape, values.shape[3]), keys.new_zeros(shape))
    mixed, weight, out = state.mixed, state.weight, []
    for start in range(0, keys.shape[2], CHUNK):
        q, k, v = (each[:, :, start : start + CHUNK] for each in (queries, keys, values))
        pairs = (q @ k.transpose(-1, -2)).tril()
        total = (q @ weight[..., None]) + pairs.sum(-1, keepdim=True)
        # Nothing but padding so far: 0 over 0.
        out.append((q @ mixed + pairs @ v) / total.clamp_min(1e-9))
        mixed, weight = mixed + k.transpose(-1, -2) @ v, weight + k.sum(2)
    return torch.cat(out, dim=2), LinearState(mixed, weight)
