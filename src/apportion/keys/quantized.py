"""A quantised cache: all tokens are kept, in a few bits each.

Liu, Yuan, Jin, Zhong, Xu, Braverman, Chen, Hu, *KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache*, 2024,
arXiv 2402.02750 (section 3).

Allocated are bits: keys are quantised per channel, over ``group`` tokens that follow each other (a few channels of keys
are large for all tokens), values per token, over ``group`` channels. Each such group has a scale and a least number
in 16 bits. At least the ``residual`` newest tokens stay exact.

``bits`` is the paper's B, ``group`` its G, ``residual`` its R.

Departures: keys and values leave the exact window together, ``group`` tokens at a time, so that between ``residual``
and ``residual + group - 1`` tokens are exact (in the paper the keys' window empties when it has R tokens, the values'
slides by one). Prompt attention is exact until the prompt is closed. Padding counts as tokens of its group.

transformers has quantised cache layers of its own. They are not used here: they need optimum-quanto or HQQ, group
keys and values alike, quantise the quantised part anew each time the window is full, cannot read single tokens (what a
selector on top of them would need), and do not say how many bytes they hold.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.memory import ComposedMemory
from apportion.keys.method import KeyMethod
from apportion.keys.stores import Growing, Store, gather_tokens
from apportion.models.key_memory import LayerFacts, LayerMemory, Step
from apportion.ops.packing import pack_codes, unpack_codes


@dataclass(eq=False)
class QuantizedKeys(KeyMethod):
    """All keys and values in a few bits; see the module's docstring.

    Attributes:
        bits: of a number: 2, 4 or 8.
        group: tokens, of keys, and channels, of values, that share a scale; heads whose width it does not divide have
            one scale for all channels.
        residual: newest tokens that stay exact.

    Raises:
        InputError: other bits, a group below 1, a negative residual.
    """

    slug: ClassVar[str] = "quantized"
    bits: int = 2
    group: int = 32
    residual: int = 32

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise InputError(f"bits={self.bits}: 2, 4 or 8")
        if self.group < 1 or self.residual < 0:
            raise InputError(f"group={self.group}, residual={self.residual}: a group of at least 1, a residual of 0 up")

    @override
    def memory(self, facts: LayerFacts) -> LayerMemory:
        return ComposedMemory(facts, QuantizedStore(self.bits, self.group, self.residual))


class QuantizedStore(Store):
    """Packed codes of the older tokens, the newest exact; see `QuantizedKeys` for the arguments."""

    def __init__(self, bits: int, group: int, residual: int) -> None:
        self.bits, self.group, self.residual = bits, group, residual
        self._real = Growing(1)
        self._exact = (Growing(2), Growing(2))  # keys and values that are not packed yet
        self._codes = (Growing(2), Growing(2))  # bytes, one row a token
        self._scales = (Growing(2), Growing(2))  # of keys one row for each group of tokens, of values one a token
        self._least = (Growing(2), Growing(2))

    @property
    def packed(self) -> int:
        """How many tokens are packed."""
        return self._codes[0].length

    @override
    @property
    def length(self) -> int:
        return self._real.length

    @override
    @property
    def real(self) -> Bool[Tensor, "batch tokens"]:
        return self._real.view

    @override
    def append(self, step: Step) -> None:
        self._real.append(step.real)
        for exact, newest in zip(self._exact, (step.keys, step.values), strict=True):
            exact.append(newest)
        if self.closed:
            self._pack()

    @override
    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._pack()

    def _pack(self) -> None:
        count = (self._exact[0].length - self.residual) // self.group * self.group
        if count <= 0:
            return
        for which, exact in enumerate(self._exact):
            older = exact.view[:, :, :count]
            codes, scales, least = quantize(older, self.bits, self.group, of_keys=which == 0)
            for growing, newest in ((self._codes, codes), (self._scales, scales), (self._least, least)):
                growing[which].append(newest)
            exact.keep(exact.view[:, :, count:].clone())

    @override
    def read(
        self, tokens: Int[Tensor, "batch groups kept"] | None = None
    ) -> tuple[Float[Tensor, "batch groups kept key_width"], Float[Tensor, "batch groups kept value_width"]]:
        keys, values = (self._read(which, tokens) for which in (0, 1))
        return keys, values

    def _read(self, which: int, tokens: Tensor | None) -> Tensor:
        exact = self._exact[which].view
        if not self.packed:
            return exact if tokens is None else gather_tokens(exact, tokens)
        codes, scales, least = (each[which].view for each in (self._codes, self._scales, self._least))
        if tokens is None:
            of_token = torch.arange(self.packed, device=codes.device).expand(*codes.shape[:2], -1)
        else:
            of_token = tokens.clamp_max(self.packed - 1)
            codes = codes.gather(2, of_token[..., None].expand(-1, -1, -1, codes.shape[-1]))
        rows = of_token // self.group if which == 0 else of_token
        older = dequantize(
            codes, gather_tokens(scales, rows), gather_tokens(least, rows), self.bits, exact.shape[-1], exact.dtype
        )
        if tokens is None:
            return torch.cat([older, exact], dim=2)
        if not exact.shape[2]:
            return older
        newer = gather_tokens(exact, (tokens - self.packed).clamp_min(0))
        return torch.where((tokens < self.packed)[..., None], older, newer)

    @override
    def bytes_held(self) -> int:
        parts = (self._exact, self._codes, self._scales, self._least)
        return sum(each.bytes for part in parts for each in part)

    @override
    def bytes_of(self, tokens: int) -> int:
        # What a token costs on average: which ones they are is not known here.
        batch = len(self.real)
        return round(self.bytes_held() / batch * tokens / self.length)

    @override
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        self._real.pick_rows(rows)
        for part in (self._exact, self._codes, self._scales, self._least):
            for each in part:
                each.pick_rows(rows)


def quantize(
    numbers: Float[Tensor, "batch groups tokens width"], bits: int, group: int, of_keys: bool
) -> tuple[
    UInt8[Tensor, "batch groups tokens packed"],
    Float[Tensor, "batch groups scale_rows scale_columns"],
    Float[Tensor, "batch groups scale_rows scale_columns"],
]:
    """Numbers as packed codes ``round((number - least) / scale)``, with scale and least of their group in 16 bits.

    Args:
        numbers: keys or values; of keys ``group`` must divide the tokens.
        bits: of a code.
        group: numbers that share a scale: tokens of keys, channels of values.
        of_keys: which of them these are.

    Returns:
        Codes, several to a byte along the width; scales; least values. Keys have scales
        ``[batch, groups, tokens / group, width]``, values ``[batch, groups, tokens, width / group]``.
    """
    parts, dim = _grouped(numbers, group, of_keys)
    least, most = parts.amin(dim), parts.amax(dim)
    half = numbers.dtype if numbers.dtype in (torch.bfloat16, torch.float16) else torch.float16
    least = least.to(half)
    # The rounded scale must reach the largest number; where all are alike any scale will do.
    scales = ((most - least.to(most.dtype)) / (2**bits - 1)).clamp_min(1e-6).to(half)
    levels = (parts - least.to(parts.dtype).unsqueeze(dim)) / scales.to(parts.dtype).unsqueeze(dim)
    codes = levels.round().clamp(0, 2**bits - 1).to(torch.uint8).view(numbers.shape)
    return pack_codes(codes, bits), scales, least


def dequantize(
    codes: UInt8[Tensor, "batch groups tokens packed"],
    scales: Float[Tensor, "batch groups tokens scale_columns"],
    least: Float[Tensor, "batch groups tokens scale_columns"],
    bits: int,
    width: int,
    dtype: torch.dtype,
) -> Float[Tensor, "batch groups tokens width"]:
    """The numbers that codes stand for; scales and least values are those of each token."""
    levels = unpack_codes(codes, bits, width).to(dtype)
    columns = scales.shape[-1]
    parts = levels.view(*levels.shape[:-1], columns, width // columns)
    return (parts * scales[..., None].to(dtype) + least[..., None].to(dtype)).view(levels.shape)


def _grouped(numbers: Tensor, group: int, of_keys: bool) -> tuple[Tensor, int]:
    batch, groups, tokens, width = numbers.shape
    if of_keys:
        return numbers.reshape(batch, groups, tokens // group, group, width), 3
    group = group if width % group == 0 else width
    return numbers.reshape(batch, groups, tokens, width // group, group), 4
