"""The axes every key method is composed of: selections, budgets, stores, and their accounts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.errors import InputError
from apportion.keys import (
    ComposedMemory,
    ExactStore,
    KeyBudget,
    KeySelection,
    compare_on_trace,
    record_trace,
)
from apportion.keys.selectors import Oracle, RandomKeys, Selector, SinksAndRecent, TopKeys, across_group, best_tokens
from apportion.keys.stores import Growing, RealTokens, Rotations
from apportion.keys.trace import exact_weights, part_of
from apportion.models import load
from apportion.models.key_door import attend_with, memories_of, with_memories
from apportion.models.key_memory import LayerFacts
from apportion.ops.attend import attend, attend_masked, attend_selected, causal, reference
from key_methods import Keeps, NeedsFit

SELECTORS = {
    "oracle": Oracle,
    "oracle, max": lambda budget: Oracle(budget, "max"),
    "oracle, mean": lambda budget: Oracle(budget, "mean"),
    "oracle, max of softmax": lambda budget: Oracle(budget, "max of softmax"),
    "sinks and recent": SinksAndRecent,
    "random": RandomKeys,
}


@pytest.mark.parametrize(
    ("tokens", "new", "padding"), [(9, 9, 0), (9, 1, 0), (9, 4, 0), (1, 1, 0), (9, 9, 3), (9, 1, 3), (9, 4, 3)]
)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attend_equals_the_reference_in_float64(
    make_step: Any, tokens: int, new: int, padding: int, softcap: float | None
) -> None:
    step = make_step(tokens, padding=padding)
    queries = step.queries[:, :, -new:]
    seen = causal(new, tokens)[None, None] & step.real[:, None, None]
    exact = reference.attend(*(each.double() for each in (queries, step.keys, step.values)), seen, 0.3, softcap)
    found = attend(queries, step.keys, step.values, 0.3, softcap, step.real if padding else None)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("new", [1, 3])
def test_attend_selected_equals_the_reference_and_the_masked_dense(make_step: Any, rows: int, new: int) -> None:
    step = make_step(9)
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(2, rows, new, 9, generator=generator).argsort(-1)[..., :5]
    kept = torch.rand(2, rows, new, 5, generator=generator) < 0.7
    kept[0, 0, 0] = False
    queries = step.queries[:, :, :new]
    found = attend_selected(queries, step.keys, step.values, indices, kept, 0.3)
    exact = reference.attend_selected(
        *(each.double() for each in (queries, step.keys, step.values)), indices, kept, 0.3, None
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    mask = KeySelection(indices, kept).mask(9).repeat_interleave(4 // rows, dim=1)
    dense = reference.attend(queries, step.keys, step.values, mask, 0.3, None)
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-6)
    assert found[0, 0, 0].abs().max() == 0
    for softcap in (None, 2.0):
        of_lists = attend_selected(queries, step.keys, step.values, indices, kept, 0.3, softcap)
        of_masks = attend_masked(queries, step.keys, step.values, KeySelection(indices, kept).mask(9), 0.3, softcap)
        torch.testing.assert_close(of_masks, of_lists, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("padding", [0, 4])
def test_selectors_spend_their_budget_and_see_neither_later_tokens_nor_padding(
    make_step: Any, facts: LayerFacts, name: str, padding: int
) -> None:
    budget = KeyBudget(keys=5, sinks=1, recent=2)
    memory = ComposedMemory(facts, selector=SELECTORS[name](budget), prompt="selected")
    step = make_step(12, padding=padding)
    memory.attend(step)
    selection = memory.newest_selection
    assert selection is not None
    mask = selection.mask(12)
    seen = causal(12, 12) & step.real[:, None]
    assert not (mask & ~seen[:, None]).any()
    assert (mask.sum(-1) == seen.sum(-1).clamp(max=5)[:, None]).all()
    newest = torch.arange(12)
    asking = step.real[:, None, :].expand(2, mask.shape[1], 12)
    assert mask[:, :, newest, newest][asking].all(), "each token reads itself"
    assert mask[0, :, -1, padding].all(), "the first token that is no padding is a sink"


@pytest.mark.parametrize("name", SELECTORS)
def test_a_budget_for_everything_is_dense_attention(make_step: Any, facts: LayerFacts, name: str) -> None:
    step = make_step(12, padding=2)
    dense = ComposedMemory(facts).attend(step)
    for budget in (KeyBudget(keys=100), KeyBudget(share=1.0)):
        memory = ComposedMemory(facts, selector=SELECTORS[name](budget), prompt="selected")
        torch.testing.assert_close(memory.attend(step), dense)


def test_the_oracle_is_the_exact_top_and_groups_agree_as_they_say(make_step: Any, facts: LayerFacts) -> None:
    step = make_step(10)
    weights = exact_weights(step)
    memory = ComposedMemory(facts, selector=Oracle(KeyBudget(keys=3)), prompt="selected")
    memory.attend(step)
    assert memory.newest_selection is not None
    last = memory.newest_selection.mask(10)[:, :, -1]
    for row in range(2):
        for head in range(4):
            best = weights[row, head, -1].topk(3).indices
            assert last[row, head].nonzero().flatten().tolist() == sorted(best.tolist())
    scores, seen = torch.randn(2, 4, 1, 10), torch.ones(2, 1, 10, dtype=torch.bool)
    assert torch.equal(across_group(scores, seen, 2, "max")[0, 1], scores[0, 2:].amax(0))
    assert torch.equal(across_group(scores, seen, 2, "mean")[0, 1], scores[0, 2:].mean(0))
    soft = across_group(scores, seen, 2, "max of softmax")[0, 1]
    assert torch.equal(soft, scores[0, 2:].softmax(-1).amax(0))


def test_a_share_is_of_what_each_query_sees() -> None:
    scores, seen = torch.randn(1, 2, 8, 8), causal(8, 8)[None]
    selection = best_tokens(scores, seen, KeyBudget(share=0.5))
    assert selection.kept.sum(-1)[0, 0].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("budget", [KeyBudget(keys=5), KeyBudget(share=0.3, sinks=2, recent=3), KeyBudget(keys=40)])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("new", [1, 3])
def test_the_best_tokens_are_sinks_recent_ones_and_the_best_of_the_others(
    budget: KeyBudget, padding: int, new: int
) -> None:
    tokens = 40
    # Many ties: earlier tokens win them, wherever every query chooses equally many.
    scores = torch.randn(2, 3, new, tokens, generator=torch.Generator().manual_seed(0)).mul(2).round()
    seen = causal(new, tokens) & torch.ones(2, 1, tokens, dtype=torch.bool)
    seen[1, :, :padding] = False
    before = scores.clone()
    found = best_tokens(scores, seen, budget).mask(tokens)
    assert scores.equal(before)
    for row in range(2):
        for query in range(new):
            visible = seen[row, query].nonzero().flatten().tolist()
            wanted = budget.tokens(len(visible))
            forced = visible[: budget.sinks] + visible[len(visible) - budget.recent :]
            for head in range(3):
                others = [token for token in visible if token not in forced]
                others.sort(key=lambda token: -float(scores[row, head, query, token]))
                chosen = found[row, head, query].nonzero().flatten().tolist()
                best = forced + others[: wanted - len(set(forced))]
                if budget.share is None or (new == 1 and not padding):
                    assert chosen == sorted(set(best))
                else:
                    assert len(chosen) == wanted
                    assert scores[row, head, query, chosen].sum() == scores[row, head, query, sorted(set(best))].sum()


def test_masks_and_lists_are_the_same_thing() -> None:
    mask = torch.rand(2, 3, 4, 9, generator=torch.Generator().manual_seed(1)) < 0.4
    selection = KeySelection.of_mask(mask)
    assert torch.equal(selection.mask(9), mask)
    assert selection.tokens_per_group(3) == int(mask.sum())
    of_one = KeySelection.of_mask(mask[:, :2].reshape(2, 2, 4, 9))
    assert of_one.tokens_per_group(1) == int(mask[:, :2].any(1).sum())


def test_decoding_reads_what_it_accounts_for(make_step: Any, facts: LayerFacts) -> None:
    memory = ComposedMemory(facts, selector=Oracle(KeyBudget(keys=3), "max"))
    memory.attend(make_step(8))
    assert memory.usage.steps == 0, "the prompt is read densely"
    memory.attend(make_step(1, seed=1, start=8))
    usage = memory.usage
    assert (usage.steps, usage.queries, usage.keys_read, usage.keys_there) == (1, 8, 24, 72)
    row = 2 * 8 * 4  # a key and a value, in float32
    assert usage.bytes_read == 2 * 2 * 3 * row
    assert usage.bytes_dense == usage.bytes_held == usage.bytes_held_dense == 2 * 2 * 9 * row
    assert usage.share_read == pytest.approx(1 / 3)


def test_tokens_one_by_one_equal_dense_where_nothing_is_left_out(make_step: Any, facts: LayerFacts) -> None:
    step = make_step(12, padding=3)
    dense = ComposedMemory(facts).attend(step)
    memory = ComposedMemory(facts, selector=Oracle(KeyBudget(keys=11)))
    parts = [memory.attend(part_of(step, 0, 9))] + [memory.attend(part_of(step, t, t + 1)) for t in range(9, 11)]
    torch.testing.assert_close(torch.cat(parts, dim=2), dense[:, :, :11], rtol=1e-5, atol=1e-6)


def test_growing_tensors() -> None:
    growing, parts = Growing(1), [torch.randn(2, count, 3) for count in (4, 1, 1, 70, 2)]
    for part in parts:
        before = growing.view.clone() if growing.length else None
        kept = growing.view if growing.length else None
        growing.append(part)
        if before is not None:
            assert torch.equal(kept, before), "views stay as they were"
    whole = torch.cat(parts, dim=1)
    assert torch.equal(growing.view, whole)
    assert growing.bytes == whole.numel() * 4
    growing.forget_newest(2)
    growing.append(torch.zeros(2, 1, 3))
    assert torch.equal(growing.view, torch.cat([whole[:, :-2], torch.zeros(2, 1, 3)], dim=1))
    growing.pick_rows(torch.tensor([1, 1, 0]))
    assert torch.equal(growing.view[0], growing.view[1])


def test_gradients_go_through_a_growing_tensor() -> None:
    growing, leaf = Growing(1), torch.ones(1, 2, requires_grad=True)
    growing.append(torch.zeros(1, 3))
    growing.append(leaf * 2)
    growing.view.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[2, 2]]


@pytest.mark.parametrize("padded", [(), (0,), (2,), (0, 1, 2)])
def test_real_tokens_are_what_was_said_of_each_step(make_step: Any, padded: tuple[int, ...]) -> None:
    kept, parts = RealTokens(), []
    for place, new in enumerate((5, 1, 3)):
        step = make_step(new, padding=1 if place in padded else 0)
        kept.append(step)
        parts.append(step.real)
        assert kept.view.equal(torch.cat(parts, dim=1))
        assert kept.all == kept.view.all()
    everything = kept.view.clone()
    kept.pick_rows(torch.tensor([1, 1, 0]))
    assert kept.view.equal(everything[[1, 1, 0]])
    kept.pick_rows(torch.tensor([0]))
    assert kept.all, "the padded row has gone"
    kept.append(make_step(2, batch=1))
    assert kept.view.equal(torch.ones(1, 11, dtype=torch.bool))


def test_a_store_that_evicts(make_step: Any) -> None:
    store = ExactStore()
    step = make_step(6)
    store.append(step)
    store.keep_tokens(torch.tensor([[[1, 5], [0, 2]], [[0, 1], [3, 4]]]), torch.ones(2, 2, dtype=torch.bool))
    keys, values = store.read()
    assert torch.equal(keys[0, 1], step.keys[0, 1, [0, 2]])
    assert torch.equal(values[1, 1], step.values[1, 1, [3, 4]])
    assert store.length == 2


def test_methods_are_saved_with_what_was_fitted(tiny_llama: Path, tmp_path: Path) -> None:
    lm = load(tiny_llama)
    method = NeedsFit(budget=KeyBudget(keys=7, sinks=2))
    with pytest.raises(InputError, match="not fitted"), method(lm):
        pass
    method.fit(lm, ["some text"]).save(tmp_path / "kept")
    again = NeedsFit.load(tmp_path / "kept")
    assert again.budget == method.budget
    assert again.fitted_to == lm.fingerprint
    assert torch.equal(again.of_layer(0)["basis"], torch.eye(3))
    assert list(again.of_layer(1)) == []
    with again(lm) as run:
        lm.generate("some text", tokens=3)
    assert run.usage.steps == 2 * 3, "two tokens after the first, in three layers"
    again.fitted_to = "of somebody else"
    with pytest.raises(InputError, match="another model"), again(lm):
        pass


def test_damaged_and_foreign_files_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    NeedsFit().fit(load(tiny_llama), []).save(tmp_path)
    with pytest.raises(InputError, match="not 'keeps_for_tests'"):
        Keeps.load(tmp_path)
    (tmp_path / "fitted.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match="damaged"):
        NeedsFit.load(tmp_path)
    (tmp_path / "method.json").write_text("{}")
    with pytest.raises(InputError, match="format 1"):
        NeedsFit.load(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give one of them"),
        ({"keys": 3, "share": 0.5}, "give one of them"),
        ({"keys": 0}, "keys=0"),
        ({"share": 1.5}, "share=1.5"),
        ({"keys": 3, "sinks": 2, "recent": 2}, "more than keys=3"),
        ({"keys": 3, "sinks": -1}, "sinks=-1"),
    ],
)
def test_budgets_that_cannot_be_spent_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        KeyBudget(**given)
    with pytest.raises(InputError, match="group='all'"):
        Oracle(KeyBudget(keys=1), "all")


def test_a_trace_compares_methods_layer_by_layer(tiny_llama: Path) -> None:
    lm = load(tiny_llama)
    texts = ["one two three four five six seven " * 4, "a b c d e f g h i j k l m n o p q " * 3]
    trace = record_trace(lm, texts, tokens=40, layers=[0, 2])
    assert trace.layers == [0, 2]
    assert trace.steps[0][0].hidden is None
    budget = KeyBudget(keys=6)
    found = compare_on_trace(
        trace,
        {
            "dense": ComposedMemory,
            "oracle": lambda facts: ComposedMemory(facts, selector=Oracle(budget)),
            "random": lambda facts: ComposedMemory(facts, selector=RandomKeys(budget)),
        },
        queries=8,
    )
    for layer in (0, 2):
        assert found["dense"][layer].mass == pytest.approx(1)
        assert found["dense"][layer].error == pytest.approx(0, abs=1e-5)
        assert 1 > found["oracle"][layer].mass > found["random"][layer].mass > 0
        assert found["oracle"][layer].error < found["random"][layer].error
        assert found["oracle"][layer].share_read < 0.25
    together = compare_on_trace(
        trace, {"oracle": lambda facts: ComposedMemory(facts, selector=Oracle(budget))}, queries=8, step=3
    )["oracle"]
    for layer in (0, 2):
        one_by_one = found["oracle"][layer]
        assert together[layer].mass == pytest.approx(one_by_one.mass)
        assert together[layer].error == pytest.approx(one_by_one.error, rel=1e-4)
    with pytest.raises(InputError, match="step=0"):
        compare_on_trace(trace, {}, step=0)
    with pytest.raises(InputError, match="layers=\\[7\\]"):
        record_trace(lm, texts, layers=[7])
    with pytest.raises(InputError, match="texts is empty"):
        record_trace(lm, [])
    with pytest.raises(InputError, match="queries=99"):
        compare_on_trace(trace, {"dense": ComposedMemory}, queries=99)


def test_scores_are_asked_only_where_the_budget_is_short(make_step: Any, facts: LayerFacts) -> None:
    class Never(TopKeys):
        def scores(self, step: Any, store: Any) -> torch.Tensor:
            raise AssertionError

    ComposedMemory(facts, selector=Never(KeyBudget(keys=8)), prompt="selected").attend(make_step(8))


def test_layers_that_turn_alike_keep_one_rotation(llama: Any) -> None:
    stores = [Rotations(), Rotations()]
    kept: dict[int, list[Any]] = {0: [], 2: []}

    class Watching(ComposedMemory):
        def take_in(self, step: Any) -> None:
            kept.setdefault(self.facts.layer, []).append(step.rotation)
            super().take_in(step)

    with attend_with(llama, Watching):
        cache = llama(torch.arange(3, 9)[None]).past_key_values
        llama(torch.arange(3, 6)[None], past_key_values=cache)
    for first, last in zip(kept[0], kept[2], strict=True):
        assert first is last
        for store, rotation in zip(stores, (first, last), strict=True):
            store.append(rotation)
        assert stores[0].all is stores[1].all
    assert stores[0].all.cos.shape[1] == 9
    assert torch.equal(stores[0].all.sin[:, 6:], kept[0][1].sin)


def test_a_prompt_that_was_read_once_goes_on_in_several_ways(llama: Any) -> None:
    prompt, later = torch.arange(3, 15)[None], torch.arange(20, 24)[None]
    exact = llama(torch.cat([prompt, later], dim=1)).logits[:, 12:]
    steps: dict[int, Any] = {}

    class Watching(ComposedMemory):
        def take_in(self, step: Any) -> None:
            steps.setdefault(self.facts.layer, step)
            super().take_in(step)

    def again(memory: Any) -> ComposedMemory:
        other = ComposedMemory(memory.facts, selector=Oracle(KeyBudget(share=1.0)))
        other.take_in(steps[memory.facts.layer])
        other.close()
        return other

    with attend_with(llama, Watching):
        cache = llama(prompt).past_key_values
        for _ in range(2):
            branch = with_memories(cache, [again(memory) for memory in memories_of(cache)])
            torch.testing.assert_close(llama(later, past_key_values=branch).logits, exact, rtol=1e-4, atol=1e-5)
            assert branch.get_seq_length() == 16
        assert cache.get_seq_length() == 12
        assert all(memory.usage.steps == 1 for memory in memories_of(branch))


def test_a_list_that_all_queries_share_is_read_once(make_step: Any, facts: LayerFacts) -> None:
    asked = []

    class OneList(Selector):
        def select(self, step: Any, store: Any) -> KeySelection:
            indices = torch.tensor([0, 3, 8, 9]).expand(2, 2, 2, 4)
            return KeySelection(indices, indices <= torch.tensor([8, 9])[:, None])

    class Watched(ExactStore):
        def read(self, tokens: Any = None) -> Any:
            asked.append(tokens)
            return super().read(tokens)

    memory = ComposedMemory(facts, Watched(), OneList())
    step = make_step(10)
    memory.attend(part_of(step, 0, 8))
    memory.close()
    found = memory.attend(part_of(step, 8, 10))
    assert asked[-1].shape == (2, 2, 4)
    selection = memory.newest_selection
    assert selection is not None
    exact = reference.attend(
        step.queries[:, :, 8:], step.keys, step.values, selection.mask(10).repeat_interleave(2, 1), step.scaling, None
    )
    torch.testing.assert_close(found, exact)
    own = KeySelection(torch.arange(4).view(1, 1, 2, 2), torch.ones(1, 1, 2, 2, dtype=torch.bool))
    assert own.common() is None
