"""A store of joint low-rank codes, with the newest tokens exact beside them, that rebuilds keys but never values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from apportion.keys.low_rank import PARTS, Factors, joint_parts
from apportion.keys.quantising import CodeCache
from apportion.keys.stores import Growing, Rotations, Store, gather_tokens
from apportion.models.key_memory import Step


@dataclass(frozen=True)
class Window:
    """How many of the newest tokens are exact.

    Attributes:
        size: at most, between steps.
        kind: ``sliding``, or ``blocks``, which are gathered and go all at once.
    """

    size: int
    kind: str = "sliding"

    def exact(self, seen: int, new: int) -> int:
        """Exact tokens among ``seen``, of which ``new`` came last and are being read for the first time.

        The tokens of a step are always exact to each other, as those of a prompt are. In blocks, those before them are
        what has gathered since the last whole block, which was read in the step that made it whole and is gone.
        """
        if self.kind == "sliding":
            return min(seen, max(self.size, new))
        return self.gathered(seen - new) + new

    def gathered(self, seen: int) -> int:
        """Exact tokens once a prompt is complete, or between two steps."""
        if self.kind == "sliding" or self.size == 0:
            return min(seen, self.size)
        return seen % self.size


class CompressedStore(Store):
    """Codes of all tokens, and the exact keys and values of the newest.

    Read values have two parts, of which one is zero: a code, and what an exact value is beyond the bias. `outputs`
    brings a mix of them to the model's values, so that no value is rebuilt.

    Args:
        factors: of keys and of values.
        codes: empty caches for both.
        window: which tokens are exact.
        layers: of the model, which share the rotations.
    """

    def __init__(
        self, factors: Mapping[str, Factors], codes: Mapping[str, CodeCache], window: Window, layers: int
    ) -> None:
        self.factors, self.codes, self.window = dict(factors), dict(codes), window
        self.keys, self.values = Growing(2), Growing(2)
        self._real, self._rotations, self._layers = Growing(1), Rotations(), layers
        self._groups = 1

    @override
    @property
    def length(self) -> int:
        return self._real.length

    @property
    def exact(self) -> int:
        """How many of the newest tokens are exact."""
        return self.keys.length

    @override
    def append(self, step: Step) -> None:
        self._groups = step.keys.shape[1]
        for part, x in joint_parts(step).items():
            self.factors[part] = self.factors[part].to(x)
            self.codes[part].append(self.factors[part].encode(x, step.hidden))
        self._real.append(step.real)
        self._rotations.append(step.rotation)
        self.keys.append(step.keys)
        self.values.append(step.values)
        if self.closed:
            self._keep_newest(self.window.exact(self.length, step.new))

    @override
    def close(self) -> None:
        self.closed = True
        self._keep_newest(self.window.gathered(self.length))

    def _keep_newest(self, count: int) -> None:
        for each in (self.keys, self.values):
            if each.length > count:
                each.keep(each.view[:, :, each.length - count :].clone())

    @override
    def read(
        self, tokens: Int[Tensor, "batch groups kept"] | None = None
    ) -> tuple[Float[Tensor, "batch groups kept key_width"], Float[Tensor, "batch groups kept value_width"]]:
        if not self.closed:
            keys, values = self.keys.view, self.values.view
            return (keys, values) if tokens is None else (gather_tokens(keys, tokens), gather_tokens(values, tokens))
        return self._read_all() if tokens is None else self._read_some(tokens)

    def read_each(
        self,
        new: int,
        keys: Float[Tensor, "batch groups exact key_width"],
        values: Float[Tensor, "batch groups exact width"],
    ) -> tuple[
        Float[Tensor, "batch groups read key_width"],
        Float[Tensor, "batch groups read value_width"],
        Bool[Tensor, "batch 1 new read"],
    ]:
        """What the newest tokens read if each came alone, after all of them were appended; for a sliding window.

        Afterwards as many are exact as if the last had come alone.

        Args:
            new: how many they are.
            keys: exact ones, oldest first: those that were exact before these tokens came, then theirs.
            values: likewise.

        Returns:
            Keys and values as `read` gives them, some tokens once from codes and once exact; which each query reads.
        """
        size, device = max(self.window.size, 1), keys.device
        old = max(self.length - size, 0)
        from_codes, exact = torch.arange(old), torch.arange(self.length - keys.shape[2], self.length)
        asking = torch.arange(self.length - new, self.length)[:, None]
        within = torch.cat([from_codes <= asking - size, (exact > asking - size) & (exact <= asking)], dim=1)
        real = self.real[:, torch.cat([from_codes, exact]).to(device)]
        self._keep_newest(self.window.exact(self.length, 1))
        return *self._beside(old, keys, values), within.to(device) & real[:, None, None]

    def _read_all(self) -> tuple[Tensor, Tensor]:
        return self._beside(self.length - self.exact, self.keys.view, self.values.view)

    def _beside(self, old: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The oldest tokens rebuilt from their codes, and exact ones after them."""
        rebuilt = self._by_heads(self.factors["keys"].decode(self.codes["keys"].view[:, :old]))
        if self._rotations.all is not None:
            rebuilt = self._rotations.all.at(slice(0, old)).apply(rebuilt)
        codes = self.codes["values"].view[:, None, :old].expand(-1, self._groups, -1, -1)
        beyond = self._beyond_bias(values)
        return torch.cat([rebuilt, keys], dim=2), torch.cat(
            [self._two_parts(code=codes), self._two_parts(value=beyond)], dim=2
        )

    def _read_some(self, tokens: Int[Tensor, "batch groups kept"]) -> tuple[Tensor, Tensor]:
        old = self.length - self.exact
        if not self.exact:
            # Nothing to gather from: between the prompt and the next tokens, without a window.
            keys, values = self._read_all()
            return gather_tokens(keys, tokens), gather_tokens(values, tokens)
        recent = (tokens >= old)[..., None]
        place = (tokens - old).clamp(min=0)
        keys, values = (gather_tokens(each, place) for each in (self.keys.view, self._beyond_bias(self.values.view)))
        of_keys, of_values = (
            gather_tokens(self.codes[part].view[:, None].expand(-1, self._groups, -1, -1), tokens) for part in PARTS
        )
        up = self._by_group(self.factors["keys"].up)
        bias = self.factors["keys"].bias.unflatten(0, (self._groups, -1))[:, None]
        rebuilt = self._rotations.apply(of_keys @ up + bias, tokens)
        read = torch.where(recent, self._two_parts(value=values), self._two_parts(code=of_values))
        return torch.where(recent, keys, rebuilt), read

    @override
    def outputs(self, mixed: Float[Tensor, "batch heads new value_width"]) -> Float[Tensor, "batch heads new width"]:
        if not self.closed:
            return mixed
        factors = self.factors["values"]
        batch, heads, new, _ = mixed.shape
        packed = mixed.reshape(batch, self._groups, -1, mixed.shape[-1])
        code, value = packed[..., : factors.rank], packed[..., factors.rank :]
        bias = factors.bias.unflatten(0, (self._groups, -1))[:, None]
        return (code @ self._by_group(factors.up) + value + bias).view(batch, heads, new, -1)

    @override
    @property
    def real(self) -> Bool[Tensor, "batch tokens"]:
        return self._real.view

    @override
    def bytes_held(self) -> int:
        """Codes, exact keys and values, and this layer's share of the rotations; factors are weights of the model."""
        codes = sum(each.bytes for each in self.codes.values())
        return codes + self.keys.bytes + self.values.bytes + self._rotations.bytes // self._layers

    @override
    def bytes_of(self, tokens: int) -> int:
        # What a token costs on average: most of them their codes, the newest their keys and values.
        rows = len(self._real.view)
        old = 1 - self.exact / self.length if self.closed else 0.0
        codes = sum(each.bytes for each in self.codes.values()) * old
        return math.ceil(tokens * (codes + self.keys.bytes + self.values.bytes) / (rows * self.length))

    @override
    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        for code in self.codes.values():
            code.pick_rows(rows)
        for each in (self.keys, self.values, self._real):
            each.pick_rows(rows)
        self._rotations.pick_rows(rows)

    def _by_heads(self, x: Float[Tensor, "batch tokens joint"]) -> Float[Tensor, "batch groups tokens width"]:
        return x.unflatten(-1, (self._groups, -1)).transpose(1, 2)

    def _by_group(self, up: Float[Tensor, "rank joint"]) -> Float[Tensor, "groups rank width"]:
        return up.unflatten(-1, (self._groups, -1)).transpose(0, 1)

    def _beyond_bias(
        self, values: Float[Tensor, "batch groups tokens width"]
    ) -> Float[Tensor, "batch groups tokens width"]:
        return values - self.factors["values"].bias.unflatten(0, (self._groups, -1))[:, None]

    def _two_parts(self, code: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        """A code and no value, or a value and no code."""
        factors = self.factors["values"]
        if value is not None:
            return torch.nn.functional.pad(value, (factors.rank, 0))
        assert code is not None
        return torch.nn.functional.pad(code, (0, factors.up.shape[1] // self._groups))
