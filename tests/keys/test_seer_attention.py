"""SeerAttention's gates: what they are taught, how they learn, and how a model reads by them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.errors import InputError
from apportion.keys import KeyBudget, read_method
from apportion.keys.blocks import BlockGrid
from apportion.keys.seer_attention import (
    DecodeGate,
    DecodeGates,
    Example,
    Gate,
    GateBlocks,
    GateRecipe,
    PromptGates,
    SeerAttention,
    gate_loss,
    train_gates,
)
from apportion.keys.seer_attention.gate import GateShape, rotary_frequencies
from apportion.keys.stores import ExactStore
from apportion.keys.trace import exact_weights, part_of
from apportion.models import LanguageModel, load
from apportion.models.key_memory import LayerFacts, Rotation

TEXTS = [
    f"the {word} and other {word}s, of which there are more than one; " * 3 for word in ("apple", "river", "stone")
]
SHAPE = GateShape(size=4, width=16)
QUICK = GateRecipe(steps=4, batch_size=2, warmup=1, tokens=60)
KINDS = {"prompt": PromptGates, "decode": DecodeGates}


@pytest.fixture(scope="module")
def lm(tiny_llama: Path) -> LanguageModel:
    return load(str(tiny_llama))


def gate_for(kind: Any, facts: LayerFacts, step: Any, shape: GateShape = SHAPE, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    frequencies = rotary_frequencies(step, shape.width)
    gates = kind(shape, [facts], None if frequencies is None else frequencies[None])
    with torch.no_grad():
        for each in gates.parameters():
            each.mul_(10)
    return gates


def test_what_a_prompt_gate_is_taught(make_step: Any) -> None:
    step = make_step(19, batch=1)
    example = PromptGates.example(step, SHAPE)
    pooled = torch.nn.functional.pad(exact_weights(step), (0, 1, 0, 1)).view(1, 4, 5, 4, 5, 4).amax((3, 5))
    truth = pooled / pooled.sum(-1, keepdim=True)
    torch.testing.assert_close(example.truth, truth[:, :, 1:])  # the first quarter of five rows is one
    torch.testing.assert_close(example.truth.sum(-1), torch.ones(1, 4, 4))
    assert (example.truth * ~example.visible).max() == 0
    assert example.query_starts.tolist() == [4, 8, 12, 16]
    unrotated = step.unrotated_queries()[:, :, 16:].mean(2)
    torch.testing.assert_close(example.queries[:, :, -1], unrotated)


def test_what_a_decode_gate_is_taught(make_step: Any) -> None:
    step = make_step(19, batch=1)
    example = DecodeGates.example(step, SHAPE)
    assert example.query_starts.tolist() == list(range(9, 19))
    peaks = torch.nn.functional.pad(exact_weights(step), (0, 1)).unflatten(-1, (5, 4)).amax(-1)[:, :, 9:]
    for row, token in enumerate(range(9, 19)):
        complete = token // 4
        assert example.visible[row].tolist() == [block < complete for block in range(5)]
        for group in range(2):
            best = peaks[0, 2 * group : 2 * group + 2, row, :complete].amax(0)
            torch.testing.assert_close(example.truth[0, group, row, :complete], best / best.sum())
    both = step.unrotated_queries()[0, 2:4, 12].flatten()
    torch.testing.assert_close(example.queries[0, 1, 3], both)


@pytest.mark.parametrize("width", [4, 8, 16, 6])
def test_rotary_frequencies_are_those_of_a_head_of_that_width(make_step: Any, width: int) -> None:
    step = make_step(5)
    base = 100.0
    angles = torch.arange(5)[None, :, None] * base ** -(torch.arange(4) / 4)
    for start in (0, 1):
        rotation = Rotation(angles[:, start:].cos(), angles[:, start:].sin())
        found = rotary_frequencies(dataclasses.replace(step, rotation=rotation), width)
        assert found is not None
        torch.testing.assert_close(found, base ** -(torch.arange(width // 2) / (width // 2)), rtol=1e-4, atol=1e-5)
    assert rotary_frequencies(dataclasses.replace(step, rotation=None), width) is None


def test_a_single_pooling_of_the_gates_width_needs_no_map_of_queries(facts: LayerFacts, make_step: Any) -> None:
    step = make_step(19)
    short = gate_for(PromptGates, facts, step, GateShape(size=4, width=8))
    assert short.query_weight is None
    assert short.key_weight.shape == (1, 4, 24, 8)
    mapped = gate_for(PromptGates, facts, step)
    assert mapped.query_weight.shape == (1, 4, 8, 16)
    assert mapped.key_weight.shape == (1, 2, 24, 16)
    both = gate_for(PromptGates, facts, step, GateShape(4, 8, ("mean", "max"), ("mean",)))
    assert both.query_weight.shape == (1, 4, 16, 8)
    assert both.key_weight.shape == (1, 2, 8, 8)


@pytest.mark.parametrize("width", [8, 16])
def test_a_gate_is_the_papers_equation(facts: LayerFacts, make_step: Any, width: int) -> None:
    step = make_step(8, batch=1)
    gates = gate_for(PromptGates, facts, step, GateShape(size=4, width=width))
    example = PromptGates.example(step, GateShape(size=4, width=width))
    frequencies = rotary_frequencies(step, width)
    assert frequencies is not None
    for head in range(4):
        key = step.unrotated_keys()[0, head // 2]
        mapped = []
        for block in range(2):
            of = key[4 * block : 4 * block + 4]
            weight = gates.key_weight[0, head if width == 8 else head // 2]
            mapped.append(torch.cat([of.amax(0), of.amin(0), of.mean(0)]) @ weight)
        query = step.unrotated_queries()[0, head, 4:].mean(0)
        if width == 16:
            query = query @ gates.query_weight[0, head]
        angles = 4 * torch.arange(2)[:, None] * frequencies
        turned = [turn(vector, angle) for vector, angle in zip([*mapped, query], [*angles, angles[1]], strict=True)]
        expected = torch.stack([turned[2] @ each for each in turned[:2]]) / width**0.5
        torch.testing.assert_close(gates(example)[0, head, -1], expected, rtol=1e-4, atol=1e-5)


def turn(vector: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    one, two = vector.chunk(2)
    return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()])


def test_a_prefix_scores_complete_blocks_alike_and_chunks_the_same_as_one_piece(
    facts: LayerFacts, make_step: Any
) -> None:
    step = make_step(22)
    gate = gate_for(PromptGates, facts, step).gate
    store, scorer = ExactStore(), GateBlocks(gate, SHAPE)
    store.append(step)
    scorer.extend(step)
    whole = scorer.scores(step, store, BlockGrid(4, 22, 22))
    prefix, short = part_of(step, 0, 14), GateBlocks(gate, SHAPE)
    short.extend(prefix)
    scores = short.scores(prefix, store, BlockGrid(4, 14, 14))
    torch.testing.assert_close(scores[:, :, :3, :3], whole[:, :, :3, :3])
    assert not torch.allclose(scores[:, :, 3, 3], whole[:, :, 3, 3]), "the last block was not complete"
    chunks = GateBlocks(gate, SHAPE)
    for start, end in ((0, 3), (3, 8), (8, 22)):
        chunks.extend(part_of(step, start, end))
    last = chunks.scores(part_of(step, 8, 22), store, BlockGrid(4, 14, 22))
    torch.testing.assert_close(last, whole[:, :, 2:])


def test_whole_blocks_of_padding_change_no_score(facts: LayerFacts, make_step: Any) -> None:
    step = make_step(14, batch=1)
    gate = gate_for(PromptGates, facts, step).gate

    def padded(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        shape = list(tensor.shape)
        shape[dim] = 8
        filler = torch.full(shape, 9) if tensor.is_floating_point() else torch.zeros(shape)
        return torch.cat([filler.to(tensor.dtype), tensor], dim)

    assert step.rotation is not None
    rotation = Rotation(padded(step.rotation.cos, 1), padded(step.rotation.sin, 1))
    queries, keys, values = (padded(each, 2) for each in (step.queries, step.keys, step.values))
    longer = dataclasses.replace(
        step, queries=queries, keys=keys, values=values, real=padded(step.real, 1), rotation=rotation, hidden=None
    )
    found = []
    for each in (step, longer):
        scorer = GateBlocks(gate, SHAPE)
        scorer.extend(each)
        found.append(scorer.scores(each, ExactStore(), BlockGrid(4, each.new, each.new)))
    torch.testing.assert_close(found[1][:, :, 2:, 2:], found[0], rtol=1e-4, atol=1e-5)


def uniform_case(blocks: int) -> tuple[torch.Tensor, Example]:
    """Every row's truth is its first block, and the gate does not know."""
    visible = torch.ones(blocks, blocks, dtype=torch.bool)
    truth = torch.zeros(1, 2, blocks, blocks)
    truth[..., 0] = 1
    nothing = torch.zeros(1, 2, blocks, 1)
    starts = torch.arange(blocks)
    return torch.zeros(1, 2, blocks, blocks), Example(nothing, starts, nothing, starts, truth, visible)


