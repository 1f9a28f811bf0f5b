import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from apportion.errors import InputError
from apportion.training import TrainingSettings, train
from apportion.weights import NofMPattern, prunable
from apportion.weights.masks import add_masks
from apportion.weights.progressive_gradient_flow import (
    ProgressiveGradientFlow,
    ScheduledWeight,
    decay_frac_of,
    finish,
)

TWO_OF_FOUR = NofMPattern(2, 4)
STEPS = 20


def network(seed: int = 0, width: int = 8) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 8, generator=generator), torch.randn(16, 3, generator=generator)


def squared(module, pair, step):
    x, y = pair
    return (module(x) - y).square().mean(), {}


def is_n_of_m(weight: torch.Tensor, n: int, m: int) -> bool:
    return int((weight != 0).reshape(-1, m).sum(dim=1).max()) <= n


def started(flow: ProgressiveGradientFlow, step: int = 0, steps: int = STEPS) -> tuple[nn.Sequential, nn.Linear]:
    net = network()
    flow.start(net, prunable(net)[:1], steps)
    net[0].parametrizations.weight[0].step.fill_(step)
    return net, net[0]


def gradient_of(weight: torch.Tensor, raw: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(weight, raw, upstream)[0]


def test_at_the_beginning_of_a_decay_the_forward_pass_is_dense_and_at_its_end_binary():
    for recipe in ("linear", "exponential"):
        flow = ProgressiveGradientFlow(TWO_OF_FOUR, recipe, decay_frac=0.5, fine_tune_fraction=0.1)
        net, layer = started(flow)
        raw = layer.parametrizations.weight.original
        assert torch.equal(layer.weight, raw)
        layer.parametrizations.weight[0].step.fill_(18)
        mask = TWO_OF_FOUR.keep(raw.detach().abs())
        assert torch.equal(layer.weight, torch.where(mask, raw, 0))
        assert torch.equal(net(batch(0)[0]), net.eval()(batch(0)[0]))


def test_in_the_middle_pruned_weights_are_a_share_of_themselves():
    _, layer = started(ProgressiveGradientFlow(TWO_OF_FOUR, "linear", decay_frac=0.5), step=4)
    raw = layer.parametrizations.weight.original
    mask = TWO_OF_FOUR.keep(raw.detach().abs())
    torch.testing.assert_close(layer.weight, raw * torch.where(mask, 1.0, 0.6))
    flow = ProgressiveGradientFlow(TWO_OF_FOUR, "exponential", decay_frac=0.5)
    assert flow.share_at(10, STEPS) == pytest.approx(torch.tensor(-10.0).exp().item())


def test_the_masked_gradient_is_the_chain_rules():
    flow = ProgressiveGradientFlow(TWO_OF_FOUR, "linear", gradient="masked", decay_frac=1.0)
    net, layer = started(flow, step=12)
    net.double()
    made = layer.parametrizations.weight[0]
    raw = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    made._layer = prunable(nn.Sequential(nn.Linear(8, 2).double()))[0]
    made.mask = torch.zeros(2, 8, dtype=torch.bool)
    assert torch.autograd.gradcheck(made, (raw,))
    mask = TWO_OF_FOUR.keep(raw.detach().abs())
    upstream = torch.randn(2, 8, dtype=torch.float64)
    torch.testing.assert_close(gradient_of(made(raw), raw, upstream), upstream * torch.where(mask, 1.0, 0.4))


@pytest.mark.parametrize("recipe", ["ste", "linear", "exponential", "stepwise"])
def test_the_straight_through_gradient_is_a_dense_layers(recipe):
    _, layer = started(ProgressiveGradientFlow(TWO_OF_FOUR, recipe), step=7)
    upstream = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(gradient_of(layer.weight, layer.parametrizations.weight.original, upstream), upstream)


def test_sr_ste_adds_a_pull_to_pruned_weights_and_nothing_else():
    upstream = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    for pull in (0.0, 2e-4, 0.5):
        _, layer = started(ProgressiveGradientFlow(TWO_OF_FOUR, "sr_ste", pull=pull, dense_fraction=0.2), step=4)
        raw = layer.parametrizations.weight.original
        mask = TWO_OF_FOUR.keep(raw.detach().abs())
        expected = upstream + pull * torch.where(mask, 0, raw.detach())
        assert torch.equal(gradient_of(layer.weight, raw, upstream), expected)
        layer.parametrizations.weight[0].step.fill_(3)  # dense still
        assert torch.equal(gradient_of(layer.weight, raw, upstream), upstream)


def test_geometric_slices_keep_the_density_and_stepwise_ones_halve_it():
    geometric = ProgressiveGradientFlow(NofMPattern(1, 4), "geometric").patterns()
    assert [str(each) for each in geometric] == ["8:32", "4:16", "2:8", "1:4"]
    assert {each.density for each in geometric} == {0.25}
    stepwise = ProgressiveGradientFlow(NofMPattern(1, 16), "stepwise").patterns()
    assert [str(each) for each in stepwise] == ["15:16", "8:16", "4:16", "2:16", "1:16"]
    assert [str(each) for each in ProgressiveGradientFlow(TWO_OF_FOUR, "stepwise").patterns()] == ["3:4", "2:4"]


@pytest.mark.parametrize("recipe", ["stepwise", "geometric"])
def test_every_schedule_ends_with_the_pattern_whatever_its_length(recipe):
    for steps, dense, fine in itertools.product((1, 2, 3, 7, 10, 23, 100), (0.0, 0.3, 1.0), (0.0, 0.2)):
        if dense + fine > 1:
            continue
        flow = ProgressiveGradientFlow(
            NofMPattern(1, 16), recipe, dense_fraction=dense, fine_tune_fraction=fine, gradient="masked"
        )
        taken = [flow.pattern_at(step, steps) for step in range(steps + 1)]
        start, end = flow.phases(steps)
        assert taken[-1] == flow.pattern
        if end > start:
            assert taken[end - 1] == flow.pattern
        places = [flow.patterns().index(each) for each in taken]
        assert places == sorted(places)
        counts = [taken[start:end].count(each) for each in flow.patterns()]
        if end - start >= len(counts):
            assert min(counts) >= (end - start) // len(counts)


@pytest.mark.parametrize("recipe", ["ste", "sr_ste", "linear", "exponential", "stepwise", "geometric"])
def test_evaluation_and_export_are_binary_at_every_step(recipe):
    flow = ProgressiveGradientFlow(NofMPattern(1, 4), recipe, dense_fraction=0.5)
    net = network(width=32)
    flow.start(net, prunable(net)[:1], STEPS)
    raw = net[0].parametrizations.weight.original.detach().clone()
    assert torch.equal(net[0].weight, raw)  # dense while it is trained
    net.eval()
    kept = NofMPattern(1, 4).keep(raw.abs())
    assert torch.equal(net[0].weight, torch.where(kept, raw, 0))
    x = torch.randn(5, 32)
    before = net(x)
    net.train()
    finish(net)
    assert type(net[0]) is nn.Linear
    assert torch.equal(net[0].weight, torch.where(kept, raw, 0))
    assert torch.equal(net(x), before)
    assert sorted(net.state_dict()) == sorted(network().state_dict())


def trained(flow, steps=STEPS, seed=0, folder=None, stop_after=None, **settings):
    net = network(seed)
    hook = flow.start(net, prunable(net)[:1], steps)
    chosen = TrainingSettings(steps=steps, learning_rate=0.02, log_every=1, checkpoint_every=5, **settings)
    return net, train(net, squared, batch, chosen, folder, hooks=[hook], progress=False, stop_after=stop_after)


def test_training_moves_from_step_to_step_and_ends_n_of_m():
    flow = ProgressiveGradientFlow(TWO_OF_FOUR, "linear", decay_frac=1.0, dense_fraction=0.2, fine_tune_fraction=0.2)
    net, result = trained(flow)
    shares = [each["used_share"] for each in result.history]
    assert shares == [flow.share_at(step, STEPS) for step in range(STEPS)]
    assert shares[3:6] == [1.0, 1.0, pytest.approx(11 / 12)]
    assert shares[-4:] == [0.0] * 4
    assert int(net[0].parametrizations.weight[0].step) == STEPS
    finish(net)
    assert is_n_of_m(net[0].weight, 2, 4)
    assert not is_n_of_m(net[2].weight, 2, 4)


def test_what_the_hook_says_of_a_step_is_what_happened():
    flow = ProgressiveGradientFlow(TWO_OF_FOUR, "ste")
    net = network()
    hook = flow.start(net, prunable(net)[:1], 3)
    held = net[0].parametrizations.weight[0]
    before = held.mask.clone()
    with torch.no_grad():
        net[0].parametrizations.weight.original[0, :4] = torch.tensor([4.0, 3.0, 0.0, 0.1])
        before[0, :4] = torch.tensor([False, False, True, True])
        held.mask.copy_(before)
    squared(net, batch(0), 0)[0].backward()
    hook.before_step(net, 0)
    metrics: dict = {}
    hook.after_step(net, 0, metrics)
    assert float(metrics["flip_rate"]) == pytest.approx(4 / 64)
    square = net[0].parametrizations.weight.original.grad.square()
    assert float(metrics["second_moment_pruned"]) == pytest.approx(float(square[~held.mask].mean()), rel=1e-3)
    assert float(metrics["second_moment_kept"]) == pytest.approx(float(square[held.mask].mean()), rel=1e-3)
    hook.after_step(net, 1, metrics)
    assert float(metrics["flip_rate"]) == 0


def test_frozen_masks_stay_through_the_fine_tune_phase():
    flow = ProgressiveGradientFlow(TWO_OF_FOUR, "ste", fine_tune_fraction=0.5, freeze=True)
    net, result = trained(flow)
    assert max(each["flip_rate"] for each in result.history[1:10]) > 0
    assert max(each["flip_rate"] for each in result.history[11:]) == 0
    held = net[0].parametrizations.weight[0]
    with torch.no_grad():
        net[0].parametrizations.weight.original[held.mask] = 0
    assert int(net.eval()[0].weight.count_nonzero()) == 0
    finish(net)
    assert int(net[0].weight.count_nonzero()) == 0


def test_a_killed_run_goes_on_where_its_schedule_was(tmp_path):
    flow = ProgressiveGradientFlow(TWO_OF_FOUR, "exponential", decay_frac=1.0)
    whole, _ = trained(flow)
    trained(flow, folder=tmp_path, stop_after=10)
    again, result = trained(flow, seed=1, folder=tmp_path)
    assert result.resumed_from == 10
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_n_equal_to_m_is_a_dense_layer():
    dense = network()
    chosen = TrainingSettings(steps=STEPS, learning_rate=0.02)
    train(dense, squared, batch, chosen, None, progress=False)
    net, _ = trained(ProgressiveGradientFlow(NofMPattern(4, 4), "sr_ste", pull=0.5))
    finish(net)
    assert all(torch.equal(each, net.state_dict()[name]) for name, each in dense.state_dict().items())


def test_m_of_all_inputs_is_the_top_of_each_row_and_the_other_dimension_a_transpose():
    net, layer = started(ProgressiveGradientFlow(NofMPattern(3, 8), "ste"))
    raw = layer.parametrizations.weight.original.detach()
    finish(net)
    best = torch.zeros_like(raw).scatter(1, raw.abs().topk(3).indices, 1).bool()
    assert torch.equal(layer.weight != 0, best)
    net, layer = started(ProgressiveGradientFlow(NofMPattern(2, 4, "out"), "ste"))
    raw = layer.parametrizations.weight.original.detach()
    finish(net)
    assert torch.equal(layer.weight != 0, TWO_OF_FOUR.keep(raw.abs().T).T)


def test_convolutions_group_channels_at_one_place():
    net = nn.Sequential(nn.Conv2d(4, 2, 3))
    ProgressiveGradientFlow(NofMPattern(1, 4), "ste").start(net, prunable(net), STEPS)
    finish(net)
    assert bool(((net[0].weight != 0).sum(dim=1) == 1).all())
    narrow = nn.Sequential(nn.Conv2d(2, 2, 2))  # 8 weights a row, but groups of 4 would lie across places
    with pytest.raises(InputError, match="0 has 2 inputs"):
        ProgressiveGradientFlow(NofMPattern(1, 4), "ste").start(narrow, prunable(narrow), STEPS)


def test_layers_may_have_patterns_of_their_own():
    net = network()
    first, second = prunable(net)
    hook = ProgressiveGradientFlow(TWO_OF_FOUR, "ste").start(net, [first], STEPS)
    ProgressiveGradientFlow(NofMPattern(1, 8), "linear").start(net, [second], STEPS)
    chosen = TrainingSettings(steps=STEPS, learning_rate=0.02)
    train(net, squared, batch, chosen, None, hooks=[hook], progress=False)
    finish(net)
    assert is_n_of_m(net[0].weight, 2, 4)
    assert is_n_of_m(net[2].weight, 1, 8)


def test_a_copy_is_on_its_own():
    net, layer = started(ProgressiveGradientFlow(TWO_OF_FOUR, "ste"))
    twin = copy.deepcopy(net)
    finish(net)
    assert isinstance(twin[0].parametrizations.weight[0], ScheduledWeight)
    assert torch.equal(twin.eval()[0].weight, layer.weight)


def test_costs_count_dense_steps_as_dense():
    assert ProgressiveGradientFlow(TWO_OF_FOUR, "ste").cost(10) == pytest.approx((0.5 + 2) / 3)
    assert ProgressiveGradientFlow(TWO_OF_FOUR, "ste", dense_fraction=0.5).cost(10) == pytest.approx((0.75 + 2) / 3)
    assert ProgressiveGradientFlow(TWO_OF_FOUR, "linear", decay_frac=0.5).cost(10) == pytest.approx((0.75 + 2) / 3)
    assert ProgressiveGradientFlow(TWO_OF_FOUR, "stepwise").cost(10) == pytest.approx((0.625 + 2) / 3)


def test_a_coefficient_a_step_becomes_a_share():
    for recipe, coefficient in (("linear", 0.01), ("exponential", 0.03)):
        share = decay_frac_of(coefficient, 400, recipe)
        flow = ProgressiveGradientFlow(TWO_OF_FOUR, recipe, decay_frac=share)
        expected = 1 - 0.01 * 25 if recipe == "linear" else torch.tensor(-0.03 * 25).exp().item()
        assert flow.share_at(25, 400) == pytest.approx(expected)
    assert decay_frac_of(1e-4, 438_000, "exponential") == pytest.approx(ProgressiveGradientFlow().decay_frac, abs=0.005)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "sr_ste", "gradient": "masked"}, "contradicts"),
        ({"dense_fraction": -0.1}, "dense_fraction=-0.1"),
        ({"fine_tune_fraction": 1.5}, "fine_tune_fraction=1.5"),
        ({"dense_fraction": 0.6, "fine_tune_fraction": 0.5}, "overlap"),
        ({"decay_frac": 0.0}, "decay_frac=0"),
        ({"pull": -1e-4}, "pull=-0.0001"),
        ({"recipe": "stepwise", "pattern": NofMPattern(1, 12)}, "M/N must be 2, 4, 8"),
        ({"recipe": "stepwise", "pattern": NofMPattern(4, 4)}, "M/N must be 2, 4, 8"),
    ],
)
def test_settings_that_cannot_work_say_so(settings, message):
    with pytest.raises(InputError, match=message):
        ProgressiveGradientFlow(**settings)


