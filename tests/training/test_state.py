"""What is remembered, and how two runs are told apart."""

import pytest
import torch
from torch import nn

from apportion.training.state import (
    differences,
    identity,
    module_tensors,
    optimizer_numbers,
    optimizer_tensors,
    parameter_names,
)


def step_of(optimizer_class, module, **options):
    optimizer = optimizer_class(module.parameters(), lr=0.1, **options)
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return optimizer


def test_optimizer_tensors_are_named_after_their_parameter():
    module = nn.Linear(4, 3)
    optimizer = step_of(torch.optim.Adam, module)
    tensors = optimizer_tensors(optimizer, module)
    keys = ("step", "exp_avg", "exp_avg_sq")
    assert set(tensors) == {f"{name}.{key}" for name in ("weight", "bias") for key in keys}
    assert tensors["weight.exp_avg"].shape == (3, 4)
    # The very tensors, not copies: a checkpoint must not double the memory of the run.
    assert tensors["weight.exp_avg"].data_ptr() == optimizer.state[module.weight]["exp_avg"].data_ptr()


def test_optimizer_state_that_json_cannot_hold_is_refused():
    module = nn.Linear(4, 3)
    optimizer = step_of(torch.optim.Adam, module)
    optimizer.state[module.weight]["thing"] = object()
    with pytest.raises(TypeError, match="not JSON serializable"):
        optimizer_numbers(optimizer, module)


def test_optimizer_of_another_module_is_refused():
    optimizer = torch.optim.Adam(nn.Linear(4, 3).parameters())
    with pytest.raises(ValueError, match="a parameter that is not the module's"):
        parameter_names(optimizer, nn.Linear(4, 3))


def test_tied_tensors_are_remembered_once_and_buffers_always(regressor):
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert set(module_tensors(tied)) == {"0.weight", "0.bias", "1.bias"}
    assert {"mean", "seen"} <= set(module_tensors(regressor()))


def test_module_with_state_that_is_no_tensor_is_refused():
    class Counts(nn.Linear):
        def get_extra_state(self):
            return {"count": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(TypeError, match="_extra_state is a dict: a checkpoint holds tensors only"):
        module_tensors(Counts(4, 3))


def test_how_the_optimizer_is_computed_is_no_difference():
    module = nn.Linear(4, 3)
    one, other = (
        identity(module, torch.optim.Adam(module.parameters(), fused=fused), {}, {}, {}) for fused in (True, False)
    )
    assert differences(one, other) == []


def test_differences_name_where_and_what():
    saved = {"a": {"b": 1, "c": [1, 2]}, "gone": True}
    current = {"a": {"b": 2, "c": (1, 2)}, "new": None}
    assert differences(saved, current) == [
        "a.b (checkpoint: 1, this run: 2)",
        'gone (checkpoint: true, this run: "absent")',
        'new (checkpoint: "absent", this run: null)',
    ]
