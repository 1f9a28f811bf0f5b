"""Gradual magnitude pruning: exact counts, masks that change when they should, runs that go on."""

import itertools
import warnings

import pytest
import torch
from torch import nn

from apportion.errors import InputError
from apportion.training import Hook, TrainingSettings
from apportion.weights import NofMPattern, add_masks, counts, masks_of, prunable, remove_masks, train_masked
from apportion.weights.gradual_pruning import GradualPruning, PruningSettings, prune_gradually
from apportion.weights.masks import masked_layers
from apportion.weights.schedule import GeometricSchedule, OneShot, PolynomialSchedule

SCHEDULE = PolynomialSchedule(0.75, begin=2, every=3, updates=4)  # updates after steps 2, 5, 8, 11, 14


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=generator), torch.randn(16, 4, generator=generator)


def squared(module, pair, step):
    x, y = pair
    return (module(x) - y).square().mean(), {}


def settings(steps: int = 20, **more) -> TrainingSettings:
    return TrainingSettings(steps=steps, learning_rate=0.02, log_every=1, **more)


class Watch(Hook):
    """Masks after every step; stands after the pruning hook."""

    def __init__(self):
        self.masks = []

    def after_step(self, module, step, metrics, /):
        self.masks.append({name: mask.clone() for name, mask in masks_of(module).items()})


def pruned(pruning: PruningSettings, steps: int = 20, net: nn.Module | None = None, **options):
    net = network() if net is None else net
    watch = Watch()
    # The watch is handed over first, so what it sees at a step is what was chosen after the one before.
    result = prune_gradually(net, squared, batch, settings(steps), pruning, hooks=[watch], progress=False, **options)
    watch.masks.append({name: mask.clone() for name, mask in masks_of(net).items()})
    return net, watch.masks[1:], result


def kept(numel: int, sparsity: float) -> int:
    return max(1, round(numel * (1 - sparsity)))


def test_masks_change_at_updates_only_are_nested_and_hold_exactly_so_many():
    net, masks, result = pruned(PruningSettings(SCHEDULE))
    changed = [
        step + 2
        for step, (before, after) in enumerate(itertools.pairwise(masks))
        if any(not torch.equal(before[name], after[name]) for name in after)
    ]
    assert changed == [5, 8, 11, 14]  # at step 2 the sparsity is still 0
    for step, now in enumerate(masks, start=1):
        last = max((each for each in range(step + 1) if SCHEDULE.is_update(each)), default=None)
        wanted = 0.0 if last is None else SCHEDULE.at(last)
        for mask in now.values():
            assert int(mask.sum()) == kept(mask.numel(), wanted)
    for before, after in itertools.pairwise(masks):
        assert all(bool((after[name] <= before[name]).all()) for name in after)
    assert [each["sparsity"] for each in result.history][-1] == pytest.approx(1 - (12 + 8) / 80)
    assert counts(net, prunable(net)).kept == 20


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_is_pruned_on_the_way_stays_exactly_zero(optimizer):
    make = {
        "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    }[optimizer]
    made = []

    def remembered(parameters):
        made.append(make(list(parameters)))
        return made[-1]

    net, masks, _ = pruned(PruningSettings(SCHEDULE), 60, optimizer=remembered)
    for layer in masked_layers(net):
        mask = masks[-1][layer.name]
        assert int(layer.parameter[~mask].count_nonzero()) == 0
        assert bool((layer.parameter[mask] != 0).all())
        for state in made[0].state[layer.parameter].values():
            assert state is None or state.shape != mask.shape or int(state[~mask].count_nonzero()) == 0


def test_an_average_of_weights_stays_as_sparse():
    net = network()
    pruning = GradualPruning(net, PruningSettings(OneShot(0.5, 3)))
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=False
    )

    class Averaging(Hook):
        def after_step(self, module, step, metrics, /):
            average.update_parameters(module)

    train_masked(net, squared, batch, settings(30), hooks=[pruning, Averaging()], progress=False)
    for name, mask in masks_of(net).items():
        averaged = average.module.get_submodule(name).weight
        assert int(averaged[~mask].count_nonzero()) == 0
        assert bool((averaged[mask] != net.get_submodule(name).weight[mask]).any())


