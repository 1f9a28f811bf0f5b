"""Many features at once: asked concurrently, kept as they finish, estimated before they start."""

import contextlib
import hashlib
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from apportion.data.files import write_json
from apportion.errors import InputError
from apportion.features.auto_interp.asking import Asker, Usage
from apportion.features.auto_interp.examples import Examples, FeatureExamples, settings_to_json
from apportion.features.auto_interp.explain import Explainer
from apportion.features.auto_interp.prompts import EXPLANATION_MARK
from apportion.features.auto_interp.records import FINISHED, SUMMARY, Records
from apportion.features.auto_interp.scorers import Scorer
from apportion.features.dictionary import SparseAutoencoder
from apportion.models.chat import ChatError, ChatModel, Generation, Messages, Prefix, SamplingParams
from apportion.models.spelling import Spelled

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_TO_FINISH = 2.0
_FEATURES_ESTIMATED = 12


class JudgeUnavailableError(RuntimeError):
    """The judge failed on feature after feature: there is no point in going on."""


@dataclass(frozen=True)
class Prices:
    """What a million tokens cost, read and written, in any currency."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, usage: Usage) -> float:
        """What tokens cost."""
        return (usage.prompt_tokens * self.prompt + usage.completion_tokens * self.completion) / 1e6


@dataclass(frozen=True)
class Estimate:
    """What a run will take, before it starts.

    Attributes:
        features: to be done.
        usage: questions and tokens; tokens are counted four characters each.
        cost: of the tokens.
        seconds: with so many seconds a question and so many questions at once.
    """

    features: int
    usage: Usage
    cost: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"features": self.features, **self.usage.to_json(), "cost": self.cost, "seconds": self.seconds}


@dataclass
class Summary:
    """What became of a run.

    Attributes:
        status: features by what became of them, those of earlier runs included.
        failures: failures of this run by kind: questions without a usable answer, and features that must be asked
            again.
        done: features that this call has finished.
        usage: of this call.
        cost: of it.
        seconds: of it.
    """

    status: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    done: int = 0
    usage: Usage = field(default_factory=Usage)
    cost: float = 0.0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "status": dict(self.status),
            "failures": dict(self.failures),
            "done": self.done,
            **self.usage.to_json(),
            "cost": self.cost,
            "seconds": round(self.seconds, 2),
        }


@dataclass(frozen=True, eq=False)
class Interpretation:
    """How features are explained and how explanations are judged.

    Args:
        explainer: makes explanations.
        scorers: judge them.
        chat: the model that both ask; None where neither asks.
        spell: what tokens say, see `apportion.models.spelling.speller`.

    Raises:
        InputError: two scorers of one name, or a chat model without what an explainer or a scorer needs.
    """

    explainer: Explainer
    scorers: Sequence[Scorer]
    chat: ChatModel | None
    spell: Callable[[Sequence[int]], Spelled]

    def __post_init__(self) -> None:
        names = [scorer.name for scorer in self.scorers]
        if len(set(names)) < len(names):
            raise InputError(f"scorers {', '.join(names)}: one of each")
        has = frozenset() if self.chat is None else self.chat.capabilities
        judge = "no judge" if self.chat is None else f"the judge {self.chat.name}"
        for who, needs in (
            (f"style {self.explainer.style!r}", self.explainer.needs),
            *((f"scorer {scorer.name!r}", scorer.needs) for scorer in self.scorers),
        ):
            if needs - has:
                raise InputError(
                    f"{who} needs {', '.join(sorted(needs - has))}, which {judge} does not have: choose another judge, "
                    "or leave it out"
                )

    def settings(self, examples: Examples, about: Mapping[str, Any]) -> dict[str, Any]:
        """What decides the results."""
        chat = self.chat
        return {
            **about,
            "explainer": {
                "style": self.explainer.style,
                "temperature": getattr(self.explainer, "temperature", None),
                "max_tokens": getattr(self.explainer, "max_tokens", None),
            },
            "judge": None if chat is None else {"name": chat.name, "capabilities": sorted(chat.capabilities)},
            "scorers": {scorer.name: scorer.settings() for scorer in self.scorers},
            "examples": settings_to_json(examples.settings),
        }

    def interpret(self, examples: FeatureExamples, ask: Asker, least: int) -> dict[str, Any]:
        """Explain a feature and judge the explanation.

        Args:
            examples: its windows.
            ask: the chat model.
            least: activating windows that it must have in the text.

        Returns:
            The record of the feature, as JSON can hold it.

        Raises:
            ChatError: of a kind that may pass: the feature is not finished.
        """
        record: dict[str, Any] = {
            "feature": examples.feature,
            "windows": examples.n_windows,
            "density": examples.density,
            "largest": examples.largest,
        }
        if examples.n_windows < least or not examples.train or not examples.test:
            return {**record, "status": "too few examples"}
        try:
            explanation = self.explainer.explain(examples, ask)
        except ChatError as error:
            if error.passing:
                raise
            return {**record, "status": "no explanation", "why": error.kind, "said": str(error)[:200]}
        scores = {scorer.name: scorer.score(examples, explanation, ask).to_json() for scorer in self.scorers}
        said = {"explanation": explanation.text, "flagged": explanation.flagged}
        return {**record, "status": "explained", **said, "scores": scores}

    def estimate(
        self,
        examples: Examples,
        features: Sequence[int] | None = None,
        *,
        prices: Prices | None = None,
        concurrency: int = 32,
        seconds_a_call: float = 1.0,
    ) -> Estimate:
        """What it will take, from going through some of the features with a judge that answers nothing useful.

        Args:
            examples: the windows.
            features: those to be done; default all.
            prices: of tokens.
            concurrency: questions at once.
            seconds_a_call: how long one takes.
        """
        wanted = examples.features.tolist() if features is None else list(features)
        places = np.unique(np.linspace(0, len(wanted) - 1, min(_FEATURES_ESTIMATED, len(wanted))).round().astype(int))
        sample = [wanted[place] for place in places.tolist()]
        total = Usage()
        for feature in sample:
            # What asks nobody costs nothing; what runs the model itself says what it will ask.
            ask = Asker(None if self.chat is None else _Placeholder(self.chat))
            own = [scorer for scorer in self.scorers if scorer.needs and not hasattr(scorer, "questions")]
            shown = examples.of(feature, self.spell)
            Interpretation(self.explainer, own, ask.chat, self.spell).interpret(
                shown, ask, examples.settings.min_windows
            )
            total.add(ask.usage)
            for scorer in self.scorers:
                if hasattr(scorer, "questions"):
                    total.add(scorer.questions(shown))
        scale = len(wanted) / max(len(sample), 1)
        usage = Usage(*(math.ceil(scale * value) for value in total.to_json().values()))
        cost = (prices or Prices()).of(usage)
        return Estimate(len(wanted), usage, cost, usage.calls * seconds_a_call / max(concurrency, 1))


def interpret_features(
    folder: Path | str,
    interpretation: Interpretation,
    examples: Examples,
    *,
    features: Sequence[int] | None = None,
    about: Mapping[str, Any] | None = None,
    concurrency: int = 32,
    prices: Prices | None = None,
    max_cost: float | None = None,
    patience: int | None = None,
    progress: bool = True,
) -> Summary:
    """Explain and judge features, many at once; what an earlier call has finished is not asked again.

    Each feature is finished on the disk before it counts, and every single answer is noted as it comes: after a kill at
    any moment nothing is asked twice but the questions that were under way. A feature whose judge could not be
    reached is recorded as failed, and tried again by the next call.

    Args:
        folder: for the records, see ``records.py``.
        interpretation: how.
        examples: the windows.
        features: which; default all of the examples.
        about: what else decides the results, such as the dictionary and the text.
        concurrency: features at once; each asks one question at a time.
        prices: of tokens, for the summary and ``max_cost``.
        max_cost: end, keeping what was done, once this much has been spent.
        patience: end after so many failed features in a row; default twice the concurrency.
        progress: show it on stderr.

    Raises:
        InputError: the folder belongs to other settings or is in use; a setting that cannot work; the judge does not
            accept the key or know the model; ``max_cost`` is spent.
        JudgeUnavailableError: feature after feature failed.
        KeyboardInterrupt: Ctrl-C.
    """
    if concurrency < 1:
        raise InputError(f"concurrency={concurrency}: must be at least 1")
    wanted = examples.features.tolist() if features is None else sorted(set(features))
    missing = np.setdiff1d(wanted, examples.features)
    if len(missing):
        raise InputError(f"feature {missing[0]}: no examples of it were collected")
    with Records(folder, interpretation.settings(examples, about or {})) as records:
        todo = [feature for feature in wanted if not records.is_finished(feature)]
        work = _Work(interpretation, examples, records, todo, prices or Prices(), max_cost)
        work.patience = patience if patience is not None else 2 * concurrency
        with _display(progress, len(wanted), len(wanted) - len(todo), work) as show:
            work.run(min(concurrency, max(len(todo), 1)), show)
        work.summary.status = Counter(records.status.get(feature, "not asked") for feature in wanted)
        write_json(Path(folder) / SUMMARY, work.summary.to_json())
    if work.error is not None:
        raise work.error
    return work.summary


def fingerprint_of(dictionary: SparseAutoencoder) -> str:
    """A hash of a dictionary's weights, which tells it from others whatever its folder."""
    digest = hashlib.sha256()
    for name, tensor in dictionary.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


