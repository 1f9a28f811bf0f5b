"""Gradients at sites are those of an unhooked model, and those that differences say, at all sites of one pass."""

import contextlib
import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.models import (
    LanguageModel,
    Site,
    capture,
    capture_with_gradients,
    capture_with_loss_gradients,
    load,
    splice,
)
from apportion.models.linear import linearised

KINDS = ("residual", "mlp_out", "mlp_in", "attn_out", "heads")
EVERYWHERE = [Site(None, "embeddings"), *(Site(layer, kind) for layer in (0, 2) for kind in KINDS)]


def weigh(logits: Tensor) -> Tensor:
    """Some number that depends on every logit."""
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape)).sin().sum()


def losses_by_hand(model: Any, input_ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
    logits = model(input_ids=input_ids, attention_mask=mask).logits
    targets = input_ids[:, 1:] if labels is None else labels[:, :-1]
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


@pytest.fixture
def precise(model: Any) -> Any:
    return copy.deepcopy(model).double()


def test_all_sites_of_one_pass_have_the_gradient_that_differences_say(precise: Any, input_ids: Tensor) -> None:
    found = capture_with_gradients(precise, EVERYWHERE, input_ids, weigh)
    # RMSNorm computes in float32 in every dtype, which shows in small differences.
    exact = not any("RMSNorm" in type(each).__name__ for each in precise.modules())
    step, tolerance = (1e-5, 1e-6) if exact else (3e-3, 2e-2)
    for site, (activations, gradient) in found.items():
        draw = torch.Generator().manual_seed(3)
        # Along the gradient and a random direction, so that the expected number is not small by chance.
        direction = torch.randn(activations.shape, generator=draw, dtype=torch.float64)
        direction = direction / direction.norm() + gradient / gradient.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad(), splice(precise, site, lambda x, s=sign, d=direction: x + s * step * d):
                out = precise(input_ids=input_ids)
                values.append(weigh(out.logits if hasattr(out, "logits") else out.last_hidden_state))
        expected = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=tolerance, atol=0)


