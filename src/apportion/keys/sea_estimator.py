"""SEA's estimator: a small map of where attention will go, drawn from linear attention by a decoder of convolutions.

Linear attention over positions and values gives each token a blurred picture of where its attention went. An encoder
and a convolutional decoder, in which the heads are channels, turn these pictures into rows of ``columns`` logits. In
the causal form nothing looks at a later row: convolutions are padded above only, and every norm is within a row.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from typing_extensions import override

from apportion.keys.performer import (
    LinearState,
    PerformerFeatures,
    attend_linearly,
    attend_linearly_causal,
)

DILATION = 2
ROWS_BACK = 2 * 2 * DILATION  # two convolutions of three rows


class CausalDecoder(nn.Module):
    """Images of heads to logits, each row from itself and rows above: two dilated convolutions, then wider by 4.

    Args:
        heads: of the layer.
        columns: of the map; the images have a quarter of them.
        splits: channels of a head's image.
    """

    DOWN = 4

    def __init__(self, heads: int, columns: int, splits: int) -> None:
        super().__init__()
        channels, width = heads * splits, columns // self.DOWN
        self.norm = nn.LayerNorm(width)
        self.first = nn.Conv2d(channels, channels, 3, dilation=DILATION, padding=(0, DILATION))
        self.second = nn.Conv2d(channels, channels, 3, dilation=DILATION, padding=(0, DILATION))
        self.mix = nn.Conv2d(channels, heads, 1)
        self.norm_out = nn.LayerNorm(columns)

    @override
    def forward(
        self, image: Float[Tensor, "batch channels n narrow"], real: Bool[Tensor, "batch n"]
    ) -> Float[Tensor, "batch heads n columns"]:
        """Logits; what rows of padding get means nothing."""
        rows = real[:, None, :, None]
        image = self.norm(image) * rows
        for convolution in (self.first, self.second):
            # Rows of padding must look like the empty rows above the first.
            image = convolution(pad(image, (0, 0, 2 * DILATION, 0))).relu() * rows
        logits: Tensor = self.norm_out(self.mix(image.repeat_interleave(self.DOWN, dim=3)))
        return logits


class WholeDecoder(nn.Module):
    """Images of heads to logits, each row from rows around it: half the rows in between, three convolutions.

    Args:
        heads: of the layer.
        columns: of the map; the images have half of them.
        splits: channels of a head's image.
    """

    DOWN = 2

    def __init__(self, heads: int, columns: int, splits: int) -> None:
        super().__init__()
        channels = 4 * heads
        self.first = nn.Conv2d(heads * splits, channels, 3, stride=(2, 1), padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, heads, 3, padding=1)

    @override
    def forward(
        self, image: Float[Tensor, "batch channels n narrow"], real: Bool[Tensor, "batch n"]
    ) -> Float[Tensor, "batch heads n columns"]:
        """Logits; what rows of padding get means nothing."""
        rows, half = real[:, None, :, None], real[:, None, ::2, None]
        image = self.first(image * rows).relu() * half
        image = self.second(image).relu() * half
        image = image.repeat_interleave(2, dim=2)[:, :, : real.shape[1]] * rows
        logits: Tensor = self.last(image)
        return logits.repeat_interleave(self.DOWN, dim=3)


@dataclass(eq=False)
class EstimatorState:
    """What a causal estimator remembers between tokens.

    Attributes:
        sums: of the linear attention.
        image: the last rows that the convolutions look back on.
        image_real: False for those above the first row.
    """

    sums: LinearState
    image: Float[Tensor, "batch channels rows narrow"]
    image_real: Bool[Tensor, "batch rows"]


class Estimator(nn.Module):
    """Queries, keys and values to logits over columns; see the module.

    Real tokens come first in every row of the batch.

    Args:
        heads: of the layer.
        width: of a head.
        columns: of the map.
        length: of the longest text.
        causal: which decoder and kernel.
        features: of the linear attention.
        positions: whether linear attention mixes positions too; an ablation otherwise.
        redraw_every: see `PerformerFeatures`.
    """

    def __init__(
        self,
        heads: int,
        width: int,
        columns: int,
        length: int,
        *,
        causal: bool,
        features: int,
        positions: bool = True,
        redraw_every: int | None = 1000,
    ) -> None:
        super().__init__()
        self.causal, self.positions, self.width = causal, positions, width
        kind, splits = (CausalDecoder, 2) if causal else (WholeDecoder, 4)
        self.splits = splits
        self.features = PerformerFeatures(width, features, "relu" if causal else "softmax", redraw_every)
        if causal and positions:
            self.places = nn.Parameter(torch.randn(length, width) * width**-0.5)
        self.encoder = nn.Sequential(nn.Linear(3 * width, 2 * width), nn.LayerNorm(2 * width), nn.GELU())
        self.to_image = nn.Linear(2 * width, columns // kind.DOWN * splits)
        self.decoder = kind(heads, columns, splits)

    @override
    def forward(
        self,
        queries: Float[Tensor, "batch heads n d"],
        keys: Float[Tensor, "batch heads n d"],
        values: Float[Tensor, "batch heads n d"],
        real: Bool[Tensor, "batch n"],
    ) -> tuple[Float[Tensor, "batch heads n columns"], Float[Tensor, "batch heads n encoded"]]:
        """Logits of the columns, and what the encoder made of each token."""
        logits, encoded, _, _ = self._whole(queries, keys, values, real)
        return logits, encoded

    def begin(
        self, queries: Tensor, keys: Tensor, values: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor, EstimatorState]:
        """As ``forward``, with what the tokens after these need; only of the causal form."""
        logits, encoded, sums, image = self._whole(queries, keys, values, real)
        assert sums is not None, "only the causal form has running sums"
        rows = real.sum(1, keepdim=True) + torch.arange(-ROWS_BACK, 0, device=real.device)
        index = rows.clamp_min(0)[:, None, :, None].expand(-1, image.shape[1], -1, image.shape[3])
        return logits, encoded, EstimatorState(sums, image.gather(2, index), rows >= 0)

    def step(
        self, queries: Tensor, keys: Tensor, values: Tensor, place: Int[Tensor, " batch"], state: EstimatorState
    ) -> tuple[Tensor, Tensor]:
        """The same for one more token of each row, at its place; the state is brought up to date."""
        real = torch.ones(len(place), 1, dtype=torch.bool, device=place.device)
        here = None if not self.positions else self.places[place][:, None, None].expand_as(values)
        encoded, sums = self._encode(queries, keys, values, here, real, state.sums)
        image = torch.cat([state.image, self._image(encoded)], dim=2)
        image_real = torch.cat([state.image_real, real], dim=1)
        logits: Tensor = self.decoder(image, image_real)[:, :, -1:]
        assert sums is not None, "only the causal form decodes"
        state.sums, state.image, state.image_real = sums, image[:, :, 1:], image_real[:, 1:]
        return logits, encoded

    def _whole(
        self, queries: Tensor, keys: Tensor, values: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor, LinearState | None, Tensor]:
        self.features.maybe_redraw()
        encoded, sums = self._encode(queries, keys, values, self._places(values, real), real, None)
        image = self._image(encoded)
        return self.decoder(image, real), encoded, sums, image

    def _places(self, values: Tensor, real: Tensor) -> Tensor | None:
        if not self.positions:
            return None
        n = values.shape[2]
        if self.causal:
            return self.places[:n].expand_as(values)
        # The rows of an identity matrix, stretched over the tokens there are.
        lengths = real.sum(1, keepdim=True).clamp_min(1)
        where = (torch.arange(n, device=values.device) + 0.5) / lengths * self.width - 0.5
        apart = where.clamp(0, self.width - 1)[..., None] - torch.arange(self.width, device=values.device)
        return (1 - apart.abs()).relu()[:, None].expand_as(values)

    def _encode(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        places: Tensor | None,
        real: Tensor,
        state: LinearState | None,
    ) -> tuple[Tensor, LinearState | None]:
        augmented = torch.cat([torch.zeros_like(values) if places is None else places, values], dim=-1)
        if self.causal:
            linear, state = attend_linearly_causal(self.features(queries), self.features(keys), augmented, real, state)
        else:
            largest = self.features.largest_exponent(keys, real)
            linear = attend_linearly(self.features(queries), self.features(keys, largest), augmented, real)
        return self.encoder(torch.cat([linear, values], dim=-1)), state

    def _image(self, encoded: Tensor) -> Tensor:
        """The heads' images, heads and splits as channels."""
        rows = self.to_image(encoded).unflatten(-1, (self.splits, -1))
        return rows.transpose(2, 3).flatten(1, 2)
