"""Transformers models: getting them, and listening (and speaking) at named places inside them."""

from typing import Any

from apportion.models.capture import capture
from apportion.models.language import LanguageModel, load
from apportion.models.packaged import cache_dir, fetch
from apportion.models.site import Site
from apportion.models.splice import splice

__all__ = [
    "ActivationStore",
    "LanguageModel",
    "Site",
    "StoreView",
    "cache_dir",
    "capture",
    "fetch",
    "harvest",
    "load",
    "splice",
]

_LATER = {
    "ActivationStore": "apportion.models.activations",
    "StoreView": "apportion.models.activations",
    "harvest": "apportion.models.harvest",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LATER[name]), name)
    globals()[name] = value
    return value
