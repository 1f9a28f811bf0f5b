"""The selectors beside Double Sparsity: page bounds, a query's own channels, principal directions."""

from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.errors import InputError
from apportion.keys import ComposedMemory, KeyBudget, Loki, OracleKeys, Quest, SparQ, read_method, record_trace
from apportion.keys.loki import KeyCovariance, LeadingSelector, RotatedStore
from apportion.keys.quest import PageSelector
from apportion.keys.selectors import TopKeys
from apportion.keys.sparq import MeanValueMemory, QueryChannelSelector
from apportion.keys.trace import part_of
from apportion.models import LanguageModel, load
from apportion.models.key_memory import LayerFacts, Step
from apportion.ops.attend import attend, causal

TEXTS = [
    "one two three four five six seven eight nine ten " * 4,
    "some other words than those before, and then more " * 3,
]


@pytest.fixture(scope="module")
def lm(tiny_llama: Path) -> LanguageModel:
    return load(tiny_llama)


@pytest.fixture
def basis() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(3))).Q


def mask_of(memory: ComposedMemory, step: Step) -> torch.Tensor:
    memory.attend(step)
    assert memory.newest_selection is not None
    return memory.newest_selection.mask(memory.store.length)


SELECTORS = {
    "quest": lambda budget: PageSelector(4, budget),
    "sparq": lambda budget: QueryChannelSelector(3, budget),
    "leading": lambda budget: LeadingSelector(3, budget),
}


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("padding", [0, 5])
def test_each_spends_its_budget_and_sees_neither_later_tokens_nor_padding(
    make_step: Any, facts: LayerFacts, name: str, padding: int
) -> None:
    step = make_step(12, padding=padding)
    mask = mask_of(ComposedMemory(facts, selector=SELECTORS[name](KeyBudget(keys=5)), prompt="selected"), step)
    seen = causal(12, 12) & step.real[:, None]
    assert not (mask & ~seen[:, None]).any()
    assert (mask.sum(-1) == seen.sum(-1).clamp(max=5)[:, None]).all()


@pytest.mark.parametrize("name", SELECTORS)
def test_tokens_one_by_one_choose_as_all_at_once(make_step: Any, facts: LayerFacts, name: str) -> None:
    step, budget = make_step(14, padding=3), KeyBudget(keys=5)
    at_once = mask_of(ComposedMemory(facts, selector=SELECTORS[name](budget), prompt="selected"), step)
    memory = ComposedMemory(facts, selector=SELECTORS[name](budget))
    memory.attend(part_of(step, 0, 6))
    memory.close()
    for start, end in ((6, 7), (7, 11), (11, 12), (12, 14)):
        found = mask_of(memory, part_of(step, start, end))
        # Of the query's own page all tokens are as good: any five of more may be chosen, here and there.
        assert torch.equal(found.sum(-1), at_once[:, :, start:end].sum(-1))
        if name != "quest":
            assert torch.equal(found, at_once[:, :, start:end, :end])


