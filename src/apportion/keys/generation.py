"""Text that a model writes by a key method, token by token, with what that cost."""

import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from apportion.errors import InputError
from apportion.keys.budget import Usage
from apportion.keys.method import KeyMethod
from apportion.models import LanguageModel
from apportion.models.key_door import close_prompt


@dataclass(frozen=True)
class Written:
    """A text and its cost.

    Attributes:
        tokens: that the model wrote, without the one that ends a text.
        prompt_tokens: that it went on from.
        prompt_seconds: computing them.
        compress_seconds: closing the prompt.
        step_seconds: of each decoding step; the first token is the prompt's.
        usage: what reading and holding cost from the prompt on; None without a method.
    """

    tokens: tuple[int, ...]
    prompt_tokens: int
    prompt_seconds: float
    compress_seconds: float
    step_seconds: tuple[float, ...]
    usage: Usage | None

    @property
    def steps(self) -> int:
        """Decoding steps."""
        return len(self.step_seconds)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the median decoding step, since kernels may be compiled in the first; None where nothing was decoded."""
        return 1 / statistics.median(self.step_seconds) if self.step_seconds else None


@torch.no_grad()
def write(
    model: LanguageModel, prompt: Int[Tensor, " prompt_tokens"], method: KeyMethod | None = None, *, tokens: int = 40
) -> Written:
    """Go on from a prompt with the likeliest token each time.

    Args:
        model: a decoder.
        prompt: its tokens; all of them are the prompt that the method compresses.
        method: None for dense attention with transformers' own cache and attention.
        tokens: to write, unless the model ends its text before.

    Raises:
        InputError: an empty prompt, ``tokens`` below 1, more positions than the model has; the method cannot be used.
    """
    limit = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    if not len(prompt) or tokens < 1:
        raise InputError(f"a prompt of {len(prompt)} tokens, tokens={tokens}: at least 1 of both")
    if limit is not None and len(prompt) + tokens > limit:
        raise InputError(
            f"the prompt has {len(prompt)} tokens, and with tokens={tokens} that is more than the {limit} positions of "
            f"{model.name}: shorten it, or write less"
        )
    with nullcontext() if method is None else method(model) as run:
        started = time.perf_counter()
        out = model.model(prompt[None], use_cache=True, logits_to_keep=1)
        written = [int(out.logits[0, -1].argmax())]  # which also waits for a GPU
        computed = time.perf_counter()
        cache = out.past_key_values
        if run is not None:
            close_prompt(cache)
        closed = time.perf_counter()
        ends = _ends(model)
        steps = []
        while len(written) < tokens and written[-1] not in ends:
            begun = time.perf_counter()
            newest = torch.tensor([[written[-1]]], device=prompt.device)
            logits = model.model(newest, past_key_values=cache, logits_to_keep=1).logits
            written.append(int(logits[0, -1].argmax()))
            steps.append(time.perf_counter() - begun)
        usage = None if run is None else run.usage
    if written[-1] in ends:
        written.pop()
    return Written(tuple(written), len(prompt), computed - started, closed - computed, tuple(steps), usage)


def first_difference(one: tuple[int, ...], other: tuple[int, ...]) -> int | None:
    """The place, from 0, of the first token in which two texts differ, or at which one ends; None if they are equal."""
    if one == other:
        return None
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _ends(model: LanguageModel) -> set[int]:
    ends = getattr(getattr(model.model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        ends = model.tokenizer.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, list | tuple) else {int(ends)}