class _Stopped(BaseException):
    """Ends a worker; not an Exception, so that nothing takes it for a failure of the judge."""


class _Work:
    """Threads that take one feature after another."""

    def __init__(
        self,
        interpretation: Interpretation,
        examples: Examples,
        records: Records,
        todo: list[int],
        prices: Prices,
        max_cost: float | None,
    ) -> None:
        self.interpretation, self.examples, self.records = interpretation, examples, records
        self.prices, self.max_cost = prices, max_cost
        self.summary = Summary()
        self.error: BaseException | None = None
        self.patience = 64
        self.finished = 0
        self._todo = iter(todo)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failed_in_a_row = 0

    def run(self, workers: int, show: Callable[[], None]) -> None:
        """Work until nothing is left, or something ends it."""
        started = time.perf_counter()
        threads = [threading.Thread(target=self._work, daemon=True, name=f"judge-{n}") for n in range(workers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
                    show()
        finally:
            # After Ctrl-C: questions that are under way may end, but nobody waits for long.
            self._stop.set()
            deadline = time.monotonic() + _SECONDS_TO_FINISH
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            self.summary.seconds = time.perf_counter() - started
            self.summary.cost = self.prices.of(self.summary.usage)

    def _work(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                feature = next(self._todo, None)
            if feature is None:
                return
            try:
                self._one(feature)
            except _Stopped:
                return
            except BaseException as error:  # bad input, a full disk, a mistake of ours: nothing will get better
                self._end(error)
                return

    def _one(self, feature: int) -> None:
        ask = Asker(
            self.interpretation.chat,
            known=self.records.answers(feature),
            note=lambda key, answer: self.records.note(feature, key, answer),
            stop=self._check,
        )
        started = time.perf_counter()
        try:
            shown = self.examples.of(feature, self.interpretation.spell)
            record = self.interpretation.interpret(shown, ask, self.examples.settings.min_windows)
        except ChatError as error:
            record = {"feature": feature, "status": "failed", "why": error.kind, "said": str(error)[:200]}
        record |= {"usage": ask.usage.to_json(), "seconds": round(time.perf_counter() - started, 3)}
        self.records.finish(record)
        self._count(record, ask.usage)

    def _check(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _count(self, record: Mapping[str, Any], usage: Usage) -> None:
        with self._lock:
            summary = self.summary
            summary.usage.add(usage)
            if "why" in record:
                summary.failures[str(record["why"])] += 1
            for score in record.get("scores", {}).values():
                summary.failures.update(score["failed"])
            failed = record["status"] not in FINISHED
            self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0
            summary.done += not failed
            self.finished += not failed
            gave_up = self._failed_in_a_row >= self.patience
            spent = self.prices.of(summary.usage)
        if gave_up:
            self._end(
                JudgeUnavailableError(
                    f"the judge failed on {self.patience} features in a row ({record['why']}: {record['said']}): see "
                    "to it and run the same command again; what was finished is kept"
                )
            )
        elif self.max_cost is not None and spent >= self.max_cost:
            self._end(
                InputError(
                    f"max_cost={self.max_cost:g} is spent ({spent:.2f}): what was finished is kept; to go on, run the "
                    "same command with more"
                )
            )

    def _end(self, error: BaseException) -> None:
        with self._lock:
            self.error = self.error or error
        self._stop.set()

    def line(self) -> str:
        """How things are, for people who wait."""
        with self._lock:
            failures = sum(self.summary.failures.values())
            usage = self.summary.usage
            said = f"{usage.calls:,} questions, {usage.prompt_tokens + usage.completion_tokens:,} tokens"
            cost = self.prices.of(usage)
        return said + (f", cost {cost:.2f}" if cost else "") + (f", {failures:,} failures" if failures else "")


class _Placeholder:
    """A chat model for estimates: it answers at once, as long as an answer usually is."""

    def __init__(self, like: ChatModel) -> None:
        self.name, self.capabilities = like.name, like.capabilities

    def generate(self, messages: Messages, params: SamplingParams) -> Generation:
        """Words that can be read as an explanation."""
        return Generation(f"{EXPLANATION_MARK} " + "word " * 20, completion_tokens=max(1, params.max_tokens // 2))

    def score(self, prefix: Prefix, continuations: Sequence[str]) -> list[list[float]]:
        """A token for each four characters."""
        return [[-1.0] * (1 + len(text) // 4) for text in continuations]


@contextlib.contextmanager
def _display(progress: bool, total: int, done: int, work: _Work) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, a line every ten seconds anywhere else, on stderr."""
    if not progress:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        printed = [time.monotonic()]

        def say() -> None:
            if time.monotonic() - printed[0] >= _SECONDS_BETWEEN_LINES:
                printed[0] = time.monotonic()
                print(
                    f"explained {done + work.finished:,}/{total:,} features, {work.line()}", file=sys.stderr, flush=True
                )

        yield say
        return
    columns = (
        TextColumn("explaining"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}", markup=False),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as bar:
        task = bar.add_task("explaining", total=total, completed=done, said="")
        yield lambda: bar.update(task, completed=done + work.finished, said=work.line())
