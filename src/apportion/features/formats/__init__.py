"""Dictionaries of other libraries, read and written: bring what you have, leave when you like."""

from collections.abc import Callable
from pathlib import Path

from apportion.errors import InputError
from apportion.features.dictionary import SparseAutoencoder
from apportion.features.formats.saelens import read_saelens, write_saelens
from apportion.features.formats.sparsify import read_sparsify, write_sparsify

__all__ = ["read_dictionary", "read_saelens", "read_sparsify", "write_saelens", "write_sparsify"]

_FORMATS: dict[str, tuple[tuple[str, str], Callable[[Path], SparseAutoencoder]]] = {
    "apportion": (("config.json", "model.safetensors"), SparseAutoencoder.load),
    "SAELens": (("cfg.json", "sae_weights.safetensors"), read_saelens),
    "sparsify": (("cfg.json", "sae.safetensors"), read_sparsify),
}


def read_dictionary(folder: Path | str) -> SparseAutoencoder:
    """The dictionary in ``folder``, whichever of the known formats it is in; in evaluation mode, on the CPU.

    Args:
        folder: what ``SparseAutoencoder.save``, SAELens or sparsify wrote: one folder per dictionary.

    Raises:
        InputError: no known format, or more than one; says what was looked for and what is there. Or the files are
            damaged, or use an option that has no equal here; names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the folder that holds the dictionary's files")
    formats = _formats_in(folder)
    if not formats:
        wanted = "; ".join(f"{name}: {' and '.join(files)}" for name, (files, _) in _FORMATS.items())
        raise InputError(f"{folder} holds no dictionary. Looked for {wanted}. {_what_is_there(folder)}")
    if len(formats) > 1:
        raise InputError(
            f"{folder} holds dictionaries in {len(formats)} formats ({', '.join(formats)}), which share file names: "
            "keep each in a folder of its own"
        )
    _, read = _FORMATS[formats[0]]
    return read(folder)


def _formats_in(folder: Path) -> list[str]:
    return [name for name, (files, _) in _FORMATS.items() if all((folder / file).is_file() for file in files)]


def _what_is_there(folder: Path) -> str:
    inside = sorted(each.name for each in folder.iterdir())
    holding = [name for name in inside if (folder / name).is_dir() and _formats_in(folder / name)]
    if holding:
        return f"Its folder {holding[0]!r} does hold one ({len(holding)} of its folders do): give that one."
    return f"It has: {', '.join(inside[:8]) or 'nothing'}{', ...' if len(inside) > 8 else ''}."
