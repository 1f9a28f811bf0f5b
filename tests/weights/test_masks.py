import copy

import pytest
import torch
from torch import nn

from apportion.errors import InputError
from apportion.training import Hook, TrainingSettings
from apportion.weights import (
    Unstructured,
    add_masks,
    choose_masks,
    counts,
    keep_masks,
    masks_from_zeros,
    masks_of,
    prunable,
    remove_masks,
    train_masked,
)
from apportion.weights.masks import mask_gradients, masked_layers, straight_through, zero_pruned


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def halved(net: nn.Module, sparsity: float = 0.5) -> dict[str, torch.Tensor]:
    masks = choose_masks({each.name: each.matrix().detach().abs() for each in prunable(net)}, Unstructured(sparsity))
    add_masks(net, masks)
    return masks


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)


def squared(module, pair, step):
    x, y = pair
    return (module(x) - y).square().mean(), {}


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.05),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.05, weight_decay=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 0.01, momentum=0.9, centered=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_pruned_weights_stay_exactly_zero_and_leave_nothing_behind(kind):
    net = network()
    optimizer = OPTIMIZERS[kind](list(net.parameters()))
    for step in range(5):  # momentum that would go on pushing
        squared(net, batch(step), step)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    masks = halved(net)
    # Registering masks keeps the parameters, so the optimiser goes on with them.
    assert {id(layer.parameter) for layer in masked_layers(net)} <= set(names)
    keep_masks(optimizer, net)
    for step in range(50):
        optimizer.zero_grad()
        squared(net, batch(step), step)[0].backward()
        optimizer.step()
    for layer in masked_layers(net):
        pruned = ~masks[layer.name]
        assert bool((layer.parameter[pruned] == 0).all())
        states = [each for each in optimizer.state[layer.parameter].values() if each.shape == layer.parameter.shape]
        assert states
        assert all(bool((each[pruned] == 0).all()) for each in states)
        assert all(bool((each[~pruned] != 0).any()) for each in states)


def test_frozen_weights_keep_their_value_and_can_come_back():
    net = network()
    before = net[0].weight.detach().clone()
    masks = halved(net)
    optimizer = OPTIMIZERS["adamw"](list(net.parameters()))
    keep_masks(optimizer, net, "frozen")
    for step in range(5):
        optimizer.zero_grad()
        squared(net, batch(step), step)[0].backward()
        optimizer.step()
    pruned = ~masks["0"]
    assert torch.equal(masked_layers(net)[0].parameter[pruned], before[pruned])
    assert int(net[0].weight[pruned].count_nonzero()) == 0
    add_masks(net, {"0": torch.ones(8, 6, dtype=torch.bool)})
    assert torch.equal(net[0].weight[pruned], before[pruned])


def test_gradients_reach_pruned_weights_only_if_asked_to():
    net, other = network(), network()
    masks = halved(net)
    add_masks(other, masks, dense_gradient=True)
    for each in (net, other):
        squared(each, batch(0), 0)[0].backward()
    plain, dense = (masked_layers(each)[0].parameter.grad for each in (net, other))
    assert bool((plain[~masks["0"]] == 0).all())
    # Brute force: the gradient of a plain layer that holds the same masked weight.
    reference = network()
    remove_masks(net)
    reference.load_state_dict(net.state_dict())
    squared(reference, batch(0), 0)[0].backward()
    torch.testing.assert_close(dense, reference[0].weight.grad)
    mask_gradients(other)
    torch.testing.assert_close(masked_layers(other)[0].parameter.grad, plain)


def test_removed_masks_leave_plain_weights_and_the_same_function():
    net = network()
    halved(net, 0.7)
    x = batch(0)[0]
    before = net(x)
    remove_masks(net)
    assert type(net[0]) is nn.Linear
    assert sorted(net.state_dict()) == sorted(network().state_dict())
    assert torch.equal(net(x), before)
    assert counts(net, prunable(net)).kept == round(0.3 * 48) + round(0.3 * 24)


def test_infinite_pruned_weights_do_no_harm():
    net = network()
    masks = halved(net)
    with torch.no_grad():
        masked_layers(net)[0].parameter[~masks["0"]] = float("inf")
    assert bool(net(batch(0)[0]).isfinite().all())


def test_masks_are_found_again_from_zeros():
    net = network()
    masks = halved(net, 0.5)
    remove_masks(net)
    found = masks_from_zeros(net, prunable(net))
    assert all(torch.equal(found[name], masks[name]) for name in masks)
    assert masks_of(net).keys() == masks.keys()


