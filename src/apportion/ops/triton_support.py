"""What the CUDA kernels share: whether Triton is there to compile them, and on which GPU they are launched."""

import functools
import importlib.util
import warnings

import torch
from torch import Tensor


@functools.cache
def triton_is_missing() -> bool:
    """Whether the reference must run on CUDA tensors because Triton is not installed; says so once."""
    if importlib.util.find_spec("triton") is not None:
        return False
    warnings.warn(
        "triton is not installed, so apportion's slow reference implementations run on CUDA tensors; "
        "`pip install 'apportion[gpu]'` brings the kernels",
        RuntimeWarning,
        stacklevel=2,
    )
    return True


def on_device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Make the tensor's GPU the current one, where Triton launches kernels; nothing for a tensor on the CPU."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
