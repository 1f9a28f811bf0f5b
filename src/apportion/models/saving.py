"""Writing a model as a folder that transformers (and `load`) reads."""

import os
import shutil
from pathlib import Path

from apportion.data.files import explain_write_error, sync
from apportion.errors import InputError
from apportion.models.language import LanguageModel
from apportion.models.quiet import quiet_transformers

_UNFINISHED = ".unfinished-model"


def save_model(lm: LanguageModel, folder: Path | str) -> Path:
    """Write a model and its tokenizer as a plain transformers folder; exact zeros stay exact zeros.

    Everything is written beside the files that it replaces and moved into place at the end, the configuration last: a
    folder with a ``config.json`` holds whole weights.

    Args:
        lm: the model. Masks must have been folded into its weights (`apportion.weights.remove_masks`).
        folder: made if need be. Other files in it are left alone.

    Raises:
        InputError: some weights are parametrised, so that transformers could not read what is written; the disk is
            full or the folder cannot be written.
    """
    folder = Path(folder)
    strange = [name for name, _ in lm.model.named_parameters() if ".parametrizations." in f".{name}"]
    if strange:
        raise InputError(f"{strange[0]} is under a mask or another parametrisation: remove it first (remove_masks)")
    unfinished = folder / _UNFINISHED
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        with quiet_transformers():
            lm.model.save_pretrained(unfinished)
            lm.tokenizer.save_pretrained(unfinished)
        for file in sorted(unfinished.iterdir(), key=lambda each: each.name == "config.json"):
            # safetensors writes files that only their owner can read.
            shutil.copymode(unfinished / "config.json", file)
            sync(file)
            os.replace(file, folder / file.name)
        sync(folder)
        unfinished.rmdir()
    except OSError as error:
        raise explain_write_error(error, folder) from error
    except Exception as error:  # SafetensorError is neither an OSError nor a ValueError
        if type(error).__name__ != "SafetensorError":
            raise
        raise InputError(f"could not write the model to {folder}: {error}") from error
    return folder
