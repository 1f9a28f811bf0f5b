"""What the processor is good at."""

import functools
from collections.abc import Callable

import torch


@functools.cache
def native_bfloat16() -> tuple[str, ...]:
    """The instructions by which this processor multiplies bfloat16 natively; none where it only imitates them."""
    # Older versions of torch cannot tell; without an answer the float32 product is taken.
    ask: Callable[[], dict[str, bool]] = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = ask()
    return tuple(name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name))
