"""Where, with what and from which commit something was measured."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from apportion.studies.machine import processor

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    "torch",
    "numba",
    "numpy",
    "transformers",
    "sae-lens",
    "eai-sparsify",
    "dictionary-learning",
    "overcomplete",
)


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system; the accelerator is not used."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def machine_slug() -> str:
    """The machine in a file name."""
    facts = machine()
    return re.sub(r"[^a-z0-9]+", "-", f"{facts['cores']}x {facts['processor']}".lower()).strip("-")


def versions() -> dict[str, str]:
    """Of what is compared and of what it stands on; only what is installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that is checked out, ``+`` behind it where files differ from it; ``unknown`` outside a repository."""
    try:
        short = _git("rev-parse", "--short", "HEAD")
        # Results and documentation change nothing that is measured.
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results", ":!/docs")
        return short + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
