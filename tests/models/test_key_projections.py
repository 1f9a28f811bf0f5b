"""The linear maps of keys and values, on families that keep them in different ways."""

from typing import Any

import pytest
import torch

from apportion.keys.trace import watch_steps
from apportion.models import LanguageModel
from apportion.models.key_memory import Step
from apportion.models.key_projections import key_projections
from biased_models import biased_model
from tiny_families import tiny_model

BIASED = ["llama", "qwen2", "gpt2", "gpt_neox", "opt_350m"]
OTHERS = ["qwen3", "gemma", "gemma2", "phi"]
IDS = torch.randint(3, 97, (9,), generator=torch.Generator().manual_seed(2))


def _steps(model: Any) -> dict[int, Step]:
    steps: dict[int, Step] = {}
    watch_steps(LanguageModel("tiny", model, None), [IDS], steps.__setitem__)
    return steps


@pytest.mark.parametrize("family", BIASED + OTHERS)
def test_the_maps_give_the_keys_and_values_of_any_text(family: str) -> None:
    model = biased_model(family, torch.float32) if family in BIASED else tiny_model(family)
    steps, maps = _steps(model), key_projections(model)
    assert maps.keys() == steps.keys()
    for layer, step in steps.items():
        keys, values = (each.transpose(1, 2).flatten(2) for each in (step.unrotated_keys(), step.values))
        assert (maps[layer].keys is None) == (family == "qwen3"), "its keys are normed"
        if maps[layer].keys is not None:
            torch.testing.assert_close(maps[layer].keys(step.hidden), keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(maps[layer].values(step.hidden), values, rtol=1e-4, atol=1e-5)


def test_they_are_the_weights_that_a_model_has() -> None:
    model = tiny_model("llama")
    found = key_projections(model)[1].keys
    assert torch.equal(found.weight, model.model.layers[1].self_attn.k_proj.weight.T)
    assert found.bias.abs().max() == 0
    model = biased_model("qwen2", torch.float32)
    torch.testing.assert_close(key_projections(model)[2].values.bias, model.model.layers[2].self_attn.v_proj.bias)
