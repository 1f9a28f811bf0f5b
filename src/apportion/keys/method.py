"""A key method: settings, what was fitted to a model, and the ``with`` block in which the model uses it."""

import contextlib
import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from apportion.data.files import read_json, write_atomically, write_json
from apportion.errors import InputError
from apportion.keys.budget import KeyBudget, Usage
from apportion.keys.memory import ComposedMemory
from apportion.models import LanguageModel
from apportion.models.key_door import Door, attend_with, close_prompt, layer_facts
from apportion.models.key_memory import LayerFacts, LayerMemory

FORMAT = 1
Method = TypeVar("Method", bound="KeyMethod")


@dataclass(eq=False)
class OpenMethod:
    """A method in force; what entering it yields."""

    door: Door

    @property
    def cache(self) -> Any:
        """The newest key-value cache that the model wrote to; None before the first pass."""
        return self.door.cache

    @property
    def usage(self) -> Usage:
        """What the newest cache has cost so far, over all layers."""
        return Usage.total(each.usage for each in self.door.memories() if isinstance(each, ComposedMemory))

    def close_prompt(self) -> None:
        """What the newest cache holds is a whole prompt: compress it before the next tokens come."""
        if self.cache is not None:
            close_prompt(self.cache)


@dataclass(eq=False)
class KeyMethod(ABC):
    """Base of all key methods, a dataclass of settings whose defaults are the paper's.

    ``with method(model): model.generate(...)`` lets a decoder use it. A method that has to be fitted says so; ``fit``
    returns the method itself.

    Attributes:
        fitted: tensors found by ``fit``, named ``layer.<number>.<what>`` where they belong to a layer; empty before it,
            and for methods without it.
        fitted_to: the fingerprint of the model that they belong to.
    """

    slug: ClassVar[str]
    needs_fit: ClassVar[bool] = False
    fitted: dict[str, Tensor] = dataclasses.field(default_factory=dict, kw_only=True, repr=False)
    fitted_to: str = dataclasses.field(default="", kw_only=True, repr=False)

    @abstractmethod
    def memory(self, facts: LayerFacts) -> LayerMemory:
        """A new memory for one layer of one cache."""

    def fit(self: Method, model: LanguageModel, texts: Sequence[str], **options: Any) -> Method:
        """Find what the method needs to know of a model. Methods that need nothing do nothing.

        Args:
            model: the model.
            texts: calibration texts.
            options: of the method.
        """
        return self

    @contextlib.contextmanager
    def __call__(self, model: Any) -> Iterator[OpenMethod]:
        """In a ``with`` block, a decoder remembers and reads its keys by this method.

        Args:
            model: a `LanguageModel` or a transformers decoder.

        Raises:
            InputError: the method was not fitted, or to another model; the model is none that it can be used on.
        """
        self.check(model)
        with attend_with(model, self.memory) as door:
            yield OpenMethod(door)

    def check(self, model: Any) -> None:
        """Refuse a model that this method cannot be used on, before any work is lost.

        Raises:
            InputError: see ``__call__``.
        """
        layer_facts(model)
        if not self.needs_fit:
            return
        if not self.fitted:
            raise InputError(f"{type(self).__name__} is not fitted: call fit(model, texts) first, or read a saved one")
        if isinstance(model, LanguageModel) and self.fitted_to and self.fitted_to != model.fingerprint:
            raise InputError(
                f"{type(self).__name__} was fitted to another model than {model.name}: fit it to this one, or read the "
                "one that was"
            )

    def of_layer(self, layer: int) -> dict[str, Tensor]:
        """What was fitted for one layer, by its short name."""
        start = f"layer.{layer}."
        return {name[len(start) :]: tensor for name, tensor in self.fitted.items() if name.startswith(start)}

    def settings(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        own = {field.name for field in dataclasses.fields(self)} - {"fitted", "fitted_to"}
        values = {name: getattr(self, name) for name in sorted(own)}
        return {name: _plain(value) for name, value in values.items()}

    def save(self, folder: Path | str) -> None:
        """Write ``method.json`` and, where something was fitted, ``fitted.safetensors``.

        Raises:
            InputError: the folder cannot be written.
        """
        folder = Path(folder)
        if self.fitted:
            with write_atomically(folder / "fitted.safetensors") as temporary:
                save_file({name: tensor.contiguous() for name, tensor in self.fitted.items()}, temporary)
        manifest = {"format": FORMAT, "method": self.slug, "settings": self.settings(), "fitted_to": self.fitted_to}
        write_json(folder / "method.json", manifest)

    @classmethod
    def load(cls: type[Method], folder: Path | str) -> Method:
        """Read what `save` wrote.

        Raises:
            InputError: there is none, it is damaged, or it is another method's.
        """
        folder = Path(folder)
        manifest = read_json(folder / "method.json")
        if not isinstance(manifest, Mapping) or manifest.get("format") != FORMAT:
            raise InputError(
                f"{folder / 'method.json'} is not of format {FORMAT}: it is damaged, or of another version"
            )
        if manifest.get("method") != cls.slug:
            raise InputError(f"{folder} holds the method {manifest.get('method')!r}, not {cls.slug!r}")
        try:
            method = cls(**cls.from_plain(dict(manifest["settings"])))
        except TypeError as error:
            raise InputError(
                f"{folder / 'method.json'} has settings that {cls.slug} does not know ({error})"
            ) from error
        file = folder / "fitted.safetensors"
        if file.exists():
            try:
                method.fitted = load_file(file)
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file} is damaged ({error}): fit the method again") from error
        method.fitted_to = str(manifest.get("fitted_to", ""))
        return method

    @classmethod
    def from_plain(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings read from JSON as the constructor takes them; a ``budget`` becomes a `KeyBudget`."""
        if isinstance(settings.get("budget"), Mapping):
            settings["budget"] = KeyBudget(**settings["budget"])
        return settings


def read_method(folder: Path | str) -> KeyMethod:
    """The method in a folder, whichever it is.

    Raises:
        InputError: there is none that is known; see `KeyMethod.load`.
    """
    import apportion.keys.catalogue  # noqa: F401  # so that all methods are known

    manifest = read_json(Path(folder) / "method.json")
    slug = manifest.get("method") if isinstance(manifest, Mapping) else None
    known = {each.slug: each for each in _subclasses(KeyMethod) if hasattr(each, "slug")}  # type: ignore[type-abstract]
    if slug not in known:
        raise InputError(f"{folder} holds the method {slug!r}; known: {', '.join(sorted(known))}")
    return known[str(slug)].load(folder)


def _subclasses(kind: type[KeyMethod]) -> list[type[KeyMethod]]:
    return [each for sub in kind.__subclasses__() for each in (sub, *_subclasses(sub))]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    try:
        json.dumps(value)
    except TypeError as error:
        raise InputError(f"a setting of type {type(value).__name__} cannot be saved") from error
    return list(value) if isinstance(value, tuple) else value
