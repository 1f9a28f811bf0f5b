"""Monarch layers in whole models: what is replaced, what stays the same, and what an optimiser knows afterwards."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.weights.monarch import MonarchLinear, projection_error
from apportion.weights.monarch_models import densify, replace_linears
from apportion.weights.monarch_shape import MonarchShape
from tiny_families import tiny_model


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 22), nn.GELU(), nn.Linear(22, 10), nn.Linear(10, 5, bias=False))


def _input() -> Tensor:
    return torch.randn(6, 13, generator=torch.Generator().manual_seed(1))


def test_layers_are_projected_in_place_with_their_errors() -> None:
    network = _network()
    last, bias = network[3], network[0].bias.detach().clone()
    errors = [
        projection_error(network[i].weight, MonarchShape.of(*network[i].weight.shape[::-1], nblocks=2)) for i in (0, 2)
    ]
    found = replace_linears(network, ["0", "2"], nblocks=2)
    assert [each.name for each in found] == ["0", "2"]
    assert isinstance(network[0], MonarchLinear)
    assert network[3] is last
    assert torch.equal(network[0].bias, bias)
    # The dense weights are gone: relative errors times their norms.
    norms = [each.detach().norm() for each in (_network()[0].weight, _network()[2].weight)]
    for replaced, error, norm in zip(found, errors, norms, strict=True):
        assert replaced.error == pytest.approx(error / float(norm), rel=1e-5)
        assert replaced.parameters == network[int(replaced.name)].shape.parameters
    assert [each.dense_parameters for each in found] == [13 * 22, 22 * 10]


def test_full_rank_changes_nothing_that_the_network_says() -> None:
    network, x = _network(), _input()
    before = network(x)
    replace_linears(network, nblocks=1)
    torch.testing.assert_close(network(x), before)


def test_layers_drawn_anew_keep_nothing() -> None:
    network = _network().eval().requires_grad_(False)
    found = replace_linears(network, ["0"], project=False, match_linear=True)
    assert found[0].error is None
    assert (network[0].match_linear, network[0].first.requires_grad, network[0].training) == (True, False, False)


def test_a_transformers_model_takes_them_and_gives_the_same_after_densify() -> None:
    model = copy.deepcopy(tiny_model("llama")).eval()
    tokens = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(tokens).logits
        found = replace_linears(model, ["*.mlp.*"])
        monarch = model(tokens).logits
        names = densify(model)
        densified = model(tokens).logits
    assert len(found) == 9
    assert names == [each.name for each in found]
    assert not torch.allclose(dense, monarch, atol=1e-2)
    torch.testing.assert_close(densified, monarch, atol=1e-5, rtol=1e-5)


def test_gpt2s_transposed_layers_are_replaced_too() -> None:
    model = copy.deepcopy(tiny_model("gpt2")).eval()
    tokens = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens).logits
        found = replace_linears(model, ["*.mlp.*"], nblocks=1)
        torch.testing.assert_close(model(tokens).logits, before, atol=1e-4, rtol=1e-4)
        assert len(densify(model)) == len(found) == 6
        torch.testing.assert_close(model(tokens).logits, before, atol=1e-4, rtol=1e-4)


def test_weights_come_back_from_a_state_dict() -> None:
    network, other, x = _network(), _network(), _input()
    replace_linears(network, ["0"])
    replace_linears(other, ["0"], project=False)
    other.load_state_dict(network.state_dict())
    torch.testing.assert_close(other(x), network(x))


def test_a_layer_in_two_places_stays_one_layer() -> None:
    shared = nn.Linear(8, 8)
    network = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(8, 8))})
    replace_linears(network, where=lambda name, module: name == "a")
    assert isinstance(network["a"], MonarchLinear)
    assert network["b"][0] is network["a"]
    densify(network)
    assert type(network["a"]) is nn.Linear
    assert network["b"][0] is network["a"]


def _stepped(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        network(_input() + step).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("named", [False, True])
def test_densify_hands_the_optimiser_on(named: bool) -> None:
    network, x = _network(), _input()
    replace_linears(network, ["[02]"], project=False)

    def given(module: nn.Module) -> Any:
        return list(module.named_parameters() if named else module.parameters())

    groups = [{"params": given(network[i]), "lr": rate} for i, rate in ((0, 0.1), (2, 0.01), (3, 0.001))]
    optimizer = torch.optim.Adam(groups)
    _stepped(network, optimizer, 3)
    old, bias = network[0], network[0].bias
    before = network(x)
    assert densify(network, optimizer) == ["0", "2"]
    torch.testing.assert_close(network(x), before, atol=1e-5, rtol=1e-5)

    assert network[0].bias is bias
    assert optimizer.state[bias]["step"] == 3, "biases go on as they were"
    assert optimizer.state[network[3].weight]["step"] == 3
    assert not {old.first, old.second} & set(optimizer.state)
    assert network[0].weight not in optimizer.state, "a dense weight starts without moments"
    assert [group["params"][0] for group in optimizer.param_groups] == [network[i].weight for i in (0, 2, 3)]
    if named:
        assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]

    weight = network[0].weight.detach().clone()
    _stepped(network, optimizer, 1)
    moved = (network[0].weight.detach() - weight).abs()
    # Adam's first step is as long as its learning rate: the dense weight is in the first factor's group.
    assert float(moved.max()) == pytest.approx(0.1, rel=1e-3)
    assert optimizer.state[network[0].weight]["step"] == 1
    optimizer.load_state_dict(optimizer.state_dict())


def test_densify_leaves_other_optimisers_alone() -> None:
    network = _network()
    replace_linears(network, ["0"])
    network[0].requires_grad_(False)
    optimizer = torch.optim.SGD(network[2].parameters(), lr=0.1)
    densify(network, optimizer)
    assert not network[0].weight.requires_grad
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_tied_weights_are_refused_and_nothing_changes() -> None:
    network = _Tied()
    with pytest.raises(InputError, match="head shares its weight with the embedding"):
        replace_linears(network)
    assert type(network.inner) is nn.Linear
    assert [each.name for each in replace_linears(network, exclude=["head"])] == ["inner"]
    twins = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    twins[1].weight = twins[0].weight
    with pytest.raises(InputError, match=r"layer 0: its weight is also that of 1; .* \(exclude\)"):
        replace_linears(twins)


def test_attention_of_torch_is_left_alone() -> None:
    network = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "after": nn.Linear(8, 8)})
    assert [each.name for each in replace_linears(network)] == ["after"]


def test_bad_input_has_one_clear_message_each() -> None:
    network = _network()
    with pytest.raises(InputError, match=r"no linear .* include=\['mlp'\].* such as 0, 2, 3"):
        replace_linears(network, ["mlp"])
    with pytest.raises(InputError, match="layer 3: nblocks=8 is more than"):
        replace_linears(network, nblocks=8)
    assert type(network[0]) is nn.Linear, "all of them or none"
    with pytest.raises(InputError, match=r"network is a linear layer itself.*from_linear"):
        replace_linears(nn.Linear(8, 8))
    with pytest.raises(InputError, match=r"network \(Sequential\) has no MonarchLinear"):
        densify(network)
    with pytest.raises(InputError, match="network is a MonarchLinear itself"):
        densify(MonarchLinear(8, 8))
