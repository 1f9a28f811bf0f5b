"""What a network costs: multiply-adds of one example, parameters, and the values that its layers put out."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.weights.layers import has_matrix
from apportion.weights.masks import masks_of


@dataclass(frozen=True)
class Cost:
    """What one example costs in the linear and convolutional layers of a network, as `cost_of` counts it.

    Attributes:
        flops: multiply-adds; a pruned weight costs none, a convolution's padding counts as input. Products without a
            weight (attention's), biases and norms are left out.
        dense_flops: the same as if nothing were pruned.
        parameters: of the whole network, pruned ones too: what must be held to train it.
        kept: parameters that are not pruned.
        activations: values that the layers put out.
        of_layers: multiply-adds by layer.
    """

    flops: int
    dense_flops: int
    parameters: int
    kept: int
    activations: int
    of_layers: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def cost_of(network: nn.Module, sample: Tensor) -> Cost:
    """Count what one example costs, by letting some through.

    Counted are all layers, also those that `prunable` leaves out: depthwise convolutions, a language model's head.

    Args:
        network: any; a layer that is called more than once counts as often.
        sample: input of the network, its rows examples.

    Raises:
        InputError: a layer is never called, so that nobody can tell what it costs.
    """
    layers = {name: each for name, each in network.named_modules() if has_matrix(each)}
    applied, put_out = _watch(network, layers, sample)
    masks = masks_of(network)
    of_layers, dense, pruned = {}, 0, 0
    for name, layer in layers.items():
        if name not in applied:
            raise InputError(f"{name} is never called as a module with this sample: what it costs cannot be counted")
        size = layer.weight.numel()
        kept = int(masks[name].sum()) if name in masks else size
        pruned += size - kept
        dense += size * applied[name]
        of_layers[name] = kept * applied[name]
    parameters = sum(each.numel() for each in network.parameters())
    return Cost(sum(of_layers.values()), dense, parameters, parameters - pruned, sum(put_out.values()), of_layers)


def _watch(network: nn.Module, layers: dict[str, Any], sample: Tensor) -> tuple[Counter[str], Counter[str]]:
    """How often a weight of each layer is applied to one example, and how many values the layer puts out."""
    applied: Counter[str] = Counter()
    put_out: Counter[str] = Counter()

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # A weight is applied at every place of the output, or of the input where it is the output that overlaps.
            places = inputs[0] if getattr(module, "transposed", False) else output
            is_convolution = isinstance(module, nn.modules.conv._ConvNd)
            applied[name] += places.numel() // places.shape[1 if is_convolution else -1] // len(sample)
            put_out[name] += output.numel() // len(sample)

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    modes = {each: each.training for each in network.modules()}
    try:
        network.eval()(sample)
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
    return applied, put_out
