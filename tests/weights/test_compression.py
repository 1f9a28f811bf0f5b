"""Compressing swaps pruned layers for packed ones, and says what it did; decompressing is the way back."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from apportion.errors import InputError
from apportion.models import LanguageModel, load
from apportion.weights import compression as compressing
from apportion.weights.compression import compress, decompress
from apportion.weights.crossover import Crossover
from apportion.weights.sparse_linear import SparseLinear
from tiny_families import tiny_model


def prune(model: nn.Module, share: float = 0.8) -> None:
    with torch.no_grad():
        for name, each in model.named_modules():
            if isinstance(each, nn.Linear) and "head" not in name:
                cut = each.weight.abs().flatten().kthvalue(int(each.weight.numel() * share)).values
                each.weight.mul_(each.weight.abs() > cut)


@pytest.fixture
def lm(tiny_llama: Path) -> LanguageModel:
    found = load(tiny_llama)
    prune(found.model)
    return found


def logits(lm: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.arange(5, 25)[None]).logits


def test_a_compressed_model_computes_and_writes_the_same(lm):
    before, text = logits(lm), lm.generate("The value of", tokens=6)
    weights = {name: each.clone() for name, each in lm.model.state_dict().items()}
    report = compress(lm)
    assert len(report.packed) == 21 == sum(isinstance(each, SparseLinear) for each in lm.model.modules())
    torch.testing.assert_close(logits(lm), before, rtol=1e-4, atol=1e-4)
    assert lm.generate("The value of", tokens=6) == text
    assert decompress(lm) == 21
    assert torch.equal(logits(lm), before)
    assert all(torch.equal(each, weights[name]) for name, each in lm.model.state_dict().items())


def test_the_report_counts_what_lies_in_memory(lm):
    report = compress(lm)
    assert all(each.bytes == lm.model.get_submodule(each.name).nbytes for each in report.packed)
    assert all(each.dense_bytes == each.shape[0] * each.shape[1] * 4 for each in report.layers)
    assert all(0.79 < each.sparsity < 0.82 and not each.reason for each in report.packed)
    head = next(each for each in report.layers if each.name == "lm_head")
    assert head.reason == "its weight is tied to another module's"
    assert head.bytes == head.dense_bytes
    assert report.bytes == sum(each.bytes for each in report.layers) < report.dense_bytes


def test_layers_with_few_zeros_and_formats_that_do_not_fit_stay_dense():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    prune(model[:1], 0.5)
    report = compress(model)
    assert isinstance(model[0], SparseLinear)
    assert type(model[1]) is nn.Linear
    assert report.layers[1].reason == "0.0% zeros, below 40%"
    decompress(model)
    assert "keeps to none of" in compress(model, "nm").layers[0].reason
    assert [each.format for each in compress(model, minimum_sparsity=0).layers] == ["bitmap", "bitmap"]


def test_layers_of_other_kinds_are_listed_too():
    lm = LanguageModel("gpt2", copy.deepcopy(tiny_model("gpt2")), None)
    report = compress(lm)
    kinds = {each.name: type(lm.model.get_submodule(each.name)).__name__ for each in report.layers}
    own = {each.name: each for each in report.layers if kinds[each.name] == "Conv1D"}
    assert len(own) == 4 * 3
    assert {each.reason for each in own.values()} == {"it is of the kind Conv1D: only nn.Linear is packed"}
    widening = own["transformer.h.0.mlp.c_fc"]
    assert widening.shape == tuple(reversed(lm.model.transformer.h[0].mlp.c_fc.weight.shape))
    assert widening.bytes == widening.dense_bytes == 4 * widening.shape[0] * widening.shape[1]
    pictures = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 8))
    layers = compress(pictures, minimum_sparsity=0).layers
    assert [(each.shape, each.reason) for each in layers] == [
        ((8, 27), "it is of the kind Conv2d: only nn.Linear is packed"),
        ((8, 8), ""),
    ]


def test_what_is_measured_decides(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    prune(model, 0.9)

    def measured(weight):
        best = 2.0 if len(weight) == 64 else 0.5
        ways = {"dense": 1.0, "csr": 3.0, "nonzeros": best, "panels": 9.0}
        return Crossover(dict.fromkeys((1, 4, 16, 64), ways))

    monkeypatch.setattr(compressing, "measure_crossover", measured)
    monkeypatch.setattr("apportion.weights.sparse_linear.measure_crossover", measured)
    report = compress(model, measure=True)
    assert [type(each) for each in model] == [nn.Linear, SparseLinear]
    assert report.layers[0].reason == "dense is 2.00 times as fast for one row"


def test_values_may_be_stored_in_bfloat16(lm):
    before = logits(lm)
    report = compress(lm, dtype=torch.bfloat16)
    assert sum(each.bytes for each in report.packed) < sum(each.dense_bytes for each in report.packed) / 3
    torch.testing.assert_close(logits(lm), before, rtol=0.1, atol=0.2)
    decompress(lm, torch.float32)
    assert {each.dtype for each in lm.model.parameters()} == {torch.float32}


def test_bad_input_changes_nothing(lm):
    for given, message in (({"format": "coo"}, "cannot be run"), ({"minimum_sparsity": 2.0}, "a share between")):
        with pytest.raises(InputError, match=message):
            compress(lm, **given)
    with pytest.raises(TypeError, match="torch module"):
        compress("smollm2")
    assert decompress(lm) == 0
    alone = nn.Linear(8, 8)
    prune(alone, 0.9)
    assert "the model itself" in compress(alone).layers[0].reason
