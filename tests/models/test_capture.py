from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.models import LanguageModel, Site, capture, splice

KINDS = ("residual", "mlp_out", "mlp_in", "attn_out", "heads", "embeddings")


def site_of(kind: str, layer: int = 1) -> Site:
    return Site(None if kind == "embeddings" else layer, kind)


def heard_by_hand(model: Any, module: nn.Module, side: str, **inputs: Any) -> Tensor:
    """What a hook written without apportion hears."""
    heard = []
    if side == "input":
        handle = module.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    else:
        handle = module.register_forward_hook(
            lambda _, args, out: heard.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return heard[0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_site_yields_exactly_what_a_hand_written_hook_yields(
    kind: str, padded: bool, model: Any, blocks: Any, parts: Any, input_ids: Tensor, attention_mask: Tensor
) -> None:
    mask = attention_mask if padded else None
    module, side = {
        "residual": (blocks[1], "output"),
        "attn_out": (parts(blocks[1])["attention"], "output"),
        "heads": (parts(blocks[1])["attention"], "input"),
        "mlp_in": (parts(blocks[1])["mlp_in"], "input"),
        "mlp_out": (parts(blocks[1])["mlp_out"], "output"),
        "embeddings": (blocks[0], "input"),
    }[kind]
    expected = heard_by_hand(model, module, side, input_ids=input_ids, attention_mask=mask)
    site = site_of(kind)
    captured = capture(model, [site], input_ids, mask)[site]
    assert captured.shape == (2, 7, site.width(model))
    assert torch.equal(captured.reshape(expected.shape), expected)


def test_residuals_are_the_hidden_states_of_transformers(model: Any, input_ids: Tensor) -> None:
    with torch.no_grad():
        states = model(input_ids=input_ids, output_hidden_states=True).hidden_states
    captured = capture(model, [site_of("embeddings"), Site(0, "residual"), Site(1, "residual")], input_ids)
    for ours, theirs in zip(captured.values(), states, strict=False):
        assert torch.equal(ours, theirs)


# The others norm what they add, or the sum.
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "gpt2", "gpt_neox", "opt"])
def test_attention_and_mlp_outputs_add_up_to_the_residual_stream(model: Any, input_ids: Tensor) -> None:
    names = ("layers.0.residual", "layers.1.attn_out", "layers.1.mlp_out", "layers.1.residual")
    before, attention, mlp, after = capture(model, [Site.parse(name) for name in names], input_ids).values()
    torch.testing.assert_close(before + attention + mlp, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_after_the_last_site_is_computed(kind: str, model: Any, blocks: Any, input_ids: Tensor) -> None:
    entered: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda _, args, number=number: entered.append(number))
        for number, block in enumerate(blocks)
    ]
    heads_called: list[int] = []
    head = model.get_output_embeddings() if hasattr(model, "lm_head") else None
    if head is not None:
        handles.append(head.register_forward_pre_hook(lambda _, args: heads_called.append(1)))
    try:
        capture(model, [site_of(kind, layer=0), site_of(kind)], input_ids)
        assert entered == ([0] if kind == "embeddings" else [0, 1])
        entered.clear()
        capture(model, [Site(2, "residual")], input_ids)
        assert entered == [0, 1, 2]
        assert heads_called == []
    finally:
        for handle in handles:
            handle.remove()


def test_a_block_is_left_in_the_middle(llama: Any, input_ids: Tensor) -> None:
    called: list[int] = []
    handle = llama.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: called.append(1))
    capture(llama, [Site(1, "attn_out")], input_ids)
    handle.remove()
    assert called == []


def test_many_sites_come_from_one_pass_in_the_order_asked_for(llama: Any, input_ids: Tensor) -> None:
    sites = [Site(2, "heads"), Site(0, "residual"), Site(1, "mlp_in"), Site(1, "mlp_out"), Site(0, "residual")]
    together = capture(llama, sites, input_ids)
    assert list(together) == list(dict.fromkeys(sites))
    for site in together:
        assert torch.equal(together[site], capture(llama, [site], input_ids)[site])


def test_no_sites_need_no_pass(llama: Any, input_ids: Tensor) -> None:
    assert capture(llama, [], input_ids) == {}


def test_what_is_captured_has_no_gradient(llama: Any, input_ids: Tensor) -> None:
    llama.requires_grad_(True)
    try:
        captured = capture(llama, [Site(1, "residual")], input_ids)[Site(1, "residual")]
    finally:
        llama.requires_grad_(False)
    assert not captured.requires_grad


def test_no_hook_is_left_behind(model: Any, input_ids: Tensor) -> None:
    before = hooks_of(model)
    capture(model, [site_of(kind) for kind in KINDS], input_ids)
    assert hooks_of(model) == before


def test_an_error_inside_the_model_is_raised_and_leaves_no_hook(llama: Any) -> None:
    before = hooks_of(llama)
    with pytest.raises(IndexError):
        capture(llama, [Site(1, "residual")], torch.full((1, 4), 10_000))
    assert hooks_of(llama) == before


def test_a_missing_layer_is_refused(llama: Any, input_ids: Tensor) -> None:
    with pytest.raises(InputError, match="has 3 layers"):
        capture(llama, [Site(0, "residual"), Site(7, "residual")], input_ids)


def test_a_splice_in_force_is_heard_by_capture(model: Any, input_ids: Tensor) -> None:
    for kind in KINDS:
        site = site_of(kind)
        with splice(model, site, lambda activations: activations + 1):
            heard = capture(model, [site], input_ids)[site]
        assert torch.equal(heard, capture(model, [site], input_ids)[site] + 1)


def test_a_language_model_and_the_model_inside_it_are_heard_alike(llama: Any, input_ids: Tensor) -> None:
    site = Site(1, "heads")
    wrapped = LanguageModel("tiny", llama, tokenizer=None)
    assert torch.equal(capture(wrapped, [site], input_ids)[site], capture(llama, [site], input_ids)[site])


class BlockThatReturnsATuple(nn.Module):
    """As the decoder layers of transformers 4 do, and some of 5."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.o_proj = nn.Linear(8, 8)
        self.mlp = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, str]:
        hidden_states = hidden_states + self.self_attn.o_proj(hidden_states)
        return hidden_states + self.mlp(hidden_states), "a cache"


class ModelOfTuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([BlockThatReturnsATuple(), BlockThatReturnsATuple()])
        self.embed_tokens = nn.Embedding(97, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Tensor:
        hidden_states = self.embed_tokens(input_ids)
        for layer in self.layers:
            # By keyword, as some families call their layers.
            hidden_states, cache = layer(hidden_states=hidden_states)
            assert cache == "a cache"
        return hidden_states


def test_blocks_that_return_tuples_and_take_keywords_are_heard_and_spliced(input_ids: Tensor) -> None:
    model = ModelOfTuples()
    last, first = Site(1, "residual"), Site(None, "embeddings")
    captured = capture(model, [last, first], input_ids)
    assert torch.equal(captured[last], model(input_ids))
    assert torch.equal(captured[first], model.embed_tokens(input_ids))
    with splice(model, last, torch.zeros_like):
        assert torch.equal(model(input_ids), torch.zeros(2, 7, 8))
    with splice(model, first, torch.zeros_like):
        assert not torch.equal(model(input_ids), captured[last])


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
