"""Monarch layers in a whole model: dense to sparse, sparse to dense, and layers drawn anew. See `monarch`.

The three uses of the paper::

    replace_linears(model, ["*.mlp.*"], project=False)  # from scratch: other layers in the same places
    replace_linears(model, ["*.mlp.*"])                 # dense to sparse: project, then finetune
    densify(model, optimizer)                           # sparse to dense: train on with dense matrices

Any `torch.nn.Module` will do, a transformers model too. Replaced are layers of the very class `torch.nn.Linear`, and
GPT-2's ``Conv1D``; what a subclass does with its weight, nobody knows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.weights.layers import WeightLayer, prunable
from apportion.weights.monarch import MonarchLinear


@dataclass(frozen=True)
class Replaced:
    """A layer that has become a Monarch layer.

    Attributes:
        name: where it is.
        dense_parameters: its weight had.
        parameters: both factors have.
        error: of the projection, relative to the weight's Frobenius norm; None where the layer was drawn anew.
    """

    name: str
    dense_parameters: int
    parameters: int
    error: float | None


def replace_linears(
    network: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    where: Callable[[str, nn.Module], bool] | None = None,
    *,
    nblocks: int = 4,
    rank: int | None = None,
    project: bool = True,
    match_linear: bool = False,
) -> list[Replaced]:
    """Put Monarch layers in place of some linear layers, in place; all of them or, on an error, none.

    Parameters keep their dtype, device and whether they want gradients. An optimiser that was made before knows only
    the old ones: make it afterwards. Fused projections (queries, keys and values in one matrix) would be divided into
    blocks across their parts; split them first.

    Args:
        network: is changed.
        include: patterns of the layers' names, see `prunable`.
        exclude: patterns to leave out again.
        where: instead or besides, a function of name and module.
        nblocks: see `MonarchShape.of`.
        rank: see `MonarchShape.of`.
        project: take the nearest Monarch matrix and the bias; otherwise draw both anew.
        match_linear: of layers drawn anew, see `MonarchLinear`.

    Raises:
        InputError: no layer is left; a layer's weight is also another's; a shape that cannot be.
    """
    if _replaceable(network):
        raise InputError("network is a linear layer itself, which has no place to put another in: use from_linear")

    def fits(name: str, module: nn.Module) -> bool:
        return _replaceable(module) and (where is None or where(name, module))

    made: dict[nn.Module, nn.Module] = {}
    found = []
    for layer in prunable(network, include, exclude, fits):
        _require_alone(network, layer)
        bias = layer.module.bias
        assert bias is None or isinstance(bias, Tensor)
        try:
            if project:
                new = MonarchLinear.from_dense(layer.matrix(), bias, nblocks=nblocks, rank=rank)
            else:
                new = _drawn_anew(layer.matrix(), bias, nblocks, rank, match_linear)
        except InputError as error:
            raise InputError(f"layer {layer.name}: {error}") from None
        made[layer.module] = new.trained_like(layer.weight, bias).train(layer.module.training)
        error_left = _relative_error(layer.matrix(), new) if project else None
        found.append(Replaced(layer.name, layer.weight.numel(), new.shape.parameters, error_left))
    _exchange(network, made)
    return found


def densify(network: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[str]:
    """Put a dense layer of the same function in place of every Monarch layer, in place; returns their names.

    Biases stay the parameters that they were. In the optimiser each dense weight takes the place of its first factor,
    in that one's group, and starts without state: moments of factors mean nothing for their product. With Adam the
    first steps after it are therefore as large as the learning rate allows; warm up again. Weight decay now acts on the
    matrix, and no longer on its factors. `apportion.training.train` makes its own optimiser: train in two calls.

    Args:
        network: is changed.
        optimizer: that trains it, if training goes on with the same one.

    Raises:
        InputError: there is no Monarch layer in it, or the network is one itself.
    """
    if isinstance(network, MonarchLinear):
        raise InputError("network is a MonarchLinear itself, which has no place to put another in: use its to_linear()")
    layers = {name: each for name, each in network.named_modules() if isinstance(each, MonarchLinear)}
    if not layers:
        raise InputError(f"network ({type(network).__name__}) has no MonarchLinear: there is nothing to make dense")
    made: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        dense = layer.to_linear()
        dense.register_parameter("bias", layer.bias)
        made[layer] = dense
        if optimizer is not None:
            _hand_over(optimizer, layer, dense.weight)
    _exchange(network, made)
    return list(layers)


def _replaceable(module: nn.Module) -> bool:
    kind = type(module)
    return kind is nn.Linear or (kind.__name__ == "Conv1D" and "transformers" in kind.__module__)


def _require_alone(network: nn.Module, layer: WeightLayer) -> None:
    """Raise if another module has the same weight: replaced, they would no longer be tied."""
    others = [
        name
        for name, module in network.named_modules()
        if module is not layer.module and any(each is layer.weight for each in module.parameters(recurse=False))
    ]
    if others:
        raise InputError(
            f"layer {layer.name}: its weight is also that of {', '.join(others)}; replacing it would untie them: "
            "leave it out (exclude)"
        )


def _drawn_anew(
    weight: Tensor, bias: Tensor | None, nblocks: int, rank: int | None, match_linear: bool
) -> MonarchLinear:
    return MonarchLinear(
        weight.shape[1],
        weight.shape[0],
        bias is not None,
        nblocks=nblocks,
        rank=rank,
        match_linear=match_linear,
        device=weight.device,
        dtype=weight.dtype,
    )


@torch.no_grad()
def _relative_error(weight: Tensor, layer: MonarchLinear) -> float:
    size = float(weight.norm())
    return float((weight - layer.weight).norm()) / size if size else 0.0


def _exchange(network: nn.Module, made: dict[nn.Module, nn.Module]) -> None:
    """Put new modules in all places of old ones."""
    for parent, name, child in list(_places(network)):
        if child in made:
            setattr(parent, name, made[child])


def _places(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every parent with the names of its children; a child that is in several places comes several times."""
    for parent in network.modules():
        for name, child in parent._modules.items():
            if child is not None:
                yield parent, name, child


def _hand_over(optimizer: torch.optim.Optimizer, layer: MonarchLinear, weight: Tensor) -> None:
    """Let ``weight`` take the place of a layer's factors in the optimiser, without their state."""
    for factor in (layer.first, layer.second):
        optimizer.state.pop(factor, None)
    for group in optimizer.param_groups:
        known = group["params"]
        names = group.get("param_names", [""] * len(known))
        kept = []
        for parameter, name in zip(known, names, strict=True):
            if parameter is layer.first:
                kept.append((weight, name.removesuffix("first") + "weight" if name else name))
            elif parameter is not layer.second:
                kept.append((parameter, name))
        group["params"] = [parameter for parameter, _ in kept]
        if "param_names" in group:
            group["param_names"] = [name for _, name in kept]
