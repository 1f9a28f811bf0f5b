"""Heads at the last token: what is read there, and what it does to put something else there."""

from pathlib import Path

import pytest
import torch

from apportion.data.tasks import ioi
from apportion.features.cross_section import CrossSection, effects_at_end, outputs_at_end, strongest_heads, table_of
from apportion.models import LanguageModel, TokenPairs, TokenPrompts, load, patch_heads


@pytest.fixture
def lm(tiny_llama: Path) -> LanguageModel:
    return load(tiny_llama)


@pytest.fixture
def pairs() -> TokenPairs:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 90, (2, 4, 6), generator=generator)
    mask, end = torch.ones(4, 6, dtype=torch.int64), torch.full((4,), 5)
    answers, distractors = torch.arange(4)[:, None] + 5, torch.arange(4)[:, None] + 20
    clean, other = (TokenPrompts(each, mask, {"end": end}, answers, distractors) for each in ids)
    return TokenPairs("made up", clean, other, "logit_difference")


def test_attributes_become_columns() -> None:
    drawn = ioi(3, seed=0)
    table = table_of(drawn.clean)
    assert list(table) == ["IO", "S", "Pos"]
    assert table["IO"][2] == drawn.clean[2].attributes["IO"]


def test_putting_back_what_was_there_changes_nothing_and_anything_else_does(lm, pairs) -> None:
    heads = [(2, 3), (0, 1)]
    section = CrossSection(lm, heads, pairs.clean)
    torch.testing.assert_close(section.logits(section.outputs), section.logits(), atol=1e-4, rtol=1e-4)
    other = outputs_at_end(lm, heads, pairs.counterfactual)
    assert not torch.allclose(section.score(other), section.score(), atol=1e-3)


def test_effects_are_those_of_exact_patching_at_the_last_token(lm, pairs) -> None:
    expected = patch_heads(lm, pairs, role="end").mean(dim=0)
    found = effects_at_end(lm, pairs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    first, second = strongest_heads(found, 2)
    assert found[first].abs() == found.abs().max()
    assert found[second].abs() <= found[first].abs()
