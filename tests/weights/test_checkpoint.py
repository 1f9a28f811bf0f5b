"""Packed checkpoints are smaller, and give back every bit: dense, packed, and by a plain reader without our code."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from apportion.errors import InputError
from apportion.models import LanguageModel, load
from apportion.models.packed_files import is_packed
from apportion.weights.checkpoint import (
    load_compressed,
    load_dense,
    save_compressed,
    save_transformers,
    to_transformers,
)
from apportion.weights.compression import compress
from apportion.weights.layers import prunable
from apportion.weights.sparse_linear import SparseLinear, bytes_by_format
from tiny_families import tiny_model


def prune(model: nn.Module, share: float = 0.8) -> None:
    with torch.no_grad():
        for name, each in model.named_modules():
            if isinstance(each, nn.Linear) and "head" not in name:
                cut = each.weight.abs().flatten().kthvalue(int(each.weight.numel() * share)).values
                each.weight.copy_(torch.where(each.weight.abs() > cut, each.weight, 0.0))


@pytest.fixture
def lm(tiny_llama: Path) -> LanguageModel:
    found = load(tiny_llama)
    prune(found.model)
    return found


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == each.dtype and torch.equal(found[name], each) for name, each in wanted.items()
    )


@pytest.mark.parametrize("format", ["auto", "bitmap", "csr", "nm", "block", "dense"])
def test_every_bit_comes_back(lm, tmp_path, format):
    saved = save_compressed(lm, tmp_path, format)
    wanted = lm.model.state_dict()
    assert same(load_dense(tmp_path), wanted)
    again = load(tmp_path)
    assert same(again.model.state_dict(), wanted)
    assert again.model.lm_head.weight is again.model.model.embed_tokens.weight
    assert again.generate("The value of", tokens=5) == lm.generate("The value of", tokens=5)
    assert saved.bytes == (tmp_path / "packed.safetensors").stat().st_size
    if format in ("auto", "bitmap"):
        assert saved.bytes < saved.dense_bytes * 0.8
    if format == "dense":
        assert {each.format for each in saved.weights} == {"dense"}


def test_what_was_packed_stays_packed(lm, tmp_path):
    save_compressed(lm, tmp_path / "a")
    packed = load_compressed(tmp_path / "a")
    assert sum(isinstance(each, SparseLinear) for each in packed.model.modules()) == 21
    assert packed.generate("The value of", tokens=5) == lm.generate("The value of", tokens=5)
    save_compressed(packed, tmp_path / "b")
    assert same(load_file(tmp_path / "b" / "packed.safetensors"), load_file(tmp_path / "a" / "packed.safetensors"))
    assert (tmp_path / "a" / "packed.json").read_text() == (tmp_path / "b" / "packed.json").read_text()


# Reads a checkpoint in a process of its own and prints by how many bytes its memory grew at the most.
PEAK = """
import sys, torch
torch.set_num_threads(1)
from apportion.models import load
from apportion.weights.checkpoint import load_compressed
def read(what):
    line = next(each for each in open("/proc/self/status") if each.startswith(what))
    return 1024 * int(line.split()[1])
