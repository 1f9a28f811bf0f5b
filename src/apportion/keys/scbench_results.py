"""What SCBench's sessions are, what they give, how that is kept on disk and summed up."""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.data.files import read_json, write_json
from apportion.data.tasks.shared_context import SharedContext
from apportion.errors import InputError

FORMAT = 1


@dataclass(frozen=True)
class Session:
    """One context and the questions about it.

    Attributes:
        task: the task's name.
        number: of the session, from 0.
        content: context and turns.
    """

    task: str
    number: int
    content: SharedContext


@dataclass(frozen=True)
class Record:
    """How one question was answered by one method in one mode, and what the cache's stages cost.

    Attributes:
        task: the task's name.
        session: number of the session.
        mode: of `apportion.keys.scbench.MODES`.
        method: its name.
        turn: of the question, from 0.
        part: of a task that mixes several.
        score: 0 to 1: by the task's metric if the model wrote, else whether the answer is exact.
        exact: whether greedy decoding would write the answer.
        nll: of the answer's tokens, mean, in nats.
        prompt_tokens: what the cache was compressed after.
        prefill_seconds: computing the prompt (generation). Methods with a dense prompt share one measurement, in
            which is what all of them do with each token (side tables).
        prefill_share_read: of the keys that its queries could see, those they read.
        compress_seconds: compressing it (compression).
        bytes_held: by the cache when the question was answered.
        share_held: the same as a share of a plain cache in the model's own numbers.
        share_read: keys read of those there, from the question on; None where nothing was fed.
        reusable: whether the cache was bit for bit the same after all requests (retrieval); None in other modes.
        bytes_per_step: read in one decoding step, over all layers (loading); None where answers were fed at once.
        tokens_per_second: of decoding, likewise.
        text: what the model wrote, if it was let.
    """

    task: str
    session: int
    mode: str
    method: str
    turn: int
    part: str
    score: float
    exact: bool
    nll: float
    prompt_tokens: int
    prefill_seconds: float
    prefill_share_read: float
    compress_seconds: float
    bytes_held: int
    share_held: float
    share_read: float | None = None
    reusable: bool | None = None
    bytes_per_step: float | None = None
    tokens_per_second: float | None = None
    text: str | None = None


@dataclass(frozen=True)
class Summary:
    """Means over the sessions of a task, each session counting once.

    Attributes:
        task: the task's name.
        part: of a task that mixes several.
        mode: of `apportion.keys.scbench.MODES`.
        method: its name.
        sessions: how many.
        score: mean over sessions of the mean over their turns.
        stderr: of that mean, over sessions; None with one.
        by_turn: mean score of each turn over the sessions that have it; None where none of this part has.
        figures: means over sessions of all other numbers of a `Record` that were measured; ``reusable`` is 1 where
            every session's cache was.
    """

    task: str
    part: str
    mode: str
    method: str
    sessions: int
    score: float
    stderr: float | None
    by_turn: tuple[float | None, ...]
    figures: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**dataclasses.asdict(self), "by_turn": list(self.by_turn), "figures": dict(self.figures)}


_NOT_FIGURES = {"task", "session", "mode", "method", "turn", "part", "score", "text"}


def summarise(records: Iterable[Record]) -> list[Summary]:
    """One summary for each task, part, mode and method, in the order in which they first come."""
    groups: dict[tuple[str, str, str, str], dict[int, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        groups[record.task, record.part, record.mode, record.method][record.session].append(record)
    return [_summary(where, sessions) for where, sessions in groups.items()]


def _summary(where: tuple[str, str, str, str], sessions: Mapping[int, Sequence[Record]]) -> Summary:
    turns = 1 + max(record.turn for of_session in sessions.values() for record in of_session)
    by_turn: list[float | None] = []
    for turn in range(turns):
        scores = [record.score for of_session in sessions.values() for record in of_session if record.turn == turn]
        by_turn.append(sum(scores) / len(scores) if scores else None)
    figures = {}
    for figure in (each.name for each in dataclasses.fields(Record) if each.name not in _NOT_FIGURES):
        means = [
            sum(values) / len(values)
            for of_session in sessions.values()
            if (values := [float(value) for each in of_session if (value := getattr(each, figure)) is not None])
        ]
        if means:
            figures[figure] = min(means) if figure == "reusable" else sum(means) / len(means)
    scores = [sum(each.score for each in of_session) / len(of_session) for of_session in sessions.values()]
    stderr = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
    return Summary(*where, len(scores), statistics.fmean(scores), stderr, tuple(by_turn), figures)


class Kept:
    """Records in a folder, a file for each session, so that an interrupted benchmark goes on.

    A session's file is written whole or not at all, after each run of the session; a method that it lacks can be added
    later.

    Args:
        folder: made if it is not there; None keeps nothing.
        settings: what decides all results beside the session and the method, JSON-ready.
        methods: what decides each method's results, by its name, JSON-ready.

    Raises:
        InputError: the folder holds results of other settings, or cannot be written.
    """

    def __init__(
        self, folder: Path | str | None, settings: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.methods = methods
        if self.folder is None:
            return
        manifest = {"format": FORMAT, **settings}
        file = self.folder / "bench.json"
        if not file.exists():
            write_json(file, manifest)
            return
        known = read_json(file)
        known = known if isinstance(known, Mapping) else {}
        for name in sorted(manifest.keys() | known.keys()):
            if known.get(name) != manifest.get(name):
                raise InputError(
                    f"{self.folder} holds results with {name}={known.get(name)!r}, not {manifest.get(name)!r}: choose "
                    "another folder, or the same settings"
                )

    def run(
        self, session: Session, measure: Callable[[Session, list[str]], list[Record]], wanted: Sequence[str]
    ) -> list[Record]:
        """The records of a session: those kept, and for methods that are missing those that ``measure`` gives.

        Raises:
            InputError: the file is damaged, or holds another session or a method with other settings.
        """
        kept = self._read(session)
        missing = [name for name in wanted if name not in kept]
        if missing:
            for name in missing:
                kept[name] = []
            for record in measure(session, missing):
                kept[record.method].append(record)
            self._write(session, kept)
        return [record for name in wanted for record in kept[name]]

    def _file(self, session: Session) -> Path:
        assert self.folder is not None
        return self.folder / "sessions" / f"{session.task}-{session.number}.json"

    def _read(self, session: Session) -> dict[str, list[Record]]:
        if self.folder is None or not self._file(session).exists():
            return {}
        file = self._file(session)
        content = read_json(file)
        try:
            same = content["context"] == session.content.context
            kept = {name: [Record(**each) for each in part["records"]] for name, part in content["methods"].items()}
            settings = {name: part["settings"] for name, part in content["methods"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} is damaged ({error}): delete it and run again") from error
        if not same:
            raise InputError(f"{file} holds another context: delete the folder, or choose another one")
        for name, of_method in self.methods.items():
            if name in settings and settings[name] != of_method:
                raise InputError(f"{file} holds {name} with {settings[name]}, not {of_method}: choose another folder")
        return kept

    def _write(self, session: Session, kept: Mapping[str, Sequence[Record]]) -> None:
        if self.folder is None:
            return
        file = self._file(session)
        before = read_json(file)["methods"] if file.exists() else {}
        now = {
            name: {"settings": self.methods[name], "records": [dataclasses.asdict(each) for each in records]}
            for name, records in kept.items()
            if name in self.methods
        }
        write_json(file, {"context": session.content.context, "methods": {**before, **now}})
