"""Double Sparsity: the labels, the channels, and the tokens that they choose."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.errors import InputError
from apportion.keys import ComposedMemory, DoubleSparsity, KeyBudget, Trace, read_method, record_trace
from apportion.keys.double_sparsity import STATISTICS, ChannelStatistics, LabelSelector, prefetch_hit_rate
from apportion.keys.labels import LabelTable, rounded
from apportion.keys.selectors import Oracle
from apportion.keys.stores import ExactStore
from apportion.keys.trace import exact_weights, part_of
from apportion.models import LanguageModel, load
from apportion.models.key_door import queries_of
from apportion.models.key_memory import LayerFacts, Step

ALL_CHANNELS = torch.arange(8).expand(4, 8)
FEW_CHANNELS = torch.tensor([[0, 3], [1, 2], [4, 7], [5, 6]])
TEXTS = [
    "one two three four five six seven eight nine ten " * 4,
    "some other words than those before, and then more " * 3,
]


@pytest.fixture(scope="module")
def lm(tiny_llama: Path) -> LanguageModel:
    return load(tiny_llama)


def selected(selector: LabelSelector, facts: LayerFacts, step: Step) -> torch.Tensor:
    memory = ComposedMemory(facts, selector=selector, prompt="selected")
    memory.attend(step)
    assert memory.newest_selection is not None
    return memory.newest_selection.mask(step.new)


# --- what is chosen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 3])
def test_with_all_channels_the_chosen_are_the_exact_top(make_step: Any, facts: LayerFacts, padding: int) -> None:
    step = make_step(12, padding=padding)
    # Numbers that 16 bits tell exactly.
    step = part_of(
        Step(step.queries, step.keys.half().float(), step.values, step.real, step.scaling, None, step.rotation), 0, 12
    )
    budget = KeyBudget(keys=4)
    found = selected(LabelSelector(ALL_CHANNELS, 16, budget), facts, step)
    oracle = ComposedMemory(facts, selector=Oracle(budget), prompt="selected")
    oracle.attend(step)
    assert oracle.newest_selection is not None
    assert torch.equal(found, oracle.newest_selection.mask(12))
    weights = exact_weights(step)
    assert torch.equal(found[1, 2, -1].nonzero().flatten(), weights[1, 2, -1].topk(4).indices.sort().values)


def test_few_channels_choose_as_a_loop_over_heads_does(make_step: Any, facts: LayerFacts) -> None:
    step = make_step(10)
    found = selected(LabelSelector(FEW_CHANNELS, 16, KeyBudget(keys=3)), facts, step)
    for row in range(2):
        for head in range(4):
            channels = FEW_CHANNELS[head]
            labels = step.keys[row, head // 2][:, channels].half().float()
            scores = labels @ step.queries[row, head, -1, channels]
            assert found[row, head, -1].nonzero().flatten().tolist() == sorted(scores.topk(3).indices.tolist())
    assert not torch.equal(found[:, 0], found[:, 1]), "heads of one key-value head choose each by themselves"


def test_heads_of_a_group_can_share_labels_and_lists(make_step: Any, facts: LayerFacts) -> None:
    step, budget = make_step(10), KeyBudget(keys=3)
    of_groups = torch.tensor([[0, 3], [4, 7]])
    shared = LabelSelector(of_groups, 16, budget)
    own = LabelSelector(of_groups.repeat_interleave(2, dim=0), 16, budget)
    assert torch.equal(selected(shared, facts, step), selected(own, facts, step))
    assert own.bytes_held() == 2 * shared.bytes_held() == 2 * 4 * 10 * 2 * 2
    assert selected(LabelSelector(of_groups, 16, budget, "max"), facts, step).shape[1] == 2


def test_the_order_of_channels_does_not_matter(make_step: Any, facts: LayerFacts) -> None:
    step, budget = make_step(10), KeyBudget(keys=3)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    permuted = Step(step.queries[..., order], step.keys[..., order], step.values, step.real, step.scaling)
    for bits in (16, 4):
        before = selected(LabelSelector(ALL_CHANNELS, bits, budget), facts, step)
        assert torch.equal(before, selected(LabelSelector(ALL_CHANNELS, bits, budget), facts, permuted))


def test_a_later_key_changes_no_earlier_choice(make_step: Any, facts: LayerFacts) -> None:
    step, budget = make_step(10), KeyBudget(keys=3)
    keys = step.keys.clone()
    keys[:, :, 7:] += 50
    changed = Step(step.queries, keys, step.values, step.real, step.scaling)
    before, after = (selected(LabelSelector(FEW_CHANNELS, 4, budget), facts, each) for each in (step, changed))
    assert torch.equal(before[:, :, :7], after[:, :, :7])
    assert not torch.equal(before, after)


def test_distinct_tokens_of_a_group_are_counted(make_step: Any, facts: LayerFacts) -> None:
    step = make_step(10)
    memory = ComposedMemory(facts, selector=LabelSelector(FEW_CHANNELS, 16, KeyBudget(keys=3)), prompt="selected")
    memory.attend(step)
    assert memory.newest_selection is not None
    mask = memory.newest_selection.mask(10).view(2, 2, 2, 10, 10)
    assert memory.newest_selection.tokens_per_group(2) == int((mask[:, :, 0] | mask[:, :, 1]).sum())


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_labels_appended_one_by_one_are_those_made_at_once(make_step: Any, bits: int) -> None:
    step = make_step(9)
    at_once, one_by_one = (LabelSelector(FEW_CHANNELS, bits, KeyBudget(keys=3)) for _ in range(2))
    store = ExactStore()
    at_once.extend(step, store)
    for part in [part_of(step, 0, 4)] + [part_of(step, place, place + 1) for place in range(4, 9)]:
        one_by_one.extend(part, store)
    assert torch.equal(at_once.labels.read(), one_by_one.labels.read())
    assert torch.equal(at_once.scores(step, store), one_by_one.scores(step, store))
    picked = torch.tensor([1, 1, 0])
    expected = at_once.labels.read()[picked]
    one_by_one.pick_rows(picked)
    assert torch.equal(one_by_one.labels.read(), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounded_labels_are_off_by_half_a_step_at_most(bits: int) -> None:
    labels = torch.randn(2, 3, 20, 5, generator=torch.Generator().manual_seed(0)) * 100
    labels[0, 0, 0] = 7.25  # nothing between its smallest and largest channel
    off = (rounded(labels, bits) - labels).abs()
    bound = (labels.amax(-1) - labels.amin(-1)) / (2**bits - 1) / 2
    assert (off <= bound[..., None] * 1.001 + 1e-6).all()
    assert off[0, 0, 0].max() == 0
    assert off.max() > 0.5 * bound.max(), "the bound is not far away"


def test_scores_are_products_of_rounded_channels(make_step: Any) -> None:
    step, store = make_step(9), ExactStore()
    # Of two channels both would be an end of the range, and exact.
    selector = LabelSelector(ALL_CHANNELS[:, 1:6], 4, KeyBudget(keys=3))
    selector.extend(step, store)
    queries = rounded(step.queries[..., 1:6], 4)
    labels = rounded(step.keys[..., 1:6], 4).repeat_interleave(2, dim=1)
    torch.testing.assert_close(selector.scores(step, store), queries @ labels.transpose(-1, -2), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(queries, step.queries[..., 1:6], atol=1e-3)
    assert selector.labels.bytes == 2 * 4 * 9 * (3 + 8), "two channels in a byte, minimum and step in float32"
    assert selector.bytes_scanned() == selector.labels.bytes


# --- channels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", STATISTICS)
def test_statistics_accumulate_and_leave_out_padding(make_step: Any, statistic: str) -> None:
    first, second = make_step(9), make_step(6, seed=1)

    def mean(*steps: Step) -> torch.Tensor:
        statistics = ChannelStatistics(statistic)
        for step in steps:
            statistics.add(step)
        return statistics.mean

    in_parts = mean(part_of(first, 0, 4), second, part_of(first, 4, 9))
    torch.testing.assert_close(mean(first, second), in_parts)
    torch.testing.assert_close(mean(second, first), in_parts)
    assert not torch.allclose(mean(second), in_parts), "the last batch alone is something else"
    padded = make_step(9, padding=4)
    rest = [part_of(padded, 4, 9), _row(part_of(padded, 0, 4), 1)]
    torch.testing.assert_close(mean(padded), mean(*rest))


def _row(step: Step, row: int) -> Step:
    here = slice(row, row + 1)
    return Step(
        step.queries[here], step.keys[here], step.values[here], step.real[here], step.scaling, None, step.rotation
    )


def test_statistics_are_what_they_are_called(make_step: Any) -> None:
    step = make_step(9)
    keys = step.keys.repeat_interleave(2, dim=1)
    expected = {
        "qk": (step.queries * keys).abs(),
        "q": step.queries.abs(),
        "k": keys.abs(),
        "unrotated q": step.unrotated_queries().abs(),
    }
    for name, values in expected.items():
        statistics = ChannelStatistics(name)
        statistics.add(step)
        torch.testing.assert_close(statistics.mean, values.mean(dim=(0, 2)))
    with pytest.raises(InputError, match="statistic='v'"):
        ChannelStatistics("v")
    with pytest.raises(InputError, match="no token"):
        _ = ChannelStatistics().mean


def test_the_largest_channels_are_chosen() -> None:
    facts = LayerFacts(layer=2, heads=4, groups=2, width=8, layers=3)
    importance = torch.tensor([0.0, 5, 1, 9, 2, 3, 0, 1]).repeat(4, 1)
    importance[3] = importance[3].flip(0) * 10
    method = DoubleSparsity(fitted={"layer.2.importance": importance})
    assert method.heavy_channels(facts).tolist() == [[1, 3]] * 3 + [[4, 6]]
    method.channels = "group"
    assert method.heavy_channels(facts).tolist() == [[1, 3], [4, 6]]
    method.group_factor = 1
    assert method.heavy_channels(facts).tolist() == [list(range(8))] * 2
    method.group_factor = 9
    with pytest.raises(InputError, match="group_factor=9"):
        method.heavy_channels(facts)


# --- the method -------------------------------------------------------------------------------------------------------


def test_fit_ranks_channels_by_all_texts(lm: LanguageModel, tmp_path: Path) -> None:
    both = DoubleSparsity().fit(lm, TEXTS)
    assert set(both.fitted) == {f"layer.{layer}.importance" for layer in range(3)}
    turned = DoubleSparsity().fit(lm, TEXTS[::-1])
    last = DoubleSparsity().fit(lm, TEXTS[1:])
    name = "layer.1.importance"
    torch.testing.assert_close(both.fitted[name], turned.fitted[name])
    assert not torch.allclose(both.fitted[name], last.fitted[name])
    both.save(tmp_path)
    again = read_method(tmp_path)
    assert isinstance(again, DoubleSparsity)
    assert again.settings() == both.settings()
    assert torch.equal(again.fitted[name], both.fitted[name])
    with pytest.raises(InputError, match="texts is empty"):
        DoubleSparsity().fit(lm, [])


def test_generation_reads_the_budget_and_leaves_the_first_layers_dense(lm: LanguageModel) -> None:
    method = DoubleSparsity(budget=KeyBudget(keys=5)).fit(lm, TEXTS)
    with method(lm) as run:
        lm.generate(TEXTS[0][:60], tokens=3)
        memories = run.door.memories()
    reads = [memory.usage.keys_read / memory.usage.queries for memory in memories if isinstance(memory, ComposedMemory)]
    assert reads[:2] == [memories[0].usage.share_read * memories[0].usage.keys_there / memories[0].usage.queries] * 2
    assert memories[0].usage.share_read == 1
    assert reads[2] == 5
    usage = run.usage
    assert usage.bytes_held > usage.bytes_held_dense, "labels come on top: it saves reads, not bytes"


def test_a_prompt_below_the_budget_is_read_densely_and_said_once(lm: LanguageModel) -> None:
    method = DoubleSparsity(budget=KeyBudget(keys=500), dense_layers=0).fit(lm, TEXTS)
    exact = lm.generate(TEXTS[0][:40], tokens=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with method(lm) as run:
            assert lm.generate(TEXTS[0][:40], tokens=4) == exact
            lm.generate(TEXTS[1][:40], tokens=4)
    assert [str(each.message)[:15] for each in caught] == ["the prompt has "]
    assert "keys=500" in str(caught[0].message)
    assert run.usage.share_read == 1


def test_channels_of_another_model_are_refused(lm: LanguageModel) -> None:
    method = DoubleSparsity().fit(lm, TEXTS)
    method.fitted = {name: each[:, :4] for name, each in method.fitted.items()}
    with pytest.raises(InputError, match=r"4 heads of width 8, but .*\(4, 4\)"), method(lm.model):
        pass
    method.fitted = {"layer.0.importance": torch.ones(4, 8)}
    with pytest.raises(InputError, match="no such layer"), method(lm):
        pass
    method.fitted_to = "somebody else's"
    with pytest.raises(InputError, match="another model"), method(lm):
        pass
    with pytest.raises(InputError, match="not fitted"), DoubleSparsity()(lm):
        pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 3}, "bits=3"),
        ({"group_factor": 0}, "group_factor=0"),
        ({"statistic": "v"}, "statistic='v'"),
        ({"channels": "all"}, "channels='all'"),
        ({"group": "any"}, "group='any'"),
        ({"dense_layers": -1}, "dense_layers=-1"),
        ({"prompt": "sparse"}, "prompt='sparse'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DoubleSparsity(**given)
    with pytest.raises(InputError, match="bits=1"):
        LabelTable(1, 4)
    with pytest.raises(InputError, match="channels=0"):
        LabelTable(4, 0)


# --- the offload variant ----------------------------------------------------------------------------------------------


def test_the_prefetch_hit_rate_is_the_overlap_of_two_choices(lm: LanguageModel) -> None:
    method = DoubleSparsity(budget=KeyBudget(keys=6), bits=16).fit(lm, TEXTS)
    trace = record_trace(lm, TEXTS, tokens=60, hidden=True)
    rates = prefetch_hit_rate(lm, trace, method, queries=20)
    assert set(rates) == {1, 2}
    assert all(6 / 60 < rate < 1 for rate in rates.values())
    # A layer that is guessed from what it is really given is guessed to the last token.
    same = record_trace(lm, TEXTS, tokens=60, hidden=True)
    same.steps[1] = same.steps[2]
    assert prefetch_hit_rate(lm, same, method, queries=20)[2] == 1
    assert rates[2] == pytest.approx(_overlap_by_hand(lm, trace, method))
    with pytest.raises(InputError, match="hidden=True"):
        prefetch_hit_rate(lm, record_trace(lm, TEXTS, tokens=60), method)
    with pytest.raises(InputError, match="no layer comes right after"):
        prefetch_hit_rate(lm, record_trace(lm, TEXTS, tokens=60, layers=[0, 2], hidden=True), method)
    with pytest.raises(InputError, match="queries=99"):
        prefetch_hit_rate(lm, trace, method, queries=99)


def _overlap_by_hand(lm: LanguageModel, trace: Trace, method: DoubleSparsity) -> float:
    channels, shared, chosen = method.heavy_channels(trace.facts[2]), 0, 0
    for before, step in zip(trace.steps[1], trace.steps[2], strict=True):
        guess = queries_of(lm, 2, before.hidden, before.rotation)
        for head in range(4):
            for place in range(step.new - 20, step.new):
                labels = step.keys[0, head // 2, : place + 1, channels[head]].half().float()
                picks = [
                    set((labels @ queries[0, head, place, channels[head]]).topk(6).indices.tolist())
                    for queries in (step.queries, guess)
                ]
                shared, chosen = shared + len(picks[0] & picks[1]), chosen + 6
    return shared / chosen
