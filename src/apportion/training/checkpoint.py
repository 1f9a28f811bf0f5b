"""Checkpoints on disk: each is whole or absent, says what it should contain, and is never a pickle.

``checkpoints/step-00000500/`` holds ``module.safetensors``, ``optimizer.safetensors`` and ``state.json``, which is
written last and carries the SHA-256 of the other two and of itself.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from apportion.data.files import explain_write_error, read_json, sync
from apportion.errors import InputError

_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


class _DamagedError(Exception):
    """A checkpoint is not what was written; the message says where."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint: ``step`` steps were done, ``state`` is what `Checkpoints.save` was given."""

    path: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``{name}.safetensors``, on the processor.

        Raises:
            InputError: several processes wrote them, in parts.
        """
        if (self.path / name).is_dir():
            raise InputError(f"{self.path} was written over a mesh of processes: go on over a mesh, of any size")
        return safetensors.torch.load_file(self.path / f"{name}.safetensors")


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they are, created if need be.
        keep: how many of the newest to keep.

    Raises:
        InputError: the folder cannot be created.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Write the checkpoint of ``step``: one safetensors file a key of ``tensors``, then ``state``.

        Older checkpoints are removed only once this one is on disk.

        Raises:
            InputError: the disk is full or the folder cannot be written; older checkpoints are untouched.
        """
        path = self.folder / f"step-{step:08d}"
        with explained(path):
            self._remove_partial()
            partial = self.folder / f".{path.name}.partial"
            partial.mkdir()
            try:
                _write(partial, step, tensors, state)
                self._put_in_place(partial, path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            self._prune(step)

    def newest_intact(self) -> Checkpoint | None:
        """The newest checkpoint whose checksums hold, with a warning if newer ones are damaged; None if there is none.

        Raises:
            InputError: there are checkpoints and all are damaged, or one is of a newer format.
        """
        damaged = []
        for path in reversed(self._paths()):
            try:
                checkpoint = _read(path)
            except _DamagedError as error:
                damaged.append(f"{path} is damaged ({error})")
                continue
            if damaged:
                warnings.warn(f"{'; '.join(damaged)}: resuming from step {checkpoint.step} instead", stacklevel=2)
            return checkpoint
        if damaged:
            raise InputError(
                f"{'; '.join(damaged)}, and there is no other: delete {self.folder} to train from the start, "
                "or choose another folder"
            )
        return None

    def _put_in_place(self, partial: Path, path: Path) -> None:
        # Only a damaged checkpoint, one that this run could not resume from, can be in the way.
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
        sync(self.folder)

    def _paths(self) -> list[Path]:
        return sorted((path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)), key=_step_of)

    def _prune(self, saved: int) -> None:
        older = [path for path in self._paths() if _step_of(path) <= saved]
        # What is newer than the step just saved was damaged, or this run would have resumed from it.
        newer = [path for path in self._paths() if _step_of(path) > saved]
        for path in older[: -self._keep] + newer:
            shutil.rmtree(path)

    def _remove_partial(self) -> None:
        for path in self.folder.glob(".step-*.partial"):
            shutil.rmtree(path)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _write(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    paths = [folder / f"{name}.safetensors" for name in tensors]
    for path, group in zip(paths, tensors.values(), strict=True):
        safetensors.torch.save_file(_writable(group), path)
        sync(path)
    write_state(folder, step, digests(folder, paths), state)


def digests(folder: Path, paths: Sequence[Path]) -> dict[str, str]:
    """The SHA-256 of files of a checkpoint, by their names within its folder."""
    return {path.relative_to(folder).as_posix(): _digest(path) for path in paths}


def write_state(folder: Path, step: int, files: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Write ``state.json``, which makes the folder a checkpoint; ``files`` are those it must have, with checksums."""
    content: dict[str, Any] = {"format": _FORMAT, "step": step, "files": dict(files), "state": dict(state)}
    content["sha256"] = _digest_of_json(content)
    path = folder / "state.json"
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    sync(path)
    for name in files:
        # safetensors makes its files private; they follow the user's umask like any other.
        shutil.copymode(path, folder / name)
    sync(folder)


def state_of(path: Path) -> dict[str, Any]:
    """What `write_state` wrote, checked against its own checksum but not against the files beside it."""
    try:
        content = read_json(path / "state.json")
    except (InputError, OSError) as error:
        raise _DamagedError(str(error)) from error
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest_of_json(content):
        raise _DamagedError("the checksum of state.json does not match")
    if content["format"] != _FORMAT:
        raise InputError(f"{path} has format {content['format']}, this apportion reads {_FORMAT}: upgrade apportion")
    return content


def _read(path: Path) -> Checkpoint:
    content = state_of(path)
    for name, digest in content["files"].items():
        if not (path / name).is_file():
            raise _DamagedError(f"{name} is missing")
        if _digest(path / name) != digest:
            raise _DamagedError(f"the checksum of {name} does not match")
    if content["step"] != _step_of(path):
        raise _DamagedError(f"it is of step {content['step']}")
    return Checkpoint(path=path, step=content["step"], state=content["state"])


def _writable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Safetensors writes only contiguous tensors that own their memory; the others, few if any, are copied."""
    seen: set[int] = set()
    writable = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        owns = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        writable[name] = tensor if owns else tensor.clone().contiguous()
        seen.add(storage.data_ptr())
    return writable


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of_json(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Within the block what goes wrong in writing ``path`` becomes a sentence with a remedy."""
    try:
        yield
    except OSError as error:
        raise explain_write_error(error, path) from error
    except safetensors.SafetensorError as error:
        # The only trace that safetensors leaves of what the operating system said.
        number = re.search(r"os error (\d+)", str(error))
        cause = OSError(int(number[1]) if number else errno.EIO, str(error))
        raise explain_write_error(cause, path) from error
