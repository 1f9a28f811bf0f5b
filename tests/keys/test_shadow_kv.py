"""ShadowKV: a prompt's keys in factors, its values in slow memory, and chunks that landmarks choose."""

import dataclasses
import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from apportion.errors import InputError
from apportion.keys import ComposedMemory, KeyBudget, compare_on_trace, read_method, record_trace
from apportion.keys.chunks import ChunkRule, ChunkTable, divide
from apportion.keys.landmarks import ChunkBudget, Landmarks
from apportion.keys.prompt_svd import Folding, PromptSVDStore, principal_directions
from apportion.keys.shadow_kv import ShadowKV, shadow_report
from apportion.keys.slow_memory import SlowTokens, put, true_places
from apportion.keys.trace import part_of
from apportion.models import load
from apportion.models.key_memory import LayerFacts, Step
from apportion.ops.attend import attend, reference

SMALL = {"chunk": 4, "local": 1, "outliers": 1, "rank_share": 1.0}


def memory_of(facts: LayerFacts, **settings: Any) -> ComposedMemory:
    return ShadowKV(**{**SMALL, "budget": KeyBudget(keys=8), **settings}).memory(facts)


def read_prompt(memory: ComposedMemory, step: Step, tokens: int) -> None:
    memory.attend(part_of(step, 0, tokens))
    memory.close()


def store_of(memory: ComposedMemory) -> PromptSVDStore:
    assert isinstance(memory.store, PromptSVDStore)
    return memory.store


def table_of(memory: ComposedMemory) -> ChunkTable:
    table = store_of(memory).table
    assert table is not None
    return table


# --- the factorisation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "width"), [(40, 12), (7, 12)])
def test_no_fit_of_the_rank_is_closer(tokens: int, width: int) -> None:
    rows = torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(rows.double())
    for rank in (1, 3, 7):
        found = principal_directions(rows, rank)
        error = (rows - rows @ found @ found.transpose(1, 2)).square().sum((1, 2))
        torch.testing.assert_close(error.double(), singular[:, rank:].square().sum(1), rtol=1e-4, atol=1e-6)
    assert principal_directions(rows, 99).shape[-1] == min(tokens, width)


def test_keys_can_be_turned_back(make_step: Any) -> None:
    step = make_step(50)
    again = step.rotation.apply(step.unrotated_keys())
    assert (again - step.keys).abs().max() < 1e-6


def test_with_full_rank_keys_and_values_are_as_they_were(make_step: Any, facts: LayerFacts) -> None:
    step, memory = make_step(43), memory_of(facts)
    read_prompt(memory, step, 43)
    store = store_of(memory)
    assert store.table is not None
    keys, values = store.read()
    torch.testing.assert_close(keys, step.keys, rtol=1e-4, atol=1e-4)
    assert torch.equal(values, step.values)
    tokens = torch.randint(43, (2, 2, 30), generator=torch.Generator().manual_seed(1))
    keys, values = store.read(tokens)
    at = tokens[..., None].expand(-1, -1, -1, 8)
    torch.testing.assert_close(keys, step.keys.gather(2, at), rtol=1e-4, atol=1e-4)
    assert torch.equal(values, step.values.gather(2, at))


def test_keys_are_turned_by_the_positions_of_their_tokens(make_step: Any, facts: LayerFacts) -> None:
    step, memory = make_step(43), memory_of(facts)
    read_prompt(memory, step, 43)
    store, tokens = store_of(memory), torch.tensor([5, 11, 12]).expand(2, 2, 3)
    exact = step.keys[:, :, [5, 11, 12]]
    torch.testing.assert_close(store.read(tokens)[0], exact, rtol=1e-4, atol=1e-4)
    store._rotations.all = make_step(43, start=1).rotation
    assert (store.read(tokens)[0] - exact).abs().max() > 0.1
    assert (store.read()[0][:, :, [5, 11, 12]] - exact).abs().max() > 0.1


