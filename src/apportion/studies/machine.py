"""The machine that something was measured on, in words, and how much of it a measurement takes."""

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path

import torch


def machine() -> str:
    """The machine in a line: cores, processor, GPU, torch and its threads."""
    cores = _models()
    name = f"{len(cores)} x {cores[0]}" if cores else processor()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}{gpu}, torch {torch.__version__}, {torch.get_num_threads()} threads"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """In a ``with`` block torch computes on one thread: small products only lose by being shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processor() -> str:
    """The processor's name, as the system gives it."""
    cores = _models()
    return cores[0] if cores else platform.processor() or platform.machine()


def _models() -> list[str]:
    """The name of each core's processor, where Linux lists them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