def test_the_largest_weights_stay():
    net = network()
    before = net[0].weight.detach().abs().clone()
    GradualPruning(net, PruningSettings(OneShot(0.75)))
    order = sorted(range(48), key=lambda i: -float(before.view(-1)[i]))
    assert sorted(order[:12]) == masks_of(net)["0"].view(-1).nonzero().flatten().tolist()


@pytest.mark.parametrize("fill", ["equal", "zeros already"])
def test_ties_do_not_change_the_count(fill):
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1, bias=False), nn.Linear(1, 1))
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        if fill == "zeros already":
            net[0].weight.view(-1)[:30] = 0
    GradualPruning(net, PruningSettings(OneShot(0.6)))
    assert {name: int(mask.sum()) for name, mask in masks_of(net).items()} == {"0": 14, "1": 3, "2": 1}


def test_a_weight_of_zero_that_stayed_does_not_lose_its_place_to_one_that_is_gone():
    net = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 0.5]]))
    hook = GradualPruning(net, PruningSettings(PolynomialSchedule(0.5, 0, 5, 1, 0.25)))
    assert masks_of(net)["0"].tolist() == [[True, True, True, False]]
    with torch.no_grad():
        masked_layers(net)[0].parameter.copy_(torch.tensor([[0.0, 0.0, 3.0, 9.0]]))  # an optimiser moved the last one
    hook.choose(net, 5)
    assert masks_of(net)["0"].tolist() == [[True, False, True, False]]


def test_frozen_weights_compete_again_with_their_old_value():
    net = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 0.5]]))
    hook = GradualPruning(net, PruningSettings(PolynomialSchedule(0.5, 0, 5, 1, 0.25), regrow="frozen"))
    with torch.no_grad():
        net[0].parametrizations.weight.original[0, :2] = 0.1  # both have shrunk below the one that was pruned
    hook.choose(net, 5)
    assert masks_of(net)["0"].tolist() == [[False, False, True, True]]
    assert net[0].weight.tolist() == [[0.0, 0.0, 3.0, 0.5]]


def test_frozen_runs_prune_to_the_same_count():
    net, masks, _ = pruned(PruningSettings(SCHEDULE, regrow="frozen"))
    assert {name: int(mask.sum()) for name, mask in masks[-1].items()} == {"0": 12, "2": 8}
    assert int(net[0].parametrizations.weight.original.count_nonzero()) == 48
    remove_masks(net)
    assert int(net[0].weight.count_nonzero()) == 12


def test_globally_it_is_one_threshold_and_over_one_layer_the_same_as_locally():
    net = network()
    magnitudes = torch.cat([each.matrix().detach().abs().flatten() for each in prunable(net)])
    threshold = magnitudes.sort(descending=True).values[kept(80, 0.7) - 1]
    GradualPruning(net, PruningSettings(OneShot(0.7), scope="global"))
    held = torch.cat([mask.flatten() for mask in masks_of(net).values()])
    assert torch.equal(held, magnitudes >= threshold)
    one, other = network(), network()
    GradualPruning(one, PruningSettings(OneShot(0.7), scope="global", include=("0",)))
    GradualPruning(other, PruningSettings(OneShot(0.7), include=("0",)))
    assert torch.equal(masks_of(one)["0"], masks_of(other)["0"])
    assert list(masks_of(one)) == ["0"]


def test_a_group_keeps_fewer_of_its_weights_step_by_step():
    pruning = PruningSettings(PolynomialSchedule(0.5, 2, 3, 4, power=1), group=4, include=("2",))
    assert [str(pruning.pattern(each)) for each in (0, 0.25, 0.5)] == ["4:4", "3:4", "2:4"]
    _net, masks, _ = pruned(pruning)
    assert {int(each) for each in masks[-1]["2"].view(4, 2, 4).sum(-1).flatten()} == {2}
    assert isinstance(pruning.pattern(0.5), NofMPattern)


def test_one_by_one_each_layer_has_its_own_part_of_the_time():
    _net, masks, _ = pruned(PruningSettings(PolynomialSchedule(0.75, 0, 2, 8, power=1), order="one by one"))
    shares = [{name: float(mask.float().mean()) for name, mask in now.items()} for now in masks]
    assert shares[3]["2"] == 1
    assert shares[3]["0"] == pytest.approx(1 - 0.375, abs=0.02)
    assert shares[7] == {"0": 0.25, "2": 1.0}
    assert shares[11] == {"0": 0.25, "2": pytest.approx(1 - 0.375, abs=0.02)}
    assert shares[-1] == {"0": 0.25, "2": 0.25}