def test_low_rank_keys_are_the_joint_fit_except_where_they_are_exact(make_step: Any, facts: LayerFacts) -> None:
    step, memory = make_step(43), memory_of(facts, rank_share=0.25)
    read_prompt(memory, step, 43)
    store, table = store_of(memory), table_of(memory)
    assert store.tail_start == 36
    rows = step.unrotated_keys()[:, :, :36].transpose(1, 2).flatten(2).double()
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    fit = (left[..., :4] * values[:, None, :4]) @ right[:, :4]
    fit = step.rotation.at(slice(0, 36)).apply(fit.float().unflatten(2, (2, 8)).transpose(1, 2))
    keys, _ = store.read()
    exact = torch.zeros(2, 2, 43, dtype=torch.bool)
    exact[:, :, 36:] = True
    exact.scatter_(2, table.tokens(table.outliers), True)
    torch.testing.assert_close(keys[exact], step.keys[exact])
    torch.testing.assert_close(keys[:, :, :36][~exact[:, :, :36]], fit[~exact[:, :, :36]], rtol=1e-3, atol=1e-4)


# --- chunks ----------------------------------------------------------------------------------------------------------


def test_stores_of_one_prompt_share_its_directions_and_nothing_else(make_step: Any) -> None:
    step = make_step(40)
    rules = [(2, ChunkRule(4, 1, 1)), (5, ChunkRule(4, 1, 1)), (5, ChunkRule(4, 3, 1)), (5, ChunkRule(2, 1, 2))]
    for given, pick, pieces in ((step, False, 1), (step, True, 1), (step, False, 2)):
        for rank, rule in rules:
            read = []
            # One that shares with all before it, and one with a prompt of its own.
            for own in (given, dataclasses.replace(given)):
                store = PromptSVDStore(rank, rule, lambda table: False)
                for piece in range(pieces):
                    store.append(part_of(own, 20 * piece, 20 * piece + 20) if pieces > 1 else own)
                if pick:
                    store.pick_rows(torch.tensor([1, 0, 0]))
                store.close()
                read += [store.read()]
            for one, other in zip(*read, strict=True):
                torch.testing.assert_close(one, other)
    assert sorted(end for _, end in step.derived) == [28, 36, 38]


@pytest.mark.parametrize("padding", [0, 5])
def test_chunks_are_those_of_an_explicit_loop(make_step: Any, padding: int) -> None:
    step = make_step(47, padding=padding)
    table = divide(step.keys, step.real, ChunkRule(size=4, local=2, outliers=3))
    sets = []
    for row in range(2):
        real = step.real[row].nonzero().flatten().tolist()
        count = len(real) // 4 - 2
        assert table.counts[row] == count
        assert table.starts[row] == real[count * 4]
        for head in range(2):
            worst = []
            for chunk in range(count):
                keys = step.keys[row, head, real[chunk * 4 : chunk * 4 + 4]]
                torch.testing.assert_close(table.means[row, head, chunk], keys.mean(0))
                worst.append(min(torch.cosine_similarity(key, keys.mean(0), dim=0) for key in keys))
            expected = sorted(sorted(range(count), key=lambda chunk: worst[chunk])[:3])
            assert table.outliers[row, head].tolist() == expected
            assert (~table.candidates[row, head]).nonzero().flatten().tolist()[:3] == expected
            sets.append(expected)
            inside = table.tokens(table.outliers)[row, head].tolist()
            assert inside == [real[chunk * 4 + place] for chunk in expected for place in range(4)]
    assert sets[0] != sets[1], "each key-value head has outliers of its own"


def test_a_row_with_few_chunks_beside_a_long_one(make_step: Any, facts: LayerFacts) -> None:
    step = make_step(48, padding=36)
    memory = memory_of(facts, outliers=4, local=1)
    read_prompt(memory, step, 47)
    table = table_of(memory)
    assert table.outlier_counts.tolist() == [1, 4]
    memory.attend(part_of(step, 47, 48))
    selection = memory.newest_selection
    assert selection is not None
    assert selection.kept[0].sum(-1).flatten().tolist() == [12, 12], "the short row reads all that it has"
    assert (selection.mask(48)[0].sum(-1) == 12).all(), "and nothing twice"


