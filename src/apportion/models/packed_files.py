"""Checkpoints whose weights lie packed on disk, and how to read them; `apportion.weights.checkpoint` writes them.

A folder holds ``packed.safetensors``, ``packed.json`` (the manifest) and, for a transformers model, what transformers
keeps beside weights (``config.json``, the tokenizer ...). The manifest:

    {"kind": "apportion packed weights", "version": 1,
     "tensors": {"model.layers.0.mlp.up_proj.weight": {"format": "bitmap", "shape": [1536, 576], "dtype": "float32"}},
     "tied": {"lm_head.weight": "model.embed_tokens.weight"}}

A tensor ``NAME`` of format ``dense`` lies in the file under its name; one of another format as ``NAME/bits``,
``NAME/values`` ... (see `apportion.ops.spmm.formats`). A tied tensor is stored once, under its first name.
Reading checks that what is there fits the manifest; it needs none of our kernels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.data.files import read_json
from apportion.errors import InputError
from apportion.ops.spmm.formats import FORMATS, Packed

WEIGHTS, MANIFEST = "packed.safetensors", "packed.json"
KIND, VERSION = "apportion packed weights", 1
DTYPES = {
    str(each).removeprefix("torch."): each for each in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}


@dataclass(frozen=True)
class PackedState:
    """What a checkpoint holds.

    Attributes:
        weights: matrices that are packed, by name; none of format ``dense``.
        others: all other tensors, by name.
        tied: names of further places, and whose tensor stands there.
    """

    weights: dict[str, Packed]
    others: dict[str, Tensor]
    tied: dict[str, str]

    def dense(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The state dictionary, tied names included, with plain tensors; floating ones in ``dtype`` if one is given."""
        state = {name: each.unpack() for name, each in self.weights.items()} | dict(self.others)
        if dtype is not None:
            state = {name: each.to(dtype) if each.is_floating_point() else each for name, each in state.items()}
        return state | {name: state[other] for name, other in self.tied.items()}


def is_packed(folder: Path | str) -> bool:
    """Whether a folder holds such a checkpoint."""
    return (Path(folder) / MANIFEST).is_file()


def read_packed(folder: Path | str) -> PackedState:
    """Read a checkpoint, as it is packed.

    Raises:
        InputError: there is none, it is of a later version, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise InputError(f"{folder / MANIFEST} is no manifest of packed weights")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{folder / MANIFEST} has version {manifest.get('version')}: this apportion reads {VERSION}; update it"
        )
    try:
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise InputError(f"{folder / WEIGHTS} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS} cannot be read ({error}): it is damaged") from error
    try:
        return _state(manifest, tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / MANIFEST} does not describe its weights ({error}): it is damaged") from error
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def _state(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> PackedState:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, each in tensors.items():
        name, _, part = key.partition("/")
        parts.setdefault(name, {})[part] = each
    weights: dict[str, Packed] = {}
    others: dict[str, Tensor] = {}
    for name, entry in manifest["tensors"].items():
        found, shape, dtype = parts.get(name, {}), tuple(entry["shape"]), DTYPES.get(entry["dtype"])
        if entry["format"] == "dense":
            if "" not in found or tuple(found[""].shape) != shape:
                raise InputError(f"{name} is missing or not of shape {shape}: the file is damaged")
            others[name] = found[""]
            continue
        if entry["format"] not in FORMATS:
            raise InputError(f"{name} is of the unknown format {entry['format']!r}: update apportion")
        try:
            packed = FORMATS[entry["format"]].restore(shape, found, entry.get("settings", {}))
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if any(each.is_floating_point() and each.dtype != dtype for each in packed.tensors().values()):
            raise InputError(f"{name} is not of {entry['dtype']}: the file is damaged")
        weights[name] = packed
    tied = dict(manifest.get("tied", {}))
    for name, other in tied.items():
        if other not in weights and other not in others:
            raise InputError(f"{name} is tied to {other}, which is not there: the file is damaged")
    return PackedState(weights, others, tied)
