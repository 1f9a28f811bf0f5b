"""SCBench: what a key method is worth when several questions share a context, over the whole life of a cache.

Li and others, *SCBench: A KV Cache-Centric Analysis of Long-Context Methods*, 2024, arXiv 2412.10319 (sections 2, 3).

Nothing is allocated here; allocators are judged. A method that forgets must decide before it knows the question, and a
benchmark that compresses after the question hides that. Three modes ask it:

- ``multi_request``: the context is taken in and compressed alone; every question is answered from that cache, which is
  as it was before the next one comes;
- ``multi_turn``: context and first question are the prompt; the right answer, whatever the model would have said, and
  the next question follow, turn by turn;
- ``query_aware``: context and question are the prompt, for each question anew: what no server of many questions can do.
  Its first turn is that of ``multi_turn``.

Measured are the four stages of a cache's life: *generation* (seconds of the prompt, share of keys its queries read),
*compression* (seconds; bytes held), *retrieval* (whether the cache is bit for bit the same after all requests) and
*loading* (bytes read a step, tokens a second).

Answers are scored with the right answer fed (teacher forcing): greedy decoding writes an answer exactly when each of
its tokens is the likeliest after the ones before. ``generate`` lets the model write too, and scores the text by the
task's metric. The prompt is computed once for all methods whose prompt attention is dense: it is the same for them.

Departures: tasks are rebuilt (`apportion.data.tasks.cache_suite`), with shorter answers; a context that is too long for
the model is refused, not cut; a later turn's question is read as the method reads, where the paper's code reads it
densely over what is left, which is the same for methods that forget.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apportion.data.tasks.metrics import metric_score
from apportion.data.tasks.shared_context import SharedContext, Turn
from apportion.errors import InputError
from apportion.keys.memory import ComposedMemory
from apportion.keys.method import KeyMethod
from apportion.keys.scbench_results import Record, Session
from apportion.keys.scoring import encode_parts, exact_and_nll
from apportion.keys.shared_prompt import (
    Fan,
    copied,
    digest_of,
    reads_prompts_densely,
    share_read,
    usage_of,
)
from apportion.models import LanguageModel
from apportion.models.key_door import attend_with, close_prompt, layer_facts, memories_of, with_memories
from apportion.models.key_memory import LayerFacts, LayerMemory, MakeMemory

MODES = ("multi_request", "multi_turn", "query_aware")
_PLAIN = ""  # the methods that share a dense prompt


@dataclass(frozen=True)
class Protocol:
    """How sessions are run.

    Attributes:
        modes: some of ``MODES``.
        steps: feed answers token by token, as decoding does, and time it; otherwise at once, which most methods read
            alike and which is several times faster, but says nothing of a step.
        generate: let the model write an answer too (needs ``steps``).
        new_tokens: that it may write.

    Raises:
        InputError: no mode or an unknown one; ``generate`` without ``steps``.
    """

    modes: tuple[str, ...] = ("multi_request", "multi_turn")
    steps: bool = True
    generate: bool = False
    new_tokens: int = 32

    def __post_init__(self) -> None:
        if not self.modes or set(self.modes) - set(MODES):
            raise InputError(f"modes={self.modes}: some of {', '.join(MODES)}")
        if self.generate and not self.steps:
            raise InputError("generate=True with steps=False: a model writes token by token")


def run_session(
    model: LanguageModel, session: Session, methods: Mapping[str, KeyMethod], protocol: Protocol
) -> list[Record]:
    """Ask all questions about one context, in every mode, of every method.

    Args:
        model: a decoder.
        session: the context and its turns.
        methods: by name; fitted where they need it.
        protocol: the modes, and how answers are scored.

    Raises:
        InputError: a method cannot be used on the model; the session has no turns, or is too long for the model.
    """
    for method in methods.values():
        method.check(model)
    check_session(model, session)
    return _Run(model, session, methods, protocol).records()


def check_session(model: LanguageModel, session: Session) -> None:
    """Refuse what cannot be asked.

    Raises:
        InputError: no turns; context and turns are more tokens than the model has positions.
    """
    content = session.content
    if not content.turns:
        raise InputError(f"session {session.number} of {session.task} has no turns: there is nothing to ask")
    tokens = sum(map(len, encode_parts(model, _transcript(content))))
    limit = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise InputError(
            f"session {session.number} of {session.task} has {tokens} tokens with its turns, and {model.name} has "
            f"{limit} positions: ask for shorter contexts"
        )


@dataclass(eq=False)
class _Prompt:
    """A prompt that was computed and is not compressed yet: the caches of all methods, and what comes next.

    Attributes:
        caches: by name of the method, or one for all that share a dense prompt.
        logits: after the last token, likewise.
        seconds: that it took, likewise.
    """

    caches: dict[str, Any] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False)
class _Life:
    """One method's cache after its prompt, and what is known of the first stages of its life."""

    name: str
    cache: Any
    first: Tensor | None  # logits of an answer's first token, where the prompt ends with the question
    stages: dict[str, Any]


