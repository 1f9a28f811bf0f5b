"""Wanda and SparseGPT against what they are defined by, solved the slow way."""

import numpy as np
import pytest
import torch

from apportion.errors import InputError
from apportion.weights import BlockPattern, NofMPattern, Unstructured
from apportion.weights.calibration import InputStatistics
from apportion.weights.one_shot_method import Seen
from apportion.weights.sparsegpt import SparseGPT, inverse_factor
from apportion.weights.wanda import Magnitude, Wanda
from straightforward_pruning import least_squares, sparsegpt, wanda, wanda_groups


def layer(rows=12, width=16, tokens=60, seed=0):
    draws = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=draws) / 4 + torch.eye(width)
    inputs = (torch.randn(tokens, width, generator=draws) @ mixed * torch.rand(width, generator=draws)).float()
    return torch.randn(rows, width, generator=draws), inputs


def seen(inputs: torch.Tensor) -> Seen:
    statistics = InputStatistics(inputs.shape[1])
    statistics.add(inputs.unsqueeze(0), torch.ones(1, len(inputs)).bool())
    return Seen("the layer", statistics)


def error(weight, pruned, inputs):
    return float(((weight - pruned).double() @ inputs.double().T).square().sum())


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_wanda_is_the_straightforward_wanda(sparsity, seed):
    weight, inputs = layer(seed=seed)
    pruned = Wanda().prune(weight, seen(inputs), Unstructured(sparsity, "row"))
    expected = wanda(weight.double().numpy(), inputs.double().numpy(), sparsity)
    np.testing.assert_array_equal(pruned.weight.double().numpy(), expected)
    assert torch.equal(pruned.weight != 0, pruned.mask)


def test_wanda_in_groups_is_the_straightforward_wanda():
    weight, inputs = layer()
    pruned = Wanda().prune(weight, seen(inputs), NofMPattern(2, 4)).weight
    expected = wanda_groups(weight.double().numpy(), inputs.double().numpy(), 2, 4)
    np.testing.assert_array_equal(pruned.double().numpy(), expected)


def test_wanda_without_differences_between_inputs_is_magnitude_of_each_row():
    weight, _ = layer()
    inputs = torch.ones(4, 16)
    by_row = Unstructured(0.5, "row")
    own, plain = (each.prune(weight, seen(inputs), by_row).mask for each in (Wanda(), Magnitude()))
    assert torch.equal(own, plain)
    assert own.sum(dim=1).tolist() == [8] * 12


def test_wanda_does_not_mind_the_scale_of_inputs_and_follows_their_order():
    weight, inputs = layer()
    pattern = Unstructured(0.6, "row")
    mask = Wanda().prune(weight, seen(inputs), pattern).mask
    assert torch.equal(Wanda().prune(weight, seen(inputs * 7), pattern).mask, mask)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(Wanda().prune(weight[:, order], seen(inputs[:, order]), pattern).mask, mask[:, order])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", [16, 300])  # less than one and more than two blocks of 128 columns
def test_sparsegpt_is_elimination_in_float64(width, seed):
    weight, inputs = layer(width=width, tokens=2 * width, seed=seed)
    pruned = SparseGPT().prune(weight, seen(inputs), Unstructured(0.5, "row"))
    expected = sparsegpt(weight.double().numpy(), inputs.double().numpy(), 0.5)
    np.testing.assert_allclose(pruned.weight.numpy(), expected, rtol=1e-3, atol=1e-4)
    for start in range(0, width, 128):
        part = pruned.mask[:, start : start + 128]
        assert int(part.sum()) == round(0.5 * part.numel())


def test_where_only_the_first_columns_go_sparsegpt_is_the_closed_form_solution():
    """All that is left may still be moved then, so that nothing is given away: each row is its own optimum."""
    weight, inputs = layer()
    statistics = seen(inputs)
    # Blocks of one column, the first of which are far too small to stay.
    weight[:, :4] *= 1e-3
    pattern = BlockPattern(12, 1, 0.25)
    pruned = SparseGPT(damp=1e-9).prune(weight, statistics, pattern)
    assert not pruned.mask[:, :4].any()
    assert pruned.mask[:, 4:].all()
    moments = statistics.statistics.second_moment.numpy()
    expected = least_squares(weight.double().numpy(), moments, pruned.mask.numpy())
    np.testing.assert_allclose(pruned.weight.numpy(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5, "row"), NofMPattern(2, 4), NofMPattern(1, 8), BlockPattern(4, 4)]
)
def test_sparsegpt_is_between_the_optimum_and_the_bare_mask(pattern):
    weight, inputs = layer(seed=5)
    pruned = SparseGPT().prune(weight, seen(inputs), pattern)
    moments = (inputs.double().T @ inputs.double()).numpy()
    best = torch.from_numpy(least_squares(weight.double().numpy(), moments, pruned.mask.numpy()))
    ours = error(weight, pruned.weight, inputs)
    assert error(weight, best, inputs) <= ours * (1 + 1e-6)
    assert ours < error(weight, weight * pruned.mask, inputs)
    assert torch.equal(pruned.weight != 0, pruned.mask)