def test_pages_are_bounded_and_the_own_one_is_read(make_step: Any, facts: LayerFacts) -> None:
    step = make_step(14, padding=3)
    selector = PageSelector(4, KeyBudget(keys=6))
    memory = ComposedMemory(facts, selector=selector)
    for start, end in ((0, 5), (5, 6), (6, 13), (13, 14)):
        memory.attend(part_of(step, start, end))
    scores = selector.scores(part_of(step, 13, 14), memory.store)
    for row, head in ((0, 1), (1, 2)):
        query = step.queries[row, head, 13]
        for page in range(3):
            tokens = [token for token in range(4 * page, 4 * page + 4) if step.real[row, token]]
            keys = step.keys[row, head // 2, tokens]
            bound = torch.maximum(query * keys.amin(0), query * keys.amax(0)).sum()
            torch.testing.assert_close(scores[row, head, 0, 4 * page], bound)
            assert bound >= (keys @ query).max()
    mask = memory.newest_selection.mask(14)  # type: ignore[union-attr]
    assert mask[:, :, 0, 12:].all(), "the page of the query's own token"
    best = scores[1, 0, 0, [0, 4, 8]].argmax()
    assert mask[1, 0, 0, 4 * best : 4 * best + 4].all()
    assert selector.bytes_held() == 2 * 2 * 4 * 2 * 8 * 4


def test_a_later_page_changes_no_earlier_choice(make_step: Any, facts: LayerFacts) -> None:
    step, budget = make_step(12), KeyBudget(keys=5)
    keys = step.keys.clone()
    keys[:, :, 9:] *= -30
    changed = Step(step.queries, keys, step.values, step.real, step.scaling)
    before, after = (
        mask_of(ComposedMemory(facts, selector=PageSelector(4, budget), prompt="selected"), each)
        for each in (step, changed)
    )
    assert torch.equal(before[:, :, :9], after[:, :, :9])


def test_sparq_scores_by_the_querys_largest_channels(make_step: Any, facts: LayerFacts) -> None:
    step = make_step(10)
    selector = QueryChannelSelector(3, KeyBudget(keys=4))
    memory = ComposedMemory(facts, selector=selector, prompt="selected")
    memory.attend(step)
    scores = selector.scores(step, memory.store)
    query, keys = step.queries[1, 3, 9], step.keys[1, 1]
    largest = query.abs().topk(3).indices
    scale = (8 * query[largest].abs().sum() / query.abs().sum()).sqrt()
    torch.testing.assert_close(scores[1, 3, 9], keys[:, largest] @ query[largest] / scale)
    assert selector.bytes_scanned() == 2 * 4 * 10 * 3 * 4
    whole = QueryChannelSelector(8, KeyBudget(keys=4)).scores(step, memory.store)
    torch.testing.assert_close(whole[1, 3, 9], keys @ query * step.scaling)


@pytest.mark.parametrize("padding", [0, 3])
def test_sparq_makes_up_for_what_it_leaves_out(make_step: Any, facts: LayerFacts, padding: int) -> None:
    step = make_step(10, padding=padding)

    def memory(kind: type[ComposedMemory]) -> ComposedMemory:
        return kind(facts, selector=QueryChannelSelector(3, KeyBudget(keys=4)), prompt="selected")

    whole, plain = memory(MeanValueMemory), memory(ComposedMemory)
    with_mean, without = whole.attend(step), plain.attend(step)
    assert isinstance(whole.selector, QueryChannelSelector)
    assert whole.newest_selection is not None
    estimate = whole.selector.scores(step, whole.store)[0, 2, 9].masked_fill(~step.real[0], -torch.inf).softmax(-1)
    alpha = estimate[whole.newest_selection.mask(10)[0, 2, 9]].sum()
    mean = step.values[0, 1, padding:].mean(0)
    torch.testing.assert_close(with_mean[0, 2, 9], alpha * without[0, 2, 9] + (1 - alpha) * mean)
    stepwise = memory(MeanValueMemory)
    stepwise.attend(part_of(step, 0, 6))
    stepwise.pick_rows(torch.tensor([0, 1]))
    found = [stepwise.attend(part_of(step, place, place + 1)) for place in range(6, 10)]
    torch.testing.assert_close(torch.cat(found, dim=2), with_mean[:, :, 6:])


def test_keys_in_another_basis_give_the_same_attention(make_step: Any, facts: LayerFacts, basis: torch.Tensor) -> None:
    step = make_step(12, padding=2)
    memory = ComposedMemory(facts, RotatedStore(basis), LeadingSelector(8, KeyBudget(keys=5)), "selected")
    plain = ComposedMemory(facts, selector=_Exact(KeyBudget(keys=5)), prompt="selected")
    torch.testing.assert_close(memory.attend(step), plain.attend(step), rtol=1e-4, atol=1e-5)
    dense = ComposedMemory(facts, RotatedStore(basis)).attend(step)
    exact = attend(step.queries, step.keys, step.values, step.scaling, None, step.real)
    torch.testing.assert_close(dense, exact, rtol=1e-4, atol=1e-5)
    few = ComposedMemory(facts, RotatedStore(basis), LeadingSelector(2, KeyBudget(keys=5)), "selected")
    few.attend(step)
    scores = few.selector.scores(step, few.store)  # type: ignore[union-attr]
    query, keys = step.queries[1, 3, 9] @ basis[1], step.keys[1, 1] @ basis[1]
    torch.testing.assert_close(scores[1, 3, 9], keys[:, :2] @ query[:2] * step.scaling, rtol=1e-4, atol=1e-5)
    assert few.selector.bytes_scanned() == 2 * 2 * 12 * 2 * 4  # type: ignore[union-attr]


class _Exact(TopKeys):
    def scores(self, step: Step, store: Any) -> torch.Tensor:
        return step.queries @ store.read()[0].repeat_interleave(step.group, dim=1).transpose(-1, -2)


def test_directions_are_those_in_which_keys_vary_most(make_step: Any) -> None:
    first, second = make_step(20, padding=4), make_step(9, seed=1)

    def basis(*steps: Step) -> torch.Tensor:
        covariance = KeyCovariance()
        for step in steps:
            covariance.add(step)
        return covariance.basis

    found = basis(first, second)
    torch.testing.assert_close(found.transpose(1, 2) @ found, torch.eye(8).expand(2, 8, 8), rtol=1e-4, atol=1e-5)
    keys = torch.cat([first.keys[0, 1, 4:], first.keys[1, 1], *second.keys[:, 1]])
    spread = (keys @ found[1]).var(0)
    assert torch.equal(spread, spread.sort(descending=True).values)
    assert spread[0] == pytest.approx(float(torch.linalg.eigvalsh(keys.T.cov())[-1]), rel=1e-4)
    in_parts = basis(second, part_of(first, 0, 7), part_of(first, 7, 20))
    torch.testing.assert_close(
        (in_parts.transpose(1, 2) @ found).abs(), torch.eye(8).expand(2, 8, 8), atol=1e-3, rtol=0
    )
    with pytest.raises(InputError, match="no token"):
        _ = KeyCovariance().basis


def test_methods_generate_and_come_back_from_files(lm: LanguageModel, tmp_path: Path) -> None:
    budget = KeyBudget(keys=5)
    for method in (Quest(budget, page=4), SparQ(budget), Loki(budget), OracleKeys(budget, dense_layers=2)):
        method.fit(lm, TEXTS).save(tmp_path / method.slug)
        again = read_method(tmp_path / method.slug)
        assert again.settings() == method.settings()
        texts = []
        for each in (method, again):
            with each(lm) as run:
                texts.append(lm.generate(TEXTS[0][:60], tokens=4))
            reads = [memory.usage.keys_read / memory.usage.queries for memory in run.door.memories()]  # type: ignore[attr-defined]
            assert reads[2] == 5 < reads[0] == reads[1]
        assert texts[0] == texts[1]


def test_a_basis_of_another_model_is_refused(lm: LanguageModel) -> None:
    method = Loki().fit(lm, TEXTS)
    method.fitted = {name: each[:1] for name, each in method.fitted.items()}
    with pytest.raises(InputError, match=r"2 key-value heads of width 8, but .*\(1, 8, 8\)"), method(lm.model):
        pass
    method.fitted = {"layer.7.basis": torch.eye(8)}
    with pytest.raises(InputError, match="of no such layer"), method(lm):
        pass


def test_settings_that_make_no_sense_are_refused(lm: LanguageModel) -> None:
    facts = LayerFacts(layer=2, heads=4, groups=2, width=8, layers=3)
    for make, message in (
        (lambda: Quest(page=0), "page=0"),
        (lambda: SparQ(group_factor=0), "group_factor=0"),
        (lambda: Loki(group_factor=0), "group_factor=0"),
        (lambda: SparQ(group_factor=9).selector(facts), "group_factor=9"),
        (lambda: Loki(group_factor=9).selector(facts), "group_factor=9"),
    ):
        with pytest.raises(InputError, match=message):
            make()
    trace = record_trace(lm, TEXTS[:1], tokens=20, layers=[2])
    assert Quest(KeyBudget(keys=5)).memory(trace.facts[2]).selector is not None
