"""What a key method does to a model's text: answers that it still gets right, and the likelihood of what follows.

Both read what was *stored*: a context is taken in, closed, and only what comes after it is scored. A loss measured in
one prefill would be exact for every method that compresses after it.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.data.tasks.shared_context import SharedContext
from apportion.errors import InputError
from apportion.keys.budget import Usage
from apportion.keys.method import KeyMethod
from apportion.models import LanguageModel
from apportion.models.key_door import close_prompt


@dataclass(frozen=True)
class Answered:
    """How one question was answered.

    Attributes:
        exact: whether the likeliest token was the answer's at every place of it (which is what greedy decoding would
            have written).
        nll: mean negative log-likelihood of the answer's tokens, in nats.
        turn: its number, from 0.
        usage: what reading has cost since the context; None without a method.
    """

    exact: bool
    nll: float
    turn: int
    usage: Usage | None


@torch.no_grad()
def score_answers(
    model: LanguageModel, tasks: Iterable[SharedContext], method: KeyMethod | None = None, *, query_aware: bool = False
) -> list[Answered]:
    """Ask every task's first question: context, compression, question, answer token by token.

    The text is encoded once and split by tokens. For tasks of several turns see `apportion.keys.scbench`.

    Args:
        model: a decoder.
        tasks: one context and at least one turn each.
        method: None for dense attention with a plain cache.
        query_aware: compress after the question rather than before it, which no server with many questions could.
    """
    found = []
    with nullcontext() if method is None else method(model) as run:
        for task in tasks:
            turn = task.turns[0]
            context, question, answer = encode_parts(model, [task.context, turn.question, turn.answer])
            first = torch.cat([context, question]) if query_aware else context
            out = model.model(first[None], use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            if run is not None:
                close_prompt(cache)
            if not query_aware:
                out = model.model(question[None], past_key_values=cache, logits_to_keep=1)
            logits = [out.logits[0, -1]]
            for token in answer[:-1]:
                logits.append(model.model(token[None, None], past_key_values=cache).logits[0, -1])
            scores = exact_and_nll(torch.stack(logits), answer)
            found.append(Answered(*scores, 0, None if run is None else run.usage))
    return found


@torch.no_grad()
def score_continuation(
    model: LanguageModel,
    ids: Int[Tensor, " tokens"],
    method: KeyMethod | None = None,
    *,
    prefix: int,
    step: int = 1,
) -> Float[Tensor, " scored"]:
    """Negative log-likelihood, in nats, of each token after a prefix that the method has compressed.

    Args:
        model: a decoder.
        ids: one text.
        method: None for dense attention.
        prefix: tokens that are taken in first and closed.
        step: tokens taken in at a time afterwards; above 1 it is a turn of several tokens, which most methods read
            alike, and much faster.

    Returns:
        One number for each token from ``prefix + 1`` on: the first token after the prefix is predicted by the prefix
        itself, which is exact, and is left out.
    """
    if not 1 <= prefix < len(ids) - 1:
        raise InputError(f"prefix={prefix}: the text has {len(ids)} tokens, and at least 2 must come after the prefix")
    losses = []
    with nullcontext() if method is None else method(model):
        cache = model.model(ids[None, :prefix], use_cache=True, logits_to_keep=1).past_key_values
        if method is not None:
            close_prompt(cache)
        for start in range(prefix, len(ids) - 1, step):
            part = ids[start : min(start + step, len(ids) - 1)]
            logits = model.model(part[None], past_key_values=cache).logits[0].float()
            targets = ids[start + 1 : start + 1 + len(part)]
            losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(losses)


def encode_parts(model: LanguageModel, parts: Sequence[str]) -> list[Int[Tensor, " part_tokens"]]:
    """Texts that follow each other, encoded as one and cut where they meet.

    A token that spans a border belongs to the later part.

    Raises:
        InputError: a part has no token of its own; or the tokenizer does not say where its tokens are.
    """
    try:
        encoded: Any = model.tokenizer("".join(parts), return_offsets_mapping=True)
    except NotImplementedError as error:
        raise InputError(f"the tokenizer of {model.name} does not say where its tokens are: use a fast one") from error
    ends, total = [], 0
    for part in parts:
        total += len(part)
        ends.append(total)
    groups: list[list[int]] = [[] for _ in parts]
    for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        groups[next((number for number, border in enumerate(ends) if end <= border), -1)].append(token)
    if empty := [number for number, group in enumerate(groups) if not group]:
        raise InputError(f"part {empty[0]} of the text ({parts[empty[0]]!r}) has no token of its own")
    return [torch.tensor(group, device=model.device) for group in groups]


def exact_and_nll(
    logits: Float[Tensor, "answer_tokens vocab"], answer: Int[Tensor, " answer_tokens"]
) -> tuple[bool, float]:
    """Whether the likeliest token is the answer's at every place, and the mean negative log-likelihood, in nats."""
    nll = torch.nn.functional.cross_entropy(logits.float(), answer)
    return bool((logits.argmax(-1) == answer).all()), float(nll)
