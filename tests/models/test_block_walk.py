"""A walk from block to block is the model's own pass."""

import pytest
import torch

from apportion.errors import InputError
from apportion.models import LanguageModel, load
from apportion.models.block_walk import BlockWalk, walked_losses
from apportion.models.families import base_of
from tiny_families import BUILDERS, CAUSAL, VOCABULARY, tiny_model


def texts(rows: int = 5, time: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, time), generator=torch.Generator().manual_seed(seed))


def padding(ids: torch.Tensor, side: str) -> torch.Tensor:
    lengths = torch.arange(len(ids)) % 3
    places = torch.arange(ids.shape[1])
    places = places if side == "left" else places.flip(0)
    return (places >= lengths.unsqueeze(1)).long()


def walked_to_the_end(walk: BlockWalk) -> torch.Tensor:
    while walk.place < len(walk):
        walk.advance()
    return torch.cat(list(walk.finish()))


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("padded", [None, "right", "left"])
def test_walking_gives_what_the_model_gives(family, padded):
    model, ids = tiny_model(family), texts()
    mask = None if padded is None else padding(ids, padded)
    whole = base_of(model)(input_ids=ids, attention_mask=mask).last_hidden_state
    walked = walked_to_the_end(BlockWalk(model, ids, mask, batch_size=2))
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    torch.testing.assert_close(walked[real], whole[real], rtol=1e-4, atol=1e-5)


def test_layers_of_two_kinds_are_handed_each_its_own(monkeypatch):
    """Gemma 3's sliding layers have another mask and other rotary embeddings than its full ones."""
    import transformers

    from tiny_families import WIDE_HEADS

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(**WIDE_HEADS, sliding_window=4, layer_types=kinds)
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config).eval().requires_grad_(False)
    ids = texts(3, 12)
    whole = model.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(walked_to_the_end(BlockWalk(model, ids)), whole, rtol=1e-4, atol=1e-5)


def test_a_changed_block_is_what_later_blocks_see():
    import copy

    model, ids = copy.deepcopy(tiny_model("llama")), texts()
    walk = BlockWalk(model, ids)
    before = [output.clone() for output, _ in walk.outputs()]
    model.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    after = [output for output, _ in walk.outputs()]
    assert not torch.equal(before[0], after[0])
    whole = model.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(walked_to_the_end(walk), whole, rtol=1e-4, atol=1e-5)


def test_a_walk_leaves_the_model_as_it_was():
    model, ids = tiny_model("llama"), texts()
    BlockWalk(model, ids)
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_batches_without_padding_share_what_they_are_handed():
    walk = BlockWalk(tiny_model("gemma3"), texts(6), batch_size=2)
    first, last = (walk._calls[batch][1][1]["position_embeddings"] for batch in (0, 2))
    assert all(one is other for one, other in zip(first, last, strict=True))


@pytest.mark.parametrize("family", CAUSAL)
def test_losses_on_the_way_are_the_models(family):
    lm = LanguageModel(family, tiny_model(family), None)
    ids = texts()
    torch.testing.assert_close(walked_losses(lm, ids, batch_size=2), lm.loss_per_token(ids), rtol=1e-4, atol=1e-5)


def test_a_walk_has_an_end_and_needs_a_text(tiny_llama):
    lm = load(tiny_llama)
    ids = texts(2)
    walk = BlockWalk(lm, ids)
    with pytest.raises(InputError, match="advance to the end first"):
        list(walk.finish())
    walked_to_the_end(walk)
    with pytest.raises(InputError, match="walk is over"):
        walk.advance()
    with pytest.raises(InputError, match="no token"):
        BlockWalk(lm, ids[:0])
