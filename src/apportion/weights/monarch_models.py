"""Monarch layers in a whole model: dense to sparse, sparse to dense, and layers drawn anew. See `monarch`.

The three uses of the paper::

    replace_linears(model, "mlp", project=False)     # from scratch: other layers in the same places
    replace_linears(model, "mlp")                    # dense to sparse: project, then finetune
    densify(model, optimizer)                        # sparse to dense: train on with dense matrices

Any `torch.nn.Module` will do, a transformers model too. Only layers of the very class `torch.nn.Linear` are replaced:
what a subclass does with its weight, nobody knows. (GPT-2's ``Conv1D`` is no such layer.)
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from apportion.errors import InputError
from apportion.weights.monarch import MonarchLinear

Where: TypeAlias = str | Callable[[str, nn.Linear], bool]
"""Which layers: a regular expression that is found in a layer's name, or a function of name and layer."""


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
    module: nn.Module,
    where: Where,
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
        module: is changed.
        where: which layers.
        nblocks: see `MonarchShape.of`.
        rank: see `MonarchShape.of`.
        project: take the nearest Monarch matrix and the bias; otherwise draw both anew.
        match_linear: of layers drawn anew, see `MonarchLinear`.

    Raises:
        InputError: nothing fits ``where``; a layer's weight is tied to another layer's; a shape that cannot be.
    """
    chosen = _chosen(module, where)
    made: dict[nn.Module, nn.Module] = {}
    found = []
    for name, linear in chosen.items():
        try:
            layer = (
                MonarchLinear.from_linear(linear, nblocks=nblocks, rank=rank)
                if project
                else _drawn_anew(linear, nblocks=nblocks, rank=rank, match_linear=match_linear)
            )
        except InputError as error:
            raise InputError(f"layer {name}: {error}") from None
        made[linear] = layer
        relative = _relative_error(linear, layer) if project else None
        found.append(Replaced(name, linear.weight.numel(), layer.shape.parameters, relative))
    _exchange(module, made)
    return found


def densify(module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[str]:
    """Put a dense layer of the same function in place of every Monarch layer, in place; returns their names.

    Biases stay the parameters that they were. In the optimiser each dense weight takes the place of its first factor,
    in that one's group, and starts without state: moments of factors mean nothing for their product. With Adam the
    first steps after it are therefore as large as the learning rate allows; warm up again. Weight decay now acts on the
    matrix, and no longer on its factors. `apportion.training.train` makes its own optimiser: train in two calls.

    Args:
        module: is changed.
        optimizer: that trains it, if training goes on with the same one.

    Raises:
        InputError: there is no Monarch layer in it, or the module is one itself.
    """
    if isinstance(module, MonarchLinear):
        raise InputError("module is a MonarchLinear itself, which has no place to put another in: use its to_linear()")
    layers = {name: each for name, each in module.named_modules() if isinstance(each, MonarchLinear)}
    if not layers:
        raise InputError(f"module ({type(module).__name__}) has no MonarchLinear: there is nothing to make dense")
    made: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        dense = layer.to_linear()
        dense.bias = layer.bias  # type: ignore[assignment]
        made[layer] = dense
        if optimizer is not None:
            _hand_over(optimizer, layer, dense.weight)
    _exchange(module, made)
    return list(layers)


def _chosen(module: nn.Module, where: Where) -> dict[str, nn.Linear]:
    """The layers to replace, by name."""
    if type(module) is nn.Linear:
        raise InputError("module is a Linear itself, which has no place to put another in: MonarchLinear.from_linear")
    linears = {name: each for name, each in module.named_modules() if type(each) is nn.Linear}
    if isinstance(where, str):
        try:
            pattern = re.compile(where)
        except re.error as error:
            raise InputError(f"where={where!r} is no regular expression: {error}") from None
        chosen = {name: each for name, each in linears.items() if pattern.search(name)}
    else:
        chosen = {name: each for name, each in linears.items() if where(name, each)}
    if not chosen:
        some = ", ".join(list(linears)[:8]) or "none at all"
        raise InputError(f"where={where!r} fits no torch.nn.Linear of this {type(module).__name__}; it has {some}")
    owners: dict[nn.Parameter, set[str]] = {}
    for name, parent in module.named_modules():
        for parameter in parent.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(name)
    for name, linear in chosen.items():
        others = owners[linear.weight] - {name}
        if others:
            raise InputError(
                f"layer {name}: its weight is also that of {', '.join(sorted(others))}; replacing it would untie them: "
                "leave it out in where"
            )
    return chosen


def _drawn_anew(linear: nn.Linear, **settings: Any) -> MonarchLinear:
    layer = MonarchLinear(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
        **settings,
    )
    return layer.requires_grad_(linear.weight.requires_grad).train(linear.training)


@torch.no_grad()
def _relative_error(linear: nn.Linear, layer: MonarchLinear) -> float:
    size = linear.weight.double().norm() if not linear.weight.is_complex() else linear.weight.norm()
    return float((linear.weight - layer.weight).norm() / size) if size else 0.0


def _exchange(module: nn.Module, made: dict[nn.Module, nn.Module]) -> None:
    """Put new modules in all places of old ones."""
    for parent, name, child in list(_places(module)):
        if child in made:
            setattr(parent, name, made[child])


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every parent with the names of its children; a child that is in several places comes several times."""
    for parent in module.modules():
        for name, child in parent._modules.items():
            if child is not None:
                yield parent, name, child


def _hand_over(optimizer: torch.optim.Optimizer, layer: MonarchLinear, weight: nn.Parameter) -> None:
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
