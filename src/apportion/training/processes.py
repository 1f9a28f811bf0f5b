"""What the loop asks of the processes that train a module: the answers of one that works alone."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.training.checkpoint import Checkpoints


class Processes:
    """Those who train one module. This class stands for a process alone; a subclass for several that share the work.

    The loop runs in every process and calls each method in all of them at the same point, so an answer that needs the
    others may be a collective operation. All must give the same answer to the same call.

    Attributes:
        writes: whether this process keeps the log, shows progress and writes the files of the run but checkpoints.
    """

    writes = True

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Float[Tensor, ""]:
        """The norm of all gradients together; sparse ones are coalesced."""
        return torch.nn.utils.get_total_norm(gradient_values(parameters))

    def any_of(self, here: bool) -> bool:
        """Whether it holds in at least one process."""
        return here

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the module or the optimiser, by name, in the shape they have over all processes."""
        return dict(tensors)

    def checkpoints(self, folder: Path, keep: int) -> Checkpoints:
        """Where the run's checkpoints are kept."""
        return Checkpoints(folder, keep)


def gradient_values(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients there are, of a sparse (coalesced) one the values that it holds: all others are zero."""
    gradients = (each.grad for each in parameters if each.grad is not None)
    return [each._values() if each.is_sparse else each for each in gradients]