def test_the_reduction_decides_whether_more_blocks_make_a_row_count_less() -> None:
    for blocks in (8, 16):
        logits, example = uniform_case(blocks)
        nats = torch.tensor([float(blocks)]).log()
        torch.testing.assert_close(gate_loss(logits, example, "row"), nats)
        torch.testing.assert_close(gate_loss(logits, example), nats / blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_learn_and_only_they_do(facts: LayerFacts, make_step: Any, kind: str) -> None:
    steps = [make_step(40, batch=1, seed=seed) for seed in range(2)]
    gates = KINDS[kind](SHAPE, [facts], rotary_frequencies(steps[0], 16)[None])  # type: ignore[index]
    examples = [gates.example(step, SHAPE) for step in steps]
    before = torch.stack([gate_loss(gates(each), each) for each in examples]).mean()
    train_gates(gates, examples, GateRecipe(steps=60, learning_rate=3e-3), progress=False)
    after = torch.stack([gate_loss(gates(each), each) for each in examples]).mean()
    assert after < 0.6 * before
    assert all(not tensor.requires_grad for each in examples for tensor in each)


def test_held_out_texts_choose_each_layers_weights(facts: LayerFacts, make_step: Any) -> None:
    torch.manual_seed(0)
    steps = [make_step(40, batch=1, seed=seed) for seed in range(3)]
    layers = [facts, dataclasses.replace(facts, layer=1)]
    gates = PromptGates(SHAPE, layers, torch.stack([rotary_frequencies(steps[0], 16)] * 2))
    of_layers = [
        [PromptGates.example(make_step(40, batch=1, seed=seed + more), SHAPE) for more in (0, 9)] for seed in range(3)
    ]
    examples = [Example.of_layers(each) for each in of_layers]
    recipe = GateRecipe(steps=80, learning_rate=1e-2, held_out=1, check_every=5)
    result = train_gates(gates, examples, recipe, progress=False)
    best = gate_loss(gates(examples[2]), examples[2])
    torch.testing.assert_close(best, gates.get_buffer("best_loss"))
    assert best.sum() < result.history[-1]["held out"]
    with pytest.raises(InputError, match="held_out=3"):
        train_gates(gates, examples, GateRecipe(held_out=3), progress=False)


@pytest.mark.parametrize("held_out", [0, 1])
def test_an_interrupted_training_ends_with_the_same_weights(
    facts: LayerFacts, make_step: Any, tmp_path: Path, held_out: int
) -> None:
    examples = [PromptGates.example(make_step(24, batch=1, seed=seed), SHAPE) for seed in range(3)]
    recipe = GateRecipe(steps=12, batch_size=1, held_out=held_out, check_every=3)
    ends = []
    for stops in ([None], [5, None]):
        folder = tmp_path / str(len(stops))
        for stop in stops:
            torch.manual_seed(3)
            gates = PromptGates(SHAPE, [facts], None)
            result = train_gates(gates, examples, recipe, folder, progress=False, stop_after=stop)
        ends.append(gates.tensors())
        assert result.resumed_from == (None if len(stops) == 1 else 5)
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("decode", [False, True])
def test_a_fitted_method_is_saved_with_all_that_its_gates_were_made_for(
    lm: LanguageModel, tmp_path: Path, decode: bool
) -> None:
    logits = lm.model(torch.arange(3, 60)[None]).logits
    method = SeerAttention(size=8, width=16, decode=decode, norm=decode, recipe=QUICK)
    with pytest.raises(InputError, match="not fitted"), method(lm):
        pass
    method.fit(lm, TEXTS, progress=False)
    assert lm.model(torch.arange(3, 60)[None]).logits.equal(logits), "the teacher is as it was"
    method.save(tmp_path)
    again = read_method(tmp_path)
    assert isinstance(again, SeerAttention)
    assert again.settings() == method.settings()
    ids = torch.arange(3, 80)[None]
    with method(lm), torch.no_grad():
        one = lm.model.generate(ids, max_new_tokens=5, do_sample=False)
    with again(lm), torch.no_grad():
        assert lm.model.generate(ids, max_new_tokens=5, do_sample=False).equal(one)
    for name, value in (("size", 4), ("key_pooling", ("mean", "max", "min")), ("width", 8), ("decode", not decode)):
        other = dataclasses.replace(again, **{name: value})
        other.fitted, other.fitted_to = again.fitted, again.fitted_to
        with pytest.raises(InputError, match=f"{name}=.*trained with another"), other(lm):
            pass


def test_a_prompt_is_sparse_and_generation_dense(lm: LanguageModel) -> None:
    method = SeerAttention(size=8, width=16, sparsity=0.75, recipe=QUICK).fit(lm, TEXTS, progress=False)
    ids = torch.randint(3, 300, (2, 160), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    with method(lm) as run, torch.no_grad():
        cache = lm.model(ids, attention_mask=mask).past_key_values
        assert run.usage.share_read == pytest.approx(0.25, abs=0.15)  # the last two rows are dense
        more = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        before = run.usage
        lm.model(ids[:, :1], attention_mask=more, past_key_values=cache)
        assert run.usage.keys_read - before.keys_read == run.usage.keys_there - before.keys_there
        assert run.usage.bytes_held == run.usage.bytes_held_dense, "the gate's keys are needed no more"


@pytest.mark.parametrize("padding", [0, 5])
def test_a_token_after_the_prompt_reads_its_own_block_and_the_gates_best(
    facts: LayerFacts, make_step: Any, padding: int
) -> None:
    step = make_step(31, padding=padding)
    shape = GateShape(4, 16, norm=True)
    gate: Gate = gate_for(DecodeGates, facts, step, shape).gate
    selector, store = DecodeGate(gate, shape, KeyBudget(keys=13), None), ExactStore()
    for start, end in ((0, 18), (18, 30), (30, 31)):
        part = part_of(step, start, end)
        store.append(part)
        selector.extend(part, store)
    selection = selector.select(part, store)
    assert selection is not None
    mask = selection.mask(31)[:, :, 0]
    assert mask.shape[1] == 2
    assert mask[:, :, 28:].all(), "the token's own block"
    assert (mask[1].sum(-1) == 3 + 2 * 4).all(), "13 tokens hold three blocks, of which one is the token's own"
    assert not mask[0, :, :padding].any()
    example = DecodeGates.example(part_of(dataclasses.replace(step), 0, 31), shape)
    scores = gate.logits(
        gate.queries(example.queries[1:, :, -1:], example.query_starts[-1:]),
        gate.keys(example.keys[1:], example.key_starts),
    )[0, :, 0, :7]
    expected = torch.zeros(2, 7, dtype=torch.bool).scatter_(-1, scores.topk(2).indices, True)
    assert mask[1, :, :28].view(2, 7, 4).all(-1).equal(expected)
    held = selector.bytes_held()
    selector.pick_rows(torch.tensor([1]))
    assert selector.bytes_held() == held // 2


def test_a_threshold_serves_later_tokens_too_and_turns_see_nothing_later(facts: LayerFacts, make_step: Any) -> None:
    step = make_step(31)
    gate = gate_for(DecodeGates, facts, step).gate
    together, store = DecodeGate(gate, SHAPE, None, 0.2), ExactStore()
    store.append(step)
    together.extend(step, store)
    whole = together.select(step, store)
    assert whole is not None
    for token in (1, 9, 30):
        alone, so_far = DecodeGate(gate, SHAPE, None, 0.2), ExactStore()
        before = part_of(step, 0, token + 1)
        so_far.append(before)
        alone.extend(before, so_far)
        selection = alone.select(part_of(step, token, token + 1), so_far)
        mask = whole.mask(31)[:, :, token]
        assert not mask[..., token + 1 :].any()
        expected = torch.ones_like(mask[..., : token + 1]) if selection is None else selection.mask(token + 1)[:, :, 0]
        assert mask[..., : token + 1].equal(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"blocks": 0}, "blocks=0"),
        ({"sparsity": 0.5, "blocks": 3}, "give one of them"),
        ({"size": 0}, "size=0"),
        ({"width": 7}, "width=7"),
        ({"key_pooling": ("median",)}, "key_pooling=.*median"),
        ({"query_pooling": ()}, "query_pooling"),
        ({"decode": True, "sparsity": 0.5}, "decode takes"),
        ({"decode": True, "threshold": 0.1, "budget": KeyBudget(keys=64)}, "give one of them"),
        ({"budget": KeyBudget(keys=64)}, "decode=True"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SeerAttention(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"held_out": -1}, "held_out=-1"),
        ({"tokens": 1}, "tokens=1"),
        ({"loss_scale": 0.0}, "loss_scale=0.0"),
        ({"reduction": "sum"}, "reduction='sum'"),
    ],
)
def test_recipes_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GateRecipe(**settings)


def test_texts_that_teach_nothing_are_refused(lm: LanguageModel) -> None:
    method = SeerAttention(size=64, recipe=GateRecipe(tokens=100))
    with pytest.raises(InputError, match="texts is empty"):
        method.fit(lm, [])
    with pytest.raises(InputError, match=r"text 1 has \d+ tokens, one block"):
        method.fit(lm, ["word " * 300, "short"])
    with pytest.raises(InputError, match="fit takes no steps"):
        method.fit(lm, TEXTS, steps=3)
