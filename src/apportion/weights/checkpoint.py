"""Writing models with pruned weights so that the files are as much smaller as the weights are, and reading them.

    save_compressed(lm, "pruned-small")              # every matrix in its smallest format
    apportion.models.load("pruned-small")            # dense, as any folder (also from the command line)
    load_compressed("pruned-small")                  # packed layers stay packed: SparseLinear
    to_transformers("pruned-small", "pruned")        # a plain transformers checkpoint again

`apportion.models.packed_files` describes the files. What is read is what was written, bit for bit, but that ``-0.0`` is
``0.0`` where a matrix is packed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apportion.data.files import write_atomically, write_json
from apportion.errors import InputError
from apportion.models import LanguageModel, load
from apportion.models.families import transformer_of
from apportion.models.language import device_named, load_around
from apportion.models.packed_files import DTYPES, KIND, MANIFEST, VERSION, WEIGHTS, PackedState, read_packed
from apportion.models.saving import save_model
from apportion.ops.spmm.formats import FORMATS, Dense, Packed
from apportion.weights.compression import other_kind, replace_module
from apportion.weights.sparse_linear import SparseLinear, bytes_by_format, smallest


@dataclass(frozen=True)
class SavedWeight:
    """One matrix of a checkpoint.

    Attributes:
        name: in the state dictionary.
        shape: rows and columns.
        nonzeros: how many there are.
        format: that it is written in.
        bytes: that it takes in the file.
        dense_bytes: that it took in the model.
        by_format: bytes in every format that can hold it, in the type that is written.
        runs_dense: why `load_compressed` makes it dense, or finds it so; empty where it stays packed.
    """

    name: str
    shape: tuple[int, int]
    nonzeros: int
    format: str
    bytes: int
    dense_bytes: int
    by_format: dict[str, int]
    runs_dense: str = ""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint takes.

    Attributes:
        folder: where it is.
        weights: its matrices.
        bytes: of the file of weights.
        dense_bytes: of all tensors of the model, tied ones once.
    """

    folder: Path
    weights: tuple[SavedWeight, ...]
    bytes: int
    dense_bytes: int


@torch.no_grad()
def save_compressed(model: Any, folder: Path | str, format: str = "auto", dtype: torch.dtype | None = None) -> Saved:
    """Write a model with its matrices packed.

    Args:
        model: a `LanguageModel` or any module; layers may be dense with zeros, or packed already.
        folder: where to; made if it is not there.
        format: of every matrix that it can hold and that it makes smaller, or ``auto``: the smallest for each.
        dtype: to write floating-point tensors in, instead of their own.

    Raises:
        InputError: an unknown format, or a folder that cannot be written.
    """
    from safetensors.torch import save_file

    if format != "auto" and format not in FORMATS:
        raise InputError(f"format {format!r} is unknown: choose from auto, {', '.join(FORMATS)}")
    folder, module = Path(folder), transformer_of(model)
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    tied: dict[str, str] = {}
    weights, dense_bytes = [], 0
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in _state(module):
        if tensor.numel() and not isinstance(_owner(module, name), SparseLinear):
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.device)
            if key in first:
                tied[name] = first[key]
                continue
            first[key] = name
        written = tensor.detach() if dtype is None or not tensor.is_floating_point() else tensor.detach().to(dtype)
        dense_bytes += tensor.nbytes
        packed = _packed(module, name, written, format)
        entry: dict[str, Any] = {"format": packed.name, "shape": list(tensor.shape), "dtype": _name(written.dtype)}
        if isinstance(packed, Dense):
            tensors[name] = written.cpu().contiguous()
        else:
            tensors |= {f"{name}/{part}": each.cpu().contiguous() for part, each in packed.tensors().items()}
            entry |= {"settings": packed.settings()} if packed.settings() else {}
        entries[name] = entry
        if written.dim() == 2 and written.is_floating_point():
            weights.append(_described(name, written, packed, tensor.nbytes))
    _writable(folder)
    # Whoever is killed from here on leaves no manifest beside weights that it does not describe.
    (folder / MANIFEST).unlink(missing_ok=True)
    _save_surroundings(model, folder)
    with write_atomically(folder / WEIGHTS) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    write_json(folder / MANIFEST, {"kind": KIND, "version": VERSION, "tensors": entries, "tied": tied})
    weights = [replace(each, runs_dense=_why_dense(module, each, set(tied.values()))) for each in weights]
    return Saved(folder, tuple(weights), (folder / WEIGHTS).stat().st_size, dense_bytes)


def load_dense(folder: Path | str) -> dict[str, Tensor]:
    """The state dictionary of a checkpoint, with plain tensors; for modules that are no transformers models.

    Raises:
        InputError: there is no whole checkpoint of packed weights.
    """
    return read_packed(folder).dense()


