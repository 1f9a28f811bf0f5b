"""Pairs of prompts as tokens: where each role lies, which tokens are right, and how well a model does."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.data.tasks import Prompt, PromptPairs
from apportion.data.tasks.pairs import MetricName
from apportion.errors import InputError
from apportion.models.families import base_of, finish_logits
from apportion.models.language import LanguageModel


@dataclass(frozen=True, eq=False)
class TokenPrompts:
    """Prompts as a model reads them, padded on the right.

    Attributes:
        input_ids: token ids.
        attention_mask: 1 for tokens, 0 for padding.
        positions: of each role (``end`` is the last token), one a prompt.
        answers, distractors: the ids of what counts as right and as wrong; -1 fills short rows.
    """

    input_ids: Int[Tensor, "prompts time"]
    attention_mask: Int[Tensor, "prompts time"]
    positions: dict[str, Int[Tensor, " prompts"]]
    answers: Int[Tensor, "prompts answers"]
    distractors: Int[Tensor, "prompts distractors"]

    def __len__(self) -> int:
        return len(self.input_ids)

    def select(self, rows: slice) -> "TokenPrompts":
        """Some of the prompts."""
        positions = {role: each[rows] for role, each in self.positions.items()}
        return TokenPrompts(
            self.input_ids[rows], self.attention_mask[rows], positions, self.answers[rows], self.distractors[rows]
        )


@dataclass(frozen=True, eq=False)
class TokenPairs:
    """`PromptPairs` as tokens: position t of a clean prompt stands against position t of its counterfactual.

    Attributes:
        name: of the task.
        clean, counterfactual: the prompts.
        metric: by which the task is judged.
    """

    name: str
    clean: TokenPrompts
    counterfactual: TokenPrompts
    metric: MetricName

    def __len__(self) -> int:
        return len(self.clean)

    def select(self, rows: slice) -> "TokenPairs":
        """Some of the pairs."""
        return TokenPairs(self.name, self.clean.select(rows), self.counterfactual.select(rows), self.metric)


def tokenise(pairs: PromptPairs, model: LanguageModel) -> TokenPairs:
    """Tokenise pairs for a model, on its device.

    Raises:
        InputError: an answer or distractor is not one token after its prompt, or the two prompts of a pair differ in
            length or in where a role lies; says which, since other words or another model would do.
    """
    prompts = [*pairs.clean, *pairs.counterfactual]
    encoded = _encode(model.tokenizer, [each.text for each in prompts])
    length = max(len(ids) for ids, _ in encoded)
    padding = model.tokenizer.pad_token_id or 0
    ids = torch.full((len(prompts), length), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    places = {role: torch.zeros(len(prompts), dtype=torch.int64) for role in pairs.roles}
    for row, (prompt, (tokens, offsets)) in enumerate(zip(prompts, encoded, strict=True)):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        for role in pairs.roles:
            places[role][row] = len(tokens) - 1 if role == "end" else _last_token(offsets, prompt, role)
    half = len(pairs)
    for row, (prompt, other) in enumerate(zip(pairs.clean, pairs.counterfactual, strict=True)):
        # Two names may have changed places.
        if len({tuple(sorted(int(place[each]) for place in places.values())) for each in (row, half + row)}) > 1:
            raise InputError(
                f"{pairs.name}: with the tokenizer of {model.name} the words of {prompt.text!r} and of {other.text!r} "
                "lie at other positions: use words that are as many tokens in both"
            )
    answers, distractors = _continuations(model, prompts, encoded)
    device = model.device
    both = [
        TokenPrompts(
            ids[rows].to(device),
            mask[rows].to(device),
            {role: place[rows].to(device) for role, place in places.items()},
            answers[rows].to(device),
            distractors[rows].to(device),
        )
        for rows in (slice(0, half), slice(half, None))
    ]
    return TokenPairs(pairs.name, both[0], both[1], pairs.metric)


def _encode(tokenizer: Any, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Token ids and the characters each stands for."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{type(tokenizer).__name__} does not say which characters a token stands for: use a fast one")
    found = tokenizer(texts, return_offsets_mapping=True)
    return [
        (list(ids), [(int(start), int(end)) for start, end in offsets])
        for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True)
    ]


def _last_token(offsets: list[tuple[int, int]], prompt: Prompt, role: str) -> int:
    """The position of the last token of a role's word."""
    start, end = prompt.roles[role]
    return max(place for place, (first, last) in enumerate(offsets) if first < end and last > start and last > first)


