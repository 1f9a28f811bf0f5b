"""``apportion doctor``: what this machine has, and what would help."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from apportion.cli import options as given
from apportion.cli.output import answer, show


def doctor(json: given.Json = False) -> None:
    """Say what this machine has: torch, threads, bfloat16, CUDA, triton, numba, a browser, packaged models, disk.

    Example: [cyan]apportion doctor --json[/cyan]
    """
    content = examine()
    if json:
        answer(content)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, value in _lines(content):
        table.add_row(Text(name), Text(value))
    show(table)
    if content["advice"]:
        show("", *(Text(f"- {line}") for line in content["advice"]))


def examine() -> dict[str, Any]:
    """Everything that `doctor` says, ready for JSON."""
    import torch

    from apportion import __version__
    from apportion.cli.fetch import packaged_models
    from apportion.models import cache_dir
    from apportion.ops.processor import native_bfloat16

    fast = list(native_bfloat16())
    cache = cache_dir()
    content: dict[str, Any] = {
        "apportion": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": {"torch": torch.get_num_threads(), "numba": _numba_threads()},
        "memory_gib": _memory_gib(),
        "bfloat16": {"native": bool(fast), "features": fast},
        "cuda": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "packages": {
            name: _version_of(name)
            for name in ("transformers", "numba", "triton", "datasets", "tensorboard", "sae-lens", "eai-sparsify")
        },
        "chromium": shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome"),
        "models": packaged_models(),
        "cache": {
            "folder": str(cache),
            "free_gib": round(shutil.disk_usage(_existing(cache)).free / 2**30, 1),
            "stores": len(list(cache.glob("stores/*/manifest.json"))),
        },
    }
    return content | {"advice": _advice(content)}


def _advice(content: dict[str, Any]) -> list[str]:
    advice = [
        f"{model['name']} is not on this machine yet: run `{model['command']}`"
        for model in content["models"]
        if model["folder"] is None
    ]
    if content["bfloat16"]["native"]:
        advice.append(
            "this CPU multiplies bfloat16 natively: try --model-dtype bfloat16, and --precision bfloat16 where it "
            "may change a few winners by rounding (float32 uses such products already, but lets none of them decide)"
        )
    if content["cache"]["free_gib"] < 5:
        advice.append(
            f"only {content['cache']['free_gib']} GiB are free in the cache; a million tokens of width 576 take 1.1: "
            "set APPORTION_CACHE to a folder on a larger disk"
        )
    if content["cuda"] and content["packages"]["triton"] is None:
        advice.append("there is a GPU but no triton: pip install 'apportion[gpu]'")
    return advice


def _lines(content: dict[str, Any]) -> list[tuple[str, str]]:
    packages = content["packages"]
    cache, bfloat16, threads = content["cache"], content["bfloat16"], content["threads"]
    memory = "" if content["memory_gib"] is None else f", {content['memory_gib']} GiB of memory"
    lines = [
        ("apportion", content["apportion"]),
        ("python", f"{content['python']} ({sys.executable})"),
        ("torch", f"{content['torch']}, {threads['torch']} threads"),
        ("processor", f"{content['cpus']} cores{memory}"),
        (
            "bfloat16",
            f"native ({', '.join(bfloat16['features'])})" if bfloat16["native"] else "works, but is not fast here",
        ),
        ("CUDA", ", ".join(content["cuda"]) or "none"),
        ("numba", f"{packages['numba']}, {threads['numba']} threads"),
    ]
    lines += [(name, version or "not installed") for name, version in packages.items() if name != "numba"]
    lines += [("chromium", content["chromium"] or "not found (only the tests of the report need it)")]
    lines += [(f"model {each['name']}", each["folder"] or f"not here: {each['command']}") for each in content["models"]]
    return [*lines, ("cache", f"{cache['folder']}, {cache['free_gib']} GiB free, {cache['stores']} activation stores")]


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numba_threads() -> int | None:
    if importlib.util.find_spec("numba") is None:
        return None
    import numba

    return int(numba.get_num_threads())


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
