"""Which weights of a network can be pruned, and how each is seen as a matrix ``[out, in]``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.weights.patterns import NofMPattern


@dataclass(frozen=True, eq=False)
class WeightLayer:
    """A module whose ``weight`` can be pruned.

    Everything in the room sees the weight as a matrix ``[out, in]``, the sums of the forward pass running along ``in``.
    A convolution's is ``[out, height * width * in]`` with its input channels last, so that a group of consecutive
    columns is one of channels at one place of the kernel.

    Attributes:
        name: dotted path from the network.
        module: that holds the weight.
    """

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """The weight as the module uses it: masked, where it has a mask."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)  # ``prunable`` has looked
        return weight

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter behind the weight, which an optimiser moves."""
        parametrizations = getattr(self.module, "parametrizations", None)
        found = self.module.weight if parametrizations is None else parametrizations["weight"].original
        assert isinstance(found, nn.Parameter)
        return found

    def matrix(self) -> Float[Tensor, "out in"]:
        """The weight as a matrix; a view where the layout allows it."""
        return self.to_matrix(self.weight)

    def to_matrix(self, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "out in"]:
        """A tensor of the weight's shape, such as a mask or a gradient, as a matrix."""
        if _is_transposed(self.module):
            return tensor.T
        if tensor.ndim > 2:
            return tensor.movedim(1, -1).reshape(tensor.shape[0], -1)
        return tensor

    def from_matrix(self, matrix: Shaped[Tensor, "out in"]) -> Shaped[Tensor, "..."]:
        """A matrix back in the weight's own shape."""
        if _is_transposed(self.module):
            return matrix.T
        shape = self.parameter.shape  # not the weight's, which may be about to be made from this
        if len(shape) > 2:
            return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        return matrix

    @property
    def summed_over(self) -> dict[str, int]:
        """How many terms at one place of the kernel the forward product sums (``in``), and the backward one (``out``).

        In a convolution of several groups these are the channels of one group.
        """
        outputs, inputs = self.to_matrix(self.parameter).shape if self.parameter.ndim == 2 else self.parameter.shape[:2]
        return {"in": inputs, "out": outputs // getattr(self.module, "groups", 1)}

    def check_groups(self, pattern: NofMPattern) -> None:
        """Refuse an N:M pattern whose groups would lie across places of the kernel, or across groups of channels.

        Raises:
            InputError: names the layer and the dimension.
        """
        size = self.summed_over[pattern.dim]
        pattern.check((size, size), self.name)

    @torch.no_grad()
    def set_matrix(self, matrix: Float[Tensor, "out in"]) -> None:
        """Overwrite the weight in place."""
        self.parameter.copy_(self.from_matrix(matrix))


def prunable(
    network: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    where: Callable[[str, nn.Module], bool] | None = None,
) -> list[WeightLayer]:
    """The linear and convolutional layers of a network, first to last.

    Left out are depthwise convolutions (one input channel a filter: hardly any parameters, and each of them dear),
    embeddings, norms and biases. A language model's output head is left out too, tied to the embedding or not: whoever
    wants it names it in ``include``.

    Args:
        network: any module; a transformers model too.
        include: patterns of names (``"*.mlp.*"``) to take.
        exclude: patterns to leave out again.
        where: instead or besides, a function of name and module.

    Returns:
        Each parameter once, however many modules share it.

    Raises:
        InputError: nothing is left; a layer shares its weight with an embedding.
    """
    head_of: Any = getattr(network, "get_output_embeddings", lambda: None)
    head = head_of()
    embedded = {id(each.weight): name for name, each in network.named_modules() if isinstance(each, nn.Embedding)}
    found, seen = [], set()
    for name, module in network.named_modules():
        if not _can_be_pruned(module):
            continue
        if not any(fnmatch(name, each) for each in include) or any(fnmatch(name, each) for each in exclude):
            continue
        if module is head and name not in include:
            continue
        if where is not None and not where(name, module):
            continue
        layer = WeightLayer(name, module)
        if id(layer.parameter) in embedded:
            raise InputError(
                f"{name} shares its weight with the embedding {embedded[id(layer.parameter)]}: pruning one would prune "
                "the other; leave it out (exclude), or untie them first"
            )
        if id(layer.parameter) in seen:
            continue
        seen.add(id(layer.parameter))
        found.append(layer)
    if not found:
        raise InputError(
            f"{type(network).__name__} has no linear or convolutional layer left to prune under "
            f"include={list(include)} and exclude={list(exclude)}: give patterns that match names such as "
            f"{', '.join(_some_names(network)) or '(it has none)'}"
        )
    return found


def has_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies what it is given with a weight: linear layers and convolutions of all kinds."""
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or _is_transposed(module)


def _can_be_pruned(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.conv._ConvNd):
        return not module.transposed and not module.groups == module.in_channels > 1
    return has_matrix(module)


def _is_transposed(module: nn.Module) -> bool:
    """GPT-2's linear layer, which transformers keeps as ``[in, out]``; under masks its class has a longer name."""
    return any(kind.__name__ == "Conv1D" and "transformers" in kind.__module__ for kind in type(module).__mro__)


def _some_names(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if _can_be_pruned(module)][:3]
