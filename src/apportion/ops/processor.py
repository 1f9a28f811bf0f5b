"""What the processor is good at."""

import functools

import torch


@functools.cache
def native_bfloat16() -> tuple[str, ...]:
    """The instructions by which this processor multiplies bfloat16 natively; none where it only imitates them."""
    capabilities = torch.cpu.get_capabilities()
    return tuple(name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name))