def _continuations(
    model: LanguageModel, prompts: list[Prompt], encoded: list[tuple[list[int], list[tuple[int, int]]]]
) -> tuple[Tensor, Tensor]:
    """The ids of answers and distractors, each tokenised where it would stand."""
    wanted = [(row, word) for row, prompt in enumerate(prompts) for word in (*prompt.answers, *prompt.distractors)]
    longer = _encode(model.tokenizer, [prompts[row].text + word for row, word in wanted])
    token: dict[tuple[int, str], int] = {}
    for (row, word), (ids, _) in zip(wanted, longer, strict=True):
        before = encoded[row][0]
        if ids[: len(before)] != before or len(ids) != len(before) + 1:
            raise InputError(
                f"{word!r} is not a single token of {model.name} after {prompts[row].text!r}: use other words or "
                "another model"
            )
        token[row, word] = ids[-1]

    def table(words: list[tuple[str, ...]]) -> Tensor:
        ids = torch.full((len(words), max(1, *(len(each) for each in words))), -1, dtype=torch.int64)
        for row, each in enumerate(words):
            ids[row, : len(each)] = torch.tensor([token[row, word] for word in each], dtype=torch.int64)
        return ids

    return table([each.answers for each in prompts]), table([each.distractors for each in prompts])


def logits_at_end(
    model: LanguageModel, hidden: Float[Tensor, "prompts time d"], end: Int[Tensor, " prompts"]
) -> Float[Tensor, "prompts vocab"]:
    """What the model predicts after each prompt, from the hidden states that come out of its last block and norm."""
    last = hidden[torch.arange(len(end), device=hidden.device), end]
    return finish_logits(model.model, model.model.get_output_embeddings()(last).float())


def predict(model: LanguageModel, prompts: TokenPrompts) -> Float[Tensor, "prompts vocab"]:
    """Logits, in float32, of the token after each prompt; splices and edits in force are in force here too."""
    hidden = base_of(model.model)(
        input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, use_cache=False
    ).last_hidden_state
    return logits_at_end(model, hidden, prompts.positions["end"])


def judge(
    logits: Float[Tensor, "prompts vocab"], prompts: TokenPrompts, metric: MetricName
) -> Float[Tensor, " prompts"]:
    """How much the answers are preferred to the distractors; differentiable.

    ``logit_difference``: the logit of the best answer minus that of the best distractor. ``probability_difference``:
    the probability of all answers minus that of all distractors.

    Raises:
        InputError: an unknown metric.
    """
    if metric == "logit_difference":
        return _best(logits, prompts.answers) - _best(logits, prompts.distractors)
    if metric == "probability_difference":
        shares = logits.softmax(-1)
        return _total(shares, prompts.answers) - _total(shares, prompts.distractors)
    raise InputError(f"metric {metric!r} is unknown: choose logit_difference or probability_difference")


def _best(logits: Tensor, ids: Tensor) -> Tensor:
    found = logits.gather(1, ids.clamp(min=0))
    return found.masked_fill(ids < 0, float("-inf")).amax(1)


def _total(shares: Tensor, ids: Tensor) -> Tensor:
    return (shares.gather(1, ids.clamp(min=0)) * (ids >= 0)).sum(1)


@dataclass(frozen=True)
class Validation:
    """How well a model does a task; look at it before anything else.

    Attributes:
        prompts: judged.
        accuracy: share of clean prompts whose most likely continuation, of the whole vocabulary, is an answer.
        preferred: share of clean prompts where the metric is above zero.
        metric: its mean over clean prompts.
        counterfactual_metric: its mean over the counterfactuals: near zero where they hide the answer well.
    """

    prompts: int
    accuracy: float
    preferred: float
    metric: float
    counterfactual_metric: float


@torch.no_grad()
def validate(model: LanguageModel, pairs: TokenPairs) -> Validation:
    """Judge a model on a task.

    Raises:
        InputError: the model does not predict the next token.
    """
    if not model.is_causal:
        raise InputError(f"{model.name} does not predict the next token: use a causal language model, such as smollm2")
    logits = predict(model, pairs.clean)
    clean = judge(logits, pairs.clean, pairs.metric)
    other = judge(predict(model, pairs.counterfactual), pairs.clean, pairs.metric)
    right = (logits.argmax(1, keepdim=True) == pairs.clean.answers).any(1)
    return Validation(
        len(pairs),
        float(right.float().mean()),
        float((clean > 0).float().mean()),
        float(clean.mean()),
        float(other.mean()),
    )