# --- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 6])
def test_what_is_read_is_what_an_explicit_loop_reads(make_step: Any, facts: LayerFacts, padding: int) -> None:
    step, memory = make_step(48, padding=padding), memory_of(facts)
    read_prompt(memory, step, 46)
    for place in (46, 47):
        found = memory.attend(part_of(step, place, place + 1))
        selection, table = memory.newest_selection, table_of(memory)
        assert selection is not None
        mask = torch.zeros(2, 2, 1, place + 1, dtype=torch.bool)
        for row in range(2):
            real = step.real[row].nonzero().flatten().tolist()
            mask[row, :, 0, int(table.starts[row]) : place + 1] = True
            for head in range(2):
                own = [chunk for chunk in range(int(table.counts[row])) if chunk not in table.outliers[row, head]]
                weights = []
                for query in (2 * head, 2 * head + 1):
                    products = torch.stack(
                        [step.queries[row, query, place] @ table.means[row, head, chunk] for chunk in own]
                    )
                    weights.append((products * 8**-0.5).softmax(0))
                best = torch.stack(weights).amax(0).topk(2).indices.tolist()
                for chunk in [own[each] for each in best] + table.outliers[row, head].tolist():
                    mask[row, head, 0, real[chunk * 4 : chunk * 4 + 4]] = True
        assert torch.equal(selection.mask(place + 1), mask)
        now = part_of(step, place, place + 1)
        exact = reference.attend(
            now.queries,
            step.keys[:, :, : place + 1],
            step.values[:, :, : place + 1],
            mask.repeat_interleave(2, 1),
            step.scaling,
            None,
        )
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)


def test_heads_are_compared_after_the_softmax(make_step: Any) -> None:
    """A head with large products everywhere would drown out one that knows what it wants."""
    step = make_step(1, batch=1)
    means = torch.zeros(1, 2, 3, 8)
    means[..., 0, 0], means[..., 1, 0], means[..., 2, 1] = 1.0, 1.0, 1.0
    queries = torch.zeros(1, 4, 1, 8)
    queries[:, 0::2, :, 0] = 30.0  # large, and of two minds
    queries[:, 1::2, :, 1] = 20.0  # smaller, and sure
    nobody = torch.zeros(1, 2, 0, dtype=torch.long)
    one = torch.tensor([3])
    table = ChunkTable(
        ChunkRule(4, 1, 0), one * 20, one, means, torch.ones(1, 2, 3, dtype=torch.bool), nobody, None, one * 12
    )
    selector = Landmarks(ChunkBudget(KeyBudget(keys=4)))
    scores = selector.scores(dataclasses.replace(step, queries=queries, scaling=1.0), table)
    assert scores.argmax(-1).flatten().tolist() == [2, 2]


def test_queries_of_a_turn_choose_together_or_as_if_they_had_come_alone(make_step: Any, facts: LayerFacts) -> None:
    step = make_step(53, padding=3)
    later = part_of(step, 46, 53)
    alone = memory_of(facts)
    read_prompt(alone, step, 46)
    parts = [alone.attend(part_of(step, place, place + 1)) for place in range(46, 53)]
    for counted in ({}, {"counted": "all", "budget": KeyBudget(keys=27)}):
        alone, each = memory_of(facts, **counted), memory_of(facts, **counted, turn="each")
        for memory in (alone, each):
            read_prompt(memory, step, 46)
        parts = [alone.attend(part_of(step, place, place + 1)) for place in range(46, 53)]
        torch.testing.assert_close(each.attend(later), torch.cat(parts, dim=2), rtol=1e-3, atol=1e-4)
        assert each.usage.keys_read == alone.usage.keys_read
    shared = memory_of(facts)
    read_prompt(shared, step, 46)
    selector, table = shared.selector, table_of(shared)
    assert isinstance(selector, Landmarks)
    shared.attend(later)
    selection = shared.newest_selection
    assert selection is not None
    assert selection.common() is not None
    queries = later.queries.view(2, 2, 2, 7, 8)
    weights = (queries @ table.means[:, :, None].transpose(-1, -2) * 8**-0.5).masked_fill(
        ~table.candidates[:, :, None, None], -torch.inf
    )
    best = weights.softmax(-1).sum(3).amax(2).topk(2).indices
    mask = selection.mask(53)[:, :, 0]
    assert mask.gather(2, table.tokens(best)).all()
    assert not selection.mask(53)[:, :, 0, 47:].any(), "a query of a turn sees no later one"


