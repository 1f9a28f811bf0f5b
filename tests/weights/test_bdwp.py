import copy
import itertools

import pytest
import torch
from torch import nn

from apportion.errors import InputError
from apportion.training import TrainingSettings, train
from apportion.weights import NofMPattern, Unstructured, choose_masks, prunable
from apportion.weights.bdwp import Bdwp, finish, transposable_mask
from apportion.weights.masks import add_masks


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LINEAR = lambda: nn.Linear(8, 12)  # noqa: E731
CONVOLUTION = lambda **options: nn.Conv2d(8, 12, 3, **options)  # noqa: E731
LAYERS = {
    "linear": (LINEAR, (3, 8)),
    "linear, three dimensions, no bias": (lambda: nn.Linear(8, 12, bias=False), (3, 5, 8)),
    "convolution": (CONVOLUTION, (2, 8, 5, 7)),
    "stride": (lambda: CONVOLUTION(stride=2, padding=1, bias=False), (2, 8, 7, 5)),
    "dilated": (lambda: CONVOLUTION(dilation=2, padding="same"), (2, 8, 6, 5)),
    "reflected": (lambda: CONVOLUTION(padding=1, padding_mode="reflect"), (2, 8, 5, 5)),
    "groups": (lambda: nn.Conv2d(16, 8, 3, groups=2), (2, 16, 5, 5)),
}


def products(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor):
    """Output and gradients of input and parameters."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return y, torch.autograd.grad(y, [x, *layer.parameters()], upstream)


def converted(make, settings: Bdwp) -> nn.Module:
    net = nn.Sequential(seeded(make))
    settings.start(net, prunable(net))
    return net[0]


def masked_copy(layer: nn.Module, mask: torch.Tensor) -> nn.Module:
    plain = copy.deepcopy(layer)
    finish(plain)
    plain.weight.data = torch.where(mask, layer.weight.detach(), 0)
    return plain


def views(layer: nn.Module, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both masks, the slow way: entry by entry, group by group."""
    weight = layer.weight.detach().abs()
    found = []
    for dim in (1, 0):
        mask = torch.zeros_like(weight, dtype=torch.bool)
        moved, moved_mask = weight.movedim(dim, -1), mask.movedim(dim, -1)
        for place in itertools.product(*map(range, moved.shape[:-1])):
            for start in range(0, moved.shape[-1], m):
                group = moved[place][start : start + m]
                for winner in group.argsort(descending=True)[:n]:
                    moved_mask[place][start + winner] = True
        found.append(mask)
    return found[0], found[1]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scheme", ["bdwp", "sr_ste", "sdwp", "transposable"])
def test_n_equal_to_m_is_dense_training_bit_for_bit(name, scheme):
    make, shape = LAYERS[name]
    plain, layer = seeded(make), converted(make, Bdwp(4, 4, scheme))
    x = draw(*shape)
    upstream = draw(*plain(x).shape, seed=2)
    (y, gradients), (z, others) = products(plain, x, upstream), products(layer, x, upstream)
    assert torch.equal(y, z)
    for gradient, other in zip(gradients, others, strict=True):
        assert torch.equal(gradient, other)


@pytest.mark.parametrize("name", LAYERS)
def test_each_product_has_the_weights_of_its_own_direction(name):
    make, shape = LAYERS[name]
    layer = converted(make, Bdwp(1, 4, pull=0.5))
    forward_mask, backward_mask = views(layer, 1, 4)
    assert not torch.equal(forward_mask, backward_mask)
    x = draw(*shape)
    upstream = draw(*layer(x).shape, seed=2)
    y, gradients = products(layer, x, upstream)
    ff, bp = masked_copy(layer, forward_mask), masked_copy(layer, backward_mask)
    expected_y, (_, of_weight, *of_bias) = products(ff, x, upstream)
    _, (of_input, *_) = products(bp, x, upstream)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(gradients[0], of_input)
    # The gradient of the weights takes no weights, but for the pull of what FF prunes.
    torch.testing.assert_close(gradients[1], of_weight + 0.5 * torch.where(forward_mask, 0, layer.weight.detach()))
    assert len(of_bias) == len(gradients[2:])
    for one, other in zip(of_bias, gradients[2:], strict=True):
        torch.testing.assert_close(one, other)


