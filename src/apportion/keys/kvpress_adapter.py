"""Any press of NVIDIA's kvpress as a key method, so that its methods and ours stand in one table.

kvpress (Apache-2.0, PyPI ``kvpress``) has some forty published methods, most of them one function
``score(module, hidden_states, keys, values, attentions, kwargs) -> [batch, groups, tokens]``. Here that function scores
the prompt when it is closed, and each key-value head keeps its best tokens.

kvpress is imported only when a press is asked for by name, and is no dependency: its releases up to 0.5.4 want
transformers below 5.3. A press object of any origin with such a ``score`` works without it.

Departures from a run inside kvpress: tokens are really evicted where kvpress pretends with "fake keys"; padded batches
work (padding is never kept); positions are kept as they were. Presses that need attention weights, that change keys, or
that override ``compress`` (ThinK, AdaKV, wrappers) are refused or would not do what they say: only ``score`` is called.
"""

import importlib
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.budget import KeyBudget
from apportion.keys.eviction import EvictingStore
from apportion.keys.memory import ComposedMemory
from apportion.keys.method import KeyMethod
from apportion.models.key_memory import LayerFacts, LayerMemory, Rotation, Step


@dataclass(eq=False)
class KvPress(KeyMethod):
    """A press of kvpress, or an object like one, as an evicting method.

    Attributes:
        press: the name of a class of kvpress, such as ``KnormPress``, or an object with a ``score``. A method with an
            object cannot be saved.
        options: what the class is made with, if ``press`` is a name.
        budget: tokens kept of the prompt; None to keep ``1 - press.compression_ratio`` of it, which is the share that
            kvpress *removes*.

    Raises:
        InputError: kvpress is not installed or has no such press; the press scores nothing; there is no budget.
    """

    slug: ClassVar[str] = "kvpress"
    press: Any = "KnormPress"
    options: dict[str, Any] = field(default_factory=dict)
    budget: KeyBudget | None = None

    def __post_init__(self) -> None:
        self._made = _press_named(self.press, self.options) if isinstance(self.press, str) else self.press
        if not callable(getattr(self._made, "score", None)):
            raise InputError(
                f"press={type(self._made).__name__} has no score(module, hidden_states, keys, values, attentions, "
                "kwargs): only presses that score tokens can be used"
            )
        if self.budget is None:
            ratio = getattr(self._made, "compression_ratio", None)
            if not isinstance(ratio, int | float) or not 0 <= ratio < 1:
                raise InputError(
                    f"budget=None and the press says compression_ratio={ratio}: give budget=KeyBudget(share=...)"
                )

    @override
    def settings(self) -> dict[str, Any]:
        if not isinstance(self.press, str):
            raise InputError(
                f"press={type(self.press).__name__}: a method with a press object cannot be saved; give the name of a "
                "class of kvpress and its options"
            )
        return super().settings()

    @override
    def memory(self, facts: LayerFacts) -> LayerMemory:
        # kvpress rounds down, but never to nothing here.
        budget = self.budget or KeyBudget(share=1 - float(self._made.compression_ratio))
        return ComposedMemory(facts, _PressStore(budget, _Borrowed(self._made)))


class _Borrowed:
    """Something that is not ours and stays one thing when a memory is copied, such as a module with its weights."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Borrowed":
        return self


class _PressStore(EvictingStore):
    def __init__(self, budget: KeyBudget, press: _Borrowed) -> None:
        super().__init__(budget)
        self._press = press
        self._module: _Borrowed | None = None
        self._hidden: list[Tensor] = []  # of the prompt, until it is closed
        self._rotation: Rotation | None = None

    @override
    def append(self, step: Step) -> None:
        super().append(step)
        if self.closed:
            return
        self._module = _Borrowed(step.module)
        if step.hidden is not None:
            self._hidden.append(step.hidden)
        if step.rotation is not None:
            self._rotation = step.rotation if self._rotation is None else self._rotation.then(step.rotation)

    @override
    def close(self) -> None:
        super().close()
        self._hidden, self._rotation, self._module = [], None, None

    @override
    def scores(self) -> Float[Tensor, "batch groups tokens"]:
        assert self._module is not None
        keys, values = self.read()
        hidden = torch.cat(self._hidden, dim=1) if self._hidden else None
        turned = None
        if self._rotation is not None:
            # transformers writes the angles twice, once for each half of a head.
            turned = tuple(torch.cat([each, each], dim=-1) for each in (self._rotation.cos, self._rotation.sin))
        kwargs = {"hidden_states": hidden, "position_embeddings": turned}
        press = self._press.thing
        scores = press.score(self._module.thing, hidden, keys, values, None, kwargs)
        if not isinstance(scores, Tensor) or scores.shape != keys.shape[:3]:
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(
                f"{type(press).__name__}.score gave {shape}, not scores of shape {tuple(keys.shape[:3])}: one for each "
                "token of each key-value head"
            )
        return scores.to(torch.float32).nan_to_num(0.0)

    @override
    def pick_rows(self, rows: Tensor) -> None:
        super().pick_rows(rows)
        self._hidden = [each[rows.to(each.device)] for each in self._hidden]
        if self._rotation is not None:
            self._rotation = self._rotation.rows(rows)


def _press_named(name: str, options: dict[str, Any]) -> Any:
    try:
        library = importlib.import_module("kvpress")
    except ImportError as error:
        raise InputError(
            f"press={name!r}: kvpress is not installed ({error}). `pip install kvpress` brings it, in an environment "
            "with transformers below 5.3; or give an object with a score(...) of its own"
        ) from error
    kind = getattr(library, name, None)
    if kind is None:
        known = sorted(each for each in dir(library) if each.endswith("Press"))
        raise InputError(f"press={name!r}: kvpress has no such press; it has {', '.join(known)}")
    try:
        return kind(**options)
    except TypeError as error:
        raise InputError(f"press={name!r}, options={options}: kvpress does not take these ({error})") from error
