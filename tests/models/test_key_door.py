"""The door: any decoder, with memories that keep everything, computes what it computes without them."""

import copy
from typing import Any

import pytest
import torch
import transformers

from apportion.errors import InputError
from apportion.keys import ComposedMemory
from apportion.models.key_door import attend_with, layer_facts, memories_of, queries_of
from apportion.models.key_memory import Rotation, Step
from tiny_families import CAUSAL, LLAMA_LIKE, tiny_model

# These have layers without a sliding window: of the tiny models two have none.
FAMILIES = [family for family in CAUSAL if family not in ("mistral", "gemma3")]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=FAMILIES)
def decoder(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def padded() -> torch.Tensor:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    return mask


@torch.no_grad()
def test_everything_remembered_gives_the_dense_logits(decoder: Any, ids: torch.Tensor) -> None:
    dense = decoder(ids).logits
    with attend_with(decoder, ComposedMemory):
        torch.testing.assert_close(decoder(ids).logits, dense, **TOLERANCE)
        torch.testing.assert_close(decoder(ids, use_cache=False).logits, dense, **TOLERANCE)
    torch.testing.assert_close(decoder(ids).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3, 5, 11])
def test_chunks_of_any_size_give_the_dense_logits(decoder: Any, ids: torch.Tensor, chunk: int) -> None:
    dense = decoder(ids).logits
    with attend_with(decoder, ComposedMemory):
        cache = transformers.DynamicCache(config=decoder.config)
        parts = [decoder(part, past_key_values=cache).logits for part in ids.split(chunk, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), dense, **TOLERANCE)