def test_a_planted_weight_survives_in_one_direction_only():
    layer = converted(lambda: nn.Linear(4, 4, bias=False), Bdwp(1, 4))
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0] = torch.tensor([2.0, 3.0, 0.0, 0.0])  # (0, 0) loses to (0, 1) in its row ...
        layer.weight[:, 0] += torch.tensor([0.0, 1.0, 1.0, 1.0])  # ... and wins its column
    forward, backward = (each.detach() for each in layer.views())
    assert float(forward[0, 0]) == 0
    assert float(backward[0, 0]) == 2
    assert (float(forward[1, 0]), float(backward[1, 0])) == (1, 0)


def test_the_weights_gradient_is_the_product_of_output_gradient_and_input():
    layer = converted(LINEAR, Bdwp(1, 4, pull=0.0))
    x, upstream = draw(5, 8), draw(5, 12, seed=2)
    _, (of_input, of_weight, of_bias) = products(layer, x, upstream)
    assert torch.equal(of_weight, upstream.T @ x)
    torch.testing.assert_close(of_bias, upstream.sum(dim=0))
    assert torch.equal(of_input, upstream @ layer.views()[1])


@pytest.mark.parametrize("scheme", ["sr_ste", "transposable"])
def test_one_mask_both_ways_is_the_exact_gradient(scheme):
    for make, shape in (LAYERS["linear"], LAYERS["stride"]):
        layer = converted(make, Bdwp(2, 4, scheme, pull=0.0))
        mask = layer.views()[0].detach() != 0
        x = draw(*shape)
        upstream = draw(*layer(x).shape, seed=2)
        (y, gradients), (z, others) = products(layer, x, upstream), products(masked_copy(layer, mask), x, upstream)
        torch.testing.assert_close(y, z)
        for gradient, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(gradient, other)


def test_backward_pruning_alone_leaves_the_forward_pass_dense():
    layer, plain = converted(LINEAR, Bdwp(1, 4, "sdwp")), seeded(LINEAR)
    x = draw(5, 8)
    assert torch.equal(layer(x), plain(x))
    assert int((layer.views()[1] != 0).sum()) == 24
    finish(layer)
    assert torch.equal(layer.weight, plain.weight)


def test_a_convolution_of_one_pixel_is_a_linear_layer():
    linear, convolution = converted(LINEAR, Bdwp(2, 4)), converted(lambda: nn.Conv2d(8, 12, 1), Bdwp(2, 4))
    with torch.no_grad():
        convolution.weight.copy_(linear.weight[..., None, None])
        convolution.bias.copy_(linear.bias)
    x, upstream = draw(5, 8), draw(5, 12, seed=2)
    y, gradients = products(linear, x, upstream)
    z, others = products(convolution, x[..., None, None], upstream[..., None, None])
    torch.testing.assert_close(z[..., 0, 0], y)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other.reshape(gradient.shape), gradient)


def test_a_direction_that_m_does_not_divide_stays_dense():
    layer = converted(lambda: nn.Linear(8, 6), Bdwp(1, 8))
    forward, backward = layer.views()
    assert (int(forward.count_nonzero()), int(backward.count_nonzero())) == (6, 48)
    layer = converted(lambda: nn.Conv2d(3, 8, 4), Bdwp(1, 8))  # 48 weights a row, but only 3 channels at a place
    forward, backward = layer.views()
    assert (int(forward.count_nonzero()), int(backward.count_nonzero())) == (384, 48)
    assert converted(lambda: nn.Linear(8, 6), Bdwp(1, 8, "transposable")).views()[0].count_nonzero() == 48


def network() -> nn.Sequential:
    return seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)))


def batch(step):
    return draw(16, 8, seed=step), draw(16, 3, seed=step + 1000)


def squared(module, pair, step):
    x, y = pair
    return (module(x) - y).square().mean(), {}


@pytest.mark.parametrize("settings", [Bdwp(2, 4), Bdwp(1, 4, "transposable", refresh=3)])
def test_training_ends_with_plain_n_of_m_layers(settings):
    net = network()
    names = sorted(net.state_dict())
    assert [each.name for each in settings.start(net)] == ["2"]
    chosen = TrainingSettings(steps=10, learning_rate=0.02)
    before = net[2].weight.detach().clone()
    train(net, squared, batch, chosen, None, progress=False)
    assert bool((net[2].weight != before).all()), "the master weight is dense and moves as a whole"
    net.eval()
    expected = net(batch(99)[0])
    finish(net)
    assert [type(net[place]) for place in (0, 2, 4)] == [nn.Linear] * 3
    assert sorted(net.state_dict()) == names
    assert torch.equal(net(batch(99)[0]), expected)
    assert int((net[2].weight.reshape(-1, 4) != 0).sum(dim=1).max()) == settings.n


