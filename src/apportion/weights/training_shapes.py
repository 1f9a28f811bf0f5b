"""What a training step multiplies: the three products of every layer, and which of them N:M weights make smaller.

A layer costs a forward product (FF), the gradient of its input (BP) and that of its weights (WU). Here they are matrix
products ``A[P, K] @ B[K, Q]``, of a network at hand (`shapes_of`) or of a published one, written down as a table:

| product | P | K | Q | weights N:M along K |
|---|---|---|---|---|
| FF | batch × output positions | inputs × kernel | outputs | if the inputs are a multiple of M |
| BP | batch × input positions | outputs × kernel | inputs | if the outputs are; the first layer has none |
| WU | outputs | batch × output positions | inputs × kernel | never |

The BP of a convolution with a stride is done over all input positions, as by a machine that inserts zeros; such zeros
take its time, but do not count as multiply-adds.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from apportion.errors import InputError

Op = Literal["FF", "BP", "WU"]
OPS: tuple[Op, ...] = ("FF", "BP", "WU")


@dataclass(frozen=True)
class LayerShape:
    """One layer.

    Attributes:
        name: of the layer.
        inputs, outputs: channels, of one group where there are several.
        kernel: places of the kernel.
        positions_in, positions_out: places of an example's input and output: height × width, or tokens.
        repeat: how many such products stand side by side: groups of a convolution, heads of an attention.
        weighted: False for a product of two activations (attention), which each example has for itself.
        prunable: False where weights stay dense both ways, as the first layer's and the classifier's do.
        first: needs no gradient of its input.
        elementwise: operations on each output beside the products, such as a norm and a non-linearity; going backward
            has as many again.
    """

    name: str
    inputs: int
    outputs: int
    kernel: int = 1
    positions_in: int = 1
    positions_out: int = 1
    repeat: int = 1
    weighted: bool = True
    prunable: bool = True
    first: bool = False
    elementwise: int = 2

    @property
    def weights(self) -> int:
        """How many it has."""
        return self.inputs * self.outputs * self.kernel * self.repeat if self.weighted else 0

    @property
    def ops(self) -> tuple[Op, ...]:
        """The products it needs."""
        return ("FF", "WU") if self.first else OPS

    def product(self, op: Op, batch: int) -> tuple[int, int, int, int]:
        """P, K and Q of a product, and how often it is done.

        Raises:
            InputError: there is no such product.
        """
        if op not in OPS:
            raise InputError(f"op={op!r}: the products of training are {', '.join(OPS)}")
        times = self.repeat if self.weighted else self.repeat * batch
        places = (batch if self.weighted else 1) * self.positions_out
        if op == "FF":
            return places, self.inputs * self.kernel, self.outputs, times
        if op == "BP":
            return places // self.positions_out * self.positions_in, self.outputs * self.kernel, self.inputs, times
        return self.outputs, places, self.inputs * self.kernel, times

    def macs(self, op: Op, batch: int) -> int:
        """Multiply-adds of a product; all three need as many."""
        p, k, q, times = self.product("FF" if op == "BP" else op, batch)
        return p * k * q * times


@dataclass(frozen=True)
class WeightSparsity:
    """Which products have N:M weights.

    Attributes:
        n, m: weights that stay, of how many.
        forward: in FF, groups along the inputs.
        backward: in BP, groups along the outputs.

    Raises:
        InputError: a value that cannot work.
    """

    n: int
    m: int
    forward: bool = True
    backward: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise InputError(f"n={self.n}, m={self.m}: use 1 <= n <= m, such as 2:8")

    def holds(self, shape: LayerShape, op: Op) -> bool:
        """Whether a product's weights are N:M; where M does not divide they are dense."""
        if self.n == self.m or not (shape.weighted and shape.prunable):
            return False
        if op == "FF":
            return self.forward and shape.inputs % self.m == 0
        return op == "BP" and self.backward and shape.outputs % self.m == 0

    @property
    def ideal_cost(self) -> float:
        """Multiplications of a layer, of a dense one's: ``(rho_ff + rho_bp + 1) / 3``."""
        density = self.n / self.m
        return ((density if self.forward else 1) + (density if self.backward else 1) + 1) / 3


def training_macs(layers: Sequence[LayerShape], batch: int = 1, sparsity: WeightSparsity | None = None) -> float:
    """Multiply-adds of a training step, leaving out those with pruned weights."""
    total = 0.0
    for shape in layers:
        for op in shape.ops:
            sparse = sparsity is not None and sparsity.holds(shape, op)
            total += shape.macs(op, batch) * (sparsity.n / sparsity.m if sparsity is not None and sparse else 1)
    return total


