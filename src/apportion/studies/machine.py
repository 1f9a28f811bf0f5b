"""The machine that something was measured on, in words."""

import platform
from pathlib import Path

import torch


def machine() -> str:
    """The machine in a line: cores, processor, GPU, torch and its threads."""
    cores = _models()
    name = f"{len(cores)} x {cores[0]}" if cores else processor()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}{gpu}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The processor's name, as the system gives it."""
    cores = _models()
    return cores[0] if cores else platform.processor() or platform.machine()


def _models() -> list[str]:
    """The name of each core's processor, where Linux lists them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
