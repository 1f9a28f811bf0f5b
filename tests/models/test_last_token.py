"""Going through the last token alone gives what a whole pass gives."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apportion.errors import InputError
from apportion.models import HeadEdit, LanguageModel, TokenPrompts, edit_heads
from apportion.models.last_token import LastToken
from apportion.models.prompts import predict

LAST = 6


def prompts_of(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> TokenPrompts:
    rows, time = input_ids.shape
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    nothing = torch.zeros(rows, 1, dtype=torch.int64)
    return TokenPrompts(input_ids, mask, {"end": torch.full((rows,), time - 1)}, nothing, nothing)


def wrapped(model: Any) -> LanguageModel:
    return LanguageModel("tiny", model, SimpleNamespace())


def test_a_pass_of_the_last_token_predicts_what_a_whole_pass_does(causal_model, input_ids) -> None:
    lm, prompts = wrapped(causal_model), prompts_of(input_ids)
    with torch.no_grad():
        expected = predict(lm, prompts)
    last = LastToken(lm, prompts)
    torch.testing.assert_close(last.logits(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(last.logits(), expected, atol=1e-5, rtol=1e-4)  # the first pass left nothing behind


def test_edits_at_the_last_token_are_those_of_a_whole_pass(causal_model, input_ids) -> None:
    lm, prompts = wrapped(causal_model), prompts_of(input_ids)
    generator = torch.Generator().manual_seed(0)
    values = {place: torch.randn(2, lm.head_width, generator=generator) for place in ((0, 1), (2, 3))}
    end = prompts.positions["end"]
    with torch.no_grad(), edit_heads(lm, [HeadEdit(*place, each, end) for place, each in values.items()]):
        expected = predict(lm, prompts)
    found = LastToken(lm, prompts).logits(values)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, LastToken(lm, prompts).logits(), atol=1e-3)


def test_copies_lie_side_by_side(llama, input_ids) -> None:
    last = LastToken(wrapped(llama), prompts_of(input_ids))
    values = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    both = last.logits({(1, 0): values}, copies=2)
    torch.testing.assert_close(both[:2], last.logits({(1, 0): values[:2]}))
    torch.testing.assert_close(both[2:], last.logits({(1, 0): values[2:]}))


def test_padded_prompts_are_refused(llama, bert, input_ids, attention_mask) -> None:
    with pytest.raises(InputError, match=r"\[5, 7\] tokens"):
        LastToken(wrapped(llama), prompts_of(input_ids, attention_mask))
    with pytest.raises(InputError, match="does not predict"):
        LastToken(wrapped(bert), prompts_of(input_ids))
