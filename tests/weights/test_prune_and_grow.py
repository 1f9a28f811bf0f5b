import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apportion.errors import InputError
from apportion.training import Hook, TrainingSettings
from apportion.weights import add_masks, masks_of, prunable, train_masked
from apportion.weights.masks import held_mask, masked_layers
from apportion.weights.prune_and_grow import (
    PruneAndGrow,
    PruneAndGrowSettings,
    layer_counts,
    move_masks,
    next_mask,
    spend,
    start_sparse,
)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def sparse(density: float = 0.4) -> nn.Sequential:
    net = network()
    start_sparse(net, layer_counts(prunable(net), density))
    return net


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2], x[:, 3] + x[:, 4]], dim=1)


def squared(module, pair, step):
    x, y = pair
    return (module(x) - y).square().mean(), {}


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.02, weight_decay=0.1),
}


def run(net, hooks, steps=30, kind="adamw", folder=None, stop_after=None):
    """Trains; gives the optimiser's state while it is trained, for hooks that look."""
    made = []

    def optimizer(parameters):
        made.append(OPTIMIZERS[kind](list(parameters)))
        for hook in hooks:
            hook.optimizer = made[0]
        return made[0]

    settings = TrainingSettings(steps=steps, learning_rate=0.05, log_every=1, checkpoint_every=100)
    train_masked(
        net,
        squared,
        batch,
        settings,
        folder,
        hooks=hooks,
        optimizer=optimizer,
        progress=False,
        stop_after=stop_after,
    )


class Watch(Hook[nn.Module]):
    """Keeps masks, raw weights, the optimiser's state and what was logged, as they are where it stands in the order."""

    def __init__(self):
        self.masks, self.raw, self.states, self.grown = [], [], [], []

    def after_step(self, module, step, metrics, /):
        layers = masked_layers(module)
        self.masks.append({name: mask.clone() for name, mask in masks_of(module).items()})
        self.raw.append({layer.name: layer.parameter.detach().clone() for layer in layers})
        self.states.append({layer.name: self._state(layer.parameter) for layer in layers})
        self.grown.append(metrics.get("weights_grown"))

    def _state(self, parameter):
        values = self.optimizer.state[parameter].values()
        return [each.clone() for each in values if torch.is_tensor(each) and each.shape == parameter.shape]


def test_the_share_that_moves_falls_along_half_a_cosine():
    moves = PruneAndGrowSettings(steps=1000, end=0.8)
    assert moves.fraction_at(0) == moves.drop_fraction == 0.3
    assert moves.fraction_at(400) == pytest.approx(0.15)
    assert moves.fraction_at(200) == pytest.approx(0.15 * (1 + math.cos(math.pi / 4)))
    assert moves.fraction_at(800) == moves.fraction_at(1000) == 0
    assert [step for step in range(1001) if moves.moves_after(step)] == [100, 200, 300, 400, 500, 600, 700]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 99), st.floats(0, 0.99), st.booleans())
def test_a_move_equals_sorting_by_hand(rows, columns, seed, fraction, ties):
    draws = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draws)
    growth = torch.rand(rows, columns, generator=draws)
    if ties:
        weight, growth = weight.round(), growth.round()
    mask = torch.rand(rows, columns, generator=draws) < 0.5
    after = next_mask(weight, mask, growth, fraction)
    has = mask.flatten().nonzero().flatten().tolist()
    size, score = weight.flatten().abs().tolist(), growth.flatten().tolist()
    dropped = int(fraction * len(has))
    kept = sorted(has, key=lambda i: (-size[i], i))[: len(has) - dropped]
    free = [i for i in range(rows * columns) if i not in kept]
    grown = sorted(free, key=lambda i: (-score[i], i))[:dropped]
    assert after.flatten().nonzero().flatten().tolist() == sorted(kept + grown)