def test_gradients_are_those_of_an_unhooked_model(causal_model: Any, input_ids: Tensor) -> None:
    embedded = causal_model.get_input_embeddings()(input_ids).detach().requires_grad_()
    out = causal_model(inputs_embeds=embedded, output_hidden_states=True)
    states = out.hidden_states[:-1]  # the last one is normed
    expected = torch.autograd.grad(weigh(out.logits), states)
    sites = [Site(None, "embeddings"), Site(0, "residual"), Site(1, "residual")]
    found = capture_with_gradients(causal_model, sites, input_ids, weigh)
    for (x, gradient), state, wanted in zip(found.values(), states, expected, strict=True):
        torch.testing.assert_close(x, state.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_a_site_alone_and_in_company_has_the_same_gradient(causal_model: Any, input_ids: Tensor) -> None:
    together = capture_with_gradients(causal_model, EVERYWHERE, input_ids, weigh)
    for site in EVERYWHERE:
        (x, gradient) = capture_with_gradients(causal_model, [site], input_ids, weigh)[site]
        assert x.equal(capture(causal_model, [site], input_ids)[site])
        torch.testing.assert_close(gradient, together[site][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_loss_gradients_are_those_of_the_sum_of_losses(
    causal_model: Any, input_ids: Tensor, attention_mask: Tensor, padding: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Five tokens' logits at a time.
    monkeypatch.setattr("apportion.models.gradients.LOGITS_AT_ONCE", 5 * 97)
    mask = None if padding is None else attention_mask if padding == "right" else attention_mask.flip(1)
    site = Site(1, "residual")
    found = capture_with_loss_gradients(causal_model, [site], input_ids, mask)[site]
    states: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        states.append(x.detach().requires_grad_())
        return states[0]

    with splice(causal_model, site, leaf):
        losses = losses_by_hand(causal_model, input_ids, mask)
    counted = torch.ones_like(losses) if mask is None else (mask[:, 1:] & mask[:, :-1]).float()
    (expected,) = torch.autograd.grad((losses * counted).sum(), states[0])
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-6)
    if mask is not None:
        assert found[1][mask == 0].eq(0).all()
    # The last token has nothing to predict.
    assert found[1][0, -1].eq(0).all()
    assert found[1][0, :-1].ne(0).any(-1).all()


def test_sampled_targets_follow_the_models_distribution(llama: Any) -> None:
    """On average over draws the score is 0: the expected gradient of the loss under the model's own distribution."""
    one = torch.tensor([[5, 9, 3, 11]])
    site = Site(2, "residual")
    many = one.expand(4000, 4)
    _, gradients = capture_with_loss_gradients(llama, [site], many, target="sampled", seed=1)[site]
    assert gradients.mean(0).norm() < 0.1 * gradients.norm(dim=-1).mean()
    _, labelled = capture_with_loss_gradients(llama, [site], many)[site]
    assert labelled.mean(0).norm() > 0.5 * labelled.norm(dim=-1).mean()
    # The last position has a target of its own.
    assert gradients[:, -1].norm(dim=-1).min() > 0


def test_a_draw_is_a_function_of_its_seed(llama: Any, input_ids: Tensor) -> None:
    def drawn(seed: Any) -> Tensor:
        site = Site(1, "residual")
        return capture_with_loss_gradients(llama, [site], input_ids, target="sampled", seed=seed)[site][1]

    assert drawn((3, 7)).equal(drawn((3, 7)))
    assert not drawn((3, 7)).equal(drawn((3, 8)))


def test_weights_get_no_gradient_and_want_what_they_wanted(input_ids: Tensor) -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=97)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    with contextlib.suppress(ZeroDivisionError):
        capture_with_gradients(model, [Site(0, "residual")], input_ids, lambda logits: 1 / 0)  # type: ignore[arg-type]
    with torch.no_grad():
        ((_, gradient),) = capture_with_gradients(model, [Site(0, "residual")], input_ids, weigh).values()
    assert gradient.ne(0).any()
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_frozen_stays_frozen(llama: Any, input_ids: Tensor) -> None:
    """Under `linearised` the gradient is that of the linear map, and what an MLP writes still has one."""
    sites = [Site(0, "residual"), Site(2, "mlp_out")]
    with linearised(llama):
        found = capture_with_gradients(llama, sites, input_ids, lambda logits: logits[0, 5, 7])
    plain = capture_with_gradients(llama, sites, input_ids, lambda logits: logits[0, 5, 7])
    assert found[sites[1]][1][0, 5].ne(0).any()
    assert found[sites[1]][1][0, :5].eq(0).all()
    assert not found[sites[0]][1].allclose(plain[sites[0]][1])


def test_what_has_no_gradient_says_so(llama: Any, bert: Any, input_ids: Tensor) -> None:
    site = Site(1, "residual")
    with pytest.raises(InputError, match=r"objective gives shape \(2, 7, 97\): it must give one number"):
        capture_with_gradients(llama, [site], input_ids, lambda logits: logits)
    with pytest.raises(InputError, match=r"does not depend on layers\.1\.residual"):
        capture_with_gradients(llama, [site], input_ids, lambda logits: torch.zeros(()))
    with pytest.raises(InputError, match="sites is empty"):
        capture_with_gradients(llama, [], input_ids, weigh)
    with pytest.raises(InputError, match="target is 'truth': choose one of label, sampled"):
        capture_with_loss_gradients(llama, [site], input_ids, target="truth")
    with pytest.raises(InputError, match="does not predict the next token"):
        capture_with_loss_gradients(bert, [site], input_ids)
    training = copy.deepcopy(llama).train()
    with pytest.raises(InputError, match="is in training mode"):
        capture_with_gradients(training, [site], input_ids, weigh)


@pytest.mark.packaged
def test_gradients_of_smollm2_are_those_of_an_unhooked_model() -> None:
    lm = load("smollm2")
    input_ids = lm.tokenizer("The harbour was quiet, and the boats", return_tensors="pt")["input_ids"]
    embedded = lm.model.get_input_embeddings()(input_ids).detach().requires_grad_()
    out = lm.model(inputs_embeds=embedded, output_hidden_states=True)
    loss = nn.functional.cross_entropy(out.logits[0, :-1], input_ids[0, 1:], reduction="sum")
    layers = (0, 14, 25)
    expected = torch.autograd.grad(loss, [out.hidden_states[layer + 1] for layer in layers])
    sites = [Site(layer, "residual") for layer in layers]
    found = capture_with_loss_gradients(lm, sites, input_ids)
    assert isinstance(lm, LanguageModel)
    for site, wanted in zip(sites, expected, strict=True):
        assert (found[site][1] - wanted).norm() < 1e-4 * wanted.norm()
