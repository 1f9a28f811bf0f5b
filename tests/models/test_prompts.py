from dataclasses import replace
from pathlib import Path

import pytest
import torch

from apportion.data.tasks import Prompt, PromptPairs, docstring, greater_than, ioi
from apportion.errors import InputError
from apportion.models import load, tokenise, validate
from apportion.models.prompts import predict


def digits(lengths: tuple[int, int] = (2, 2)) -> PromptPairs:
    """Two pairs of other lengths, made of what every byte-level tokenizer has a token for."""
    texts = [("1" * lengths[0], "2" * lengths[1]), ("345", "346")]
    prompts = [
        tuple(Prompt(text, ("7", "8"), ("9",), {"last": (len(text) - 1, len(text))}) for text in pair)
        for pair in texts
    ]  # fmt: skip
    clean, other = zip(*prompts, strict=True)
    return PromptPairs("digits", clean, other)


def test_prompts_of_other_lengths_are_padded_and_their_roles_found(tiny_llama: Path) -> None:
    pairs = tokenise(digits(), load(tiny_llama))
    assert pairs.clean.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert pairs.clean.positions["last"].tolist() == pairs.clean.positions["end"].tolist() == [1, 2]
    assert pairs.clean.answers.shape == (2, 2)
    assert (pairs.clean.answers != pairs.clean.distractors).all()


def test_padding_changes_no_prediction(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    pairs = tokenise(digits(), model)
    alone = tokenise(digits().select(0, 1), model)
    assert alone.clean.input_ids.shape[1] == 2
    torch.testing.assert_close(predict(model, pairs.clean)[:1], predict(model, alone.clean))


def test_prompts_that_do_not_stand_against_each_other_token_by_token_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match=r"'11' and of '222' lie at other positions"):
        tokenise(digits((2, 3)), load(tiny_llama))


def test_an_answer_of_several_tokens_is_refused_by_name(tiny_llama: Path) -> None:
    pairs = digits()
    clean = (replace(pairs.clean[0], answers=("77777",)), pairs.clean[1])
    with pytest.raises(InputError, match="'77777' is not a single token"):
        tokenise(replace(pairs, clean=clean), load(tiny_llama))


def test_validation_counts_right_answers(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    pairs = tokenise(digits(), model)
    best = predict(model, pairs.clean).argmax(1)
    right = replace(pairs.clean, answers=torch.stack([best, best], 1))
    half = replace(pairs.clean, answers=torch.stack([best, best + 1], 1).flip(1), distractors=best[:, None])
    half.answers[0] = best[0]
    assert validate(model, replace(pairs, clean=right)).accuracy == 1.0
    found = validate(model, replace(pairs, clean=right))
    assert found.prompts == 2
    assert found.preferred == 1.0
    assert found.metric > 0


@pytest.mark.packaged
@pytest.mark.slow
def test_smollm2_does_the_three_tasks() -> None:
    model = load("smollm2")
    for pairs, accuracy, length in ((ioi(16, frame=1), 0.9, 14), (greater_than(16), 0.0, 17), (docstring(8), 0.8, 37)):
        tokens = tokenise(pairs, model)
        assert tokens.clean.input_ids.shape == (16 if length < 37 else 8, length)
        assert tokens.clean.attention_mask.all()
        found = validate(model, tokens)
        assert found.accuracy >= accuracy
        assert found.preferred > 0.8
        assert found.counterfactual_metric < 0.2 * found.metric
