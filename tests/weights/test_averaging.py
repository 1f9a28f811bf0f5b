"""Averages of networks."""

import copy

import pytest
import torch
from torch import nn

from apportion.errors import InputError
from apportion.weights import Unstructured, add_masks, counts, masks_of, prunable, remove_masks
from apportion.weights.averaging import average, distances, greedy, repair_batch_norm
from apportion.weights.gradual_pruning import prune_by_magnitude
from apportion.weights.masks import masked_layers, zero_pruned
from soup_recipes import tiny


def varied(count: int, norm: bool = False, sparsity: float | None = 0.6) -> list[nn.Module]:
    """Networks with the masks of one, and weights of their own."""
    base = tiny(norm)
    if sparsity is not None:
        prune_by_magnitude(base, prunable(base), Unstructured(sparsity))
    made = []
    for seed in range(count):
        own = copy.deepcopy(base)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for each in own.parameters():
                each.add_(0.3 * torch.randn(each.shape, generator=generator))
        zero_pruned(own)
        made.append(own)
    return made


def weights_of(network: nn.Module) -> torch.Tensor:
    return torch.cat([each.detach().flatten() for each in network.parameters()])


def test_the_average_is_the_mean_and_exactly_as_sparse():
    candidates = varied(3)
    soup = average(candidates)
    torch.testing.assert_close(weights_of(soup), torch.stack([weights_of(each) for each in candidates]).mean(0))
    kept = {counts(each, prunable(each)).kept for each in [soup, *candidates]}
    assert kept == {round(0.4 * 72) + round(0.4 * 36)}
    assert all(torch.equal(mask, masks_of(candidates[0])[name]) for name, mask in masks_of(soup).items())


def test_one_alone_comes_back_bit_for_bit():
    candidates = varied(3)
    assert torch.equal(weights_of(average(candidates[:1])), weights_of(candidates[0]))
    assert torch.equal(weights_of(average(candidates, [0.0, 1.0, 0.0])), weights_of(candidates[1]))


def test_the_order_does_not_matter():
    candidates = varied(4)
    shares = [0.1, 0.2, 0.3, 0.4]
    turned = average(candidates[::-1], shares[::-1])
    torch.testing.assert_close(weights_of(average(candidates, shares)), weights_of(turned), rtol=1e-7, atol=1e-8)


def test_averaging_affine_networks_averages_what_they_say():
    candidates = [nn.Linear(5, 3) for _ in range(3)]
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    said = torch.stack([each(x) for each in candidates])
    torch.testing.assert_close(
        average(candidates, [0.5, 0.3, 0.2])(x), torch.einsum("c,cbo->bo", torch.tensor([0.5, 0.3, 0.2]), said)
    )


def test_a_shared_weight_is_averaged_once_and_stays_shared():
    def tied(seed: int) -> nn.Sequential:
        network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        network[1].weight = network[0].weight
        with torch.no_grad():
            network[0].weight.fill_(float(seed))
        return network

    soup = average([tied(1), tied(4)])
    assert soup[0].weight is soup[1].weight
    assert soup[0].weight[0, 0] == 2.5


def test_integers_stay_integers_and_inputs_stay_as_they_were():
    candidates = varied(2, norm=True)
    for count, each in enumerate(candidates):
        each[1].num_batches_tracked.fill_(3 + count)
    before = [weights_of(each).clone() for each in candidates]
    soup = average(candidates)
    assert soup[1].num_batches_tracked.dtype == torch.int64
    assert int(soup[1].num_batches_tracked) == 3
    assert all(torch.equal(weights_of(each), kept) for each, kept in zip(candidates, before, strict=True))


