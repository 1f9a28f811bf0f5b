"""Methods by name: each can be made with a budget of either kind and spends it, and other names are refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.errors import InputError
from apportion.keys import KeyBudget, read_method
from apportion.keys.catalogue import CATALOGUE, method_named, offered, parse_budget
from apportion.keys.generation import first_difference, write
from apportion.models import load
from apportion.models.key_memory import LayerFacts

FITTED = [name for name, each in CATALOGUE.items() if each.make(KeyBudget(share=0.25)).needs_fit]


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in FITTED])
@pytest.mark.parametrize("budget", [KeyBudget(keys=40), KeyBudget(share=0.25)])
def test_a_method_saves_what_the_catalogue_says(
    make_step: Any, facts: LayerFacts, name: str, budget: KeyBudget, tmp_path: Path
) -> None:
    method = method_named(name, budget)
    # Some methods leave the first two layers dense.
    memory: Any = method.memory(dataclasses.replace(facts, layer=2, layers=3))
    memory.attend(make_step(200))
    memory.close()
    memory.attend(make_step(1, seed=1, start=200))
    usage, saves = memory.usage, offered(name).saves
    assert (usage.share_read < 0.35) == (saves in ("reads", "bytes")), usage
    assert (usage.share_held < 0.6) == (saves in ("bytes", "bits")), usage
    assert usage.share_held < 1 or saves in ("reads", "nothing")
    method.save(tmp_path)
    assert read_method(tmp_path).settings() == method.settings()


def test_budgets_are_read_as_people_write_them() -> None:
    assert parse_budget("1/16") == KeyBudget(share=1 / 16)
    assert parse_budget("0.5") == KeyBudget(share=0.5)
    assert parse_budget(" 256 ") == KeyBudget(keys=256)
    for text in ("many", "1/0", "1/", "2.5", "0", "-3"):
        with pytest.raises(InputError):
            parse_budget(text)


def test_other_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"method 'snapkv': one of dense, .*kvpress:NAME"):
        offered("snapkv")
    with pytest.raises(InputError, match="kvpress is not installed"):
        method_named("kvpress:KnormPress", KeyBudget(keys=3))


def test_texts_are_written_as_generate_does_and_compared(tiny_llama: Path) -> None:
    lm = load(tiny_llama)
    ids = lm.tokenizer("An assignment statement evaluates", return_tensors="pt")["input_ids"]
    expected = lm.model.generate(ids, max_new_tokens=7, do_sample=False)[0, ids.shape[1] :].tolist()
    dense = write(lm, ids[0], tokens=7)
    assert list(dense.tokens) == expected
    assert dense.usage is None
    assert (dense.steps, dense.prompt_tokens) == (6, ids.shape[1])
    same = write(lm, ids[0], method_named("oracle", KeyBudget(share=1.0)), tokens=7)
    assert same.tokens == dense.tokens
    assert same.usage is not None
    assert same.usage.steps == 6 * 3
    assert same.tokens_per_second is not None
    assert write(lm, ids[0], tokens=1).tokens_per_second is None
    assert first_difference((1, 2), (1, 2)) is None
    assert first_difference((1, 2), (1, 3)) == 1
    assert first_difference((1, 2), (1,)) == 1
    for prompt, tokens, named in ((ids[0, :0], 5, "0 tokens"), (ids[0], 0, "tokens=0"), (ids[0], 500, "256 positions")):
        with pytest.raises(InputError, match=named):
            write(lm, prompt, tokens=tokens)


def test_a_text_ends_where_the_model_ends_it(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load(tiny_llama)
    ids = torch.tensor([5, 6, 7, 8])
    first = write(lm, ids, tokens=6).tokens
    place = first.index(first[2])
    monkeypatch.setattr(lm.model.generation_config, "eos_token_id", [first[2], 0])
    ended = write(lm, ids, tokens=6)
    assert ended.tokens == first[:place]
    assert ended.steps == place