def test_what_is_dropped_may_win_its_own_place_back():
    weight = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    mask = torch.tensor([[True, True, False, False]])
    back = next_mask(weight, mask, torch.tensor([[0.0, 9.0, 1.0, 1.0]]), 0.5)
    assert torch.equal(back, mask)
    away = next_mask(weight, mask, torch.tensor([[9.0, 0.0, 0.0, 1.0]]), 0.5)
    assert away.tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("growth", ["gradient", "random"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_move_at_constant_number_and_new_ones_start_from_nothing(growth, kind):
    net = sparse()
    counts = {name: int(mask.sum()) for name, mask in masks_of(net).items()}
    moves = PruneAndGrowSettings(steps=30, growth=growth, every=5, drop_fraction=0.5)
    earlier, later = Watch(), Watch()
    run(net, [earlier, PruneAndGrow(moves), later], kind=kind)
    moved_at = set()
    for step in range(30):
        new_at_all = 0
        for name, count in counts.items():
            old, new = earlier.masks[step][name], later.masks[step][name]
            assert int(new.sum()) == count
            stayed, grown = old & new, new & ~old
            # Kept weights are the very same numbers; whatever else there is lies at 0.
            assert torch.equal(later.raw[step][name][stayed], earlier.raw[step][name][stayed])
            assert bool((later.raw[step][name][~stayed] == 0).all())
            assert later.states[step][name]
            for state, before in zip(later.states[step][name], earlier.states[step][name], strict=True):
                assert bool((state[grown] == 0).all())
                assert torch.equal(state[stayed], before[stayed])
                assert bool(state[stayed].any())
            # What was dropped has no momentum left one step later.
            if step < 29:
                for state in later.states[step + 1][name]:
                    assert bool((state[old & ~new] == 0).all())
            new_at_all += int(grown.sum())
        assert later.grown[step] in (None, new_at_all)
        if new_at_all:
            moved_at.add(step + 1)
    assert moved_at == {5, 10, 15}  # at 20 the share rounds to none, and T_end is 22.5


def test_growth_follows_the_dense_gradient():
    # Linear regression: the gradient of the weight is X^T r, known by hand.
    draws = torch.Generator().manual_seed(0)
    x, truth = torch.randn(32, 12, generator=draws), torch.randn(12, generator=draws)
    net = nn.Sequential(nn.Linear(12, 1, bias=False))
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, [1, 4]] = True
    add_masks(net, {"0": mask}, dense_gradient=True)
    with torch.no_grad():
        masked_layers(net)[0].parameter[0, 1], masked_layers(net)[0].parameter[0, 4] = 5.0, 0.1
    residual = net(x).squeeze(1) - x @ truth
    correlation = (x.T @ residual).detach().abs()
    correlation[1] = -1  # it is the larger one and stays
    train_masked(
        net,
        lambda module, pair, step: ((module(x).squeeze(1) - x @ truth).square().mean(), {}),
        lambda step: (x, x),
        TrainingSettings(steps=4, learning_rate=1e-6, clip_norm=None),
        None,
        hooks=[PruneAndGrow(PruneAndGrowSettings(steps=4, every=1, drop_fraction=0.99, end=1.0))],
        progress=False,
        stop_after=1,
    )
    after = masks_of(net)["0"][0]
    assert after.nonzero().flatten().tolist() == sorted([1, int(correlation.argmax())])


def test_nothing_moves_without_a_share_to_move_nor_after_the_end():
    plain, still, late = sparse(), sparse(), sparse()
    train_masked(plain, squared, batch, TrainingSettings(steps=12, learning_rate=0.05), None, progress=False)
    for net, moves in (
        (still, PruneAndGrowSettings(steps=12, every=2, drop_fraction=0.0)),
        (late, PruneAndGrowSettings(steps=12, every=2, end=1 / 12)),
    ):
        train_masked(
            net,
            squared,
            batch,
            TrainingSettings(steps=12, learning_rate=0.05),
            None,
            hooks=[PruneAndGrow(moves)],
            progress=False,
        )
        for (name, own), (_, other) in zip(net.state_dict().items(), plain.state_dict().items(), strict=True):
            assert torch.equal(own, other), name


@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_an_interrupted_run_ends_with_the_same_weights(growth, tmp_path):
    moves = PruneAndGrowSettings(steps=20, growth=growth, every=3, drop_fraction=0.5)
    whole, parts = sparse(), sparse()
    run(whole, [PruneAndGrow(moves)], steps=20)
    for stop in (6, 11, None):  # 6 is right after a move
        parts = sparse()
        run(parts, [PruneAndGrow(moves)], steps=20, folder=tmp_path, stop_after=stop)
    assert not torch.equal(masks_of(whole)["0"], masks_of(sparse())["0"])
    for (name, own), (_, other) in zip(whole.state_dict().items(), parts.state_dict().items(), strict=True):
        assert torch.equal(own, other), name


def test_random_growth_has_a_seed():
    def after(seed):
        net = sparse()
        run(net, [PruneAndGrow(PruneAndGrowSettings(steps=10, growth="random", every=2, seed=seed))], steps=10)
        return masks_of(net)["0"]

    assert torch.equal(after(1), after(1))
    assert not torch.equal(after(1), after(2))


def test_convolutions_move_too():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    start_sparse(net, layer_counts(prunable(net), 0.3, "erk"))
    mask = masks_of(net)["0"].clone()
    growth = torch.rand(4, 18, generator=torch.Generator().manual_seed(0))
    expected = next_mask(masked_layers(net)[0].matrix(), mask, growth, 0.5)
    moved = move_masks(net, {"0": growth}, 0.5)
    assert torch.equal(masks_of(net)["0"], expected)
    assert moved == int((expected & ~mask).sum()) > 0


def test_a_gradient_that_is_not_finite_moves_nothing():
    net = sparse()
    mover = PruneAndGrow(PruneAndGrowSettings(steps=10, every=1))
    before = masks_of(net)["0"].clone()
    squared(net, batch(0), 0)[0].backward()
    masked_layers(net)[0].parameter.grad[0, 0] = float("nan")
    mover.before_step(net, 0)
    metrics = {}
    mover.after_step(net, 0, metrics)
    assert torch.equal(masks_of(net)["0"], before)
    assert not metrics


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4),
    st.floats(0.2, 1),
    st.sampled_from(["uniform", "erk"]),
)
def test_densities_are_shares_and_add_up(shapes, density, profile):
    net = nn.Sequential(*(nn.Linear(a, b) for a, b in shapes))
    layers = prunable(net)
    sizes = {layer.name: layer.parameter.numel() for layer in layers}
    total = round(density * sum(sizes.values()))
    if total == 0 or density * min(sizes.values()) < 1:
        return  # a layer may be left without a weight, which is refused
    counts = layer_counts(layers, density, profile)
    assert sum(counts.values()) == total
    assert all(1 <= counts[name] <= sizes[name] for name in sizes)
    if profile == "uniform":
        assert all(abs(counts[name] - total / sum(sizes.values()) * sizes[name]) < 1 for name in sizes)
    if len(layers) == 1:
        assert counts == layer_counts(layers, density, "uniform")