@torch.no_grad()
def test_left_padding_gives_the_dense_logits(decoder: Any, ids: torch.Tensor, padded: torch.Tensor) -> None:
    positions = (padded.cumsum(1) - 1).clamp_min(0)
    given = {"attention_mask": padded}
    if "position_ids" in decoder.forward.__code__.co_varnames:
        given["position_ids"] = positions
    dense = decoder(ids, **given).logits
    with attend_with(decoder, ComposedMemory):
        found = decoder(ids, **given).logits
        torch.testing.assert_close(found[padded.bool()], dense[padded.bool()], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_padding_writes_the_same_tokens(
    decoder: Any, ids: torch.Tensor, padded: torch.Tensor, beams: int
) -> None:
    options = {"max_new_tokens": 9, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    dense = decoder.generate(ids, attention_mask=padded, **options)
    with attend_with(decoder, ComposedMemory):
        assert decoder.generate(ids, attention_mask=padded, **options).tolist() == dense.tolist()


@torch.no_grad()
def test_prefill_in_chunks_by_generate_itself(ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    dense = model.generate(ids, **options)
    with attend_with(model, ComposedMemory):
        assert model.generate(ids, prefill_chunk_size=5, **options).tolist() == dense.tolist()


@torch.no_grad()
def test_a_later_turn_goes_on_from_the_cache_and_a_copy_of_it(ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    dense = model(ids).logits
    with attend_with(model, ComposedMemory) as door:
        cache = model(ids[:, :7]).past_key_values
        kept = copy.deepcopy(cache)
        for each in (cache, kept):
            torch.testing.assert_close(model(ids[:, 7:], past_key_values=each).logits, dense[:, 7:], **TOLERANCE)
        assert door.cache is kept
        assert [memory.seen for memory in memories_of(kept)] == [12, 12, 12]


@torch.no_grad()
def test_without_its_mask_function_a_model_would_not_be_causal(ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    later = ids.clone()
    later[:, -1] = 5
    with attend_with(model, ComposedMemory):
        torch.testing.assert_close(model(ids).logits[:, :-1], model(later).logits[:, :-1], rtol=0, atol=0)


@torch.no_grad()
def _step_of_layer_0(model: Any, ids: torch.Tensor) -> Step:
    steps = []

    class Keeps(ComposedMemory):
        def attend(self, step: Step) -> torch.Tensor:
            steps.append(step)
            return super().attend(step)

    with attend_with(model, Keeps):
        model(ids)
    return steps[0]


def test_rotation_is_what_the_model_does_and_can_be_undone(ids: torch.Tensor) -> None:
    for family in ("llama", "qwen3", "phi", "gpt_neox", "gemma"):
        model = tiny_model(family)
        step = _step_of_layer_0(model, ids)
        torch.testing.assert_close(step.rotation.apply(step.unrotated_keys()), step.keys, **TOLERANCE)
        # The first token has position 0 and is not turned at all; the same token later is the same key before turning.
        torch.testing.assert_close(step.unrotated_keys()[:, :, 0], step.keys[:, :, 0])
        assert step.hidden.shape == (2, 12, 32)
        assert (step.unrotated_keys()[:, :, 1:] - step.keys[:, :, 1:]).abs().max() > 0.01


@torch.no_grad()
def test_queries_are_made_by_the_layer_itself(decoder: Any, ids: torch.Tensor) -> None:
    seen: dict[int, Step] = {}

    class Notes(ComposedMemory):
        def attend(self, step: Step) -> torch.Tensor:
            seen[self.facts.layer] = step
            return super().attend(step)

    with attend_with(decoder, Notes):
        decoder(ids)
    first, last = min(seen), max(seen)
    for layer in (first, last):
        step = seen[layer]
        assert step.hidden is not None
        torch.testing.assert_close(queries_of(decoder, layer, step.hidden, step.rotation), step.queries)
    if first != last:
        foreign = queries_of(decoder, last, seen[first].hidden, seen[first].rotation)
        assert not torch.allclose(foreign, seen[last].queries)
    with pytest.raises(InputError, match="layer=99"):
        queries_of(decoder, 99, seen[first].hidden, seen[first].rotation)
    assert decoder(ids).logits.isfinite().all()


def test_rotations_can_be_picked_and_joined() -> None:
    angles = torch.rand(1, 6, 3)
    rotation = Rotation(angles.cos(), angles.sin())
    vectors = torch.randn(2, 4, 6, 8)
    whole = rotation.apply(vectors)
    joined = rotation.at(slice(0, 2)).then(rotation.at(slice(2, 6)))
    torch.testing.assert_close(joined.apply(vectors), whole)
    tokens = torch.tensor([[5, 0], [1, 3]])
    rows = torch.arange(2)[:, None]
    some = rotation.at(tokens).apply(vectors.transpose(1, 2)[rows, tokens].transpose(1, 2))
    torch.testing.assert_close(some, whole.transpose(1, 2)[rows, tokens].transpose(1, 2))


@torch.no_grad()
def test_a_rotation_that_stretches_is_undone_too(ids: torch.Tensor) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**{**LLAMA_LIKE, "rope_parameters": scaling})
    step = _step_of_layer_0(transformers.LlamaForCausalLM(config).eval(), ids)
    assert step.rotation.cos[0, 0, 0] > 1.1
    torch.testing.assert_close(step.rotation.apply(step.unrotated_keys()), step.keys, **TOLERANCE)


@torch.no_grad()
def test_layers_that_turn_alike_share_one_rotation(ids: torch.Tensor) -> None:
    model, steps = tiny_model("llama"), []

    class Keeps(ComposedMemory):
        def attend(self, step: Step) -> torch.Tensor:
            steps.append(step)
            return super().attend(step)

    with attend_with(model, Keeps):
        cache = model(ids[:, :7]).past_key_values
        model(ids[:, 7:], past_key_values=cache)
    joined = [first.rotation.then(second.rotation) for first, second in zip(steps[:3], steps[3:], strict=True)]
    assert joined[0] is joined[1] is joined[2]
    assert joined[0].bytes == 2 * 12 * 4 * 4
    assert steps[0].rotation.then(steps[0].rotation) is not joined[0]
    assert joined[0] is not steps[0].rotation.then(steps[3].rotation), "what followed last is remembered, nothing else"


def test_which_layers_get_memories() -> None:
    assert [each.layer for each in layer_facts(tiny_model("gemma2"))] == [1]
    facts = layer_facts(tiny_model("qwen3"))[0]
    assert (facts.heads, facts.groups, facts.width, facts.layers) == (4, 2, 12, 3)


def test_models_that_cannot_be_served_are_refused() -> None:
    with pytest.raises(InputError, match="no layer of full attention"):
        layer_facts(tiny_model("mistral"))
    with pytest.raises(InputError, match="encoder"):
        layer_facts(tiny_model("bert"))
    config = transformers.DeepseekV3Config(
        **{**LLAMA_LIKE, "num_key_value_heads": 4}, n_routed_experts=4, first_k_dense_replace=3, n_group=1
    )
    latent = transformers.DeepseekV3ForCausalLM(config)
    with pytest.raises(InputError, match="MLA"):
        layer_facts(latent)


@torch.no_grad()
def test_bad_input_is_refused(ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    used = model(ids).past_key_values
    with attend_with(model, ComposedMemory):
        mine = model(ids).past_key_values
        with pytest.raises(InputError, match="12 tokens"):
            model(ids, past_key_values=used)
        with pytest.raises(InputError, match="StaticCache"):
            model(ids, past_key_values=transformers.StaticCache(config=model.config, max_cache_len=30))
        with pytest.raises(InputError, match="attention_mask"):
            model(ids, attention_mask=torch.ones(2, 1, 12, 12))
        with pytest.raises(InputError, match="already"), attend_with(model, ComposedMemory):
            pass
        with pytest.raises(InputError, match="take tokens back"):
            mine.crop(-2)
        with pytest.raises(InputError, match="emptied"):
            mine.reset()
    with pytest.raises(InputError, match="within such a block"):
        model(ids, past_key_values=mine)
    other = tiny_model("qwen2")
    with attend_with(other, ComposedMemory):
        other(ids)
        # Somebody else's open door: without the check, attention would see the newest tokens alone.
        with pytest.raises(InputError, match="within such a block"):
            model(ids, past_key_values=mine)
    assert model.config._attn_implementation == "sdpa"