@pytest.mark.parametrize("stop", [4, 8, 15])
@pytest.mark.parametrize("regrow", ["zero", "frozen"])
def test_a_killed_run_ends_with_the_same_weights_and_masks(tmp_path, stop, regrow):
    pruning = PruningSettings(SCHEDULE, regrow=regrow)
    whole, _, uninterrupted = pruned(pruning)
    start = (squared, batch, settings(), pruning, tmp_path)
    prune_gradually(network(), *start, stop_after=stop, progress=False)
    again = network(seed=1)
    result = prune_gradually(again, *start, progress=False)
    assert result.resumed_from == stop
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(mask, masks_of(again)[name]) for name, mask in masks_of(whole).items())
    assert [each["sparsity"] for each in result.history] == [each["sparsity"] for each in uninterrupted.history]


def test_another_schedule_cannot_go_on_with_the_run(tmp_path):
    prune_gradually(
        network(), squared, batch, settings(), PruningSettings(SCHEDULE), tmp_path, stop_after=4, progress=False
    )
    other = PruningSettings(PolynomialSchedule(0.5, 2, 3, 4))
    with pytest.raises(InputError, match="holds another run"):
        prune_gradually(network(), squared, batch, settings(), other, tmp_path, progress=False)


def test_a_hook_serves_one_run():
    net = network()
    hook = GradualPruning(net, PruningSettings(SCHEDULE))
    hook.after_step(net, 7, {})
    hook.after_step(net, 8, {})
    with pytest.raises(InputError, match="step=3 comes after step 8"):
        hook.after_step(net, 3, {})


def test_masks_that_are_there_are_kept_until_the_first_update():
    net = network()
    add_masks(net, {"0": torch.eye(8, 6, dtype=torch.bool)})
    GradualPruning(net, PruningSettings(SCHEDULE))
    assert torch.equal(masks_of(net)["0"], torch.eye(8, 6, dtype=torch.bool))
    assert bool(masks_of(net)["2"].all())


def test_phases_are_pruned_as_they_come():
    _net, masks, _ = pruned(PruningSettings(GeometricSchedule(0.875, 3, 5, 2), scope="global"))
    assert [sum(int(mask.sum()) for mask in masks[step - 1].values()) for step in (1, 2, 7, 12)] == [80, 40, 20, 10]


def test_late_pruning_is_warned_of_and_later_than_the_end_refused():
    late = PruningSettings(PolynomialSchedule(0.5, 2, 4, 4))
    with pytest.warns(UserWarning, match="still change at step 18 .* from step 16 on"):
        pruned(late)
    with pytest.raises(InputError, match="the schedule ends at step 18, the training at step 10"):
        pruned(late, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned(PruningSettings(SCHEDULE))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruningSettings(SCHEDULE, order="one by one", scope="global"), "exclude each other"),
        (lambda: PruningSettings(SCHEDULE, group=1), "group=1"),
        (lambda: PruningSettings(SCHEDULE, group=4, scope="row"), "scope='row'"),
        (lambda: PruningSettings(PolynomialSchedule(0.6, 0, 1, 1), group=4), r"leave 1\.6 of them.*such as 0\.5"),
        (lambda: GradualPruning(network(), PruningSettings(SCHEDULE, group=4)), "0 has 6 inputs"),
        (lambda: GradualPruning(nn.Sequential(nn.ReLU()), PruningSettings(SCHEDULE)), "no linear or convolutional"),
    ],
)
def test_what_cannot_work_says_so(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("name", ["order", "regrow"])
def test_words_that_mean_nothing_say_so(name):
    broken = PruningSettings(SCHEDULE)
    object.__setattr__(broken, name, "backwards")  # past the types that the tests check
    with pytest.raises(InputError, match=f"{name}='backwards'"):
        broken.__post_init__()


def test_weights_that_are_no_numbers_are_refused():
    net = network()
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="must be finite"):
        GradualPruning(net, PruningSettings(OneShot(0.5)))