def test_erk_is_in_proportion_and_small_layers_are_dense():
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(512, 10))
    layers = prunable(net)
    counts = layer_counts(layers, 0.2, "erk")
    raw = {layer.name: sum(layer.parameter.shape) / layer.parameter.numel() for layer in layers}
    shares = {layer.name: counts[layer.name] / layer.parameter.numel() for layer in layers}
    scale = [shares[name] / raw[name] for name in shares]
    assert max(scale) / min(scale) < 1.01
    # One layer's share would be above 1: it is dense, and the rest make up for it.
    small = nn.Sequential(nn.Linear(4, 4), nn.Linear(100, 100))
    found = layer_counts(prunable(small), 0.5, "erk")
    assert found == {"0": 16, "1": round(0.5 * 10016) - 16}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.floats(0.1, 1))
def test_a_budget_is_spent_to_within_a_weight(seed, share):
    draws = torch.Generator().manual_seed(seed)
    shapes = torch.randint(2, 9, (3, 2), generator=draws).tolist()
    layers = prunable(nn.Sequential(*(nn.Linear(a, b) for a, b in shapes)))
    costs = dict(zip("012", torch.randint(1, 30, (3,), generator=draws).tolist(), strict=True))
    sizes = {layer.name: layer.parameter.numel() for layer in layers}
    budget = round(share * sum(sizes[name] * costs[name] for name in sizes))
    if share * min(sizes.values()) < 1.1:
        return  # a layer may be left without a weight, which is refused
    counts = spend(layers, budget, costs)
    spent = sum(counts[name] * costs[name] for name in counts)
    room = [costs[name] for name in counts if counts[name] < sizes[name]]
    assert 0 <= budget - spent < min(room, default=1)


