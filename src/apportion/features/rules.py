"""Rules of a dictionary as JSON and by the names people type."""

from dataclasses import asdict
from typing import Any

import torch

from apportion.allocate import FeatureChoice, MutualChoice, Rule, Threshold, TokenChoice, Uniform, Zipf
from apportion.errors import InputError
from apportion.features.jump_relu import LearnedThreshold

_BY_CLASS: dict[str, type] = {
    each.__name__: each for each in (TokenChoice, MutualChoice, FeatureChoice, Threshold, LearnedThreshold)
}
_PROFILES: dict[str, type] = {"Uniform": Uniform, "Zipf": Zipf}


def rule_to_dict(rule: Rule | LearnedThreshold) -> dict[str, Any]:
    """A rule as JSON-ready values; ``rule_from_dict`` reads them back."""
    if isinstance(rule, Threshold):
        if isinstance(rule.theta, torch.Tensor):
            return {"name": "Threshold", "theta": rule.theta.tolist()}
        return {"name": "Threshold", "theta": rule.theta}
    content = {"name": type(rule).__name__, **asdict(rule)}  # type: ignore[arg-type]
    if isinstance(rule, FeatureChoice):
        content["profile"] = {"name": type(rule.profile).__name__, **asdict(rule.profile)}
    return content


def rule_from_dict(content: dict[str, Any]) -> Rule | LearnedThreshold:
    """The rule that ``rule_to_dict`` described.

    Raises:
        InputError: unknown name.
    """
    arguments = dict(content)
    name = arguments.pop("name")
    if name not in _BY_CLASS:
        raise InputError(f"rule {name!r} is unknown: one of {', '.join(_BY_CLASS)}")
    if "profile" in arguments:
        profile = dict(arguments["profile"])
        arguments["profile"] = _PROFILES[profile.pop("name")](**profile)
    if isinstance(arguments.get("theta"), list):
        arguments["theta"] = torch.tensor(arguments["theta"])
    return _BY_CLASS[name](**arguments)
