import copy

import pytest
import torch
from torch import nn

from apportion.errors import InputError
from apportion.weights import WeightLayer, add_masks, masks_of, prunable
from tiny_families import tiny_model


def test_takes_linear_and_convolutional_layers_but_no_depthwise_ones():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Flatten(),
        nn.Linear(8, 4),
        nn.LayerNorm(4),
    )
    assert [each.name for each in prunable(network)] == ["0", "4"]


def test_patterns_of_names_choose():
    network = nn.ModuleDict({"mlp": nn.Linear(4, 4), "attn": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    assert [each.name for each in prunable(network, exclude=["head"])] == ["mlp", "attn"]
    assert [each.name for each in prunable(network, include=["a*"])] == ["attn"]
    assert [each.name for each in prunable(network, where=lambda name, _: name != "mlp")] == ["attn", "head"]


def test_a_shared_weight_is_pruned_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    assert [each.name for each in prunable(nn.Sequential(first, second))] == ["0"]


def test_nothing_left_says_what_there_is():
    with pytest.raises(InputError, match=r"include=\['nope'\].*names such as 0"):
        prunable(nn.Sequential(nn.Linear(2, 2)), include=["nope"])


def test_a_convolution_has_its_input_channels_side_by_side():
    layer = WeightLayer("c", nn.Conv2d(3, 2, (2, 2)))
    matrix = layer.matrix()
    assert torch.equal(matrix[1, :3], layer.weight[1, :, 0, 0])
    assert torch.equal(layer.from_matrix(matrix), layer.weight)
    assert layer.from_matrix(matrix).shape == (2, 3, 2, 2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_decoder_is_pruned_without_its_head_and_embeddings(family):
    model = copy.deepcopy(tiny_model(family))  # it is shared with other tests
    layers = prunable(model)
    assert not any("head" in each.name or "emb" in each.name for each in layers)
    up = next(each for each in layers if each.name.endswith(("up_proj", "c_fc")))
    assert up.matrix().shape[0] > up.matrix().shape[1]  # outputs first, in GPT-2's turned layers too
    add_masks(model, {up.name: torch.zeros(up.matrix().shape, dtype=torch.bool)})
    assert int(up.matrix().count_nonzero()) == 0
    assert masks_of(model)[up.name].shape == up.matrix().shape


def test_a_tied_head_is_refused():
    model = copy.deepcopy(tiny_model("llama"))
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(InputError, match=r"lm_head shares its weight with the embedding model\.embed_tokens"):
        prunable(model, include=["lm_head"])
