"""Files that are either whole or absent: every write goes to a neighbour first and is moved into place."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apportion.errors import InputError


@contextlib.contextmanager
def write_atomically(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path``, on any error it is removed.

    The bytes are on disk before the name changes, so a ``kill -9`` leaves either the old file or the new one.

    Raises:
        InputError: the folder cannot be written or the disk is full; names the path and the remedy.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            # mkstemp makes the file private; the finished file follows the user's umask like any other.
            temporary.chmod(0o666 & ~_umask())
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise explain_write_error(error, path) from error


def explain_write_error(error: OSError, path: Path) -> Exception:
    """Turn what the operating system says about a failed write into a sentence with a remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"the disk is full while writing {path}: free some space and run the same command again")
    if error.errno == errno.EFBIG:
        return InputError(f"{path} would pass the file-size limit: raise it (ulimit -f) and run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return InputError(f"cannot write {path} ({error.strerror}): choose a folder you may write to")
    return error


def check_writable(folder: Path | str) -> None:
    """Make sure that files can be written in a folder, which is made if need be.

    Raises:
        InputError: they cannot.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise explain_write_error(error, Path(folder)) from error


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path | str, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically; NaN and infinities are refused, since JSON has none."""
    text = json.dumps(content, indent=2, sort_keys=False, allow_nan=False, ensure_ascii=False)
    with write_atomically(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path | str) -> Any:
    """Read JSON.

    Raises:
        InputError: the file is missing or is not JSON; names the file.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not readable JSON ({error}): it is damaged, or not written by apportion"
        ) from error


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
