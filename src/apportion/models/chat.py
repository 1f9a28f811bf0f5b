"""Chat models, whatever they run on: what apportion asks of one, and those that need no model at all.

`LocalChat` runs a transformers model on this machine, `ChatServer` talks to any server that speaks OpenAI's protocol,
`CallableChat` asks a Python function and `ReplayChat` repeats what was recorded.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from apportion.errors import InputError

Message = Mapping[str, str]
Messages = Sequence[Message]
Prefix = str | Messages
# What can become of a question, other than an answer. The first four may pass by themselves.
FailureKind = Literal["timeout", "unreachable", "busy", "server error", "rejected", "nonsense", "refusal", "too long"]
PASSING: tuple[FailureKind, ...] = ("timeout", "unreachable", "busy", "server error")


class ChatError(Exception):
    """A chat model gave no answer.

    Attributes:
        kind: why, in a word that failures are counted by.
    """

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def passing(self) -> bool:
        """Whether the same question may well be answered later."""
        return self.kind in PASSING


@dataclass(frozen=True)
class Generation:
    """What a chat model said.

    Attributes:
        text: the answer.
        finish_reason: ``stop``, ``length`` or ``content_filter``.
        tokens: the answer's tokens, where the model tells them.
        top_logprobs: for each of those tokens the likeliest ones with their natural log-probabilities, if asked for.
        prompt_tokens, completion_tokens: what it read and wrote, 0 where unknown.
        refused: the model says itself that it refuses.
    """

    text: str
    finish_reason: str = "stop"
    tokens: tuple[str, ...] = ()
    top_logprobs: tuple[Mapping[str, float], ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    refused: bool = False

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Generation":
        """Read what ``to_json`` gave."""
        return cls(**{**content, "tokens": tuple(content["tokens"]), "top_logprobs": tuple(content["top_logprobs"])})


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is to be written.

    Attributes:
        max_tokens: of the answer.
        temperature: 0 always takes the likeliest token.
        stop: the answer ends before this text.
        seed: of the draws; None leaves them to the model.
        top_logprobs: how many of the likeliest tokens are wanted at each place of the answer.
    """

    max_tokens: int
    temperature: float = 0.0
    stop: str | None = None
    seed: int | None = None
    top_logprobs: int = 0


@runtime_checkable
class ChatModel(Protocol):
    """What is asked of a chat model. It is called from many threads at once.

    Attributes:
        name: what decides its answers, for the record; two models of one name must answer alike.
        capabilities: of ``chat`` (it generates), ``logprobs`` (it tells the likeliest tokens) and ``score`` (it tells
            how likely a given text is).
    """

    name: str
    capabilities: frozenset[str]

    def generate(self, messages: Messages, params: SamplingParams) -> Generation:
        """Answer a conversation, a sequence of ``{"role": ..., "content": ...}``.

        Args:
            messages: the conversation.
            params: how the answer is to be written.

        Raises:
            ChatError: there is no answer.
        """

    def score(self, prefix: Prefix, continuations: Sequence[str]) -> list[list[float]]:
        """Natural log-probability of each token of each continuation after a text, or as the answer to a conversation.

        Raises:
            ChatError: it is too long.
            NotImplementedError: the model cannot.
        """


def request_key(kind: str, *content: Any) -> str:
    """A hash that tells questions apart."""
    said = json.dumps([kind, *content], sort_keys=True, ensure_ascii=True, default=dict)
    return hashlib.sha256(said.encode()).hexdigest()[:32]


class CallableChat:
    """A Python function as a chat model: an oracle, a rule, a test.

    Args:
        answer: given the messages, the text of the answer (or a whole `Generation`, or it raises `ChatError`).
        name: see `ChatModel`.
        likelihood: given prefix and continuations what ``score`` returns, if the model shall have it.
    """

    def __init__(
        self,
        answer: Callable[[Messages], str | Generation],
        name: str = "callable",
        likelihood: Callable[[Prefix, Sequence[str]], list[list[float]]] | None = None,
    ) -> None:
        self.name = name
        self.capabilities = frozenset({"chat", "score"} if likelihood else {"chat"})
        self._answer, self._likelihood = answer, likelihood

    def generate(self, messages: Messages, params: SamplingParams) -> Generation:
        """What the function says."""
        said = self._answer(messages)
        return said if isinstance(said, Generation) else Generation(said)

    def score(self, prefix: Prefix, continuations: Sequence[str]) -> list[list[float]]:
        """What the other function says."""
        if self._likelihood is None:
            raise NotImplementedError(f"{self.name} has no likelihoods")
        return self._likelihood(prefix, continuations)


class ReplayChat:
    """Repeats answers from a file of one JSON object a line; asks another model for those it lacks, and records them.

    Args:
        path: of the file; it need not exist where there is another model.
        then: whom to ask; None: what was not recorded is an error.

    Raises:
        InputError: the file is missing, where there is nobody else to ask, or damaged.
    """

    def __init__(self, path: Path | str, then: ChatModel | None = None) -> None:
        self.path, self.then = Path(path), then
        self._lock = threading.Lock()
        self._known: dict[str, Any] = {}
        if then is None and not self.path.exists():
            raise InputError(f"{self.path} does not exist: record answers first, with another model to ask")
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []):
            try:
                record = json.loads(line)
                self._known[record["key"]] = record["answer"]
                self.name, kept = record["model"], record["capabilities"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise InputError(f"{self.path}, line {number + 1}, is not a recorded answer ({error})") from error
            self.capabilities = frozenset(kept)
        if then is not None:
            self.name, self.capabilities = then.name, then.capabilities
        elif not self._known:
            raise InputError(f"{self.path} holds no answers: record some first")

    name: str
    capabilities: frozenset[str]

    def generate(self, messages: Messages, params: SamplingParams) -> Generation:
        """The recorded answer to the same question."""
        key = request_key("generate", list(messages), asdict(params))
        answer = self._answer(key, lambda then: then.generate(messages, params).to_json())
        return Generation.from_json(answer)

    def score(self, prefix: Prefix, continuations: Sequence[str]) -> list[list[float]]:
        """The recorded likelihoods."""
        said: Any = prefix if isinstance(prefix, str) else list(prefix)
        key = request_key("score", said, list(continuations))
        return self._answer(key, lambda then: then.score(prefix, continuations))

    def _answer(self, key: str, ask: Callable[[ChatModel], Any]) -> Any:
        if key in self._known:
            return self._known[key]
        if self.then is None:
            raise ChatError("rejected", f"{self.path} holds no answer to this question")
        answer = ask(self.then)
        record = {"key": key, "model": self.name, "capabilities": sorted(self.capabilities), "answer": answer}
        with self._lock:
            self._known[key] = answer
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return answer