class _Run:
    """One session."""

    def __init__(
        self, model: LanguageModel, session: Session, methods: Mapping[str, KeyMethod], protocol: Protocol
    ) -> None:
        self.model, self.session, self.methods, self.protocol = model, session, methods, protocol
        self.content = session.content
        facts = layer_facts(model)[0]
        self.shared = [name for name, method in methods.items() if reads_prompts_densely(method.memory(facts))]
        self.make: MakeMemory = ComposedMemory

    def records(self) -> list[Record]:
        found: list[Record] = []
        modes = self.protocol.modes
        with torch.no_grad(), attend_with(self.model, lambda facts: self.make(facts)):
            parts = encode_parts(self.model, _transcript(self.content))
            base = self._take_in(parts[0])
            if "multi_request" in modes:
                found += self._multi_request(base)
            if "multi_turn" in modes:
                found += self._multi_turn(base, parts)
            if "query_aware" in modes:
                found += self._query_aware(base)
        return found

    # --- the modes

    def _multi_request(self, base: _Prompt) -> list[Record]:
        asked = [self._request(turn) for turn in self.content.turns]
        found = []
        for name in self.methods:
            life = self._compress(base, name)
            before = digest_of(life.cache)
            answers = [self._answer(copied(life.cache), None, question, answer) for question, answer in asked]
            reusable = digest_of(life.cache) == before
            for turn, measured in enumerate(answers):
                found.append(self._record("multi_request", life, turn, {**measured, "reusable": reusable}))
        return found

    def _multi_turn(self, base: _Prompt, parts: Sequence[Tensor]) -> list[Record]:
        prompt = self._extended(base, parts[1])
        found = []
        for name in self.methods:
            life = self._compress(prompt, name, ends_with_question=True)
            waiting = parts[1][:0]
            for turn in range(len(self.content.turns)):
                answer = parts[2 * turn + 2]
                question = torch.cat([waiting, parts[2 * turn + 1]]) if turn else waiting
                measured = self._answer(life.cache, life.first if turn == 0 else None, question, answer)
                found.append(self._record("multi_turn", life, turn, measured))
                # The answer's last token was not fed: nothing of this turn follows it.
                waiting = answer[-1:]
        return found

    def _query_aware(self, base: _Prompt) -> list[Record]:
        found = []
        for turn, content in enumerate(self.content.turns):
            question, answer = self._request(content)
            prompt = self._extended(base, question)
            for name in self.methods:
                life = self._compress(prompt, name, ends_with_question=True)
                measured = self._answer(life.cache, life.first, question[:0], answer)
                found.append(self._record("query_aware", life, turn, measured))
        return found

    def _request(self, turn: Turn) -> tuple[Tensor, Tensor]:
        """A question and its answer as they follow the context."""
        first = self.content.turns[0]
        context, question, answer = encode_parts(self.model, [self.content.context, turn.question, turn.answer])
        expected = encode_parts(self.model, [self.content.context, first.question, first.answer])[0]
        if context.tolist() != expected.tolist():
            raise InputError(
                f"session {self.session.number} of {self.session.task}: the context's tokens depend on the question "
                "that follows: let all questions begin alike, with a space or a line break"
            )
        return question, answer

    # --- the stages of a cache

    def _take_in(self, ids: Tensor) -> _Prompt:
        prompt = _Prompt()
        if self.shared:
            self.make = self._fan
            self._compute(prompt, _PLAIN, None, ids)
        for name in self.methods:
            if name not in self.shared:
                self.make = self.methods[name].memory
                self._compute(prompt, name, None, ids)
        return prompt

    def _fan(self, facts: LayerFacts) -> LayerMemory:
        made = [self.methods[name].memory(facts) for name in self.shared]
        return Fan(facts, [each for each in made if isinstance(each, ComposedMemory)])

    def _extended(self, prompt: _Prompt, ids: Tensor) -> _Prompt:
        """The same prompt with more tokens; the first one stays as it is."""
        longer = _Prompt(seconds=dict(prompt.seconds))
        for name, cache in prompt.caches.items():
            self._compute(longer, name, copied(cache), ids)
        return longer

    def _compute(self, prompt: _Prompt, name: str, cache: Any, ids: Tensor) -> None:
        started = self._now()
        out = self.model.model(ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        seconds = self._now() - started
        prompt.seconds[name] = prompt.seconds.get(name, 0.0) + seconds
        prompt.caches[name], prompt.logits[name] = out.past_key_values, out.logits[0, -1:]

    def _compress(self, prompt: _Prompt, name: str, ends_with_question: bool = False) -> _Life:
        """A method's own cache of a prompt, closed."""
        key = _PLAIN if name in self.shared else name
        memories = memories_of(prompt.caches[key])
        if name in self.shared:
            place = self.shared.index(name)
            memories = [each.made[place] for each in memories if isinstance(each, Fan)]
        read = share_read(memories)
        cache = with_memories(prompt.caches[key], copy.deepcopy(memories))
        started = self._now()
        close_prompt(cache)
        stages = {
            "prompt_tokens": memories[0].seen,
            "prefill_seconds": prompt.seconds[key],
            "prefill_share_read": read,
            "compress_seconds": self._now() - started,
        }
        return _Life(name, cache, prompt.logits[key] if ends_with_question else None, stages)

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    # --- answers

    def _answer(self, cache: Any, first: Tensor | None, question: Tensor, answer: Tensor) -> dict[str, Any]:
        """Score an answer; all of its tokens but the last are then in the cache.

        Args:
            cache: of a closed prompt and earlier turns.
            first: logits of the answer's first token, if they are known.
            question: tokens to feed before; may be empty.
            answer: tokens.
        """
        before = usage_of(cache)
        measured: dict[str, Any] = {}
        if not self.protocol.steps:
            fed = torch.cat([question, answer[:-1]])
            parts = [] if first is None else [first]
            if len(fed):
                parts.append(self._feed(cache, fed, len(answer) - len(parts)))
            logits = torch.cat(parts)
        else:
            if len(question):
                first = self._feed(cache, question, 1)
            assert first is not None
            if self.protocol.generate:
                measured["text"] = self._write(copied(cache), first)
            logits, timed = self._by_steps(cache, first, answer)
            measured.update(timed)
        after = usage_of(cache)
        exact, nll = exact_and_nll(logits, answer)
        there = after.keys_there - before.keys_there
        measured |= {"exact": exact, "nll": nll, "bytes_held": after.bytes_held, "share_held": after.share_held}
        measured["share_read"] = (after.keys_read - before.keys_read) / there if there else None
        return measured

    def _feed(self, cache: Any, ids: Tensor, keep: int) -> Tensor:
        logits: Tensor = self.model.model(ids[None], past_key_values=cache, logits_to_keep=keep).logits[0]
        return logits

    def _by_steps(self, cache: Any, first: Tensor, answer: Tensor) -> tuple[Tensor, dict[str, Any]]:
        before, started = usage_of(cache).bytes_read, self._now()
        logits = [first, *(self._feed(cache, token[None], 1) for token in answer[:-1])]
        steps = len(answer) - 1
        if not steps:
            return first, {}
        seconds = self._now() - started
        read = usage_of(cache).bytes_read - before
        return torch.cat(logits), {"tokens_per_second": steps / seconds, "bytes_per_step": read / steps}

    def _write(self, cache: Any, logits: Tensor) -> str:
        end = self.model.tokenizer.eos_token_id
        written: list[int] = []
        while len(written) < self.protocol.new_tokens:
            token = logits[-1].argmax()
            if int(token) == end:
                break
            written.append(int(token))
            if len(written) < self.protocol.new_tokens:
                logits = self._feed(cache, token[None], 1)
        text: str = self.model.tokenizer.decode(written, skip_special_tokens=True)
        return text

    def _record(self, mode: str, life: _Life, turn: int, measured: Mapping[str, Any]) -> Record:
        content = self.content.turns[turn]
        text = measured.get("text")
        score = float(measured["exact"])
        if text is not None:
            score = metric_score(content.metric, text, content.answer, self.content.context)
        fields: dict[str, Any] = {
            "task": self.session.task,
            "session": self.session.number,
            "mode": mode,
            "method": life.name,
            "turn": turn,
            "part": content.part,
            "score": score,
        }
        return Record(**fields, **life.stages, **measured)


def _transcript(content: SharedContext) -> list[str]:
    return [content.context, *(text for turn in content.turns for text in (turn.question, turn.answer))]
