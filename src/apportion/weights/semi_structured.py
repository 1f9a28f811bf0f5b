"""2:4 weights on GPUs that multiply by them, through PyTorch's semi-structured tensors; **not run on a GPU yet**.

Two of four consecutive weights are kept, and Ampere's tensor cores (and later ones) skip the others. PyTorch's kernels
want 16-bit numbers and whole tiles; where anything is missing, a 2:4 weight is read as a bitmap like any other.
"""

import functools

import torch
from torch import Tensor

_MULTIPLE = 64  # of rows and columns: what both of PyTorch's libraries (cuSPARSELt, CUTLASS) take


def why_not(weight: Tensor) -> str | None:
    """Why a 2:4 weight cannot be multiplied by here; None where it can."""
    if weight.device.type != "cuda":
        return "not on a GPU"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"of {weight.dtype}, neither float16 nor bfloat16"
    if any(size % _MULTIPLE or not size for size in weight.shape):
        return f"rows and columns are not multiples of {_MULTIPLE}"
    return _works(weight.device.index or 0, weight.dtype)


def accelerated(weight: Tensor) -> Tensor:
    """The weight as a tensor that ``nn.functional.linear`` takes; ask `why_not` first."""
    from torch.sparse import to_sparse_semi_structured

    return to_sparse_semi_structured(weight.contiguous())


@functools.cache
def _works(device: int, dtype: torch.dtype) -> str | None:
    """Try a small product: versions of PyTorch and of its libraries differ too much to be told by their numbers."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "a GPU from before Ampere"
    weight = torch.tensor([1, 0, 2, 0], dtype=dtype, device=f"cuda:{device}").repeat(128, 32)
    x = torch.ones(64, 128, dtype=dtype, device=weight.device)
    try:
        found = torch.nn.functional.linear(x, accelerated(weight))
    except (RuntimeError, NotImplementedError, ImportError) as error:
        return f"PyTorch's kernels do not run ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None if bool((found == 96).all()) else "PyTorch's kernels compute something else"
