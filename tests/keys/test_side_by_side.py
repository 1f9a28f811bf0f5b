"""Methods side by side read what each would alone."""

from pathlib import Path

import pytest
import torch

from apportion.errors import InputError
from apportion.keys import ComposedMemory, KeyBudget, record_trace
from apportion.keys.cskv import CSKV
from apportion.keys.one_by_one import one_by_one
from apportion.keys.quest import Quest
from apportion.keys.scoring import score_continuation
from apportion.keys.side_by_side import read_on
from apportion.keys.trace import encode_texts
from apportion.models import load
from key_methods import Keeps

TEXTS = ["one two three four five six seven eight nine ten " * 3, "a b c d e f g h i j k l m n o p q r s t u v " * 3]


def test_each_method_reads_what_it_would_alone(tiny_llama: Path) -> None:
    lm = load(tiny_llama)
    whole = torch.stack(encode_texts(lm, TEXTS, 40))
    prompts = record_trace(lm, TEXTS, tokens=30, hidden=True)
    methods = {
        "few keys": Keeps(budget=KeyBudget(keys=3)),
        "codes": CSKV(key_density=0.25, value_density=0.5, window=3).fit(lm, TEXTS),
    }
    makers = {"dense": ComposedMemory, **{name: each.memory for name, each in methods.items()}}
    found = read_on(lm, prompts, whole[:, 30:], makers)
    for name, method in {"dense": None, **methods}.items():
        alone = torch.stack([score_continuation(lm, ids, method, prefix=30) for ids in whole])
        torch.testing.assert_close(found[name].nll, alone, rtol=1e-3, atol=1e-3)
    assert (found["dense"].nll - found["codes"].nll).abs().max() > 1e-2
    assert found["codes"].usage.share_held < 0.6
    assert found["few keys"].usage.share_read < 0.2
    at_once = read_on(lm, prompts, whole[:, 30:], makers, turn=5)
    torch.testing.assert_close(at_once["dense"].nll, found["dense"].nll, rtol=1e-3, atol=1e-3)
    assert torch.equal(at_once["dense"].hit, found["dense"].hit)


def test_bad_input_is_refused(tiny_llama: Path) -> None:
    lm = load(tiny_llama)
    prompts, dense = record_trace(lm, TEXTS, tokens=30), {"dense": ComposedMemory}
    ids = torch.ones(2, 6, dtype=torch.long)
    with pytest.raises(InputError, match="turn=6"):
        read_on(lm, prompts, ids, dense, turn=6)
    with pytest.raises(InputError, match="stride=0"):
        read_on(lm, prompts, ids, dense, stride=0)
    with pytest.raises(InputError, match="2 prompts and 1 texts"):
        read_on(lm, prompts, ids[:1], dense)
    with pytest.raises(InputError, match="lacks layers"):
        read_on(lm, record_trace(lm, TEXTS, tokens=30, layers=[0]), ids, dense)
    with pytest.raises(InputError, match="all must have as many"):
        read_on(lm, record_trace(lm, [TEXTS[0], "short text"], tokens=30), ids, dense)


@pytest.mark.parametrize("turn", [1, 6])
@pytest.mark.parametrize("stride", [4, 30])
@pytest.mark.parametrize(("window", "bits"), [(0, None), (3, None), (8, 4), (60, None)])
def test_codes_read_in_one_pass_are_those_read_token_by_token(
    tiny_llama: Path, turn: int, stride: int, window: int, bits: int | None
) -> None:
    lm = load(tiny_llama)
    whole = torch.stack(encode_texts(lm, TEXTS, 45))
    prompts = record_trace(lm, TEXTS, tokens=21, hidden=True)
    method = CSKV(key_density=0.25, value_density=0.5, window=window, bits=bits, group=8).fit(lm, TEXTS)
    one = read_on(lm, prompts, whole[:, 21:], {"codes": method.memory, "dense": ComposedMemory}, turn=turn)
    exact = CSKV(window=200).fit(lm, TEXTS)
    at_once = {
        "codes": lambda facts: one_by_one(method, facts, turn=turn > 1),
        "dense": ComposedMemory,
        "all exact": lambda facts: one_by_one(exact, facts),
    }
    found = read_on(lm, prompts, whole[:, 21:], at_once, turn=turn, stride=stride)
    for name in one:
        torch.testing.assert_close(found[name].nll, one[name].nll, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[name].hit, one[name].hit)
        assert found[name].usage.share_held == one[name].usage.share_held
    torch.testing.assert_close(found["all exact"].nll, found["dense"].nll, rtol=1e-4, atol=1e-4)
    if window < 60:
        assert (found["codes"].nll - found["dense"].nll).abs().max() > 1e-3


def test_what_depends_on_when_it_is_read_is_not_read_at_once(tiny_llama: Path) -> None:
    lm = load(tiny_llama)
    prompts, ids = record_trace(lm, TEXTS, tokens=30), torch.ones(2, 6, dtype=torch.long)
    for method, message in (
        (CSKV(window_kind="blocks"), "kind 'blocks'"),
        (CSKV(window=8, bits=4), "groups of 32 tokens"),
        (Quest(), "quest keeps no joint codes"),
    ):
        method.fit(lm, TEXTS)
        with pytest.raises(InputError, match=message):
            read_on(lm, prompts, ids, {"codes": lambda facts, method=method: one_by_one(method, facts)})