def test_a_sparse_start_has_the_counts_and_can_keep_the_size_of_activations():
    net = network()
    dense = net[0].weight.detach().clone()
    start_sparse(net, {"0": 12, "2": 24}, seed=3, rescale=True)
    mask = masks_of(net)["0"]
    assert int(mask.sum()) == 12
    assert held_mask(masked_layers(net)[0]).dense_gradient
    torch.testing.assert_close(net[0].weight, torch.where(mask, dense * 2, 0))
    assert int(masked_layers(net)[0].parameter.count_nonzero()) == 12
    other = network()
    start_sparse(other, {"0": 12}, seed=4, dense_gradient=False)
    assert not torch.equal(masks_of(other)["0"], mask)
    assert set(masks_of(other)) == {"0"}
    torch.testing.assert_close(other[0].weight, torch.where(masks_of(other)["0"], dense, 0))


def test_first_masks_have_nothing_to_do_with_weights_of_the_same_seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(100, 100))
    start_sparse(net, {"0": 1000}, seed=0)
    kept = net[0].weight[masks_of(net)["0"]]
    assert abs(float(kept.detach().mean())) < 0.01  # of weights between -0.1 and 0.1


def test_training_costs_what_its_steps_add_up_to():
    for growth, extra in (("gradient", 1), ("random", 0)):
        moves = PruneAndGrowSettings(steps=100, every=10, end=0.75, growth=growth)
        by_hand = sum(2 * 5 + (20 if extra and step % 10 == 0 and 0 < step < 75 else 5) for step in range(1, 101))
        assert moves.training_flops(5, 20) == pytest.approx(by_hand / 100)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"every": 0}, "every=0"),
        ({"end": 0.0}, "end=0.0"),
        ({"end": 1.5}, "end=1.5"),
        ({"drop_fraction": 1.0}, "drop_fraction=1.0"),
        ({"drop_fraction": -0.1}, "drop_fraction=-0.1"),
        ({"drop_fraction": float("nan")}, "drop_fraction=nan"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        PruneAndGrowSettings(**{"steps": 10, **wrong})


def test_bad_input_is_named():
    moves = PruneAndGrowSettings(steps=2, every=1, end=1.0)
    one_step = TrainingSettings(steps=2, learning_rate=0.01)
    frozen = sparse()
    masked_layers(frozen)[0].parameter.requires_grad_(False)
    stopped = network()
    start_sparse(stopped, layer_counts(prunable(stopped), 0.5), dense_gradient=False)
    for net, message in (
        (network(), "no masked layer"),
        (frozen, "0 has a mask but no gradient"),
        (stopped, "dense_gradient=True"),
    ):
        with pytest.raises(InputError, match=message):
            train_masked(net, squared, batch, one_step, None, hooks=[PruneAndGrow(moves)], progress=False)
    layers = prunable(network())
    with pytest.raises(InputError, match=r"density=0"):
        layer_counts(layers, 0.0)
    with pytest.raises(InputError, match="without a weight"):
        layer_counts(layers, 0.014)
    with pytest.raises(InputError, match="no layer 'x'"):
        start_sparse(network(), {"x": 1})
    with pytest.raises(InputError, match=r"counts\['0'\]=0"):
        start_sparse(network(), {"0": 0})
    with pytest.raises(InputError, match="2 has no mask"):
        held_mask(prunable(network())[1])
