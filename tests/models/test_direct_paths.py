"""What is read from the stream is the sum of the shares of all that was written, and of the biases: exactly."""

import pytest
import torch

from apportion.errors import InputError
from apportion.models import Site
from apportion.models.direct_paths import DirectPaths, Pullback
from biased_models import FAMILIES, biased_model, some_ids


@pytest.fixture(params=FAMILIES)
def paths(request: pytest.FixtureRequest) -> DirectPaths:
    return DirectPaths(biased_model(request.param), some_ids())


def summed(paths: DirectPaths, pullback: Pullback) -> float:
    shares = [(pullback.embeddings * paths.embeddings).sum()]
    shares += [(gradient * paths.heads[layer]).sum() for layer, gradient in pullback.heads.items()]
    shares += [(gradient * paths.mlps[layer]).sum() for layer, gradient in pullback.mlps.items()]
    return float(sum(shares)) + pullback.constant


def a_cotangent(like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("part", ["values", "queries", "keys"])
def test_what_attention_reads_is_a_sum_of_what_was_written(paths: DirectPaths, part: str) -> None:
    read = paths.attention(2, part)
    cotangent = a_cotangent(read)
    pullback = paths.through_attention(2, part, cotangent)
    assert summed(paths, pullback) == pytest.approx(float((read * cotangent).sum()), rel=1e-10)
    assert set(pullback.heads) == set(pullback.mlps) == {0, 1}, "a layer's own heads come after what it reads"
    gradient, constant = paths.to_stream(2, part, cotangent)
    assert float((gradient * paths.stream(2)).sum()) + constant == pytest.approx(
        float((read * cotangent).sum()), rel=1e-10
    )


@pytest.mark.parametrize("kind", ["residual", "attn_out", "mlp_in"])
def test_what_lies_in_the_stream_is_a_sum_of_what_was_written(paths: DirectPaths, kind: str) -> None:
    read = paths.activations(Site(1, kind))
    cotangent = a_cotangent(read)
    pullback = paths.through(Site(1, kind), cotangent)
    assert summed(paths, pullback) == pytest.approx(float((read * cotangent).sum()), rel=1e-10)


def test_a_reading_of_one_token_owes_to_that_token_alone(paths: DirectPaths) -> None:
    cotangent = torch.zeros_like(paths.attention(2, "values"))
    cotangent[1, 4] = 1
    pullback = paths.through_attention(2, "values", cotangent)
    for gradient in (pullback.embeddings, *pullback.heads.values(), *pullback.mlps.values()):
        assert gradient[[0, 1, 2, 3, 5, 6]].eq(0).all()


def test_it_is_the_model_that_was_taken_apart(paths: DirectPaths) -> None:
    model = paths._model
    with torch.no_grad():
        states = model(input_ids=paths.input_ids[None], output_hidden_states=True).hidden_states
    # transformers computes some norms and all rotary embeddings in float32.
    for layer in range(3):
        torch.testing.assert_close(paths.stream(layer), states[layer][0], rtol=1e-5, atol=1e-5)
        heads = paths.patterns[layer] @ paths.attention(layer, "values")
        torch.testing.assert_close(paths.heads[layer], heads.transpose(0, 1).flatten(1))


def test_the_constant_is_what_the_biases_say() -> None:
    """By hand for GPT-2: of the norm, by way of the value projection, and of what was added below."""
    model = biased_model("gpt2")
    paths = DirectPaths(model, some_ids())
    cotangent = torch.zeros_like(paths.attention(1, "values"))
    cotangent[:, 3] = a_cotangent(cotangent[:, 3])
    (below, block) = model.transformer.h[:2]
    values_of = block.attn.c_attn.weight[:, 64:]
    own = (block.ln_1.bias @ values_of + block.attn.c_attn.bias[64:]).reshape(4, 8)
    # The MLP's own bias is part of what the MLP wrote; the output projection's is nobody's.
    direction = (values_of.T.reshape(4, 8, 32) * cotangent[:, 3, :, None]).sum(dim=(0, 1)) * block.ln_1.weight
    x = paths.stream(1)[3]
    added = below.attn.c_proj.bias
    scale = 1 / (x.var(correction=0) + block.ln_1.eps).sqrt()
    expected = (own * cotangent[:, 3]).sum() + (added - added.mean()) @ direction * scale
    assert paths.through_attention(1, "values", cotangent).constant == pytest.approx(float(expected), rel=1e-8)
    assert paths.to_stream(1, "values", cotangent)[1] == pytest.approx(float((own * cotangent[:, 3]).sum()), rel=1e-8)


def test_the_model_is_left_as_it_was() -> None:
    model = biased_model("llama", torch.float32)
    ids = some_ids()[None]
    before, kind = model(input_ids=ids).logits, model.config._attn_implementation
    DirectPaths(model, ids[0])
    assert model(input_ids=ids).logits.equal(before)
    assert model.config._attn_implementation == kind


def test_what_is_not_linear_cannot_be_pulled_back() -> None:
    paths = DirectPaths(biased_model("llama"), some_ids())
    with pytest.raises(InputError, match=r"layers.1.mlp_out: what is there is not a linear function"):
        paths.through(Site(1, "mlp_out"), torch.zeros(7, 32))
    with pytest.raises(InputError, match="no tokens"):
        DirectPaths(biased_model("llama"), some_ids()[:0])