@pytest.mark.parametrize(("zeros", "masked"), [(9, False), (10, True)])
def test_a_tenth_of_zeros_makes_a_mask(zeros, masked):
    net = nn.Sequential(nn.Linear(10, 10))
    with torch.no_grad():
        net[0].weight.fill_(1).view(-1)[:zeros] = 0
    assert bool(masks_from_zeros(net, prunable(net))) is masked
    assert bool(masks_of(net)) is masked


def test_counts_are_of_prunable_weights_and_of_all():
    net = network()
    halved(net, 0.5)
    found = counts(net, prunable(net))
    assert (found.kept, found.prunable, found.parameters) == (36, 72, 83)
    assert found.sparsity == 0.5
    assert found.sparsity_of_all == 36 / 83


def test_the_straight_through_gradient_is_dense_but_for_the_pull():
    generator = torch.Generator().manual_seed(0)
    raw, upstream = (torch.randn(4, 6, generator=generator) for _ in range(2))
    raw.requires_grad_()
    mask = raw.detach() > 0
    for share, pull in ((0.0, 0.0), (0.3, 0.0), (0.0, 0.5), (0.3, 0.5)):
        weight = straight_through(raw, mask, share, pull)
        assert torch.equal(weight, torch.where(mask, raw, share * raw))
        (gradient,) = torch.autograd.grad(weight, raw, upstream)
        assert torch.equal(gradient, upstream + pull * torch.where(mask, 0, raw.detach()))


class Recorder(Hook):
    def __init__(self):
        self.seen = []

    def before_step(self, module, step, /):
        layer = masked_layers(module)[0]
        self.seen.append(float(layer.parameter.grad[~masks_of(module)[layer.name]].abs().sum()))


def test_training_holds_masks_and_clips_by_gradients_that_are_used():
    net = network()
    masks = halved(net)
    add_masks(net, masks, dense_gradient=True)
    recorder = Recorder()
    settings = TrainingSettings(steps=8, learning_rate=0.01, log_every=1)
    result = train_masked(net, squared, batch, settings, hooks=[recorder], progress=False)
    assert min(recorder.seen) > 0  # hooks see the dense gradient
    plain = network()
    add_masks(plain, masks)
    same = train_masked(plain, squared, batch, settings, progress=False)
    # The logged norm does not count gradients of pruned weights, so both runs are one.
    assert [each["gradient_norm"] for each in result.history] == [each["gradient_norm"] for each in same.history]
    assert bool((net[0].weight[~masks["0"]] == 0).all())


def test_a_killed_run_goes_on_with_its_masks(tmp_path):
    settings = TrainingSettings(steps=10, learning_rate=0.01, checkpoint_every=4)
    whole, parts = network(), network()
    halved(whole)
    halved(parts)
    train_masked(whole, squared, batch, settings, progress=False)
    train_masked(parts, squared, batch, settings, tmp_path, progress=False, stop_after=4)
    again = network(seed=1)
    add_masks(again, {name: torch.ones_like(mask) for name, mask in masks_of(parts).items()})
    train_masked(again, squared, batch, settings, tmp_path, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(mask, masks_of(again)[name]) for name, mask in masks_of(whole).items())


def test_a_network_with_masks_can_be_copied():
    net = network()
    halved(net)
    twin = copy.deepcopy(net)
    zero_pruned(twin)
    x = batch(0)[0]
    assert torch.equal(net(x), twin(x))
    assert float(masked_layers(net)[0].parameter.count_nonzero()) == 48
    before = net(x)
    remove_masks(twin)
    assert type(twin[0]) is nn.Linear
    assert torch.equal(net(x), before), "the other still has its masks"
    remove_masks(net)
    assert torch.equal(net(x), before)


def test_taking_masks_off_a_copy_leaves_the_other_alone():
    net = network()
    masks = halved(net)
    twin = copy.deepcopy(net)
    remove_masks(twin)
    assert type(twin[0]) is nn.Linear
    assert masks_of(net).keys() == masks.keys()
    assert torch.equal(net[0].weight, twin[0].weight)


@pytest.mark.parametrize(
    ("masks", "message"),
    [({"9": torch.ones(2, 2, dtype=torch.bool)}, "no layer '9'"), ({"0": torch.ones(2, 2, dtype=torch.bool)}, "shape")],
)
def test_masks_that_fit_nothing_are_refused(masks, message):
    with pytest.raises(InputError, match=message):
        add_masks(network(), masks)
