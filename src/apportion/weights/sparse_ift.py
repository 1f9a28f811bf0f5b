"""Sparse-IFT: a dense layer becomes a larger, sparse one that costs exactly as much.

Thangarasa, Saxena, Gupta, Lie 2023, *Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training Efficiency*,
arXiv 2303.11525.

What is allocated: the multiply-adds of the dense layer, among the weights of a larger one. There are more ways to
choose as many weights, and `prune_and_grow` searches them while it trains.

===================  =======================================  ==============================================
Sparse Wide          every hidden width times 1 / sqrt(1-s)   ``make(factor)``, a network that many times wider
Sparse Parallel      1 / (1-s) branches, summed               `SparseParallel`
Sparse Factorized    V phi(U x), d wide between               `SparseFactorized`
Sparse Doped         S x + V U x, U and V dense, of rank r    `SparseDoped`
s                    sparsity                                 ``SparseIftSettings.sparsity``
phi                  non-linearity, with a norm before it     ``between``
===================  =======================================  ==============================================

Widths, branches and ranks are whole numbers, and stem and head stay dense but grow with a wider network. So s only
decides the size; then the density is found at which the whole network costs what the dense one did, for every member.
(The code searches s in steps of 1e-4 to within 0.1 %, for Wide alone; here it is solved for, to within what one weight
costs.) Realised and nominal sparsity therefore differ, and both are reported.

Departures. In Doped the low-rank part is dense, as the paper has it (the published code masks it too). The factor of
Wide is 1 / sqrt(1-s), where the code rounds 1 / (1-s) first. One branch alone has no non-linearity inside: it is the
dense layer. ``rescale`` is ours, for networks without norms.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.weights.cost import Cost, cost_of
from apportion.weights.layers import WeightLayer, prunable
from apportion.weights.prune_and_grow import Profile, spend, start_sparse

Member = Literal["wide", "parallel", "factorized", "doped"]
Between = Callable[[int], nn.Module]
Dense = nn.Linear | nn.Conv2d


def rectified(width: int) -> nn.Module:
    """What lies between two factors, or after each branch, unless told otherwise."""
    return nn.ReLU()


class SparseParallel(nn.Module):
    """Branches of a layer's own shape with a non-linearity after each, summed.

    Args:
        layer: the dense one; it becomes the first branch, weights and all.
        sparsity: that all branches will have; there are 1 / (1 - sparsity) of them.
        between: makes what follows each branch, given its width: without a non-linearity there, branches collapse
            into one layer.
    """

    def __init__(self, layer: Dense, sparsity: float, between: Between = rectified) -> None:
        super().__init__()
        _check(layer, sparsity)
        inputs, outputs = _widths(layer)
        count = max(1, round(1 / (1 - sparsity)))
        self.branches = nn.ModuleList([layer, *(_alike(layer, inputs, outputs) for _ in range(count - 1))])
        self.between = nn.ModuleList(between(outputs) if count > 1 else nn.Identity() for _ in self.branches)

    @property
    def sparse_parts(self) -> list[nn.Module]:
        """The layers that are to be sparse."""
        return list(self.branches)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The sum of the branches."""
        outputs = [between(branch(x)) for branch, between in zip(self.branches, self.between, strict=True)]
        return sum(outputs[1:], start=outputs[0])


