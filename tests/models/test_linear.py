"""With patterns and norm scales held fixed, what is read from the residual stream is a sum of what was written."""

import itertools
from typing import Any

import pytest
import torch
import transformers

from apportion.errors import InputError
from apportion.models import Site, capture
from apportion.models.linear import LinearNorm, linearised, watch_attention
from apportion.models.splice import splice


def test_watching_changes_nothing(
    model: Any, outputs: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> None:
    before = outputs(model, input_ids, attention_mask)
    kind = model.config._attn_implementation
    with watch_attention(model):
        watched = outputs(model, input_ids, attention_mask)
    kept = attention_mask.bool()
    torch.testing.assert_close(watched[kept], before[kept], rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == kind
    assert outputs(model, input_ids, attention_mask).equal(before)


def test_patterns_times_values_are_the_heads(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
    with watch_attention(model) as seen:
        sites = [Site(layer, "heads") for layer in range(3)]
        heads = capture(model, sites, input_ids, attention_mask)
    for layer, site in enumerate(sites):
        torch.testing.assert_close(seen[layer].heads.flatten(2), heads[site], rtol=1e-5, atol=1e-6)
        pattern = seen[layer].pattern
        torch.testing.assert_close(pattern.sum(-1)[0], torch.ones_like(pattern.sum(-1)[0]))
        assert pattern[1, :, :5, 5:].eq(0).all()


def test_causal_models_stay_causal(causal_model: Any, input_ids: torch.Tensor, outputs: Any) -> None:
    with watch_attention(causal_model) as seen:
        outputs(causal_model, input_ids)
    for layer in range(3):
        assert seen[layer].pattern.triu(1).eq(0).all()


def written(model: Any, layers: int, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """What the embeddings and the attention and MLP of each block below ``layers`` write: differences of the stream."""
    sites = [Site(None, "embeddings"), *(Site(layer, "residual") for layer in range(layers))]
    found = capture(model, sites, input_ids)
    stream = [found[site] for site in sites]
    return [stream[0], *(after - before for before, after in itertools.pairwise(stream))]


def reading_and_gradient(
    model: Any, site: Site, reader: torch.Tensor, input_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``activations[0, 5] @ reader`` at a site of block 2, and its gradient with respect to the stream before it."""
    read: list[torch.Tensor] = []
    stream: list[torch.Tensor] = []

    def leaf(x: torch.Tensor) -> torch.Tensor:
        stream.append(x.detach().requires_grad_())
        return stream[0]

    def keep(x: torch.Tensor) -> torch.Tensor:
        read.append(x[0, 5] @ reader)
        return x

    with linearised(model), splice(model, Site(1, "residual"), leaf), splice(model, site, keep):
        model(input_ids=input_ids, use_cache=False)
    (gradient,) = torch.autograd.grad(read[0], stream[0])
    return read[0].detach(), gradient


@pytest.mark.parametrize("kind", ["heads", "mlp_in"])
def test_a_reading_is_the_sum_of_what_was_written(causal_model: Any, kind: str, input_ids: torch.Tensor) -> None:
    site = Site(2, kind)
    reader = torch.randn(site.width(causal_model), generator=torch.Generator().manual_seed(0))
    value, gradient = reading_and_gradient(causal_model, site, reader, input_ids)
    shares = torch.stack([(part * gradient).sum() for part in written(causal_model, 2, input_ids)])
    assert gradient[1].eq(0).all()
    assert gradient[0, 6:].eq(0).all()
    assert gradient[0, 5].ne(0).any()
    # There would be a constant, too, if these models were not made with zero biases.
    torch.testing.assert_close(shares.sum(), value, rtol=1e-4, atol=1e-4)


def test_biases_are_the_constant(input_ids: torch.Tensor) -> None:
    draw = torch.Generator().manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=97)
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=draw)
    reader = torch.randn(32, generator=draw)
    value, gradient = reading_and_gradient(model, Site(2, "heads"), reader, input_ids)
    with watch_attention(model) as seen:
        capture(model, [Site(2, "heads")], input_ids)
    block = model.transformer.h[2]
    biases = (block.ln_1.bias @ block.attn.c_attn.weight + block.attn.c_attn.bias)[64:].reshape(4, 8)
    # A pattern's row sums to 1, so what is the same at every source arrives as it is.
    assert seen[2].pattern[0, :, 5].sum(-1).allclose(torch.ones(4))
    constant = (biases * reader.reshape(4, 8)).sum()
    shares = torch.stack([(part * gradient).sum() for part in written(model, 2, input_ids)])
    torch.testing.assert_close(shares.sum() + constant, value, rtol=1e-4, atol=1e-4)
    assert constant.abs() > 0.01


def test_a_share_is_what_the_weights_say(llama: Any, input_ids: torch.Tensor) -> None:
    """By hand for Llama: pattern x (gain x part / rms) W_V, head by head."""
    reader = torch.randn(32, generator=torch.Generator().manual_seed(0))
    _, gradient = reading_and_gradient(llama, Site(2, "heads"), reader, input_ids)
    block = llama.model.layers[2]
    with watch_attention(llama) as seen:
        stream = capture(llama, [Site(1, "residual"), Site(2, "heads")], input_ids)[Site(1, "residual")][0]
    rms = (stream.square().mean(-1, keepdim=True) + block.input_layernorm.variance_epsilon).sqrt()
    for part in written(llama, 2, input_ids):
        values = (block.input_layernorm.weight * part[0] / rms) @ block.self_attn.v_proj.weight.T
        by_head = values.reshape(7, 2, 8).repeat_interleave(2, dim=1)
        expected = torch.stack(
            [seen[2].pattern[0, head, 5] @ by_head[:, head] @ reader[8 * head : 8 * head + 8] for head in range(4)]
        )
        torch.testing.assert_close((part[0] * gradient[0]).sum(), expected.sum(), rtol=1e-4, atol=1e-5)


def test_no_gradient_goes_through_an_mlp_unless_it_is_wanted(llama: Any, input_ids: torch.Tensor) -> None:
    def has_gradient(mlps: Any) -> bool:
        def leaf(x: torch.Tensor) -> torch.Tensor:
            return x.detach().requires_grad_()

        with linearised(llama, mlps), splice(llama, Site(0, "mlp_in"), leaf):
            return bool(llama(input_ids=input_ids, use_cache=False).logits.requires_grad)

    assert not has_gradient("constant")
    assert has_gradient("model")


def test_frozen_norms_keep_values_and_are_linear(model: Any, input_ids: torch.Tensor, outputs: Any) -> None:
    before = outputs(model, input_ids)
    with linearised(model):
        torch.testing.assert_close(outputs(model, input_ids), before, rtol=1e-4, atol=1e-5)
    assert outputs(model, input_ids).equal(before)


@pytest.mark.parametrize("width", [7, 8])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_is_found_out_by_asking_it(kind: str, width: int) -> None:
    draw = torch.Generator().manual_seed(0)
    norm = torch.nn.LayerNorm(width) if kind == "layer" else torch.nn.RMSNorm(width, eps=1e-6)
    for parameter in norm.parameters():
        parameter.data = torch.randn(width, generator=draw)
    norm = norm.double().requires_grad_(False)
    linear = LinearNorm(norm, width)
    x, other = torch.randn(2, 5, width, generator=draw, dtype=torch.float64)
    y = norm(x)
    scale = linear.scale(x, y)
    torch.testing.assert_close(scale * linear.directions(x) + linear.bias, y)
    assert linear.centres == (kind == "layer")
    # Additive over components, at the scale of their sum.
    torch.testing.assert_close(linear.directions(other) + linear.directions(x - other), linear.directions(x))


def test_what_is_no_norm_is_refused() -> None:
    with pytest.raises(InputError, match="Tanh is neither a LayerNorm nor an RMSNorm"):
        LinearNorm(torch.nn.Tanh(), 8)


def test_the_model_is_as_before_also_after_an_error(llama: Any, input_ids: torch.Tensor, outputs: Any) -> None:
    before = outputs(llama, input_ids)
    with pytest.raises(KeyError), linearised(llama):
        raise KeyError
    assert outputs(llama, input_ids).equal(before)
