"""Stops a run whose loss or gradient is no longer a number, before it spoils a checkpoint."""

import torch
from jaxtyping import Float
from torch import Tensor


class NonFiniteLossError(FloatingPointError):
    """The loss or its gradient became NaN or infinite.

    Attributes:
        step: the first such step (1-based, as in the log).
    """

    def __init__(self, step: int, learning_rate: float, kept: str) -> None:
        self.step = step
        super().__init__(
            f"the loss or its gradient became NaN or infinite at step {step}: lower learning_rate={learning_rate:g}, "
            f"raise warmup_fraction, or look for NaN in the batch of that step; {kept}"
        )


class FirstNonFinite:
    """Remembers, on the device, the first step whose loss or gradient was not finite.

    Reading a number back from an accelerator makes the processor wait for it, so ``watch`` only notes and
    ``found`` reads.
    """

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), -1, dtype=torch.int64, device=device)

    def watch(self, loss: Float[Tensor, ""], gradient_norm: Float[Tensor, ""], step: int) -> None:
        """Note ``step`` if it is the first that went wrong."""
        fine = torch.isfinite(loss.detach()) & torch.isfinite(gradient_norm)
        self._first = torch.where(fine | (self._first >= 0), self._first, step)

    def found(self) -> int | None:
        """The first step that went wrong, or None; waits for the device."""
        first = int(self._first)
        return first if first >= 0 else None
