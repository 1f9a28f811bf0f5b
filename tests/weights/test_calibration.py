"""Statistics of layers' inputs are those of all the tokens at once."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.errors import InputError
from apportion.models import load
from apportion.models.block_walk import BlockWalk
from apportion.weights.calibration import InputStatistics, statistics_of
from apportion.weights.one_shot import layers_by_block
from tiny_families import BUILDERS, VOCABULARY, tiny_model


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_sums_do_not_depend_on_how_texts_are_batched_and_leave_padding_out(texts, time, batch, seed, padded):
    draws = torch.Generator().manual_seed(seed)
    inputs = torch.randn(texts, time, 3, generator=draws) + 1
    lengths = torch.randint(1, time + 1, (texts,), generator=draws) if padded else torch.full((texts,), time)
    real = torch.arange(time) < lengths.unsqueeze(1)
    found = InputStatistics(3)
    for start in range(0, texts, batch):
        part = slice(start, start + batch)
        found.add(torch.where(real[part].unsqueeze(2), inputs[part], torch.nan), real[part])
    # The slow obvious way: token by token.
    rows = [inputs[text, : int(lengths[text])].double() for text in range(texts)]
    tokens = torch.cat(rows)
    assert (found.samples, found.tokens) == (texts, len(tokens))
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found.mean, tokens.mean(0), **close)
    torch.testing.assert_close(found.norm, tokens.square().mean(0).sqrt(), **close)
    torch.testing.assert_close(found.second_moment, tokens.T @ tokens / len(tokens), **close)
    variance = torch.stack([each.var(0, correction=0) for each in rows]).mean(0)
    torch.testing.assert_close(found.variance, variance, **close)


@pytest.mark.parametrize("family", [each for each in BUILDERS if each != "bert"])
def test_every_layer_of_a_block_is_watched(family):
    """With the statistics of its inputs a layer's mean output is known: it is compared with what the layer puts out."""
    model = tiny_model(family)
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    from apportion.models import LanguageModel

    layers = layers_by_block(LanguageModel(family, model, None))[1]
    walk = BlockWalk(model, ids, mask, batch_size=2)
    walk.advance()
    found = statistics_of(layers, walk)
    outputs = {each.name: [] for each in layers}
    hooks = [
        each.module.register_forward_hook(lambda *call, kept=outputs[each.name]: kept.append(call[2]))
        for each in layers
    ]
    for _ in walk.outputs():
        pass
    for hook in hooks:
        hook.remove()
    for layer in layers:
        assert found[layer.name].tokens == int(mask.sum())
        assert found[layer.name].samples == 3
        flat = torch.cat([each.reshape(-1, each.shape[-1]) for each in outputs[layer.name]])[mask.bool().flatten()]
        bias = layer.module.bias if getattr(layer.module, "bias", None) is not None else torch.zeros(())
        expected = layer.matrix().double() @ found[layer.name].mean + bias
        torch.testing.assert_close(flat.double().mean(0), expected.double(), rtol=1e-4, atol=1e-5)


def test_layers_that_are_given_the_same_share_their_statistics(tiny_llama):
    lm = load(tiny_llama)
    layers = layers_by_block(lm)[0]
    walk = BlockWalk(lm, torch.randint(0, 300, (2, 9)))
    found = statistics_of(layers, walk)
    by_end = {name.rpartition(".")[2]: each for name, each in found.items()}
    assert by_end["q_proj"] is by_end["k_proj"] is by_end["v_proj"]
    assert by_end["gate_proj"] is by_end["up_proj"] is not by_end["q_proj"]
    assert not any(module._forward_pre_hooks for module in lm.model.modules())


def test_second_moments_are_only_gathered_if_wanted():
    statistics = InputStatistics(2, second_moment=False)
    statistics.add(torch.ones(1, 2, 2), torch.ones(1, 2).bool())
    with pytest.raises(ValueError, match="second_moment=True"):
        _ = statistics.second_moment


def test_a_layer_that_saw_nothing_is_named(tiny_llama):
    lm = load(tiny_llama)
    block = lm.model.model.layers[0]
    block.mlp.spare = torch.nn.Linear(32, 8)
    layers = layers_by_block(lm)[0]
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.spare saw no calibration tokens.*exclude"):
        statistics_of(layers, BlockWalk(lm, torch.ones(1, 4).long()))


def test_inputs_that_are_not_finite_are_refused():
    model = copy.deepcopy(tiny_model("llama"))
    model.model.embed_tokens.weight[5] = float("nan")
    from apportion.models import LanguageModel

    lm = LanguageModel("broken", model, None)
    with pytest.raises(InputError, match="not finite"):
        statistics_of(layers_by_block(lm)[0], BlockWalk(lm, torch.full((1, 4), 5)))


class _Routed(torch.nn.Module):
    """An MLP of which one part sees every second token, all texts in one."""

    def __init__(self):
        super().__init__()
        self.expert = torch.nn.Linear(32, 32)

    def forward(self, hidden):
        some = hidden.reshape(-1, 32)[::2]
        self.expert(some)
        return hidden


def test_an_expert_sees_some_tokens_and_padding_cannot_be_told_there(tiny_llama):
    lm = load(tiny_llama)
    lm.model.model.layers[0].mlp = _Routed()
    layers = [each for each in layers_by_block(lm)[0] if "expert" in each.name]
    ids = torch.randint(0, 300, (2, 6))
    (found,) = statistics_of(layers, BlockWalk(lm, ids)).values()
    assert (found.tokens, found.samples) == (6, 1)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    with pytest.raises(InputError, match="expert sees 6 of 12 places"):
        statistics_of(layers, BlockWalk(lm, ids, mask))
