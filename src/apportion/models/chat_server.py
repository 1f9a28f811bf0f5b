"""Any server that speaks OpenAI's chat protocol (vLLM, llama.cpp, Ollama, OpenAI itself ...) as a `ChatModel`."""

import os
import time
from collections.abc import Sequence
from typing import Any

from apportion.errors import InputError
from apportion.models.chat import ChatError, FailureKind, Generation, Messages, Prefix, SamplingParams

_OFFICIAL = "https://api.openai.com/v1"
_LONGEST_PAUSE = 2.0


class ChatServer:
    """A chat model behind the ``openai`` package, which retries, backs off and heeds ``Retry-After`` by itself.

    Nothing is sent before the first question.

    Args:
        model: its name on the server.
        base_url: of the server, such as ``http://127.0.0.1:8000/v1``; default ``$OPENAI_BASE_URL``, else OpenAI's.
        api_key: default ``$OPENAI_API_KEY``; servers of one's own commonly need none.
        timeout: seconds for one attempt.
        retries: further attempts after a timeout, a lost connection, an answer that cannot be read, or the statuses
            408, 409, 429 and 5xx.
        logprobs: whether the server tells log-probabilities; without them scores are 0 or 1.

    Raises:
        InputError: the package is missing, or a key for OpenAI's own server.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 120.0,
        retries: int = 4,
        logprobs: bool = False,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise InputError(
                "a judge behind a server needs the package openai: pip install 'apportion[judge]'"
            ) from error
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL") or _OFFICIAL
        self.model, self.retries = model, retries
        self.name = f"openai:{model}"
        self.capabilities = frozenset({"chat", "logprobs"} if logprobs else {"chat"})
        key = api_key or os.environ.get("OPENAI_API_KEY")
        self._is_official = self.base_url.rstrip("/") == _OFFICIAL
        if not key and self._is_official:
            raise InputError(
                "OPENAI_API_KEY is not set: set it, or name a server of your own with base_url (--base-url)"
            )
        if timeout <= 0 or retries < 0:
            raise InputError(f"timeout={timeout}, retries={retries}: above 0 seconds, and not fewer than 0 retries")
        self._client = openai.OpenAI(
            api_key=key or "none", base_url=self.base_url, timeout=timeout, max_retries=retries
        )

    def generate(self, messages: Messages, params: SamplingParams) -> Generation:
        """See `ChatModel`.

        Raises:
            ChatError: no answer after all attempts, or none that could be read.
            InputError: the server knows neither the key nor the model: no question will ever be answered.
        """
        # The older name is the one that every server knows, the newer the one that OpenAI's newer models ask for.
        settings: dict[str, Any] = {"max_completion_tokens" if self._is_official else "max_tokens": params.max_tokens}
        settings |= {} if params.stop is None else {"stop": params.stop}
        settings |= {} if params.seed is None else {"seed": params.seed}
        if params.top_logprobs and "logprobs" in self.capabilities:
            settings |= {"logprobs": True, "top_logprobs": params.top_logprobs}
        said: Any = [dict(each) for each in messages]
        settings |= {"messages": said, "temperature": params.temperature}
        for attempt in range(self.retries):
            try:
                return self._generation(self._answer(settings))
            except ChatError as error:
                # The package tries again where the server says that it failed, but not where its answer is garbled.
                if error.kind != "nonsense":
                    raise
                time.sleep(min(0.1 * 2**attempt, _LONGEST_PAUSE))
        return self._generation(self._answer(settings))

    def _answer(self, settings: dict[str, Any]) -> Any:
        import openai

        try:
            return self._client.chat.completions.create(model=self.model, **settings)
        except openai.APITimeoutError as error:
            raise ChatError("timeout", f"{self.base_url} did not answer in time") from error
        except openai.APIConnectionError as error:
            raise ChatError("unreachable", f"{self.base_url} cannot be reached ({error.__cause__ or error})") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise InputError(f"{self.base_url} does not accept the key: {_first_line(error)}") from error
        except openai.NotFoundError as error:
            raise InputError(f"{self.base_url} does not know the model {self.model!r}: {_first_line(error)}") from error
        except openai.RateLimitError as error:
            raise ChatError("busy", f"{self.base_url} is busy: {_first_line(error)}") from error
        except openai.APIStatusError as error:
            kind: FailureKind = "server error" if error.status_code >= 500 else "rejected"
            raise ChatError(kind, f"{self.base_url} says {error.status_code}: {_first_line(error)}") from error
        except (openai.OpenAIError, ValueError, TypeError) as error:
            # A body that is no JSON, or JSON of another shape.
            raise ChatError(
                "nonsense", f"{self.base_url} answered what cannot be read: {_first_line(error)}"
            ) from error

    def score(self, prefix: Prefix, continuations: Sequence[str]) -> list[list[float]]:
        """Servers do not tell the likelihood of a given text."""
        raise NotImplementedError(f"{self.name} tells no likelihoods of given texts: use a local judge for that")

    def _generation(self, said: Any) -> Generation:
        try:
            choice = said.choices[0]
            text = choice.message.content
            refusal = getattr(choice.message, "refusal", None)
            told = getattr(choice, "logprobs", None)
            content = (told.content if told is not None else None) or []
            tokens = tuple(str(token.token) for token in content)
            tops = tuple({top.token: float(top.logprob) for top in token.top_logprobs} for token in content)
            usage = getattr(said, "usage", None)
            if text is not None and not isinstance(text, str):
                raise TypeError(f"content is {type(text).__name__}")
        except (AttributeError, IndexError, TypeError, KeyError) as error:
            raise ChatError("nonsense", f"{self.base_url} answered without a message ({error})") from error
        return Generation(
            text=text or str(refusal or ""),
            finish_reason=str(choice.finish_reason or "stop"),
            tokens=tokens,
            top_logprobs=tops,
            prompt_tokens=int(getattr(usage, "prompt_tokens", 0) or 0),
            completion_tokens=int(getattr(usage, "completion_tokens", 0) or 0),
            refused=bool(refusal) or choice.finish_reason == "content_filter",
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
