"""Scores read what was stored: with everything kept they are those of one plain forward pass."""

import re
from pathlib import Path

import pytest
import torch

from apportion.data.tasks.shared_context import SharedContext, Turn, needles
from apportion.errors import InputError
from apportion.keys import KeyBudget
from apportion.keys.scoring import encode_parts, score_answers, score_continuation
from apportion.models import load
from key_methods import Keeps

PROSE = ["The quick brown fox jumps over the lazy dog. It was a fine day for all of them. " * 20]
ALL, FEW = KeyBudget(share=1.0), KeyBudget(keys=2)


def test_needles_can_be_found_by_reading() -> None:
    tasks = needles(5, filler=PROSE, words=60, keys=4, turns=3, seed=1)
    assert tasks == needles(5, filler=PROSE, words=60, keys=4, turns=3, seed=1)
    assert tasks != needles(5, filler=PROSE, words=60, keys=4, turns=3, seed=2)
    for task in tasks:
        told = dict(re.findall(r"The special magic number for (\w+) is (\d{4})\.", task.context))
        assert len(told) == 4
        assert len({turn.question for turn in task.turns}) == 3
        for turn in task.turns:
            key = turn.question.split()[-2]
            assert turn.answer == f" {told[key]}"
    with pytest.raises(InputError, match="turns=5"):
        needles(1, filler=PROSE, turns=5, keys=4)
    with pytest.raises(InputError, match="words=9999"):
        needles(1, filler=PROSE, words=9999)


def test_continuations_and_answers_equal_one_forward_pass(tiny_llama: Path) -> None:
    lm = load(tiny_llama)
    ids = lm.tokenizer("some words to go on from, and some more of them", return_tensors="pt")["input_ids"][0]
    plain = lm.loss_per_token(ids[None])[0, 8:]
    for method in (None, Keeps(budget=ALL)):
        for step in (1, 3):
            torch.testing.assert_close(
                score_continuation(lm, ids, method, prefix=8, step=step), plain, rtol=1e-4, atol=1e-4
            )
    worse = score_continuation(lm, ids, Keeps(budget=FEW), prefix=8)
    assert (worse - plain).abs().max() > 1e-3
    task = SharedContext("some words to go on", (Turn(" from, and", " some more"),))
    methods = (None, Keeps(budget=ALL))
    answers = [score_answers(lm, [task], each, query_aware=aware) for each in methods for aware in (False, True)]
    parts = encode_parts(lm, [task.context, task.turns[0].question, task.turns[0].answer])
    expected = float(lm.loss_per_token(torch.cat(parts)[None])[0, -len(parts[2]) :].mean())
    assert [found[0].nll for found in answers] == pytest.approx([expected] * 4, rel=1e-4)
    assert answers[2][0].usage is not None
    with pytest.raises(InputError, match="prefix=99"):
        score_continuation(lm, ids, prefix=99)


def test_parts_are_cut_by_tokens(tiny_llama: Path) -> None:
    lm = load(tiny_llama)
    parts = ["some words ", "to go", " on"]
    cut = encode_parts(lm, parts)
    assert torch.cat(cut).tolist() == lm.tokenizer("".join(parts))["input_ids"]
    assert lm.tokenizer.decode(cut[2]) == " on"
    with pytest.raises(InputError, match="part 1"):
        encode_parts(lm, ["a", "", "b"])
