"""Contexts that are read once give each method what it would have read alone."""

from pathlib import Path

import pytest
import torch

from apportion.data.tasks.shared_context import SharedContext, Turn
from apportion.errors import InputError
from apportion.keys import ComposedMemory, KeyBudget, branches
from apportion.keys.branches import ask_all, go_on
from apportion.keys.scoring import score_answers, score_continuation
from apportion.keys.shadow_kv import ShadowKV
from apportion.models import load
from key_methods import Keeps

SHADOW = ShadowKV(KeyBudget(keys=8), chunk=4, local=1, outliers=1, rank_share=0.5, turn="each")
METHODS = {"dense": ComposedMemory, "shadow": SHADOW.memory, "oracle": Keeps(KeyBudget(keys=5)).memory}


def test_a_context_read_once_is_gone_on_from_as_if_alone(tiny_llama: Path) -> None:
    lm = load(tiny_llama)
    text = "some words to go on from, and some more of them, until there are enough to choose from"
    ids = lm.tokenizer(text, return_tensors="pt")["input_ids"][0][:60]
    found = {name: (logits, usage) for name, logits, usage in go_on(lm, ids[:40], ids[None, 40:], METHODS)}
    alone = {"dense": None, "shadow": SHADOW, "oracle": Keeps(KeyBudget(keys=5))}
    for name, (logits, _) in found.items():
        losses = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[41:], reduction="none")
        for step in (1, 19):
            expected = score_continuation(lm, ids, alone[name], prefix=40, step=step)
            torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)
    assert found["dense"][1].share_read == 1
    assert found["shadow"][1].share_read < 0.9


@pytest.mark.parametrize("rows", [1, 6, 64])
def test_turns_are_asked_each_as_the_first(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(branches, "_ROWS", rows)  # one method a pass, two, all
    lm = load(tiny_llama)
    turns = (Turn(" one is", " abc"), Turn(" three is", " def"), Turn(" two is", " g"))
    task = SharedContext("some words to go on from, and some more of them, until there are enough", turns)
    found = ask_all(lm, task, METHODS)
    alone = {"dense": None, "shadow": SHADOW, "oracle": Keeps(KeyBudget(keys=5))}
    for name, answers in found.items():
        assert [each.turn for each in answers] == [0, 1, 2]
        tasks = [SharedContext(task.context, (turn,)) for turn in turns]
        expected = score_answers(lm, tasks, alone[name])
        assert [each.nll for each in answers] == pytest.approx([each.nll for each in expected], rel=1e-3)
        assert [each.exact for each in answers] == [each.exact for each in expected]


def test_a_context_that_is_cut_differently_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = iter([[torch.arange(3, 5), torch.arange(2), torch.arange(2)], [torch.arange(4, 6)] * 3])
    monkeypatch.setattr(branches, "encode_parts", lambda *_: next(cuts))
    with pytest.raises(InputError, match="reaches into a question"):
        ask_all(load(tiny_llama), SharedContext("a", (Turn(" b", " c"), Turn(" d", " e"))), METHODS)
