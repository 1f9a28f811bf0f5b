"""What a run must remember to go on exactly: tensors by name, a few numbers, torch's random stream."""

import base64
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# How the optimiser is computed, not what: free to differ between the machine that saved and the one that resumes.
_IMPLEMENTATION_FLAGS = ("params", "foreach", "fused", "capturable", "differentiable")


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each tied tensor once, without gradients.

    Buffers outside the module's ``state_dict`` (``persistent=False``) are included: a run that changes them
    would not resume exactly without them.

    Raises:
        TypeError: the module keeps extra state that is not a tensor.
    """
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}: a checkpoint holds tensors only, make it a buffer")
    tensors = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return tensors | dict(module.named_buffers())


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimiser's tensors as ``{parameter name}.{key}``, such as ``encoder.weight.exp_avg``."""
    state = _state_by_name(optimizer, module)
    return {f"{name}.{key}": value for (name, key), value in state.items() if isinstance(value, Tensor)}


def optimizer_numbers(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Any]:
    """What the optimiser knows beside tensors, ready for JSON: counters by parameter, values by parameter group.

    Raises:
        TypeError: it holds something that JSON cannot.
    """
    numbers: dict[str, Any] = {
        "state": [
            [name, key, value]
            for (name, key), value in _state_by_name(optimizer, module).items()
            if not isinstance(value, Tensor)
        ],
        "groups": [_plain_group(group) for group in optimizer.param_groups],
    }
    json.dumps(numbers)
    return numbers


def restore_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy ``tensors`` into the module, in place, so that the optimiser keeps its parameters."""
    for name, own in module_tensors(module).items():
        own.copy_(tensors[name])


def restore_optimizer(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Undo `optimizer_tensors` and `optimizer_numbers` on a fresh optimiser of the same module."""
    saved: dict[str, dict[str, Any]] = {}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit(".", 1)
        # A clone, because what safetensors loads may be a view of the file, which goes when newer ones come.
        saved.setdefault(name, {})[key] = tensor.clone()
    for name, key, value in numbers["state"]:
        saved.setdefault(name, {})[key] = value
    fresh = optimizer.state_dict()
    names = parameter_names(optimizer, module)
    groups = [
        group | {key: tuple(value) if isinstance(value, list) else value for key, value in loaded.items()}
        for group, loaded in zip(fresh["param_groups"], numbers["groups"], strict=True)
    ]
    state = {index: saved[name] for index, name in enumerate(names) if name in saved}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def parameter_names(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[str]:
    """Names of the optimiser's parameters, in its order.

    Raises:
        ValueError: it trains a parameter that the module does not have.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(parameter not in names for parameter in parameters):
        raise ValueError("the optimizer trains a parameter that is not the module's: build it from the given ones")
    return [names[parameter] for parameter in parameters]


def random_state(device: torch.device) -> dict[str, str]:
    """State of torch's random streams (the processor's and, on CUDA, the device's) as base64 text."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def restore_random_state(states: Mapping[str, str], device: torch.device) -> None:
    """Undo `random_state`; a run that moved from one kind of device to another keeps what it can."""
    torch.set_rng_state(_decode(states["cpu"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_decode(states["cuda"]), device)


def identity(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> dict[str, Any]:
    """What two runs must share for one to continue the other, ready for JSON. Taken before the first step.

    ``tensors`` are those of the module as all processes together have them.
    """
    return {
        "settings": dict(settings),
        "provenance": dict(provenance),
        "tensors": {
            name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for name, tensor in tensors.items()
        },
        "optimizer": {
            "class": type(optimizer).__name__,
            "parameters": parameter_names(optimizer, module),
            "groups": {str(index): _plain_group(group) for index, group in enumerate(optimizer.param_groups)},
        },
    }


def differences(saved: Any, current: Any, name: str = "") -> list[str]:
    """Where two JSON values differ, one phrase each: ``settings.steps (checkpoint: 10, this run: 20)``."""
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = list(saved) + [key for key in current if key not in saved]
        return [
            phrase
            for key in keys
            for phrase in differences(saved.get(key, "absent"), current.get(key, "absent"), f"{name}.{key}".strip("."))
        ]
    saved, current = json.dumps(saved), json.dumps(current)
    return [] if saved == current else [f"{name} (checkpoint: {saved}, this run: {current})"]


def _state_by_name(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[tuple[str, str], Any]:
    names = parameter_names(optimizer, module)
    return {
        (names[index], key): value
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }


def _plain_group(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _IMPLEMENTATION_FLAGS}


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
