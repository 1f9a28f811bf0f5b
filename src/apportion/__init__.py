"""Sparsity as one question: who gets the budget?

The names below load on first use, so that ``import apportion`` stays quick::

    import apportion

    model = apportion.load("smollm2")
    dictionary = apportion.SparseAutoencoder(576, 4608, rule=apportion.MutualChoice(budget=32))
"""

import importlib
from typing import TYPE_CHECKING, Any

from apportion.errors import InputError

if TYPE_CHECKING:
    from apportion.allocate import (
        Allocation,
        Blocks,
        FeatureChoice,
        MutualChoice,
        NofM,
        Threshold,
        TokenChoice,
    )
    from apportion.features import SparseAutoencoder
    from apportion.models import load

__version__ = "0.1.0"

__all__ = [
    "Allocation",
    "Blocks",
    "FeatureChoice",
    "InputError",
    "MutualChoice",
    "NofM",
    "SparseAutoencoder",
    "Threshold",
    "TokenChoice",
    "__version__",
    "load",
]

_HOME_OF = {
    "Allocation": "apportion.allocate",
    "Blocks": "apportion.allocate",
    "FeatureChoice": "apportion.allocate",
    "MutualChoice": "apportion.allocate",
    "NofM": "apportion.allocate",
    "Threshold": "apportion.allocate",
    "TokenChoice": "apportion.allocate",
    "SparseAutoencoder": "apportion.features",
    "load": "apportion.models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'apportion' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
