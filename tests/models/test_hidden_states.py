import pytest
import torch
from torch import nn

from apportion.errors import InputError
from apportion.models import Site, capture
from apportion.models.hidden_states import hidden_states, logits_of
from tiny_families import BUILDERS, CAUSAL, tiny_model

IDS = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", BUILDERS)
def test_they_are_what_blocks_leave_behind_and_the_last_is_normed(family):
    model = tiny_model(family)
    states = hidden_states(model, IDS)
    assert len(states) == 3
    sites = [Site(layer, "residual") for layer in range(3)]
    heard = capture(model, sites, IDS)
    for site, state in list(zip(sites, states, strict=True))[:-1]:
        assert torch.equal(heard[site], state)
    if family not in ("bert", "opt_350m"):  # which have no final norm
        assert not torch.allclose(heard[sites[-1]], states[-1])


@pytest.mark.parametrize("family", CAUSAL)
def test_logits_are_the_models_own(family):
    model = tiny_model(family)
    assert torch.allclose(logits_of(model, hidden_states(model, IDS)[-1]), model(input_ids=IDS).logits, atol=1e-5)


def test_gradients_flow_through_every_layer():
    model = BUILDERS["llama"]().train()
    sum(each.square().mean() for each in hidden_states(model, IDS)).backward()
    layers = [each for name, each in model.named_parameters() if ".layers." in name]
    assert all(float(each.grad.abs().sum()) > 0 for each in layers)


def test_a_model_without_hidden_states_or_head_is_refused():
    model = BUILDERS["llama"]()
    model.model.forward = lambda **_: type("Output", (), {"hidden_states": None})()
    with pytest.raises(InputError, match="no hidden states for 3 blocks"):
        hidden_states(model, IDS)
    with pytest.raises(InputError, match="has no head"):
        logits_of(tiny_model("bert"), torch.zeros(1, 32))
    with pytest.raises(InputError, match="has no head"):
        logits_of(nn.Linear(2, 2), torch.zeros(1, 2))