def test_layers_that_do_not_fit_are_refused_before_any_is_touched():
    net = network(width=16)
    flow = ProgressiveGradientFlow(TWO_OF_FOUR, "geometric")
    with pytest.raises(InputError, match="0 has 16 inputs, which is not a multiple of 32"):
        flow.start(net, prunable(net), STEPS)
    flow = replace(flow, recipe="ste", pattern=NofMPattern(1, 16))
    with pytest.raises(InputError, match="2 has 8 inputs"):
        flow.start(net, prunable(net), STEPS)
    assert type(net[0]) is nn.Linear
    with pytest.raises(InputError, match="steps=0"):
        flow.start(net, prunable(net)[:1], 0)
    add_masks(net, {"0": torch.ones(8, 16, dtype=torch.bool)})
    with pytest.raises(InputError, match="0 has a mask"):
        flow.start(net, prunable(net)[:1], STEPS)
    with pytest.raises(InputError, match="coefficient=-1"):
        decay_frac_of(-1.0, 10, "linear")
    hook = flow.start(other := network(width=16), prunable(other)[:1], STEPS)
    with pytest.raises(InputError, match="has no layer that was started"):
        hook.after_step(network(), 0, {})


def test_names_that_are_none_are_refused():
    # Types that are checked while the tests run would speak first.
    made = ProgressiveGradientFlow(TWO_OF_FOUR)
    for name, value in (("recipe", "densify"), ("gradient", "dense")):
        wrong = copy.copy(made)
        object.__setattr__(wrong, name, value)
        with pytest.raises(InputError, match=f"{name}='{value}'"):
            wrong.__post_init__()
