"""Asking on behalf of one feature: every answer is noted before it is used, so that nothing is asked twice."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from apportion.models.chat import ChatModel, Generation, Messages, Prefix, SamplingParams, request_key

_CHARACTERS_A_TOKEN = 4


@dataclass
class Usage:
    """Questions asked, and tokens read and written."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: "Usage") -> None:
        """Count another's as well."""
        self.calls += other.calls
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens

    def to_json(self) -> dict[str, int]:
        """As JSON can hold it."""
        return dict(self.__dict__)


@dataclass
class Asker:
    """A chat model as one feature sees it.

    Attributes:
        chat: the model; None where nobody needs one.
        known: answers from an earlier run that was killed in the middle of this feature.
        note: called with each new answer before it is used.
        stop: raises where the run has been told to end.
        usage: of this feature, known answers included.
    """

    chat: ChatModel | None
    known: dict[str, Any] = field(default_factory=dict)
    note: Callable[[str, Any], None] = lambda key, answer: None
    stop: Callable[[], None] = lambda: None
    usage: Usage = field(default_factory=Usage)

    def can(self, capability: str) -> bool:
        """Whether the model has a capability."""
        return self.chat is not None and capability in self.chat.capabilities

    def generate(self, messages: Messages, params: SamplingParams) -> Generation:
        """See `ChatModel`."""
        key = request_key("generate", list(messages), asdict(params))
        said = Generation.from_json(self._answer(key, lambda chat: chat.generate(messages, params).to_json()))
        read = said.prompt_tokens or sum(len(each["content"]) for each in messages) // _CHARACTERS_A_TOKEN
        written = said.completion_tokens or len(said.text) // _CHARACTERS_A_TOKEN
        self.usage.add(Usage(1, read, written))
        return said

    def score(self, prefix: Prefix, continuations: Sequence[str]) -> list[list[float]]:
        """See `ChatModel`."""
        said: Any = prefix if isinstance(prefix, str) else list(prefix)
        key = request_key("score", said, list(continuations))
        found: list[list[float]] = self._answer(key, lambda chat: chat.score(prefix, continuations))
        shown = prefix if isinstance(prefix, str) else "".join(each["content"] for each in prefix)
        self.usage.add(Usage(1, len(shown) // _CHARACTERS_A_TOKEN + sum(map(len, found)), 0))
        return found

    def _answer(self, key: str, ask: Callable[[ChatModel], Any]) -> Any:
        if key in self.known:
            return self.known[key]
        self.stop()
        assert self.chat is not None  # who asks has checked what it needs
        answer = ask(self.chat)
        self.note(key, answer)
        self.known[key] = answer
        return answer