def test_a_padded_row_is_answered_as_it_would_be_alone(make_step: Any, facts: LayerFacts) -> None:
    step = make_step(60, padding=7)
    alone = dataclasses.replace(
        part_of(step, 7, 60),
        **{name: getattr(step, name)[:1, :, 7:] for name in ("queries", "keys", "values")},
        real=step.real[:1, 7:],
        hidden=None,
    )
    both, one = memory_of(facts), memory_of(facts)
    read_prompt(both, step, 58)
    read_prompt(one, alone, 51)
    for place in (58, 59):
        batched = both.attend(part_of(step, place, place + 1))
        single = one.attend(part_of(alone, place - 7, place - 6))
        torch.testing.assert_close(batched[:1], single, rtol=1e-3, atol=1e-4)
        assert both.newest_selection is not None
        assert one.newest_selection is not None
        assert torch.equal(both.newest_selection.mask(place + 1)[:1, ..., 7:], one.newest_selection.mask(place - 6))


def test_padding_has_no_part_in_the_factorisation(make_step: Any, facts: LayerFacts) -> None:
    step = make_step(43, padding=7)
    loud = dataclasses.replace(step, keys=torch.where(step.real[:, None, :, None], step.keys, 50.0 * step.keys))
    found = []
    for given in (step, loud):
        memory = memory_of(facts, rank_share=0.25)
        read_prompt(memory, given, 43)
        found.append(store_of(memory).read()[0][:, :, 7:])
    torch.testing.assert_close(*found)


def test_padding_has_no_say_in_what_a_turn_reads(make_step: Any, facts: LayerFacts) -> None:
    step, found = make_step(53), []
    real = step.real.clone()
    real[0, 46:50] = False
    for loudness in (1.0, 50.0):
        queries = torch.where(real[:, None, :, None], step.queries, loudness * step.queries.flip(-1))
        given = dataclasses.replace(step, queries=queries, real=real)
        memory = memory_of(facts)
        read_prompt(memory, given, 46)
        memory.attend(part_of(given, 46, 53))
        assert memory.newest_selection is not None
        found.append(memory.newest_selection.mask(53))
    assert torch.equal(*found)
    assert not found[0][0, :, :, 46:50].any()


def test_a_padded_row_whose_chunks_leave_nothing_over(make_step: Any) -> None:
    step = make_step(16, padding=4)
    table = divide(step.keys, step.real, ChunkRule(size=4, local=0, outliers=1))
    assert table.counts.tolist() == [3, 4]
    assert table.starts.tolist() == [16, 16]
    assert divide(step.keys[:, :, :0], step.real[:, :0], ChunkRule(4, 0, 1)).counts.tolist() == [0, 0]


# --- budgets and accounts --------------------------------------------------------------------------------------------


def test_a_budget_of_everything_that_is_read_is_never_exceeded(make_step: Any, facts: LayerFacts) -> None:
    step = make_step(60)
    memory = memory_of(facts, counted="all", budget=KeyBudget(keys=23))
    read_prompt(memory, step, 50)
    counts = []
    for place in range(50, 60):
        memory.attend(part_of(step, place, place + 1))
        assert memory.newest_selection is not None
        counts.append(int(memory.newest_selection.kept[0, 0].sum()))
    # 4 outlying tokens, 6 at the prompt's end, the later ones, and the chunks that still have room.
    assert counts == [23, 20, 21, 22, 23, 20, 21, 22, 23, 20]


