"""The way past torch's dispatcher, which takes longer than the work where one token is decoded."""

import torch
from torch import Tensor


def runs_directly(*tensors: Tensor) -> bool:
    """Whether a kernel of the CPU may be called as it is: the tensors lie there, nobody traces or wants a gradient."""
    if torch.compiler.is_compiling():
        return False
    wants_gradients = torch.is_grad_enabled()
    return all(
        type(each) is Tensor and each.is_cpu and not (wants_gradients and each.requires_grad) for each in tensors
    )