def test_masks_are_kept_for_as_long_as_asked_and_through_a_restart(tmp_path):
    settings = Bdwp(1, 4, refresh=4)

    def run(folder=None, **options):
        net = network()
        settings.start(net)
        chosen = TrainingSettings(steps=8, learning_rate=0.3, checkpoint_every=2)
        train(net, squared, batch, chosen, folder, progress=False, **options)
        return net

    whole = run()
    run(tmp_path, stop_after=6)
    again = run(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    net = network()
    settings.start(net)
    layer, masks = net[2], []
    for step in range(8):
        net(batch(step)[0])
        masks.append(layer.forward_mask.clone())
        with torch.no_grad():
            layer.weight.copy_(draw(8, 8, seed=step))
    assert [torch.equal(a, b) for a, b in itertools.pairwise(masks)] == [True] * 3 + [False] + [True] * 3
    net.eval()(batch(0)[0])
    assert int(layer.age) == 8


def test_under_autocast_all_products_are_in_its_type():
    net = nn.Sequential(seeded(LINEAR), seeded(lambda: nn.Linear(12, 4)))
    Bdwp(2, 4).start(net, prunable(net))
    x = draw(5, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
    assert x.grad.dtype == net[0].weight.grad.dtype == torch.float32
    exact = network()  # nothing else is on
    assert exact(x).dtype == torch.float32


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4)])
def test_small_transposable_masks_are_the_best_there_are(n, m):
    scores = draw(2 * m, m).abs()
    mask = transposable_mask(scores, n, m)
    for start in (0, m):
        tile, kept = scores[start : start + m], mask[start : start + m]
        assert bool((kept.sum(dim=0) == n).all() and (kept.sum(dim=1) == n).all())
        assert float(tile[kept].sum()) == pytest.approx(brute_force(tile, n))


def brute_force(tile, n):
    m = len(tile)
    lines = [[i in chosen for i in range(m)] for chosen in itertools.combinations(range(m), n)]
    fits = (torch.tensor(rows) for rows in itertools.product(lines, repeat=m))
    return max(float(tile[rows].sum()) for rows in fits if bool((rows.sum(dim=0) == n).all()))


@pytest.mark.parametrize(("n", "m"), [(2, 8), (2, 16), (8, 8)])
def test_large_transposable_masks_never_keep_too_many_and_cannot_be_added_to(n, m):
    scores = draw(2 * m, 3 * m).abs()
    mask = transposable_mask(scores, n, m)
    tiles = mask.reshape(2, m, 3, m).transpose(1, 2).reshape(-1, m, m)
    rows, columns = tiles.sum(dim=2), tiles.sum(dim=1)
    assert int(rows.max()) == int(columns.max()) == n
    free = (rows < n).unsqueeze(2) & (columns < n).unsqueeze(1) & ~tiles
    assert not bool(free.any())
    assert int(mask.sum()) > 0.9 * mask.numel() * n / m


def test_the_pull_and_the_costs_follow_the_scheme():
    assert Bdwp(2, 8).sparsity.ideal_cost == pytest.approx(0.5)
    assert Bdwp(2, 8, "transposable").sparsity.ideal_cost == pytest.approx(0.5)
    assert Bdwp(2, 4).sparsity.ideal_cost == pytest.approx(1 / 1.5)
    assert Bdwp(2, 16).sparsity.ideal_cost == pytest.approx(1 / 2.4)
    for scheme in ("sr_ste", "sdwp"):
        assert Bdwp(2, 8, scheme).sparsity.ideal_cost == pytest.approx(0.75)


def test_what_cannot_be_trained_this_way_is_refused():
    for settings, message in (
        ({"n": 5, "m": 4}, "1 <= n <= m"),
        ({"pull": -1.0}, "pull=-1"),
        ({"refresh": 0}, "refresh=0"),
    ):
        with pytest.raises(InputError, match=message):
            Bdwp(**settings)
    with pytest.raises(InputError, match="no layer between"):
        Bdwp().start(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    net = nn.Sequential(nn.Conv1d(8, 8, 3))
    with pytest.raises(InputError, match="0 is a Conv1d"):
        Bdwp().start(net, prunable(net))
    net = network()
    add_masks(net, choose_masks({"2": torch.rand(8, 8)}, Unstructured(0.5)))
    with pytest.raises(InputError, match="2 is a ParametrizedLinear"):
        Bdwp().start(net)
    with pytest.raises(InputError, match="6 inputs"):
        transposable_mask(torch.rand(4, 6), 2, 4)
    assert NofMPattern(2, 4).dim == "in"