def test_accounts_tell_fast_from_slow_memory_and_what_was_moved(make_step: Any, facts: LayerFacts) -> None:
    step, memory = make_step(47), memory_of(facts, rank_share=0.25, outliers=0, budget=KeyBudget(keys=4))
    memory.attend(part_of(step, 0, 46))
    assert memory.usage.bytes_slow == 0
    assert memory.usage.bytes_held == memory.usage.bytes_held_dense + 46 * 8 * 4, "and the angles"
    memory.close()
    memory.attend(part_of(step, 46, 47))
    chunk, usage = 4 * 8 * 4, memory.usage
    assert usage.bytes_slow == 2 * 2 * 40 * 8 * 4, "the values of 10 chunks"
    assert usage.bytes_moved == 2 * 2 * chunk, "of one chunk for each key-value head"
    # Chunks: 4 factors, 8 angles and 8 values a token; exact: 7 keys and values. A basis and landmarks for each row.
    rebuilt, exact = 4 * (4 + 8 + 8) * 4, 7 * 16 * 4
    assert usage.bytes_read == 2 * (2 * (rebuilt + exact) + 4 * 16 * 4 + 2 * 10 * 8 * 4)
    assert usage.keys_read == 2 * 4 * 11
    table, resident = table_of(memory).bytes, 2 * 2 * chunk
    factors = 2 * (40 * 4 + 4 * 16) * 4
    assert usage.bytes_held == usage.bytes_slow + table + resident + factors + 2 * 2 * 7 * 16 * 4 + 46 * 8 * 4
    assert 0 < usage.share_fast < 1 < usage.share_fast + usage.bytes_slow / usage.bytes_held_dense + 0.5
    memory.attend(part_of(step, 46, 47))
    assert memory.usage.bytes_moved == 2 * 2 * chunk, "the same query again finds its values still there"
    assert isinstance(memory.selector, Landmarks)
    assert memory.selector.hit_rate == 1
    here = memory_of(facts, offload=False)
    read_prompt(here, step, 46)
    here.attend(part_of(step, 46, 47))
    assert here.usage.bytes_slow == here.usage.bytes_moved == 0


def test_hits_are_the_chunks_chosen_twice_running(make_step: Any, facts: LayerFacts) -> None:
    step, memory = make_step(60), memory_of(facts)
    read_prompt(memory, step, 50)
    chosen = []
    assert isinstance(memory.selector, Landmarks)
    assert math.isnan(memory.selector.hit_rate)
    for place in range(50, 60):
        memory.attend(part_of(step, place, place + 1))
        assert memory.newest_selection is not None
        chosen.append(memory.newest_selection.mask(60)[:, :, 0, :44:4] & table_of(memory).candidates)
    hits = sum(int((a & b).sum()) for a, b in itertools.pairwise(chosen))
    assert memory.selector.hit_rate == pytest.approx(hits / (9 * 2 * 2 * 2))


NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_slow_memory_gives_what_it_was_given(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(2, 3, 30, 4, generator=generator)
    slow, fetched, before = SlowTokens(content.to(device)), 0, torch.zeros(2, 3, 30, dtype=torch.bool)
    for _ in range(6):
        tokens = torch.rand(2, 3, 30, generator=generator).argsort(-1)[..., :9]
        wanted = torch.rand(2, 3, 9, generator=generator) < 0.7
        found = slow.read(tokens.to(device), wanted.to(device)).cpu()
        expected = content.gather(2, tokens[..., None].expand(-1, -1, -1, 4))
        assert torch.equal(found[wanted], expected[wanted])
        now = torch.zeros_like(before).scatter(2, tokens, wanted)
        fetched += int((now & ~before).sum())
        assert slow.moved == fetched * 4 * 4
        before = now
    assert torch.equal(slow.all().cpu(), content)
    slow.append(content[:, :, :2].to(device))
    slow.pick_rows(torch.tensor([1, 1]))
    assert torch.equal(slow.all().cpu()[0], torch.cat([content[1], content[1, :, :2]], dim=1))


def test_vectors_are_put_where_a_mask_is_true_alone() -> None:
    mask = torch.tensor([[[True, False, True, False]], [[False, False, False, True]]])
    places = true_places(mask)
    found = put(torch.zeros(2, 1, 4, 1), places, mask, torch.ones(2, 1, 2, 1))
    assert torch.equal(found[..., 0].bool(), mask)


# --- later tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 3])
def test_later_tokens_are_folded_in_and_read_as_before(make_step: Any, facts: LayerFacts, padding: int) -> None:
    step = make_step(90, padding=padding)
    plain, folding = memory_of(facts), memory_of(facts, fold=8, largest_residual=-1.0)
    for memory in (plain, folding):
        read_prompt(memory, step, 40)
        for place in range(40, 90):
            memory.attend(part_of(step, place, place + 1))
    store, table = store_of(folding), table_of(folding)
    assert store.length == 90
    assert store.tail_start >= 90 - 8 - 2 * 4 - 3, "what is not folded yet, the local chunk and what fills none"
    keys, values = store.read()
    torch.testing.assert_close(
        keys[step.real[:, None].expand(2, 2, 90)],
        step.keys[:, :, :][step.real[:, None].expand(2, 2, 90)],
        rtol=1e-3,
        atol=1e-3,
    )
    assert torch.equal(values, step.values)
    afresh = divide(step.keys, step.real, ChunkRule(4, 0, 0))
    for row in range(2):
        count = int(table.counts[row])
        torch.testing.assert_close(table.means[row, :, :count], afresh.means[row, :, :count])
        assert int(table.candidates[row, 0].sum()) == count - 1
    assert plain.newest_selection is not None
    assert folding.newest_selection is not None
    most = 8 + 4 + (8 + 2 * 4 + 3)
    assert folding.newest_selection.kept.sum(-1).max() <= most < plain.newest_selection.kept.sum(-1).min()
    assert store.refits == (90 - 40) // 8
    assert store_of(plain).refits == 0


def test_a_basis_is_found_anew_where_it_does_not_fit(make_step: Any) -> None:
    step, rule = make_step(40), ChunkRule(4, 1, 0)

    def after(largest: float, strange: bool) -> PromptSVDStore:
        store = PromptSVDStore(3, rule, lambda table: False, folding=Folding(8, largest))
        keys = step.rotation.undo(step.keys)
        keys[..., 3:] = 0  # of rank 6 over both heads, of which the first three of one head are large
        keys[:, 0] *= 100
        if strange:
            keys[:, :, 20:] = torch.randn(keys[:, :, 20:].shape, generator=torch.Generator().manual_seed(5)) * 100
        made = dataclasses.replace(step, keys=step.rotation.apply(keys))
        store.append(part_of(made, 0, 20))
        store.close()
        for place in range(20, 40):
            store.append(part_of(made, place, place + 1))
        return store

    assert after(0.1, strange=False).refits == 0
    assert after(0.1, strange=False).residual < 0.01
    assert after(0.1, strange=True).refits > 0
    assert after(1.0, strange=True).refits == 0
    assert after(1.0, strange=True).residual > 0.3


def test_rows_can_be_picked_and_come_twice(make_step: Any, facts: LayerFacts) -> None:
    step = make_step(60, padding=2)
    whole, picked = memory_of(facts, fold=8), memory_of(facts, fold=8)
    for memory in (whole, picked):
        read_prompt(memory, step, 40)
        for place in range(40, 55):
            memory.attend(part_of(step, place, place + 1))
    rows = torch.tensor([1, 0, 1])
    picked.pick_rows(rows)
    for place in range(55, 60):
        now = part_of(step, place, place + 1)
        fields = {name: getattr(now, name)[rows] for name in ("queries", "keys", "values", "real")}
        found = picked.attend(dataclasses.replace(now, **fields, hidden=None))
        torch.testing.assert_close(found, whole.attend(now)[rows])


# --- in a model ------------------------------------------------------------------------------------------------------


def test_a_short_prompt_is_read_in_full_with_one_warning(llama: Any) -> None:
    ids = torch.randint(3, 97, (1, 20), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    dense = llama.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with warnings.catch_warnings(record=True) as said, ShadowKV()(llama) as run:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(llama.generate(ids, attention_mask=torch.ones_like(ids), **options), dense)
    assert [str(each.message)[:40] for each in said] == ["a prompt of 20 tokens is too short for S"]
    assert run.usage.share_read == 1
    assert run.usage.share_held == 1
    with warnings.catch_warnings(), ShadowKV(budget=KeyBudget(share=1.0))(llama) as run:
        warnings.simplefilter("error")
        llama.generate(ids, attention_mask=torch.ones_like(ids), **options)


def test_a_padded_batch_with_beams_generates_what_its_rows_would(llama: Any) -> None:
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    method = ShadowKV(**{**SMALL, "budget": KeyBudget(keys=8)})
    for more in ({}, {"num_beams": 3}):
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}
        with method(llama) as run:
            both = llama.generate(ids, attention_mask=mask, **options)
            assert run.usage.share_read < 0.6
        assert 0 <= shadow_report(run).hit_rate <= 1
        with method(llama):
            alone = llama.generate(ids[:1, 6:], attention_mask=mask[:1, 6:], **options)
        assert both[0, 40:].tolist() == alone[0, 34:].tolist()


def test_a_prompt_in_chunks_is_one_prompt(llama: Any) -> None:
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(2))
    method, found = ShadowKV(**{**SMALL, "budget": KeyBudget(keys=8), "rank_share": 0.5}), []
    for chunk in (38, 5):
        with method(llama) as run:
            cache = transformers.DynamicCache(config=llama.config)
            for part in ids[:, :38].split(chunk, dim=1):
                llama(part, past_key_values=cache)
            run.close_prompt()
            found.append(torch.cat([llama(ids[:, at : at + 1], past_key_values=cache).logits for at in (38, 39)]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_it_runs_on_a_trace_and_is_kept_as_settings(tiny_llama: Path, tmp_path: Path) -> None:
    lm = load(tiny_llama)
    trace = record_trace(lm, ["one two three four five six seven " * 6], tokens=60, layers=[0])
    method = ShadowKV(**{**SMALL, "budget": KeyBudget(keys=8), "fold": 8})
    found = compare_on_trace(trace, {"shadow": method.memory, "dense": ComposedMemory}, queries=8)
    assert 0 < found["shadow"][0].mass < 1
    method.save(tmp_path)
    again = read_method(tmp_path)
    assert isinstance(again, ShadowKV)
    assert again.settings() == method.settings()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": KeyBudget(keys=20)}, "multiple of 8"),
        ({"budget": KeyBudget(keys=64), "counted": "all"}, "at least 424"),
        ({"budget": KeyBudget(keys=64, sinks=4)}, "no sinks"),
        ({"chunk": 0}, "size=0"),
        ({"outliers": -1}, "outliers=-1"),
        ({"rank": 0}, "rank=0"),
        ({"rank_share": 1.5}, "rank_share=1.5"),
        ({"fold": 12}, "fold=12"),
        ({"counted": "some"}, "counted='some'"),
        ({"turn": "none"}, "turn='none'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ShadowKV(**settings)


def test_a_rank_that_the_keys_cannot_have_is_refused(llama: Any, facts: LayerFacts) -> None:
    with pytest.raises(InputError, match="rank=160: the keys of this model's 2 key-value heads are together 16 wide"):
        ShadowKV(rank=160)(llama).__enter__()
    assert ShadowKV(rank=16).rank_of(facts) == 16
    assert ShadowKV().rank_of(facts) == 3
    assert ShadowKV().rank_of(LayerFacts(0, 32, 8, 128, 1)) == 160, "the paper's"
    selector = Landmarks(ChunkBudget(KeyBudget(keys=8)))
    with pytest.raises(InputError, match="keeps chunks"):
        selector.close(ComposedMemory(facts).store)


def test_outliers_catch_what_no_mean_describes(make_step: Any, facts: LayerFacts) -> None:
    """A sink: one key that turns away from its chunk, and that every query wants."""
    step = make_step(70, batch=1)
    keys, queries = step.keys.clone() + 3, step.queries + 2
    keys[:, :, 0] = -keys[:, :, 0] * 0.2 + 8
    keys[:, :, 1:4] = -keys[:, :, 1:4]
    step = dataclasses.replace(step, keys=keys, queries=queries)
    errors = []
    for outliers in (1, 0):
        memory = memory_of(facts, outliers=outliers, budget=KeyBudget(keys=4 * (2 - outliers)))
        read_prompt(memory, step, 69)
        if outliers:
            assert table_of(memory).outliers.flatten().tolist() == [0, 0]
        found = memory.attend(part_of(step, 69, 70))
        exact = attend(step.queries[:, :, 69:], step.keys, step.values, step.scaling)
        errors.append(float((found - exact).norm()))
    assert errors[0] < errors[1] / 2
