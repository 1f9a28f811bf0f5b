"""Methods that forget: they hold what they say, keep what their paper keeps, and read it as dense attention would."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.errors import InputError
from apportion.keys import ComposedMemory, ExactStore, KeyBudget, read_method
from apportion.keys.eviction import EvictingStore, keep_best
from apportion.keys.key_norm import KeyNorm
from apportion.keys.kvpress_adapter import KvPress
from apportion.keys.selectors import SinksAndRecent
from apportion.keys.snap_kv import SnapKV, pyramid_capacity
from apportion.keys.streaming_llm import StreamingLLM
from apportion.keys.trace import part_of
from apportion.models.key_memory import LayerFacts
from apportion.ops.attend import causal, reference
from key_methods import ShortKeys

EVICTING = {
    "snap_kv": lambda budget: SnapKV(budget, window=3, kernel=3),
    "knorm": KeyNorm,
    "key_diff": lambda budget: KeyNorm(budget, by="difference"),
    "kvpress": lambda budget: KvPress(ShortKeys(), budget=budget),
}


class Module:
    """Stands in for an attention module, which made-up steps do not have."""


def with_module(step: Any) -> Any:
    return replace(step, module=Module())


def after_prompt(memory: ComposedMemory, step: Any, prompt: int, chunk: int) -> torch.Tensor:
    memory.attend(part_of(step, 0, prompt))
    memory.close()
    outs = [
        memory.attend(part_of(step, start, min(start + chunk, step.new))) for start in range(prompt, step.new, chunk)
    ]
    return torch.cat(outs, dim=2)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("budget", [KeyBudget(keys=5, sinks=2), KeyBudget(share=0.4, sinks=2)])
def test_streaming_llm_reads_sinks_and_the_newest_in_chunks_of_any_size(
    make_step: Any, facts: LayerFacts, padding: int, chunk: int, budget: KeyBudget
) -> None:
    step = make_step(16, padding=padding)
    window = ComposedMemory(facts, selector=SinksAndRecent(budget))
    expected = after_prompt(window, step, 9, 1)
    memory = StreamingLLM(budget).memory(facts)
    torch.testing.assert_close(after_prompt(memory, step, 9, chunk), expected, rtol=1e-5, atol=1e-6)
    assert memory.seen == 16
    if chunk == 1:
        assert memory.store.length == budget.tokens(16)
    held = 2 * memory.store.length * 2 * 2 * 8 * 4
    assert memory.usage.bytes_held == held < memory.usage.bytes_held_dense


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("padding", [0, 6])
def test_an_evicting_method_holds_its_budget_and_all_later_tokens(
    make_step: Any, facts: LayerFacts, name: str, padding: int
) -> None:
    step = with_module(make_step(14, padding=padding))
    memory = EVICTING[name](KeyBudget(keys=6)).memory(facts)
    memory.attend(part_of(step, 0, 10))
    memory.close()
    memory.close()
    assert memory.store.length == 6
    assert memory.store.real.sum(-1).tolist() == [min(6, 10 - padding), 6]
    kept, _ = memory.store.read()
    real = memory.store.real
    for row in range(2):
        for group in range(2):
            # What is left are keys of the prompt, in order, none of them twice, and no padding.
            left = kept[row, group][real[row]]
            there = step.keys[row, group, padding if row == 0 else 0 : 10]
            places = [int((there - key).abs().sum(-1).argmin()) for key in left]
            assert places == sorted(set(places))
            torch.testing.assert_close(there[places], left)
    memory.attend(part_of(step, 10, 14))
    assert memory.store.length == 10
    assert memory.usage.keys_read == 2 * 4 * 4 * 10


def test_the_best_tokens_are_kept_of_each_head_sinks_and_recent_first(make_step: Any, facts: LayerFacts) -> None:
    step = make_step(8, batch=1)
    memory = KeyNorm(KeyBudget(keys=5, sinks=1, recent=2)).memory(facts)
    memory.attend(step)
    memory.close()
    kept, values = memory.store.read()
    for group in range(2):
        shortest = (1 + step.keys[0, group, 1:6].norm(dim=-1).argsort()[:2]).sort().values
        expected = torch.tensor([0, *shortest.tolist(), 6, 7])
        torch.testing.assert_close(kept[0, group], step.keys[0, group, expected])
        torch.testing.assert_close(values[0, group], step.values[0, group, expected])


def test_sinks_and_recent_tokens_beat_any_score(make_step: Any) -> None:
    step = make_step(8, batch=1)
    store = ExactStore()
    store.append(step)
    keep_best(store, torch.arange(8.0).expand(1, 2, 8).flip(-1), torch.tensor([4]), sinks=0, recent=2)
    torch.testing.assert_close(store.read()[0], step.keys[:, :, [0, 1, 6, 7]])
    keep_best(store, torch.arange(4.0).expand(1, 2, 4), torch.tensor([2]), sinks=1)
    torch.testing.assert_close(store.read()[0], step.keys[:, :, [0, 7]])


@pytest.mark.parametrize("chunks", [(12,), (5, 4, 3)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_snap_kv_keeps_what_its_window_looks_at(
    make_step: Any, facts: LayerFacts, chunks: tuple[int, ...], softcap: float | None
) -> None:
    step = replace(make_step(12, batch=1), softcap=softcap)
    memory = SnapKV(KeyBudget(keys=7), window=3, kernel=3).memory(facts)
    start = 0
    for chunk in chunks:
        memory.attend(part_of(step, start, start + chunk))
        start += chunk
    memory.close()
    kept, _ = memory.store.read()
    # Section 4 of the paper, written out: votes of the window, smoothed, the best four, and the window.
    for group in range(2):
        products = step.queries[0, 2 * group : 2 * group + 2, -3:] @ step.keys[0, group].T
        weights = reference.weigh(products, causal(3, 12), step.scaling, softcap)
        votes = weights[:, :, :9].mean((0, 1))
        padded = torch.cat([torch.zeros(1), votes, torch.zeros(1)])
        smooth = torch.stack([padded[place : place + 3].mean() for place in range(9)])
        expected = [*smooth.topk(4).indices.sort().values.tolist(), 9, 10, 11]
        torch.testing.assert_close(kept[0, group], step.keys[0, group, expected])


def test_a_prompt_shorter_than_the_window_or_the_budget_is_kept(make_step: Any, facts: LayerFacts) -> None:
    step = make_step(4)
    for method in (SnapKV(KeyBudget(keys=40)), SnapKV(KeyBudget(share=0.5), window=8)):
        memory = method.memory(facts)
        memory.attend(step)
        memory.close()
        assert memory.store.length == min(4, method.budget.tokens(4))
    kept, _ = memory.store.read()
    torch.testing.assert_close(kept, step.keys[:, :, 2:])  # the newest of the window


def test_a_pyramid_spends_the_same_and_less_from_layer_to_layer() -> None:
    layers = [LayerFacts(layer, 4, 2, 8, 10) for layer in range(10)]
    kept = [pyramid_capacity(100, 1000, each, 20, 20) for each in layers]
    assert kept == sorted(kept, reverse=True)
    assert sum(kept) == pytest.approx(1000, abs=10)
    assert kept[-1] == 24
    # A short prompt caps the first layer, and the last one gets the rest.
    capped = [pyramid_capacity(100, 120, each, 20, 20) for each in layers]
    assert capped[0] == 120
    assert sum(capped) == pytest.approx(1000, abs=10)
    assert pyramid_capacity(10, 1000, layers[0], 20, 20) == 10


def test_rows_can_be_picked_before_and_after_closing(make_step: Any, facts: LayerFacts) -> None:
    step = with_module(make_step(12, padding=2))
    rows = torch.tensor([1, 0, 1])
    for method in (
        *(make(KeyBudget(keys=6)) for make in EVICTING.values()),
        StreamingLLM(KeyBudget(keys=6, sinks=1)),
    ):
        outs = []
        for early in (True, False):
            memory = method.memory(facts)
            memory.attend(part_of(step, 0, 10))
            if early:
                memory.pick_rows(rows)
            memory.close()
            if not early:
                memory.pick_rows(rows)
            last = part_of(step, 10, 12)
            picked = {name: getattr(last, name)[rows] for name in ("queries", "keys", "values", "real", "hidden")}
            outs.append(memory.attend(replace(last, **picked)))
        torch.testing.assert_close(*outs)


def test_a_press_is_called_as_kvpress_would(make_step: Any, facts: LayerFacts) -> None:
    step = with_module(make_step(9, batch=1))
    calls = []

    class Press:
        compression_ratio = 0.5

        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            calls.append((module, hidden_states, keys, values, attentions, kwargs))
            return torch.arange(9.0).expand(1, 2, 9)

    memory = KvPress(Press()).memory(facts)
    memory.attend(part_of(step, 0, 4))
    memory.attend(part_of(step, 4, 9))
    memory.close()
    ((module, hidden, keys, values, attentions, kwargs),) = calls
    assert isinstance(module, Module)
    assert attentions is None
    torch.testing.assert_close(hidden, step.hidden)
    torch.testing.assert_close(keys, step.keys)
    torch.testing.assert_close(values, step.values)
    cos, sin = kwargs["position_embeddings"]
    assert cos.shape == sin.shape == (1, 9, 8)
    torch.testing.assert_close(cos[..., :4], step.rotation.cos)
    torch.testing.assert_close(memory.store.read()[0], step.keys[:, :, 4:])


def test_a_press_that_cannot_be_used_is_refused(make_step: Any, facts: LayerFacts, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kvpress is not installed"):
        KvPress("KnormPress")
    with pytest.raises(InputError, match="no score"):
        KvPress(object())
    with pytest.raises(InputError, match="compression_ratio=None"):
        KvPress(ShortKeys(compression_ratio=None))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cannot be saved"):
        KvPress(ShortKeys()).save(tmp_path)

    class Wrong(ShortKeys):
        def score(self, *given: Any) -> torch.Tensor:
            return torch.zeros(3)

    memory = KvPress(Wrong()).memory(facts)
    memory.attend(with_module(make_step(9)))
    with pytest.raises(InputError, match=r"gave \(3,\)"):
        memory.close()


def test_presses_by_name_come_from_kvpress(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys
    import types

    library = types.ModuleType("kvpress")
    library.KnormPress = ShortKeys  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvpress", library)
    method = KvPress("KnormPress", {"compression_ratio": 0.25})
    method.save(tmp_path)
    again = read_method(tmp_path)
    assert isinstance(again, KvPress)
    assert again.settings() == method.settings()
    with pytest.raises(InputError, match="it has KnormPress"):
        KvPress("SomePress")
    with pytest.raises(InputError, match="does not take"):
        KvPress("KnormPress", {"ratio": 1})


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SnapKV(window=0), "window=0"),
        (lambda: SnapKV(kernel=4), "kernel=4"),
        (lambda: SnapKV(beta=0), "beta=0"),
        (lambda: KeyNorm(by="size"), "by='size'"),
    ],
)
def test_settings_that_cannot_work_are_refused(make: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        make()


def test_an_empty_prompt_is_nothing_to_evict() -> None:
    class Store(EvictingStore):
        def scores(self) -> torch.Tensor:
            raise AssertionError

    store = Store(KeyBudget(keys=3))
    store.close()
    assert store.closed
