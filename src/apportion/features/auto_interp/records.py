"""What is known so far, on disk: finished features, and the answers of unfinished ones. Both survive ``kill -9``.

A folder of explanations holds ``settings.json`` (what decides them), ``results.jsonl`` (a line for each feature, on the
disk before the next thing is done; of several lines for one feature the last one counts) and ``journal.jsonl`` (answers
to features that are not finished). A last line that was cut off is taken off again.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from apportion.data.files import explain_write_error, read_json, write_atomically, write_json
from apportion.errors import InputError
from apportion.training.state import differences

FORMAT = "apportion.explanations/1"
SETTINGS, RESULTS, JOURNAL, SUMMARY = "settings.json", "results.jsonl", "journal.jsonl", "summary.json"
# Of these nothing is asked again; the others failed for reasons that may pass.
FINISHED = ("explained", "no explanation", "too few examples")
_DIFFERENCES_NAMED = 6
_LARGEST_JOURNAL = 1 << 26


class Records:
    """The folder, open for one process.

    Args:
        folder: new, empty, or of the same settings.
        settings: what decides the results, as JSON can hold it.

    Raises:
        InputError: the folder belongs to other settings (names what differs), to another process or to something else;
            it cannot be written; a line in the middle of a file is damaged.
    """

    def __init__(self, folder: Path | str, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._lock = threading.Lock()
        self._files = contextlib.ExitStack()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise explain_write_error(error, self.folder) from error
        self._files.enter_context(_alone(self.folder))
        try:
            self._check(settings)
            self.status: dict[int, str] = {}
            for record in _lines(self.folder / RESULTS):
                self.status[int(record["feature"])] = str(record["status"])
            self._answers: dict[int, dict[str, Any]] = {}
            for record in _lines(self.folder / JOURNAL):
                if not self.is_finished(int(record["feature"])):
                    self._answers.setdefault(int(record["feature"]), {})[record["key"]] = record["answer"]
            self._shrink_journal()
            self._results: BinaryIO = self._files.enter_context((self.folder / RESULTS).open("ab"))
        except OSError as error:
            self.close()
            raise explain_write_error(error, self.folder) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        with self._lock:
            self._files.close()

    def is_finished(self, feature: int) -> bool:
        """Whether there is nothing left to ask about a feature."""
        return self.status.get(feature) in FINISHED

    def answers(self, feature: int) -> dict[str, Any]:
        """Answers that an earlier run got for a feature it did not finish."""
        with self._lock:
            return dict(self._answers.get(feature, {}))

    def note(self, feature: int, key: str, answer: Any) -> None:
        """Keep an answer until its feature is finished."""
        line = _line({"feature": feature, "key": key, "answer": answer})
        with self._lock:
            self._answers.setdefault(feature, {})[key] = answer
            self._journal.write(line)
            self._journal.flush()
            if self._journal.tell() > self._journal_limit:
                self._shrink_journal()

    def finish(self, record: Mapping[str, Any]) -> None:
        """Keep the result of a feature, for good unless it failed."""
        line = _line(record)
        with self._lock:
            self._results.write(line)
            self._results.flush()
            os.fsync(self._results.fileno())
            self.status[int(record["feature"])] = str(record["status"])
            if record["status"] in FINISHED:
                self._answers.pop(int(record["feature"]), None)

    def _check(self, settings: Mapping[str, Any]) -> None:
        path = self.folder / SETTINGS
        now = json.loads(json.dumps({"format": FORMAT, **settings}))
        if path.exists():
            before = read_json(path)
            different = differences(before, now)
            if different:
                named = "; ".join(different[:_DIFFERENCES_NAMED]).replace("(checkpoint:", "(there:")
                raise InputError(
                    f"{self.folder} holds explanations of other settings: {named}. Choose another folder (--out), or "
                    "repeat what was asked for"
                )
            return
        foreign = sorted(each.name for each in self.folder.iterdir() if not each.name.startswith("."))
        if foreign:
            raise InputError(
                f"{self.folder} is not empty ({', '.join(foreign[:3])}) and holds no explanations: choose a new folder"
            )
        write_json(path, now)

    def _shrink_journal(self) -> None:
        """Write the journal anew, with the answers of unfinished features alone."""
        if hasattr(self, "_journal"):
            self._journal.close()
        path = self.folder / JOURNAL
        with write_atomically(path) as temporary, temporary.open("wb") as file:
            for feature, answers in self._answers.items():
                for key, answer in answers.items():
                    file.write(_line({"feature": feature, "key": key, "answer": answer}))
        self._journal: BinaryIO = self._files.enter_context(path.open("ab"))
        # Twice what is alive, so that the work of shrinking is in proportion to what is written.
        self._journal_limit = max(_LARGEST_JOURNAL, 2 * path.stat().st_size)


def read_results(folder: Path | str, *, windows: bool = False) -> dict[int, dict[str, Any]]:
    """The records of a folder of explanations by feature; an unfinished run's are those it has.

    Args:
        folder: of the explanations.
        windows: also the scores of single windows, which are most of what the records hold.

    Raises:
        InputError: there are none, or a line is damaged.
    """
    path = Path(folder) / RESULTS
    if not path.exists():
        raise InputError(f"{folder} holds no explanations: run `apportion explain` first")
    found = {}
    for record in _lines(path, repair=False):
        if not windows:
            for score in record.get("scores", {}).values():
                score.pop("windows", None)
        found[int(record["feature"])] = record
    return found


def _lines(path: Path, *, repair: bool = True) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file; what was cut off at its end is taken off it, or skipped."""
    if not path.exists():
        return
    whole = 0
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or "feature" not in record:
                    raise ValueError("not a record of a feature")
            except ValueError as error:
                raise InputError(
                    f"{path}, line {number + 1}, is damaged ({error}): delete that line to have the feature done again"
                ) from error
            whole += len(line)
            yield record
    if repair and whole < path.stat().st_size:
        os.truncate(path, whole)


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=True, allow_nan=False, separators=(",", ":")) + "\n").encode()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder, which the system releases when the process dies."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{folder} is being written by another process: wait for it, or choose another") from error
        yield
    finally:
        os.close(descriptor)