class SparseFactorized(nn.Module):
    """Two layers in place of one, wider between them than a dense factorisation could afford.

    Args:
        layer: the dense one; only its shape is used.
        sparsity: that both will have.
        between: makes what lies between them, given the width there.
    """

    def __init__(self, layer: Dense, sparsity: float, between: Between = rectified) -> None:
        super().__init__()
        _check(layer, sparsity)
        inputs, outputs = _widths(layer)
        places = _places(layer)
        # Rounded to what a weight can cost before it is rounded up: 1 / (1 - 0.9) is a little more than 10.
        width = math.ceil(round(places * inputs * outputs / ((places * inputs + outputs) * (1 - sparsity)), 6))
        self.first = _alike(layer, inputs, width)
        self.between = between(width)
        self.second = _alike(layer, width, outputs, pointwise=True)

    @property
    def sparse_parts(self) -> list[nn.Module]:
        """The layers that are to be sparse."""
        return [self.first, self.second]

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Through both."""
        return self.second(self.between(self.first(x)))


class SparseDoped(nn.Module):
    """A sparse layer and beside it a dense one of low rank, which costs what the sparse one saves.

    Args:
        layer: the dense one; it becomes the sparse one, weights and all.
        sparsity: that it will have.
    """

    def __init__(self, layer: Dense, sparsity: float) -> None:
        super().__init__()
        _check(layer, sparsity)
        inputs, outputs = _widths(layer)
        places = _places(layer)
        rank = math.floor(round(sparsity * places * inputs * outputs / (places * inputs + outputs), 6))
        self.sparse = layer
        self.low_rank = nn.Sequential()
        if rank:
            self.low_rank.append(_alike(layer, inputs, rank, bias=False))
            self.low_rank.append(_alike(layer, rank, outputs, pointwise=True, bias=False))

    @property
    def sparse_parts(self) -> list[nn.Module]:
        """The layer that is to be sparse."""
        return [self.sparse]

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The sum of both."""
        return self.sparse(x) + self.low_rank(x) if len(self.low_rank) else self.sparse(x)


@dataclass(frozen=True)
class SparseIftSettings:
    """Which larger network takes the place of a dense one.

    Attributes:
        member: of the family.
        sparsity: nominal, which decides how much larger it is.
        dense: patterns of names of layers that stay as they are: the stem and the head. (Nothing is guessed: in the
            published code a layer that happens to be as wide as there are classes stays dense.)
        profile: ``uniform`` or ``erk``, see `layer_counts`.
        between: makes what lies inside Parallel and Factorized, given a width. The paper's runs have a norm there too:
            ``lambda width: nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())``.
        rescale: start with weights that make up for those that are missing. Only for Wide and Factorized: in Parallel
            and Doped what is summed makes up for it.
        seed: of the first masks.

    Raises:
        InputError: a value that cannot work.
    """

    member: Member = "wide"
    sparsity: float = 0.75
    dense: tuple[str, ...] = ()
    profile: Profile = "uniform"
    between: Between = rectified
    rescale: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.member not in ("wide", "parallel", "factorized", "doped"):
            raise InputError(f"member={self.member!r}: use wide, parallel, factorized or doped")
        _check_sparsity(self.sparsity)

    @property
    def factor(self) -> float:
        """How much wider Wide is."""
        return 1 / math.sqrt(1 - self.sparsity)


@dataclass(frozen=True)
class Transformed:
    """What `transform` made.

    Attributes:
        network: with masks, for `train_masked` and `PruneAndGrow`.
        before, after: what the dense network and this one cost.
        nominal, realised: sparsity asked for, and that of the layers that are sparse.
    """

    network: nn.Module
    before: Cost
    after: Cost
    nominal: float
    realised: float

    def to_json(self) -> dict[str, float]:
        """All but the network."""
        found: dict[str, float] = {"nominal sparsity": self.nominal, "realised sparsity": self.realised}
        for when, cost in (("before", self.before), ("after", self.after)):
            for name in ("flops", "dense_flops", "parameters", "kept", "activations"):
                found[f"{name}, {when}"] = getattr(cost, name)
        return found


