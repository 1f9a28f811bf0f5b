import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from apportion.errors import InputError
from apportion.studies.small_networks import DigitsNetwork
from apportion.weights import masks_from_zeros, masks_of, prunable, remove_masks
from apportion.weights.cost import cost_of
from apportion.weights.sparse_ift import (
    SparseDoped,
    SparseFactorized,
    SparseIftSettings,
    SparseParallel,
    transform,
)

MEMBERS = {"parallel": SparseParallel, "factorized": SparseFactorized, "doped": SparseDoped}
ALL = ("wide", *MEMBERS)


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def wide_digits(factor: float) -> nn.Module:
    return DigitsNetwork((64, int(8 * factor), int(8 * factor), 10))


def pictures(factor: float = 1.0) -> nn.Module:
    """Stem, a block with a stride, one that is depthwise, and a head."""
    width = int(8 * factor)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, groups=2 * width),
        nn.Conv2d(2 * width, width, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 5),
    )


PICTURE = torch.zeros(2, 3, 8, 8)


def counted_by_hand(module: nn.Conv2d, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A convolution of one picture with loops, multiplying only with weights that are not 0, and how often it did."""
    weight, stride, padding = module.weight, module.stride[0], module.padding[0]
    x = nn.functional.pad(x, (padding,) * 4)
    height, width = ((x.shape[axis] - weight.shape[axis + 1]) // stride + 1 for axis in (1, 2))
    y, multiplied = torch.zeros(weight.shape[0], height, width), 0
    for o, c, a, b in itertools.product(*(range(size) for size in weight.shape)):
        if weight[o, c, a, b] == 0:
            continue
        for i, j in itertools.product(range(height), range(width)):
            y[o, i, j] += weight[o, c, a, b] * x[c, i * stride + a, j * stride + b]
            multiplied += 1
    return y, multiplied


def test_the_counter_agrees_with_loops_and_with_torch():
    net = seeded(pictures)
    with FlopCounterMode(display=False) as torchs, torch.no_grad():
        net.eval()(PICTURE)
    assert cost_of(net, PICTURE).flops == torchs.get_total_flops() / 2 / len(PICTURE)
    own = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False)))
    with torch.no_grad():
        own[0].weight[0, 1] = 0
    x = torch.randn(1, 2, 5, 7)
    y, multiplied = counted_by_hand(own[0], x[0])
    torch.testing.assert_close(own(x)[0], y)
    masks_from_zeros(own, prunable(own))
    assert cost_of(own, x).flops == multiplied
    assert cost_of(own, x).dense_flops == own[0].weight.numel() * y[0].numel()


def test_a_cost_counts_calls_parameters_and_what_is_put_out():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.up = nn.ConvTranspose1d(4, 2, 3)

        def forward(self, x):
            hidden = self.layer(self.layer(x))
            return self.up(hidden.transpose(1, 2))

    net = Twice().train()
    net.layer.eval()
    cost = cost_of(net, torch.zeros(5, 6, 4))
    assert cost.of_layers == {"layer": 2 * 6 * 16, "up": 6 * 24}
    assert cost.activations == 2 * 6 * 4 + 2 * 8
    assert cost.parameters == cost.kept == 20 + 26
    assert net.training
    assert not net.layer.training
    with pytest.raises(InputError, match="out_proj is never called"):
        cost_of(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), torch.zeros(1, 3, 8))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(MEMBERS)),
    st.integers(2, 40),
    st.integers(2, 40),
    st.floats(0.05, 0.9),
    st.booleans(),
    st.sampled_from([(1, 1, 0), (3, 1, 1), (3, 2, 1), (2, 1, 0)]),
)
@pytest.mark.filterwarnings("ignore:at sparsity")
def test_members_cost_what_the_dense_layer_costs(member, inputs, outputs, sparsity, convolution, shape):
    kernel, stride, padding = shape
    if convolution:
        sample = torch.zeros(1, inputs, 6, 6)

        def make(factor: float) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding))
    else:
        kernel, sample = 1, torch.zeros(1, inputs)

        def make(factor: float) -> nn.Module:
            return nn.Sequential(nn.Linear(inputs, outputs))

    size = kernel**2 * inputs * outputs
    if member == "parallel" and size < (branches := max(1, round(1 / (1 - sparsity)))):
        with pytest.raises(InputError, match=f"left for {branches} sparse layers"):
            transform(make, SparseIftSettings(member, sparsity), sample)
        return
    found = transform(make, SparseIftSettings(member, sparsity), sample)
    dense = make(1.0)(sample)
    places = dense[0, 0].numel() if convolution else 1
    assert found.before.flops == size * places
    assert found.after.flops == found.before.flops
    # The brute force: every mask's weights, every dense layer's, once for each place.
    masks = masks_of(found.network)
    assert (
        places
        * sum(
            int(masks[each.name].sum()) if each.name in masks else each.weight.numel()
            for each in prunable(found.network)
        )
        == found.before.flops
    )
    assert found.network(sample).shape == dense.shape
    # And the sheet's formulas for the sizes.
    part = found.network[0]
    if member == "parallel":
        assert len(part.branches) == max(1, round(1 / (1 - sparsity)))
    elif member == "factorized":
        exact = kernel**2 * inputs * outputs / ((1 - sparsity) * (kernel**2 * inputs + outputs))
        assert -1e-6 <= part.second.weight.shape[1] - exact < 1
        assert found.realised == pytest.approx(
            1 - size / (part.second.weight.shape[1] * (kernel**2 * inputs + outputs))
        )
    else:
        exact = sparsity * kernel**2 * inputs * outputs / (kernel**2 * inputs + outputs)
        rank = part.low_rank[0].weight.shape[0] if len(part.low_rank) else 0
        assert -1e-6 <= exact - rank < 1
        assert set(masks) == {"0.sparse"}


@pytest.mark.parametrize("member", ALL)
@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_whole_networks_cost_what_the_dense_one_costs(member, sparsity):
    settings_ = SparseIftSettings(member, sparsity, dense=("0", "9"))
    found = transform(lambda factor: seeded(lambda: pictures(factor)), settings_, PICTURE)
    # A weight is applied 16 times at most where it is sparse; depthwise and dense layers are counted too.
    assert 0 <= found.before.flops - found.after.flops < 16
    remove_masks(found.network)
    dense = {name for name, each in found.network.named_modules() if name in ("0", "5", "9")}
    assert all(bool((found.network.get_submodule(name).weight != 0).all()) for name in dense)
    with torch.no_grad():
        assert found.network.eval()(PICTURE + 1).shape == (2, 5)
    assert found.after.parameters > found.before.parameters
    assert found.after.activations > found.before.activations
    assert found.to_json()["flops, before"] == found.before.flops


def test_wide_spends_what_the_dense_head_leaves():
    # The pilot's figures: 1 - 546/825, 1 - 496/1280, 1 - 406/2225.
    for sparsity, width, kept, size in ((0.5, 11, 546, 825), (0.75, 16, 496, 1280), (0.9, 25, 406, 2225)):
        found = transform(wide_digits, SparseIftSettings("wide", sparsity, dense=("4",)), torch.zeros(1, 64))
        assert found.network[0].out_features == width
        assert sum(int(mask.sum()) for mask in masks_of(found.network).values()) == kept
        assert found.realised == pytest.approx(1 - kept / size)
        assert found.after.flops == 656


@pytest.mark.parametrize("member", ["wide", "parallel", "doped"])
def test_without_sparsity_it_is_the_dense_network(member):
    dense = seeded(lambda: wide_digits(1.0))
    found = transform(
        lambda factor: seeded(lambda: wide_digits(factor)), SparseIftSettings(member, 0.0), torch.zeros(1, 64)
    )
    assert found.realised == 0
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.network(x), dense(x))


def test_parallel_branches_collapse_without_a_nonlinearity():
    layer = seeded(lambda: nn.Conv2d(3, 4, 3, padding=1))
    x = torch.randn(2, 3, 5, 5)
    linear = seeded(lambda: SparseParallel(layer, 0.75, lambda width: nn.Identity()))
    together = nn.Conv2d(3, 4, 3, padding=1)
    with torch.no_grad():
        together.weight.copy_(sum(branch.weight for branch in linear.branches))
        together.bias.copy_(sum(branch.bias for branch in linear.branches))
    torch.testing.assert_close(linear(x), together(x))
    bent = seeded(lambda: SparseParallel(layer, 0.75))
    assert not torch.allclose(bent(x), together(x))
    torch.testing.assert_close(bent(x), sum(branch(x).relu() for branch in bent.branches))


def test_factorized_and_doped_are_their_formulas():
    layer, x = seeded(lambda: nn.Linear(6, 4)), torch.randn(3, 6)
    two = seeded(lambda: SparseFactorized(layer, 0.5))
    torch.testing.assert_close(
        two(x), (x @ two.first.weight.T + two.first.bias).relu() @ two.second.weight.T + two.second.bias
    )
    normed = SparseFactorized(nn.Conv2d(2, 3, 3), 0.5, lambda width: nn.Sequential(nn.BatchNorm2d(width), nn.ReLU()))
    assert normed.between[0].num_features == normed.first.out_channels
    doped = seeded(lambda: SparseDoped(layer, 0.5))
    assert doped.sparse is layer
    u, v = (each.weight for each in doped.low_rank)
    torch.testing.assert_close(doped(x), layer(x) + x @ (v @ u).T)


def test_a_second_factor_looks_at_one_place():
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1, padding_mode="circular", bias=False)
    for part in (SparseFactorized(layer, 0.5), SparseDoped(layer, 0.5)):
        first, second = (part.first, part.second) if isinstance(part, SparseFactorized) else part.low_rank
        assert (first.kernel_size, first.stride, first.padding_mode) == ((3, 3), (2, 2), "circular")
        assert (second.kernel_size, second.stride) == ((1, 1), (1, 1))
        assert first.bias is None
        assert second.bias is None


def test_rescaled_starts_keep_the_size_of_activations():
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))

    def spread(member: str, rescale: bool) -> float:
        def make(factor: float) -> nn.Module:
            width = int(128 * factor)
            return seeded(lambda: nn.Sequential(nn.Linear(64, width, bias=False), nn.Linear(width, 10, bias=False)))

        settings_ = SparseIftSettings(member, 0.9, dense=("1",), rescale=rescale)  # type: ignore[arg-type]
        network = seeded(lambda: transform(make, settings_, x[:1]).network)
        return float(network[0](x).detach().std())

    dense = float(seeded(lambda: nn.Sequential(nn.Linear(64, 128, bias=False)))(x).detach().std())
    assert spread("wide", True) == pytest.approx(dense, rel=0.1)
    assert spread("wide", False) < 0.6 * dense
    assert spread("doped", True) == spread("doped", False)


def test_erk_spends_the_same():
    settings_ = SparseIftSettings("wide", 0.9, dense=("4",), profile="erk")
    found = transform(wide_digits, settings_, torch.zeros(1, 64))
    assert found.after.flops == 656
    kept = {name: float(mask.float().mean()) for name, mask in masks_of(found.network).items()}
    assert kept["2"] > kept["0"]


def test_masks_have_a_seed():
    def mask(seed: int) -> torch.Tensor:
        return masks_of(transform(wide_digits, SparseIftSettings(dense=("4",), seed=seed), torch.zeros(1, 64)).network)[
            "0"
        ]

    assert torch.equal(mask(1), mask(1))
    assert not torch.equal(mask(1), mask(2))


def test_nested_layers_are_replaced_where_they_are():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.inner(x))

    found = transform(lambda factor: Block(), SparseIftSettings("parallel", 0.5, dense=("head",)), torch.zeros(1, 8))
    assert isinstance(found.network.inner[0], SparseParallel)
    assert set(masks_of(found.network)) == {"inner.0.branches.0", "inner.0.branches.1"}


def test_what_cannot_be_is_named():
    sample = torch.zeros(1, 64)
    for sparsity in (1.0, -0.1, math.nan):
        with pytest.raises(InputError, match="sparsity="):
            SparseIftSettings(sparsity=sparsity)
        with pytest.raises(InputError, match="sparsity="):
            SparseDoped(nn.Linear(2, 2), sparsity)
    with pytest.raises(InputError, match="dense='stem' fits none"):
        transform(wide_digits, SparseIftSettings(dense=("stem",)), sample)
    with pytest.raises(InputError, match="are left for"):
        transform(wide_digits, SparseIftSettings("wide", 0.9999, dense=("4",)), sample)
    with pytest.raises(InputError, match="left for 20 sparse layers"):
        transform(lambda factor: DigitsNetwork((4, 2, 1)), SparseIftSettings("parallel", 0.9), torch.zeros(1, 4))
    with pytest.raises(InputError, match="without a weight"):
        transform(lambda factor: DigitsNetwork((64, 30, 1)), SparseIftSettings("parallel", 0.99), sample)
    with pytest.raises(InputError, match="2 groups"):
        SparseFactorized(nn.Conv2d(4, 4, 3, groups=2), 0.5)
    with pytest.raises(InputError, match="Conv1d"):
        transform(lambda factor: nn.Sequential(nn.Conv1d(2, 2, 1)), SparseIftSettings("doped"), torch.zeros(1, 2, 3))
    with pytest.raises(InputError, match="leaves no layer"):
        transform(wide_digits, SparseIftSettings(dense=("*",)), sample)
    for member in ("wide", "parallel"):
        with pytest.warns(UserWarning, match="no larger than the dense one"):
            transform(wide_digits, SparseIftSettings(member, 0.1, dense=("4",)), sample)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="no larger"):
        transform(lambda factor: nn.Sequential(nn.Linear(2, 2)), SparseIftSettings("doped", 0.5), torch.zeros(1, 2))
