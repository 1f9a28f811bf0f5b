"""Joint low-rank codes of a layer's keys or values: where they come from, in closed form and from weights.

``joint``: all key-value heads side by side are one vector, which one code stands for. Keys are meant before the rotary
embedding, and after the norm where a model norms its keys.

With keys K = X W of some text, and W (or diag(s) W) = U S V' its singular value decomposition, the factors of CSKV are
A = U_r S_r^½ (or diag(s)^-1 U_r S_r^½) and B = S_r^½ V_r'. Since X A = K V_r S_r^-½ in both cases, they act on keys as
well as on what the layer was given, and no code needs X but one whose A was trained.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.errors import InputError
from apportion.keys.trace import watch_steps
from apportion.models import LanguageModel
from apportion.models.key_memory import Step
from apportion.models.key_projections import KeyProjections, LinearMap

PARTS = ("keys", "values")


@dataclass(frozen=True, eq=False)
class Factors:
    """A code and how it is read: ``code = (x - bias) @ down``, ``x = code @ up + bias``; or ``code = hidden @ down``.

    Attributes:
        down: from a joint key or value, or from what the layer was given.
        up: to the joint key or value.
        bias: of the layer's projection; zero where it has none or its output is normed.
        from_hidden: which of the two ``down`` reads.
    """

    down: Float[Tensor, "inputs rank"]
    up: Float[Tensor, "rank width"]
    bias: Float[Tensor, " width"]
    from_hidden: bool = False

    @property
    def rank(self) -> int:
        """Numbers in a code."""
        return self.up.shape[0]

    def encode(
        self, joint: Float[Tensor, "*batch width"], hidden: Float[Tensor, "*batch d_model"] | None
    ) -> Float[Tensor, "*batch rank"]:
        """Codes of joint keys or values.

        Raises:
            InputError: they are made from what the layer was given, and that is not known.
        """
        if not self.from_hidden:
            return (joint - self.bias) @ self.down
        if hidden is None:
            raise InputError("this layer does not say what it was given (hidden is None), which trained factors read")
        return hidden @ self.down

    def decode(self, codes: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch width"]:
        """The joint keys or values that codes stand for."""
        return codes @ self.up + self.bias

    def to(self, like: Tensor) -> "Factors":
        """With the dtype and on the device of a tensor."""
        return Factors(self.down.to(like), self.up.to(like), self.bias.to(like), self.from_hidden)

    def named(self, part: str) -> dict[str, Tensor]:
        """As tensors of a layer; see `KeyMethod.fitted`."""
        down = "down_from_hidden" if self.from_hidden else "down"
        return {f"{part}.{down}": self.down, f"{part}.up": self.up, f"{part}.bias": self.bias}

    @classmethod
    def of_layer(cls, tensors: Mapping[str, Tensor], part: str) -> "Factors":
        """What `named` gave."""
        from_hidden = f"{part}.down_from_hidden" in tensors
        down = tensors[f"{part}.down_from_hidden" if from_hidden else f"{part}.down"]
        return cls(down, tensors[f"{part}.up"], tensors[f"{part}.bias"], from_hidden)


def joint(heads: Float[Tensor, "batch groups tokens width"]) -> Float[Tensor, "batch tokens joint"]:
    """The heads of each token side by side."""
    return heads.transpose(1, 2).flatten(2)


def joint_parts(step: Step) -> dict[str, Float[Tensor, "batch tokens joint"]]:
    """The joint keys, before the rotary embedding, and values of a step."""
    return {"keys": joint(step.unrotated_keys()), "values": joint(step.values)}


def biases_of(projections: KeyProjections, widths: Mapping[str, int]) -> dict[str, Float[Tensor, " width"]]:
    """The constant part of a layer's keys and values; zero where they are normed."""
    maps = {"keys": projections.keys, "values": projections.values}
    return {part: torch.zeros(widths[part]) if each is None else each.bias.cpu() for part, each in maps.items()}


@dataclass(eq=False)
class Moments:
    """What is known of a layer's keys and values over a calibration text.

    Attributes:
        second: un-centred second moments of joint keys and of values without the bias, sums over tokens.
        hidden: mean absolute value of each coordinate of what the layer was given; None where it does not say.
        tokens: seen.
    """

    second: dict[str, Float[Tensor, "width width"]] = field(default_factory=dict)
    hidden: Float[Tensor, " d_model"] | None = None
    tokens: int = 0

    def add(self, step: Step, biases: Mapping[str, Tensor]) -> None:
        """Take in a step."""
        for part, x in joint_parts(step).items():
            x = (x[0].float() - biases[part].to(x.device)).double()
            moment = (x.T @ x).cpu()
            self.second[part] = self.second[part] + moment if part in self.second else moment
        if step.hidden is not None:
            size = step.hidden[0].float().abs().sum(0).cpu()
            before = 0 if self.hidden is None else self.hidden * self.tokens
            self.hidden = (before + size) / (self.tokens + step.new)
        self.tokens += step.new