how = {"packed": load_compressed, "dense": load}[sys.argv[1]]
how(sys.argv[2])  # a small one first: what is imported and made once
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forgets the peak so far
before = read("VmRSS")
model = how(sys.argv[3])
print(read("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_reading_takes_the_memory_of_the_packed_model(lm, tmp_path):
    config = copy.deepcopy(lm.model.config)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 1536, 8
    large = LanguageModel("large", type(lm.model)(config), lm.tokenizer)
    with torch.no_grad():
        for each in large.model.model.layers.modules():
            if isinstance(each, nn.Linear):
                each.weight.mul_(torch.rand_like(each.weight) < 0.1)
    save_compressed(lm, tmp_path / "small")
    saved = save_compressed(large, tmp_path / "large")
    # With a fixed threshold the allocator gives each tensor back at once, or else peaks differ by what it retains.
    surroundings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    peak = {}
    for how in ("packed", "dense"):
        command = [sys.executable, "-c", PEAK, how, str(tmp_path / "small"), str(tmp_path / "large")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=surroundings)
        peak[how] = int(done.stdout)
    assert peak["dense"] > 0.9 * saved.dense_bytes
    # The file as it is mapped, and beside it the layers as kernels read them.
    assert peak["packed"] < 3 * saved.bytes < 0.45 * saved.dense_bytes


def test_the_report_says_what_runs_dense_and_why(lm, tmp_path):
    with torch.no_grad():
        lm.model.model.layers[0].mlp.up_proj.weight.fill_(1)
    saved = save_compressed(lm, tmp_path)
    module = load_compressed(tmp_path).model
    for each in saved.weights:
        packed = isinstance(module.get_submodule(each.name.removesuffix(".weight")), SparseLinear)
        assert packed == (not each.runs_dense)
    reasons = {each.name: each.runs_dense for each in saved.weights if each.runs_dense}
    assert reasons == {
        "model.embed_tokens.weight": "its weight is tied to another module's",
        "model.layers.0.mlp.up_proj.weight": "no format makes it smaller",
    }
    gpt2 = LanguageModel("gpt2", copy.deepcopy(tiny_model("gpt2")), lm.tokenizer)
    prune_all(gpt2)
    found = {each.name: each for each in save_compressed(gpt2, tmp_path / "gpt2").weights}
    assert found["transformer.h.0.mlp.c_fc.weight"].format == "bitmap"
    assert found["transformer.h.0.mlp.c_fc.weight"].runs_dense == "it is of the kind Conv1D: only nn.Linear is packed"
    assert found["transformer.wpe.weight"].runs_dense == "it is of the kind Embedding: only nn.Linear is packed"
    again = load_compressed(tmp_path / "gpt2")
    assert same(again.model.state_dict(), gpt2.model.state_dict())


def prune_all(lm):
    with torch.no_grad():
        for each in prunable(lm.model):
            each.set_matrix(each.matrix() * (torch.rand_like(each.matrix()) < 0.2))


def test_tied_embeddings_are_stored_once(lm, tmp_path):
    save_compressed(lm, tmp_path)
    manifest = json.loads((tmp_path / "packed.json").read_text())
    assert manifest["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in manifest["tensors"]


def test_bytes_are_those_of_the_tensors(lm, tmp_path):
    saved = save_compressed(lm, tmp_path, dtype=torch.bfloat16)
    with safe_open(tmp_path / "packed.safetensors", "pt") as file:
        names = set(file.keys())
        for each in saved.weights:
            parts = [name for name in names if name.partition("/")[0] == each.name]
            assert sum(file.get_tensor(part).nbytes for part in parts) == each.bytes == min(each.by_format.values())
    assert saved.dense_bytes == sum(each.nbytes for each in lm.model.parameters())


def test_a_plain_module_goes_there_and_back(tmp_path):
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 64, bias=False))
    prune(model)
    compress(model)
    save_compressed(model, tmp_path)
    other = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 64, bias=False))
    assert load_compressed(tmp_path, into=other) is other
    assert isinstance(other[0], SparseLinear)
    x = torch.randn(3, 64)
    assert torch.equal(other.eval()(x), model.eval()(x))
    with pytest.raises(InputError, match=r"without config\.json"):
        load_compressed(tmp_path)
    with pytest.raises(InputError, match="into does not fit"):
        load_compressed(tmp_path, into=nn.Linear(3, 3))


def test_the_way_back_is_a_checkpoint_of_transformers(lm, tmp_path, tiny_llama):
    save_compressed(lm, tmp_path / "small")
    to_transformers(tmp_path / "small", tmp_path / "plain")
    assert {each.name for each in tiny_llama.iterdir()} <= {each.name for each in (tmp_path / "plain").iterdir()}
    assert same(load(tmp_path / "plain").model.state_dict(), lm.model.state_dict())
    compress(lm)
    with pytest.raises(InputError, match="decompress it first"):
        save_transformers(lm, tmp_path / "other")


