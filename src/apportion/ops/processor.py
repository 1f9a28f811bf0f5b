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


@functools.cache
def has_expand() -> bool:
    """Whether this processor expands packed float32 and bfloat16 by a mask in one instruction."""
    features = _features()
    return all(features.get(name, False) for name in ("avx512f", "avx512bw", "avx512vl", "avx512vbmi2"))


@functools.cache
def has_lookup() -> bool:
    """Whether this processor looks up 16 numbers among 32 in one instruction."""
    return bool(_features().get("avx512f", False))


def _features() -> dict[str, bool]:
    # Not at the top: whoever asks about torch alone need not load LLVM.
    from llvmlite import binding
    from numba import config

    # Told to compile for another processor (NUMBA_CPU_NAME), numba cannot use what this one has.
    return {} if getattr(config, "CPU_NAME", None) else dict(binding.get_host_cpu_features())