@pytest.mark.packaged
@pytest.mark.slow
def test_a_layer_of_smollm2_is_pruned_as_in_float64():
    """576 inputs that hang together as real ones do: the float32 columns end where float64 elimination does."""
    from apportion.models import load
    from apportion.models.block_walk import BlockWalk

    lm = load("smollm2")
    ids = torch.randint(0, 40_000, (6, 128), generator=torch.Generator().manual_seed(0))
    walk = BlockWalk(lm, ids, batch_size=6)
    while walk.place < 10:
        walk.advance()
    module, caught = walk.blocks[10].self_attn.o_proj, []
    hook = module.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    next(walk.outputs())
    hook.remove()
    inputs, weight = caught[0].flatten(0, 1), module.weight.detach()
    pattern = Unstructured(0.5, "row")
    bare = wanda(weight.double().numpy(), inputs.double().numpy(), 0.5)
    assert torch.equal(Wanda().prune(weight, seen(inputs), pattern).weight.double(), torch.from_numpy(bare))
    ours = SparseGPT().prune(weight, seen(inputs), pattern).weight
    theirs = torch.from_numpy(sparsegpt(weight.double().numpy(), inputs.double().numpy(), 0.5))
    assert float(((ours == 0) == (theirs == 0)).float().mean()) > 0.999
    assert error(weight, ours, inputs) == pytest.approx(error(weight, theirs, inputs), rel=1e-3)
    assert error(weight, ours, inputs) < 0.5 * error(weight, torch.from_numpy(bare), inputs)


def test_sparsegpt_changes_nothing_where_nothing_goes():
    weight, inputs = layer()
    pruned = SparseGPT().prune(weight, seen(inputs), Unstructured(0.0, "row"))
    torch.testing.assert_close(pruned.weight, weight)
    assert pruned.mask.all()


def test_sparsegpt_of_unrelated_inputs_is_magnitude_without_moves():
    weight, _ = layer()
    inputs = torch.eye(16) * 4
    pruned = SparseGPT(block=8).prune(weight, seen(inputs), Unstructured(0.5, "row"))
    torch.testing.assert_close(pruned.weight, weight * pruned.mask)
    for start in (0, 8):
        part = weight[:, start : start + 8]
        assert torch.equal(pruned.mask[:, start : start + 8], Unstructured(0.5, "layer").keep(part.abs()))


def test_sparsegpt_keeps_its_groups():
    weight, inputs = layer(width=160, tokens=400)
    mask = SparseGPT().prune(weight, seen(inputs), NofMPattern(2, 4)).mask
    assert (mask.view(12, 40, 4).sum(dim=2) == 2).all()


def test_too_few_tokens_and_dead_inputs_are_no_obstacle():
    weight, inputs = layer(tokens=5)
    inputs[:, 3] = 0
    pruned = SparseGPT().prune(weight, seen(inputs), Unstructured(0.5, "row"))
    assert torch.isfinite(pruned.weight).all()
    assert not pruned.mask[:, 3].any()
    with pytest.raises(InputError, match=r"the layer: .*damp=0.0: give a larger damp"):
        SparseGPT(damp=0.0).prune(weight, seen(inputs), Unstructured(0.5, "row"))


def test_the_factor_is_that_of_the_inverse():
    _, inputs = layer()
    moment = seen(inputs).statistics.second_moment
    factor, dead = inverse_factor(moment, 0.01)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(16)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped))
    assert torch.equal(factor, factor.triu())
    assert not dead.any()


@pytest.mark.parametrize(
    ("settings", "pattern", "named"),
    [
        ({"block": 10}, NofMPattern(2, 4), ("block=10", "multiple of 4", "such as 8")),
        ({"block": 128}, BlockPattern(3, 3), ("block=128", "multiple of 3", "such as 126")),
        ({}, NofMPattern(2, 4, "out"), ("along the inputs",)),
    ],
)
def test_patterns_that_columns_would_cut_are_refused(settings, pattern, named):
    weight, inputs = layer()
    with pytest.raises(InputError) as refused:
        SparseGPT(**settings).prune(weight, seen(inputs), pattern)
    assert all(each in str(refused.value) for each in named)


@pytest.mark.parametrize(("settings", "named"), [({"block": 0}, "block=0"), ({"damp": -1.0}, "damp=-1.0")])
def test_settings_that_cannot_be_are_refused(settings, named):
    with pytest.raises(InputError, match=named):
        SparseGPT(**settings)