def measure_moments(
    model: LanguageModel, texts: Iterable[Int[Tensor, "_"]], projections: Mapping[int, KeyProjections]
) -> dict[int, Moments]:
    """The moments of every full-attention layer over some texts, in one pass that keeps nothing else."""
    found: dict[int, Moments] = {layer: Moments() for layer in projections}
    biases: dict[int, dict[str, Tensor]] = {}

    def show(layer: int, step: Step) -> None:
        if layer not in biases:
            widths = {part: x.shape[-1] for part, x in joint_parts(step).items()}
            biases[layer] = biases_of(projections[layer], widths)
        found[layer].add(step, biases[layer])

    watch_steps(model, texts, show)
    return found


def principal(
    second: Float[Tensor, "width width"], rank: int, bias: Float[Tensor, " width"], blocks: int = 1
) -> Factors:
    """The closed form: the best code of that rank for the text that the moments are of.

    Rotations are isometries and the layer's input does not depend on the code, so CSKV's reconstruction loss is a
    reduced-rank regression, whose optimum is the un-centred principal directions of K: ``A = W V_r``, ``B = V_r'``.

    Args:
        second: see `Moments`.
        rank: numbers in a code.
        bias: see `Factors`.
        blocks: of the width, each of which has a code of ``rank / blocks`` numbers of its own (by head: Palu's choice).
    """
    size, each = len(second) // blocks, rank // blocks
    directions = torch.block_diag(
        *(
            torch.linalg.eigh(second[start : start + size, start : start + size]).eigenvectors.flip(1)[:, :each]
            for start in range(0, len(second), size)
        )
    ).float()
    return Factors(directions, directions.T.contiguous(), bias)


def from_weights(projection: LinearMap, rank: int, scale: Float[Tensor, " d_model"] | None = None) -> Factors:
    """The truncated singular value decomposition of a projection, its inputs weighted by ``scale`` (ASVD) or not."""
    weight = projection.weight.double().cpu()
    if scale is not None:
        weight = scale.double()[:, None] * weight
    _, sizes, directions = torch.linalg.svd(weight, full_matrices=False)
    sizes, directions = sizes[:rank], directions[:rank]
    roots = sizes.sqrt()
    # A direction that the layer never writes in has nothing to be divided by.
    inverse = torch.where(sizes > 1e-12 * sizes[0], 1 / roots, 0.0)
    return Factors((directions.T * inverse).float(), (roots[:, None] * directions).float(), projection.bias.cpu())


def at_random(rank: int, bias: Float[Tensor, " width"], seed: int) -> Factors:
    """Random orthonormal directions."""
    draw = torch.randn(len(bias), rank, generator=torch.Generator().manual_seed(seed))
    directions = torch.linalg.qr(draw).Q
    return Factors(directions, directions.T.contiguous(), bias)


def activation_scale(moments: Moments, alpha: float) -> Float[Tensor, " d_model"]:
    """ASVD's weight of each input coordinate: ``(mean |x| + 1e-6) ** alpha``."""
    if moments.hidden is None:
        raise InputError("init='asvd' needs what the layers are given, which this model does not say: use init='exact'")
    return (moments.hidden + 1e-6) ** alpha


def rank_of(density: float, width: int, groups: int, name: str) -> int:
    """Numbers in a joint code: ``int(density * width)`` for each key-value head.

    Raises:
        InputError: the density is not above 0 and at most 1, or leaves a head nothing.
    """
    # The product may fall short of a whole number by a rounding error: .29 of 100 is 28.999999999999996.
    each = math.floor(density * width + 1e-9)
    if not 0 < density <= 1 or each < 1:
        raise InputError(f"{name}={density}: above 0 and at most 1, and at least {1 / width:.3g} for heads of {width}")
    return each * groups


def relative_error(factors: Factors, second: Float[Tensor, "width width"]) -> float:
    """Norm of what a code loses over the norm of what it stands for, bias aside, over the text of the moments.

    Only for factors that read keys or values; see `Factors.from_hidden`.
    """
    lost = torch.eye(len(second), dtype=second.dtype) - factors.down.to(second) @ factors.up.to(second)
    return math.sqrt(max(0.0, float((lost.T @ second @ lost).trace() / second.trace())))
