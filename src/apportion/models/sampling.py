"""Continuing texts a few tokens while something is done to the model on some of the tokens."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.models.language import LanguageModel

# Given which tokens of a padded batch are meant, what is in force during a pass over that batch.
During = Callable[[Bool[Tensor, "batch time"]], AbstractContextManager[None]]


def padded(lm: LanguageModel, texts: list[list[int]]) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """Token ids padded on the right, and which of them are real."""
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=lm.device)
    lengths = torch.tensor([len(text) for text in texts], device=lm.device)
    return ids, torch.arange(width, device=lm.device)[None] < lengths[:, None]


def next_logits(
    lm: LanguageModel, texts: list[list[int]], during: During | None = None, since: list[int] | None = None
) -> Float[Tensor, "batch vocab"]:
    """Logits after the last token of each text, in float32.

    Args:
        lm: the model.
        texts: token ids.
        during: what is in force in the pass, told which tokens are meant.
        since: the tokens meant are those from here to the end of each text; default the last one.
    """
    ids, real = padded(lm, texts)
    first = torch.tensor([len(text) - 1 for text in texts] if since is None else since, device=lm.device)
    meant = real & (torch.arange(ids.shape[1], device=lm.device)[None] >= first[:, None])
    with contextlib.nullcontext() if during is None else during(meant):
        return lm.next_token_logits(ids, real)


def continue_texts(
    lm: LanguageModel,
    texts: list[list[int]],
    tokens: int,
    generator: torch.Generator,
    during: During | None = None,
    positions: str = "last",
) -> list[list[int]]:
    """Sample tokens at temperature 1 after each text, without a cache: meant for a few tokens.

    Args:
        lm: the model.
        texts: token ids.
        tokens: to sample.
        generator: of the random numbers, on the CPU.
        during: see ``next_logits``.
        positions: the tokens meant: the ``last`` one of the given text alone, or ``from_last``: those sampled, too.

    Returns:
        The sampled tokens of each text.
    """
    length = [len(text) for text in texts]
    running = [list(text) for text in texts]
    for _ in range(tokens):
        meant: During | None = during
        if during is not None and positions == "last":
            meant = _only(during, length)
        logits = next_logits(lm, running, meant, [each - 1 for each in length])
        drawn = torch.multinomial(logits.softmax(dim=-1).cpu(), 1, generator=generator)
        for text, token in zip(running, drawn[:, 0].tolist(), strict=True):
            text.append(token)
    return [text[start:] for text, start in zip(running, length, strict=True)]


def _only(during: During, length: list[int]) -> During:
    """Of the tokens meant the one that each text ended with when it was given."""

    def begin(meant: Tensor) -> AbstractContextManager[None]:
        last = torch.tensor(length, device=meant.device)[:, None] - 1
        return during(meant & (torch.arange(meant.shape[1], device=meant.device)[None] == last))

    return begin
