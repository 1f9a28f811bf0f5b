import pytest
import torch
from torch import nn

from apportion.errors import InputError
from apportion.weights.bdwp import Bdwp
from apportion.weights.training_shapes import (
    NETWORKS,
    LayerShape,
    WeightSparsity,
    resnet18,
    resnet50,
    shapes_of,
    training_macs,
    vgg19,
    vit_small,
)


def test_published_networks_have_the_sizes_they_are_known_for():
    for make, millions, forward in (
        (resnet50, 25.5, 4.09),  # torchvision: 25.56 with biases and norms; 4.09 GMACs at 224
        (lambda: resnet18(224, 1000), 11.68, 1.81),  # 11.69 and 1.81
        (vgg19, 20.07, 0.398),
        (vit_small, 21.3, 1.42),
    ):
        layers = make()
        assert sum(each.weights for each in layers) / 1e6 == pytest.approx(millions, rel=5e-3)
        assert sum(each.macs("FF", 1) for each in layers) / 1e9 == pytest.approx(forward, rel=1e-2)


def test_every_network_begins_and_ends_dense():
    for make in NETWORKS.values():
        layers = make()
        assert layers[0].first
        assert not layers[0].prunable
        assert not layers[-1].prunable
        assert not any(each.first for each in layers[1:])


def test_products_of_a_layer_are_those_of_the_table():
    shape = LayerShape("a", 16, 32, 9, positions_in=64, positions_out=16)
    assert shape.product("FF", 5) == (80, 144, 32, 1)
    assert shape.product("BP", 5) == (320, 288, 16, 1)
    assert shape.product("WU", 5) == (32, 80, 144, 1)
    assert {shape.macs(op, 5) for op in ("FF", "BP", "WU")} == {80 * 144 * 32}
    scores = LayerShape("scores", 64, 65, 1, 65, 65, repeat=6, weighted=False)
    assert scores.product("FF", 5) == (65, 64, 65, 30)
    assert scores.product("BP", 5) == (65, 65, 64, 30)
    assert scores.product("WU", 5) == (65, 65, 64, 30)
    assert scores.weights == 0


def test_a_networks_shapes_are_read_off_it():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2),
        nn.Flatten(2),
        nn.Linear(9, 4),
    )
    layers = shapes_of(network, torch.zeros(2, 3, 5, 5), pruned=["1"])
    assert layers == [
        LayerShape("0", 3, 8, 9, 25, 25, prunable=False, first=True),
        LayerShape("1", 4, 8, 9, 25, 9, repeat=2),
        LayerShape("3", 9, 4, 1, 16, 16, prunable=False),
    ]
    assert network.training
    assert not any(each._forward_hooks for each in network)


def test_multiplications_are_counted_by_scheme():
    network = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8))
    settings = Bdwp(2, 8)
    names = [each.name for each in settings.start(network)]
    layers = shapes_of(network, torch.zeros(1, 16), names)
    first, middle, last = 2 * 16 * 32, 32 * 32, 3 * 32 * 8
    assert training_macs(layers) == first + 3 * middle + last
    assert training_macs(layers, 7, settings.sparsity) == 7 * (first + 1.5 * middle + last)
    assert training_macs(layers, 1, WeightSparsity(2, 8, backward=False)) == first + 2.25 * middle + last


@pytest.mark.parametrize(("inputs", "outputs", "sparse"), [(16, 16, (True, True)), (12, 16, (False, True))])
def test_where_m_does_not_divide_weights_are_dense(inputs, outputs, sparse):
    sparsity = WeightSparsity(2, 8)
    shape = LayerShape("a", inputs, outputs)
    assert (sparsity.holds(shape, "FF"), sparsity.holds(shape, "BP")) == sparse
    assert not sparsity.holds(shape, "WU")
    assert not WeightSparsity(8, 8).holds(shape, "BP")


def test_what_is_no_product_is_refused():
    with pytest.raises(InputError, match="1 <= n <= m"):
        WeightSparsity(3, 2)
    with pytest.raises(InputError, match="op='XX'"):
        LayerShape.product.__wrapped__(LayerShape("a", 1, 1), "XX", 1)
