"""The record of a run: ``log.jsonl``, one JSON object a logged step, and TensorBoard events on request."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from apportion.data.files import explain_write_error, sync, write_atomically
from apportion.errors import InputError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Record: TypeAlias = dict[str, int | float | None]
"""One logged step: ``step`` (1-based), ``loss``, ``learning_rate``, ``gradient_norm``, ``seconds``, metrics."""

RESERVED_NAMES = ("step", "loss", "learning_rate", "gradient_norm", "seconds")
"""What every record has; no metric may be called so."""


class TrainingLog:
    """Keeps the records of a run and, given a folder, writes them to ``log.jsonl``.

    Args:
        folder: of the run, or None to keep the records in memory only.
        steps_done: of the run so far; records of later steps, which will be made again, are dropped.
        tensorboard: also write TensorBoard events to ``folder/tensorboard``.

    Raises:
        InputError: the log cannot be written, or the tensorboard package is not installed.
    """

    def __init__(self, folder: Path | None, steps_done: int, tensorboard: bool = False) -> None:
        self.history: list[Record] = []
        self._path = None if folder is None else folder / "log.jsonl"
        self._tensorboard: SummaryWriter | None = None
        if folder is None or self._path is None:
            return
        if tensorboard:
            self._tensorboard = _open_tensorboard(folder, steps_done)
        self.history = [record for record in _read(self._path) if (record["step"] or 0) <= steps_done]
        with write_atomically(self._path) as temporary:
            temporary.write_text("".join(map(_line, self.history)), encoding="utf-8")

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()

    def write(self, record: Record) -> None:
        """Append a record; what is not finite becomes null, since JSON has neither NaN nor infinity."""
        record = {name: value if value is None or math.isfinite(value) else None for name, value in record.items()}
        self.history.append(record)
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(record))
        except OSError as error:
            raise explain_write_error(error, self._path) from error
        if self._tensorboard is not None:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._tensorboard.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Flush to the disk, so that a checkpoint never outlives the records of the steps before it."""
        if self._path is not None:
            sync(self._path)


def _open_tensorboard(folder: Path, steps_done: int) -> "SummaryWriter":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "tensorboard=True needs the tensorboard package: run `pip install tensorboard`, or leave it off "
            "(log.jsonl is written anyway)"
        ) from error
    # Events after the checkpoint are hidden: those steps are made again.
    writer: Any = SummaryWriter
    return cast("SummaryWriter", writer(str(folder / "tensorboard"), purge_step=steps_done + 1))


def _read(path: Path) -> Iterator[Record]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            # A process that was killed leaves its last line unfinished.
            return
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise InputError(
                f"{path} has a line without a step ({line[:80]}): it is not the log of a run, move it away"
            )
        yield record


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
