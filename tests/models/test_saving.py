import copy

import pytest
import torch

from apportion.errors import InputError
from apportion.models import load
from apportion.models.saving import save_model
from apportion.weights import add_masks, remove_masks

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def halved(tiny_llama):
    lm = load(tiny_llama)
    add_masks(lm.model, {LAYER: torch.rand(64, 32, generator=torch.Generator().manual_seed(0)) > 0.5})
    return lm


def test_a_model_comes_back_with_its_zeros_and_its_tokenizer(halved, tmp_path):
    remove_masks(halved.model)
    (tmp_path / "notes.txt").write_text("mine")
    save_model(halved, tmp_path)
    again = load(tmp_path)
    for (name, one), (other_name, other) in zip(
        halved.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other)
    assert 0.4 < float((again.model.get_submodule(LAYER).weight == 0).float().mean()) < 0.6
    assert again.tokenizer.get_vocab() == halved.tokenizer.get_vocab()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))
    save_model(again, tmp_path)


def test_a_model_under_masks_is_not_written(halved, tmp_path):
    with pytest.raises(InputError, match="remove_masks"):
        save_model(halved, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tiny_llama, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        save_model(copy.copy(load(tiny_llama)), tmp_path / "file" / "model")