@torch.no_grad()
def load_compressed(
    folder: Path | str, dtype: str = "float32", device: str = "cpu", *, into: nn.Module | None = None
) -> Any:
    """A model whose packed linear layers stay packed; it is never in memory as a dense one.

    Args:
        folder: of `save_compressed`.
        dtype: of what is computed, and of dense weights; packed values keep their own.
        device: where to.
        into: a module of the right structure to fill instead of a transformers model; it is changed in place.

    Returns:
        The `LanguageModel`, or the module that was filled.

    Raises:
        InputError: there is no whole checkpoint of packed weights, or ``into`` has another structure.
    """
    state = read_packed(folder)

    def stand_ins(module: nn.Module, number: torch.dtype | None) -> dict[str, Tensor]:
        """One number in the place of each matrix that stays packed."""
        kept = {name: state.weights[name] for name in _stay_packed(module, state)}
        rest = {name: each for name, each in state.weights.items() if name not in kept}
        zero = torch.zeros((), dtype=number)
        return replace(state, weights=rest).dense(number) | {n: zero.expand(each.shape) for n, each in kept.items()}

    def swap(module: nn.Module, place: torch.device | None = None) -> None:
        for name in _stay_packed(module, state):
            path = name.removesuffix(".weight")
            linear = module.get_submodule(path)
            packed = _moved(state.weights.pop(name), place or linear.get_parameter("weight").device)
            bias = None if linear.bias is None else linear.get_parameter("bias")
            replace_module(module, path, SparseLinear(packed, bias).train(linear.training))

    if into is None:
        place = device_named(device)
        return load_around(folder, stand_ins, lambda module: swap(module, place), dtype, device)
    try:
        into.load_state_dict(stand_ins(into, None))
    except RuntimeError as error:
        raise InputError(f"into does not fit {folder} ({str(error).splitlines()[0]})") from error
    swap(into)
    return into


def _stay_packed(module: nn.Module, state: PackedState) -> list[str]:
    """Names of the matrices that linear layers can read as they are packed."""
    shared = set(state.tied.values())
    owners = {f"{path}.weight": type(each) for path, each in module.named_modules() if path}
    return [name for name in state.weights if owners.get(name) is nn.Linear and name not in shared]


def to_transformers(folder: Path | str, out: Path | str, dtype: str = "float32") -> Path:
    """Write a packed checkpoint of a transformers model as transformers itself would.

    Raises:
        InputError: there is no whole checkpoint, or ``out`` cannot be written.
    """
    read_packed(folder)
    return save_transformers(load(folder, dtype), out)


def save_transformers(lm: LanguageModel, out: Path | str) -> Path:
    """Write a dense model as transformers does: its weights, configuration and tokenizer.

    Raises:
        InputError: layers are packed, or ``out`` cannot be written.
    """
    if any(isinstance(each, SparseLinear) for each in lm.model.modules()):
        raise InputError("the model has packed layers: decompress it first")
    save_model(lm, out)
    for name in (MANIFEST, WEIGHTS):  # of a packed checkpoint that was there, which would be read in its place
        (Path(out) / name).unlink(missing_ok=True)
    return Path(out)


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under the names that a dense model has; packed weights dense, one at a time."""
    for name, each in module.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(each, SparseLinear):
            yield f"{prefix}weight", each.weight
            if each.bias is not None:
                yield f"{prefix}bias", each.bias
            continue
        persistent = {key: value for key, value in each._buffers.items() if key not in each._non_persistent_buffers_set}
        for key, value in {**each._parameters, **persistent}.items():
            if value is not None:
                yield f"{prefix}{key}", value


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _packed(module: nn.Module, name: str, tensor: Tensor, format: str) -> Packed:
    """The matrix in the wanted format where that holds it and helps, else dense."""
    if tensor.dim() != 2 or not tensor.is_floating_point() or not tensor.numel():
        return Dense(tensor)
    if format == "auto":
        return smallest(tensor)
    owner = _owner(module, name)
    settings = owner.settings if isinstance(owner, SparseLinear) and owner.format == format else {}
    try:
        packed = FORMATS[format].pack(tensor, **settings)
    except InputError:  # an N:M that the matrix does not keep to
        return Dense(tensor)
    return packed if packed.nbytes < tensor.nbytes else Dense(tensor)


def _described(name: str, weight: Tensor, packed: Packed, dense_bytes: int) -> SavedWeight:
    shape = (weight.shape[0], weight.shape[1])
    return SavedWeight(
        name, shape, int(weight.count_nonzero()), packed.name, packed.nbytes, dense_bytes, bytes_by_format(weight)
    )


def _why_dense(module: nn.Module, weight: SavedWeight, shared: set[str]) -> str:
    owner = _owner(module, weight.name)
    if weight.name in shared:
        return "its weight is tied to another module's"
    if not isinstance(owner, SparseLinear) and type(owner) is not nn.Linear:
        return other_kind(owner)
    return "no format makes it smaller" if weight.format == "dense" else ""


def _name(dtype: torch.dtype) -> str:
    return next((name for name, each in DTYPES.items() if each == dtype), str(dtype).removeprefix("torch."))


def _moved(packed: Packed, device: torch.device) -> Packed:
    if device.type == "cpu":
        return packed
    tensors = {name: each.to(device) for name, each in packed.tensors().items()}
    return FORMATS[packed.name].restore(packed.shape, tensors, packed.settings())


def _writable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: choose a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder} ({error.strerror}): choose a folder you may write to") from error


def _save_surroundings(model: Any, folder: Path) -> None:
    """What transformers keeps beside weights, for a `LanguageModel`."""
    if not isinstance(model, LanguageModel):
        return
    model.model.config.save_pretrained(folder)
    generation = getattr(model.model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