def test_masks_that_differ_are_refused_and_without_masks_the_average_is_denser():
    candidates = varied(2)
    turned = {name: mask.flip(0) for name, mask in masks_of(candidates[1]).items()}
    add_masks(candidates[1], turned)
    with torch.no_grad():
        for layer in masked_layers(candidates[1]):
            layer.parameter.fill_(1.0)
    with pytest.raises(InputError, match=r"mask differs in candidate 1 .*remove_masks"):
        average(candidates)
    for each in candidates:
        remove_masks(each)
    kept = counts(candidates[0], prunable(candidates[0])).kept
    soup = average(candidates)
    assert counts(soup, prunable(soup)).kept > kept


def test_greedy_never_falls_below_the_best():
    candidates = varied(5)
    target = weights_of(average(candidates, [0.0, 0.4, 0.0, 0.6, 0.0]))

    def score(network: nn.Module) -> float:
        return -float((weights_of(network) - target).norm())

    chosen, soup = greedy(candidates, score)
    assert sorted(chosen) == [1, 3]
    assert chosen[0] == 3
    assert score(soup) > max(score(each) for each in candidates)
    torch.testing.assert_close(weights_of(soup), weights_of(average([candidates[3], candidates[1]])))
    # What is as good is taken in; what is worse is not.
    assert len(greedy(candidates, lambda network: 0.0)[0]) == 5
    alone = weights_of(candidates[2])
    chosen, soup = greedy(candidates, lambda network: float(torch.equal(weights_of(network), alone)))
    assert chosen == [2]
    assert torch.equal(weights_of(soup), alone)


def test_batch_norms_get_the_statistics_of_the_data():
    network = varied(1, norm=True)[0]
    batches = [torch.randn(20, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    network[1].running_mean.fill_(7.0)
    network.eval()
    repair_batch_norm(network, batches)
    with torch.no_grad():
        seen = [network[0](each) for each in batches]
    torch.testing.assert_close(network[1].running_mean, torch.stack([each.mean(0) for each in seen]).mean(0))
    torch.testing.assert_close(network[1].running_var, torch.stack([each.var(0) for each in seen]).mean(0))
    assert int(network[1].num_batches_tracked) == 3
    assert not network.training
    assert network[1].momentum == 0.1


def test_without_batch_norms_nothing_is_asked_for():
    network = varied(1)[0]
    before = weights_of(network).clone()
    repair_batch_norm(network, None)
    assert torch.equal(weights_of(network), before)
    for nothing in (None, []):
        with pytest.raises(InputError, match="batch norms and there are no batches"):
            repair_batch_norm(tiny(norm=True), nothing)


def test_distances_are_from_the_middle():
    candidates = varied(2)
    assert distances([candidates[0], copy.deepcopy(candidates[0])]) == [0, 0]
    half = (weights_of(candidates[0]) - weights_of(candidates[1])).norm() / 2
    assert distances(candidates) == pytest.approx([float(half / weights_of(average(candidates)).norm())] * 2, rel=1e-5)


def broken(kind: str) -> list[nn.Module]:
    one, other = varied(2, sparsity=None)
    if kind == "shape":
        other[0] = nn.Linear(7, 12)
    elif kind == "dtype":
        other.double()
    elif kind == "keys":
        other[0] = nn.Linear(6, 12, bias=False)
    else:
        with torch.no_grad():
            other[0].weight[0, 0] = float("nan")
    return [one, other]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: average([]), "candidates is empty"),
        (lambda: greedy([], lambda network: 0.0), "candidates is empty"),
        (lambda: average(varied(2), [0.5, 0.6]), "sum to 1"),
        (lambda: average(varied(2), [1.0]), "give one each"),
        (lambda: average(varied(2), [float("nan"), 0.5]), "sum to 1"),
        (lambda: average(broken("shape")), r"\[12, 7\] in candidate 1"),
        (lambda: average(broken("dtype")), "float64"),
        (lambda: average(broken("keys")), r"only one of them has 0\.bias"),
        (lambda: average(broken("nan")), r"0\.weight of candidate 1 is not finite"),
    ],
)
def test_what_cannot_be_averaged_says_so(make, message):
    with pytest.raises(InputError, match=message):
        make()
