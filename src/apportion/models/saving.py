"""Writing a model as an ordinary transformers folder, whole or not at all."""

import os
import shutil
from pathlib import Path
from typing import Any

from apportion.data.files import explain_write_error, sync
from apportion.errors import InputError
from apportion.models.quiet import quiet_transformers

_UNFINISHED = ".unfinished"


def save_model(lm: Any, folder: Path | str) -> None:
    """Write a model's configuration, weights (as safetensors) and tokenizer, for `load` or for transformers.

    Everything is written beside first and then moved into place, the configuration last: a folder that was cut short is
    no model to anybody, and the next attempt replaces it.

    Args:
        lm: a `LanguageModel`.
        folder: where; other files there are left alone.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    from safetensors import SafetensorError

    folder = Path(folder)
    unfinished = folder / _UNFINISHED
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        with quiet_transformers():
            lm.model.save_pretrained(unfinished)
            lm.tokenizer.save_pretrained(unfinished)
        names = sorted((each.name for each in unfinished.iterdir()), key=lambda name: (name == "config.json", name))
        for name in names:
            # safetensors writes files that only their owner can read.
            shutil.copymode(unfinished / "config.json", unfinished / name)
            sync(unfinished / name)
        (folder / "config.json").unlink(missing_ok=True)
        for name in names:
            os.replace(unfinished / name, folder / name)
        sync(folder)
        unfinished.rmdir()
    except OSError as error:
        raise explain_write_error(error, folder) from error
    except SafetensorError as error:
        raise InputError(f"could not write the model to {folder}: {error}") from error
