"""Every key method with a budget for everything equals dense attention, on every family, padded or not, in chunks."""

from typing import Any

import pytest
import torch
import transformers

from apportion.models import LanguageModel
from key_methods import EVERYTHING
from tiny_families import CAUSAL, tiny_model

# These have layers without a sliding window: of the tiny models two have none.
FAMILIES = [family for family in CAUSAL if family not in ("mistral", "gemma3")]
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}
TEXTS = [
    "some words to fit a method to, and a few more words after them " * 3,
    "other words, which are not the same ones " * 3,
]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def lm(family: str) -> LanguageModel:
    return LanguageModel(family, tiny_model(family), _Tokenizer())


class _Tokenizer:
    """Letters are tokens; enough of a tokenizer to fit methods on tiny models."""

    pad_token_id, eos_token_id = 0, 2

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        ids = [3 + ord(letter) % 90 for letter in text][: min(options.get("max_length", 48), 48)]
        if options.get("return_tensors") == "pt":
            return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 97, (2, 21), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", EVERYTHING)
@torch.no_grad()
def test_with_a_budget_for_everything_a_method_is_dense_attention(
    lm: LanguageModel, ids: torch.Tensor, name: str
) -> None:
    method = EVERYTHING[name](lm).fit(lm, TEXTS)
    for padding in (0, 5):
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        dense = _written(lm, ids, mask)
        with method(lm) as run:
            found = _written(lm, ids, mask)
            assert run.usage.steps > 0
        assert found.sequences.tolist() == dense.sequences.tolist()
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(dense.logits), **TOLERANCE)
    exact = lm.model(ids).logits
    for chunk in (4, 9):
        with method(lm) as run:
            cache = transformers.DynamicCache(config=lm.model.config)
            parts = []
            for number, part in enumerate(ids.split(chunk, dim=1)):
                parts.append(lm.model(part, past_key_values=cache).logits)
                if number == 1:
                    run.close_prompt()
            torch.testing.assert_close(torch.cat(parts, dim=1), exact, **TOLERANCE)


def _written(lm: LanguageModel, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return lm.model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options)