def transform(make: Callable[[float], nn.Module], settings: SparseIftSettings, sample: Tensor) -> Transformed:
    """Build the larger network and find the density at which it costs what the dense one does.

    Args:
        make: gives the network with its hidden widths times a factor: the dense one for 1. How it rounds is its
            affair. For members other than Wide it is only asked for the dense one, whose layers are then replaced.
        settings: see `SparseIftSettings`.
        sample: an input of the network, its rows examples: shows how often each weight is applied.

    Returns:
        The network, sparse at random places, and what became of its cost.

    Raises:
        InputError: a pattern of ``dense`` fits no layer; what stays dense costs all there is; a layer cannot be
            replaced, is never called with the sample, or would be left without a weight.
    """
    network = make(1.0)
    before = cost_of(network, sample)
    _check_patterns(network, settings.dense)
    if settings.member == "wide":
        network = make(settings.factor)
        chosen = [layer for layer in prunable(network) if not _fits(layer.name, settings.dense)]
    else:
        chosen = _replace(network, settings)
    if not chosen:
        raise InputError(f"dense={settings.dense} leaves no layer to make sparse")
    after = cost_of(network, sample)
    sparse = sum(after.of_layers[layer.name] for layer in chosen)
    _say_if_nothing_grew(before, after, settings)
    stays = after.flops - sparse
    budget = before.flops - stays
    costs = {layer.name: after.of_layers[layer.name] // layer.parameter.numel() for layer in chosen}
    if budget < sum(costs.values()):
        raise InputError(
            f"sparsity={settings.sparsity}: of the dense network's {before.flops} multiply-adds {max(budget, 0)} are "
            f"left for {len(chosen)} sparse layers (what stays dense costs {stays}), and a weight in each costs "
            f"{sum(costs.values())}; use a smaller sparsity, or leave fewer layers dense"
        )
    counts = spend(chosen, min(budget, sparse), costs, settings.profile)
    rescale = settings.rescale and settings.member in ("wide", "factorized")
    start_sparse(network, counts, seed=settings.seed, rescale=rescale)
    size = sum(layer.parameter.numel() for layer in chosen)
    return Transformed(network, before, cost_of(network, sample), settings.sparsity, 1 - sum(counts.values()) / size)


def _replace(network: nn.Module, settings: SparseIftSettings) -> list[WeightLayer]:
    """Put members in the place of layers; the layers in them that are to be sparse, as the network names them."""
    parts: set[nn.Module] = set()
    for layer in prunable(network):
        if _fits(layer.name, settings.dense):
            continue
        if not isinstance(layer.module, nn.Linear | nn.Conv2d):
            raise InputError(f"{layer.name} is a {type(layer.module).__name__}, not Linear or Conv2d: name it in dense")
        member = _member(layer.module, settings)
        parent, _, own = layer.name.rpartition(".")
        setattr(network.get_submodule(parent), own, member)
        parts |= set(member.sparse_parts)
    return [layer for layer in prunable(network) if layer.module in parts]


def _member(layer: Dense, settings: SparseIftSettings) -> SparseParallel | SparseFactorized | SparseDoped:
    if settings.member == "parallel":
        return SparseParallel(layer, settings.sparsity, settings.between)
    if settings.member == "factorized":
        return SparseFactorized(layer, settings.sparsity, settings.between)
    return SparseDoped(layer, settings.sparsity)


def _alike(layer: Dense, inputs: int, outputs: int, *, pointwise: bool = False, bias: bool | None = None) -> Dense:
    """A new layer of the same kind with other widths; a convolution's second factor looks at one place only."""
    with_bias = layer.bias is not None if bias is None else bias
    if isinstance(layer, nn.Linear):
        return nn.Linear(inputs, outputs, with_bias).to(layer.weight)
    if pointwise:
        return nn.Conv2d(inputs, outputs, 1, bias=with_bias).to(layer.weight)
    geometry: dict[str, Any] = {
        name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    }
    return nn.Conv2d(inputs, outputs, bias=with_bias, **geometry).to(layer.weight)


def _widths(layer: Dense) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _places(layer: Dense) -> int:
    """Of a kernel: k squared in the paper."""
    return 1 if isinstance(layer, nn.Linear) else math.prod(layer.kernel_size)


def _check(layer: Dense, sparsity: float) -> None:
    _check_sparsity(sparsity)
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        raise InputError(f"a convolution in {layer.groups} groups has no transformation: leave it dense")


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity={sparsity}: use a share of weights, at least 0 and below 1, such as 0.75")


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _check_patterns(network: nn.Module, patterns: tuple[str, ...]) -> None:
    names = [layer.name for layer in prunable(network)]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise InputError(f"dense={pattern!r} fits none of the layers {', '.join(names)}")


def _say_if_nothing_grew(before: Cost, after: Cost, settings: SparseIftSettings) -> None:
    if settings.sparsity > 0 and after.flops <= before.flops:
        warnings.warn(
            f"at sparsity={settings.sparsity} the {settings.member} network is no larger than the dense one, since "
            "widths, branches and ranks are whole numbers: it is the dense one",
            stacklevel=3,
        )
