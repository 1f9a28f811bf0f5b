"""A transformers model of this machine as a `ChatModel`: many threads ask, and it answers in batches."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apportion.errors import InputError
from apportion.models.chat import ChatError, Generation, Message, Messages, Prefix, SamplingParams
from apportion.models.families import base_of, finish_logits
from apportion.models.language import LanguageModel
from apportion.models.quiet import quiet_transformers

_LOGITS_AT_ONCE = 2**24


class _Question:
    def __init__(self, text: str, params: SamplingParams) -> None:
        self.text, self.params = text, params
        self.answer: Generation | Exception | None = None


class LocalChat:
    """A causal language model that answers conversations and tells likelihoods.

    There is no thread of its own: of those that ask, the one that gets hold of the model answers all that are waiting
    with the same settings. Prompts are padded on the left. Sampling is reproducible where a seed is given: such
    questions are answered alone, with random numbers of their own.

    Args:
        lm: the model; where its tokenizer has no chat template, roles are written out (``user: ...``).
        batch_size: conversations and continuations at once.

    Raises:
        InputError: the model does not predict the next token.
    """

    def __init__(self, lm: LanguageModel, batch_size: int = 8) -> None:
        if not lm.is_causal:
            raise InputError(f"{lm.name} does not predict the next token: a judge is a causal model, such as smollm2")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: it must be at least 1")
        self.lm, self.batch_size = lm, batch_size
        self.name = f"local:{lm.name}@{lm.fingerprint[:12]}"
        self.capabilities = frozenset({"chat", "logprobs", "score"})
        self._model_is_free = threading.Lock()
        self._queue_is_free = threading.Lock()
        self._waiting: list[_Question] = []

    def generate(self, messages: Messages, params: SamplingParams) -> Generation:
        """See `ChatModel`; waits for its turn."""
        mine = _Question(self.prompt(messages), params)
        with self._queue_is_free:
            self._waiting.append(mine)
        while mine.answer is None:
            with self._model_is_free:
                if mine.answer is None:
                    self._answer_all_like(mine)
        if isinstance(mine.answer, Exception):
            raise mine.answer
        return mine.answer

    @torch.no_grad()
    def score(self, prefix: Prefix, continuations: Sequence[str]) -> list[list[float]]:
        """See `ChatModel`. The prefix is read once; prefix and continuation are tokenised apart.

        Raises:
            ChatError: the model has not as many positions.
            ValueError: a continuation has no token, or the prefix has none.
        """
        tokenizer, device = self.lm.tokenizer, self.lm.device
        before = self._ids(prefix if isinstance(prefix, str) else self.prompt(prefix))
        after = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in continuations]
        if not before or not all(after):
            raise ValueError("prefix and continuations must have at least one token each")
        self._check_length(len(before) + max(map(len, after)))
        head = self.lm.model.get_output_embeddings()
        found: list[list[float]] = []
        with self._model_is_free:
            first = base_of(self.lm.model)(input_ids=torch.tensor([before], device=device), use_cache=True)
            for start in range(0, len(after), self.batch_size):
                part = after[start : start + self.batch_size]
                hidden = first.last_hidden_state[:, -1:].expand(len(part), -1, -1)
                if max(map(len, part)) > 1:
                    hidden = torch.cat([hidden, self._continued(first.past_key_values, before, part)], dim=1)
                for row, ids in enumerate(part):
                    logits = finish_logits(self.lm.model, head(hidden[row, : len(ids)]).float())
                    told = logits.log_softmax(dim=-1)[torch.arange(len(ids)), torch.tensor(ids)]
                    found.append(told.tolist())
        return found

    @property
    def exclusive(self) -> threading.Lock:
        """Held while the model answers; who holds it has the model for itself, to steer it for instance."""
        return self._model_is_free

    def prompt(self, messages: Messages) -> str:
        """A conversation as the text that the model continues with its answer."""
        tokenizer = self.lm.tokenizer
        if getattr(tokenizer, "chat_template", None):
            spoken = [dict(message) for message in messages]
            return str(tokenizer.apply_chat_template(spoken, tokenize=False, add_generation_prompt=True))
        return "\n\n".join([_written_out(message) for message in messages] + ["assistant:"])

    def count_tokens(self, messages: Messages) -> int:
        """How many tokens the model would read."""
        return len(self._ids(self.prompt(messages)))

    def _ids(self, text: str) -> list[int]:
        # A template writes its own special tokens.
        special = not getattr(self.lm.tokenizer, "chat_template", None)
        return list(self.lm.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _continued(self, cache: Any, before: list[int], part: list[list[int]]) -> Tensor:
        """Hidden states of all but the last token of each continuation, from a copy of the prefix's cache."""
        import copy

        width = max(map(len, part)) - 1
        pad = self._pad()
        rows = [ids[:-1] + [pad] * (width - len(ids) + 1) for ids in part]
        mask = torch.tensor([[1] * (len(before) + len(ids) - 1) + [0] * (width - len(ids) + 1) for ids in part])
        copied = copy.deepcopy(cache)
        copied.batch_repeat_interleave(len(part))
        device = self.lm.device
        out = base_of(self.lm.model)(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=mask.to(device),
            past_key_values=copied,
            use_cache=True,
        )
        return out.last_hidden_state

    def _answer_all_like(self, mine: _Question) -> None:
        with self._queue_is_free:
            alone = mine.params.temperature > 0
            batch = [mine] if alone else [each for each in self._waiting if each.params == mine.params]
            batch = [mine, *(each for each in batch if each is not mine)][: self.batch_size]
            self._waiting = [each for each in self._waiting if each not in batch]
        try:
            answers: list[Any] = self._generate([each.text for each in batch], mine.params)
        except ChatError as error:
            if len(batch) == 1:
                answers = [error]
            else:  # one that is too long must not take the others with it
                with self._queue_is_free:
                    self._waiting += batch[1:]
                batch, answers = [mine], [self._one(mine)]
        except Exception as error:
            answers = [error] * len(batch)
        for question, answer in zip(batch, answers, strict=True):
            question.answer = answer

    def _one(self, question: _Question) -> Generation | Exception:
        try:
            return self._generate([question.text], question.params)[0]
        except Exception as error:
            return error

    @torch.no_grad()
    def _generate(self, texts: list[str], params: SamplingParams) -> list[Generation]:
        from transformers import GenerationConfig

        ids = [self._ids(text) for text in texts]
        longest = max(map(len, ids))
        self._check_length(longest + params.max_tokens)
        pad, device = self._pad(), self.lm.device
        rows = torch.tensor([[pad] * (longest - len(each)) + each for each in ids], device=device)
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in ids], device=device)
        ends = self._ends()
        config = GenerationConfig(
            max_new_tokens=params.max_tokens,
            do_sample=params.temperature > 0,
            **({"temperature": params.temperature, "top_k": 0, "top_p": 1.0} if params.temperature > 0 else {}),
            stop_strings=[params.stop] if params.stop else None,
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
            output_logits=params.top_logprobs > 0,
            return_dict_in_generate=True,
        )
        with quiet_transformers(), torch.random.fork_rng():
            if params.seed is not None:
                torch.manual_seed(params.seed)
            out = self.lm.model.generate(
                input_ids=rows, attention_mask=mask, generation_config=config, tokenizer=self.lm.tokenizer
            )
        logits = torch.stack(out.logits, dim=1) if params.top_logprobs else None
        written = out.sequences[:, longest:].tolist()
        return [
            self._said(new, len(ids[row]), params, ends, None if logits is None else logits[row])
            for row, new in enumerate(written)
        ]

    def _said(
        self, new: list[int], read: int, params: SamplingParams, ends: set[int], logits: Tensor | None
    ) -> Generation:
        length = next((place for place, token in enumerate(new) if token in ends), None)
        kept = new if length is None else new[:length]
        tokenizer = self.lm.tokenizer
        text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        stopped = bool(params.stop) and str(params.stop) in text
        if params.stop:
            text = text.split(params.stop)[0]
        tops: list[dict[str, float]] = []
        if logits is not None:
            best = logits[: len(kept)].float().log_softmax(dim=-1).topk(params.top_logprobs)
            for values, tokens in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                tops.append({tokenizer.decode([token]): value for value, token in zip(values, tokens, strict=True)})
        return Generation(
            text=text,
            finish_reason="length" if length is None and not stopped else "stop",
            tokens=tuple(tokenizer.decode([token]) for token in kept) if logits is not None else (),
            top_logprobs=tuple(tops),
            prompt_tokens=read,
            completion_tokens=len(kept),
        )

    def _check_length(self, tokens: int) -> None:
        most = getattr(self.lm.model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and tokens > most:
            raise ChatError("too long", f"{tokens} tokens, of which {self.lm.name} takes {most}: show fewer examples")

    def _pad(self) -> int:
        tokenizer = self.lm.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return 0 if pad is None else int(pad)

    def _ends(self) -> set[int]:
        """Tokens that end an answer: those of the tokenizer and those of the model's own settings."""
        said = getattr(self.lm.model.generation_config, "eos_token_id", None)
        ends = [said] if isinstance(said, int) else list(said or [])
        own = self.lm.tokenizer.eos_token_id
        return {int(token) for token in [*ends, own] if token is not None}


def _written_out(message: Message) -> str:
    return f"{message['role']}: {message['content']}"
