"""Asymmetric quantisation of what a cache stores, as numbers that training goes through and as bytes that are held.

KIVI (Liu et al. 2024, arXiv 2402.02750) quantises keys per channel, in groups of tokens, and values per token. Each
range has a scale and a zero point that is a code itself; ranges are widened to include zero, or that zero point would
not be one (ours: a channel that is 100 everywhere would else come back as 15 or less).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from apportion.errors import InputError
from apportion.keys.stores import Growing
from apportion.ops.packing import pack_codes, unpack_codes


@dataclass(frozen=True)
class Quantiser:
    """Codes of ``bits`` bits for ``[..., tokens, channels]``.

    Attributes:
        bits: 2, 4 or 8.
        group: tokens that share a range in each channel; None for one range a token, over its channels.
    """

    bits: int
    group: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise InputError(f"bits={self.bits}: 2, 4 or 8, which fill bytes")
        if self.group is not None and (self.group < 8 or self.group % 8):
            raise InputError(f"group={self.group}: a multiple of 8 tokens, such as 32")

    def fake(self, x: Float[Tensor, "*batch tokens channels"]) -> Float[Tensor, "*batch tokens channels"]:
        """What would be read back, with the gradient of ``x`` itself wherever it was not clipped.

        Raises:
            InputError: ``tokens`` is not a multiple of the group.
        """
        grouped = self._grouped(x)
        scale, zero = ranges(grouped, self.bits, dim=-2 if self.group else -1)
        return straight_through(grouped, scale, zero, self.bits).view(x.shape)

    def pack(self, x: Float[Tensor, "*batch tokens channels"]) -> tuple[Tensor, Tensor, Tensor]:
        """Codes in bytes, scales and zero points; leading dimensions are kept.

        Returns:
            In groups: ``[..., groups, channels, bytes]`` and twice ``[..., groups, channels, 1]``; else
            ``[..., tokens, bytes]`` and twice ``[..., tokens, 1]``.
        """
        grouped = self._grouped(x)
        if self.group:
            grouped = grouped.transpose(-1, -2)
        scale, zero = ranges(grouped, self.bits, dim=-1)
        codes = encode(grouped, scale, zero, self.bits)
        return pack_codes(codes.to(torch.uint8), self.bits), scale, zero.to(torch.uint8)

    def unpack(self, packed: UInt8[Tensor, "*shape"], scale: Tensor, zero: Tensor, channels: int) -> Tensor:
        """The numbers that `pack` stands for: ``[..., tokens, channels]``."""
        codes = unpack_codes(packed, self.bits, self.group or channels)
        if self.group:
            x = ((codes - zero.to(scale)) * scale).transpose(-1, -2)
            return x.flatten(-3, -2)
        return (codes - zero.to(scale)) * scale

    def _grouped(self, x: Tensor) -> Tensor:
        if not self.group:
            return x
        if x.shape[-2] % self.group:
            raise InputError(f"{x.shape[-2]} tokens are not whole groups of group={self.group}: give a multiple of it")
        return x.unflatten(-2, (-1, self.group))


def ranges(
    x: Float[Tensor, "*shape"], bits: int, dim: int
) -> tuple[Float[Tensor, "*ranges"], Float[Tensor, "*ranges"]]:
    """Scales and zero points, both without gradient, of the range that x spans along a dimension."""
    x = x.detach()
    low, high = x.amin(dim, keepdim=True).clamp(max=0), x.amax(dim, keepdim=True).clamp(min=0)
    levels = 2**bits - 1
    # Nothing but zeros: any scale does.
    scale = torch.where(high > low, (high - low) / levels, 1.0)
    return scale, (-low / scale).round().clamp(0, levels)


def encode(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The codes, as whole numbers from 0 to ``2**bits - 1`` in the dtype of x."""
    return ((x / scale).round() + zero).clamp(0, 2**bits - 1)


def straight_through(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Numbers as they would be read back; the gradient goes through as if they were x, and not at all where clipped."""
    with torch.no_grad():
        codes = (x / scale).round() + zero
        inside = (codes >= 0) & (codes <= 2**bits - 1)
        read = (codes.clamp(0, 2**bits - 1) - zero) * scale
    return read + torch.where(inside, x - x.detach(), 0.0)


class CodeCache:
    """One code a token, growing; packed as soon as a group of tokens is whole if there is a quantiser.

    Args:
        quantiser: None to keep numbers as they are.
    """

    def __init__(self, quantiser: Quantiser | None) -> None:
        self.quantiser = quantiser
        self.channels = 0
        # Of the tokens that are packed: codes, scales, zero points.
        self._packed = [Growing(1), Growing(1), Growing(1)]
        # Of those after them: the last, incomplete group, or all where nothing is quantised.
        self._plain = Growing(1)

    def append(self, codes: Float[Tensor, "batch new channels"]) -> None:
        """Take in the newest tokens."""
        self.channels = codes.shape[-1]
        self._plain.append(codes)
        if self.quantiser is None:
            return
        whole = self._plain.length - self._plain.length % (self.quantiser.group or 1)
        if whole:
            for each, newest in zip(self._packed, self.quantiser.pack(self._plain.view[:, :whole]), strict=True):
                each.append(newest)
            self._plain.keep(self._plain.view[:, whole:].clone())

    @property
    def view(self) -> Float[Tensor, "batch tokens channels"]:
        """The codes of all tokens, as they are read back."""
        if self.quantiser is None or not self._packed[0].length:
            return self._plain.view
        packed, scale, zero = (each.view for each in self._packed)
        read = self.quantiser.unpack(packed, scale, zero, self.channels)
        return torch.cat([read, self._plain.view], dim=1)

    @property
    def bytes(self) -> int:
        """Held."""
        return self._plain.bytes + sum(each.bytes for each in self._packed)

    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows of the batch, in this order."""
        for each in (*self._packed, self._plain):
            each.pick_rows(rows)


def quantisers(bits: int | None, group: int) -> dict[str, Quantiser | None]:
    """KIVI's: for the codes of keys in groups of tokens, for those of values by token; None for both without bits."""
    if bits is None:
        return {"keys": None, "values": None}
    return {"keys": Quantiser(bits, group), "values": Quantiser(bits)}