def test_a_plain_model_takes_the_place_of_a_packed_one(lm, tmp_path):
    prune(lm.model)
    save_compressed(lm, tmp_path)
    lm.model.lm_head.weight.data += 1
    save_transformers(lm, tmp_path)
    assert not is_packed(tmp_path)
    assert same(load(tmp_path).model.state_dict(), lm.model.state_dict())


def test_a_reader_of_a_few_lines_needs_nothing_of_ours(lm, tmp_path):
    save_compressed(lm, tmp_path, "bitmap")
    text = (Path(__file__).parents[2] / "docs/rooms/weights/flash_llm.md").read_text()
    reader = next(block for block in text.split("```python\n")[1:] if "def read_weights" in block).split("```")[0]
    assert len(reader.splitlines()) < 40
    assert "apportion" not in reader.replace("apportion packed", "")
    scope: dict = {}
    exec(reader, scope)
    found = scope["read_weights"](tmp_path)
    wanted = lm.model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], each.numpy()) for name, each in wanted.items())
    one = lm.model.model.layers[0].mlp.up_proj
    for format, settings in (("csr", {}), ("nm", {}), ("block", {})):
        with torch.no_grad():
            one.weight.copy_(torch.where(torch.arange(one.in_features) % 4 == 0, one.weight, 0.0))
        save_compressed(lm, tmp_path, format)
        found = scope["read_weights"](tmp_path)
        assert np.array_equal(found["model.layers.0.mlp.up_proj.weight"], one.weight.numpy()), (format, settings)


def test_bytes_in_every_format():
    weight = torch.zeros(32, 64)
    weight[:, ::4] = 1
    found = bytes_by_format(weight)
    assert found == {"dense": 8192, "bitmap": 2304, "csr": 132 + 512 * 6, "nm": 2048 + 32 * 4, "block": 12 + 8 * 1028}


# Bad input


def test_a_damaged_checkpoint_is_refused(lm, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_dense(tmp_path)
    save_compressed(lm, tmp_path)
    manifest = json.loads((tmp_path / "packed.json").read_text())
    tensors = load_file(tmp_path / "packed.safetensors")
    name = next(each for each, entry in manifest["tensors"].items() if entry["format"] == "bitmap")

    def refused(changed: dict, message: str) -> None:
        (tmp_path / "packed.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            load(tmp_path)

    refused(manifest | {"version": 2}, "has version 2")
    refused(manifest | {"kind": "other"}, "no manifest")
    refused({"kind": manifest["kind"], "version": 1}, "does not describe")
    refused(manifest | {"tied": {"x": "y"}}, "tied to y")
    entry = manifest["tensors"][name]
    for change, message in (
        ({"format": "coo"}, "unknown format"),
        ({"shape": [3, 3]}, "damaged"),
        ({"dtype": "bfloat16"}, "is not of bfloat16"),
        ({"format": "dense"}, "missing or not of shape"),
    ):
        refused(manifest | {"tensors": manifest["tensors"] | {name: entry | change}}, message)
    (tmp_path / "packed.json").write_text(json.dumps(manifest))
    save_file({key: each for key, each in tensors.items() if key != f"{name}/bits"}, tmp_path / "packed.safetensors")
    with pytest.raises(InputError, match="lacks 'bits'"):
        load(tmp_path)
    (tmp_path / "packed.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "packed.safetensors").unlink()
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path)


def test_what_cannot_be_written_says_so(lm, tmp_path):
    with pytest.raises(InputError, match="format 'coo' is unknown"):
        save_compressed(lm, tmp_path, "coo")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        save_compressed(lm, tmp_path / "file")
    with pytest.raises(InputError, match="cannot write"):
        save_compressed(lm, tmp_path / "file" / "below")