@torch.no_grad()
def shapes_of(network: nn.Module, example: Any, pruned: Collection[str] | None = None) -> list[LayerShape]:
    """The linear and convolutional layers of a network, in the order in which it calls them.

    Args:
        network: is run once, in eval mode.
        example: its input, with a batch dimension first.
        pruned: names of layers that become N:M; all of them if None.
    """
    found: list[LayerShape] = []
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    names = {id(each): name for name, each in network.named_modules() if isinstance(each, kinds)}

    def look(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        name, groups, weight = names[id(module)], getattr(module, "groups", 1), module.get_parameter("weight")
        outputs, inputs = weight.shape[:2]  # a convolution's second dimension is of one group
        channels = inputs * groups
        found.append(
            LayerShape(
                name,
                inputs,
                outputs // groups,
                weight[0, 0].numel(),
                given[0].numel() // (len(given[0]) * channels),
                output.numel() // (len(output) * outputs),
                repeat=groups,
                prunable=pruned is None or name in pruned,
                first=not found,
            )
        )

    handles = [each.register_forward_hook(look) for each in network.modules() if isinstance(each, kinds)]
    before = network.training
    try:
        network.eval()(example)
    finally:
        network.train(before)
        for handle in handles:
            handle.remove()
    return found


class _Table:
    """Writes a network down, layer by layer, and keeps the size of the picture."""

    def __init__(self, size: int) -> None:
        self.size, self.layers = size, list[LayerShape]()

    def convolution(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, size: int | None = None) -> None:
        """Padded so that the stride alone makes the picture smaller; ``size`` for a side branch."""
        given = size or self.size
        made = -(-given // stride)
        first = not self.layers
        name = f"{len(self.layers)}: {kernel}x{kernel}, {inputs}-{outputs}"
        self.layers.append(
            LayerShape(name, inputs, outputs, kernel**2, given**2, made**2, first=first, prunable=not first)
        )
        if size is None:
            self.size = made

    def pool(self, by: int = 2) -> None:
        self.size //= by

    def classifier(self, inputs: int, outputs: int) -> list[LayerShape]:
        self.layers.append(LayerShape("classifier", inputs, outputs, prunable=False, elementwise=1))
        return self.layers


def resnet9(size: int = 32, classes: int = 10) -> list[LayerShape]:
    """ResNet-9 as it is trained on CIFAR-10."""
    table = _Table(size)
    table.convolution(3, 64)
    for inputs, outputs, residual in ((64, 128, True), (128, 256, False), (256, 512, True)):
        table.convolution(inputs, outputs)
        table.pool()
        for _ in range(2 * residual):
            table.convolution(outputs, outputs)
    return table.classifier(512, classes)


def vgg19(size: int = 32, classes: int = 100) -> list[LayerShape]:
    """VGG-19 for small pictures: one linear layer at the end."""
    table, channels = _Table(size), 3
    for width, depth in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(depth):
            table.convolution(channels, width)
            channels = width
        table.pool()
    return table.classifier(512, classes)


def resnet18(size: int = 64, classes: int = 200) -> list[LayerShape]:
    """ResNet-18; pictures of at most 64 pixels get a 3 x 3 stem without pooling."""
    table, channels = _Table(size), 64
    _stem(table)
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for block in range(2):
            own, given = (stride if block == 0 else 1), table.size
            table.convolution(channels, width, stride=own)
            table.convolution(width, width)
            if own > 1:
                table.convolution(channels, width, 1, own, given)
            channels = width
    return table.classifier(512, classes)


def resnet50(size: int = 224, classes: int = 1000) -> list[LayerShape]:
    """ResNet-50 with its stride in the 3 x 3 convolutions, as torchvision has it."""
    table, channels = _Table(size), 64
    _stem(table)
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(depth):
            own, given = (stride if block == 0 else 1), table.size
            table.convolution(channels, width, 1)
            table.convolution(width, width, stride=own)
            table.convolution(width, 4 * width, 1)
            if block == 0:
                table.convolution(channels, 4 * width, 1, own, given)
            channels = 4 * width
    return table.classifier(2048, classes)


def vit_small(size: int = 32, patch: int = 4, classes: int = 100) -> list[LayerShape]:
    """ViT-S: 12 blocks of width 384 with 6 heads; a class token beside the patches."""
    tokens, width, heads = (size // patch) ** 2 + 1, 384, 6
    head = width // heads
    patches = LayerShape(
        "patches", 3 * patch**2, width, 1, tokens - 1, tokens - 1, prunable=False, first=True, elementwise=1
    )
    layers = [patches]

    def linear(name: str, inputs: int, outputs: int, elementwise: int = 1) -> None:
        layers.append(LayerShape(name, inputs, outputs, 1, tokens, tokens, elementwise=elementwise))

    for block in range(12):
        linear(f"{block}.qkv", width, 3 * width)
        # Scores and values are products of activations: nothing is pruned. A softmax is about three operations.
        layers.append(LayerShape(f"{block}.scores", head, tokens, 1, tokens, tokens, heads, False, elementwise=3))
        layers.append(LayerShape(f"{block}.values", tokens, head, 1, tokens, tokens, heads, False, elementwise=0))
        linear(f"{block}.output", width, width, 2)
        linear(f"{block}.up", width, 4 * width)
        linear(f"{block}.down", 4 * width, width, 2)
    return [*layers, LayerShape("classifier", width, classes, prunable=False, elementwise=1)]


def _stem(table: _Table) -> None:
    if table.size <= 64:
        table.convolution(3, 64)
    else:
        table.convolution(3, 64, 7, 2)
        table.pool()


NETWORKS: dict[str, Callable[[], list[LayerShape]]] = {
    "ResNet-9, 32": resnet9,
    "VGG-19, 32": vgg19,
    "ViT-S, 32": vit_small,
    "ResNet-18, 64": resnet18,
    "ResNet-50, 224": resnet50,
}
"""The five networks of the BDWP paper by name and picture size."""
