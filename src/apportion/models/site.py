"""A site: a named place inside a transformer where activations can be read or replaced."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from apportion.errors import InputError
from apportion.models.families import blocks_of, find_module, layout_of, transformer_of

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Site:
    """A place in a model, written ``layers.9.residual`` (blocks count from 0) or ``embeddings``.

    | kind | what is there, ``[batch, time, width]`` |
    |---|---|
    | ``residual`` | hidden state after block L (transformers' ``hidden_states[L + 1]`` but for the last block) |
    | ``attn_out`` | output of the attention's output projection |
    | ``heads`` | the heads' outputs side by side: the input of that projection (may be wider than the model) |
    | ``neurons`` | the MLP's neurons, after the non-linearity: the input of its last projection |
    | ``mlp_in`` | input of the MLP (after the norm in front of it) |
    | ``mlp_out`` | output of the MLP itself (Gemma 2 and 3 norm it once more before they add it) |
    | ``embeddings`` | hidden state before block 0, positions included; it has no layer |

    Raises:
        InputError: an unknown kind, a missing, superfluous or negative layer.
    """

    layer: int | None
    kind: str

    KINDS: ClassVar[tuple[str, ...]] = ("residual", "mlp_out", "mlp_in", "attn_out", "heads", "neurons", "embeddings")

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise InputError(f"site kind {self.kind!r} is unknown: choose one of {', '.join(self.KINDS)}")
        if self.kind == "embeddings" and self.layer is not None:
            raise InputError(f"site 'embeddings' has no layer, got layer {self.layer}")
        if self.kind != "embeddings" and (self.layer is None or self.layer < 0):
            raise InputError(f"site kind {self.kind!r} needs a layer counted from 0, got {self.layer}")

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"layers.{self.layer}.{self.kind}"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read a site from its name; ``str`` gives the name back.

        Raises:
            InputError: not the name of a site.
        """
        if text == "embeddings":
            return cls(None, "embeddings")
        match = re.fullmatch(r"layers\.(-?[0-9]+)\.(\w+)", text)
        if match is None:
            kinds = ", ".join(kind for kind in cls.KINDS if kind != "embeddings")
            raise InputError(
                f"site {text!r} is not a site: write embeddings or layers.L.KIND, such as layers.9.residual "
                f"(L from 0, KIND one of {kinds})"
            )
        return cls(int(match[1]), match[2])

    def width(self, model: Any) -> int:
        """The number of activations a token has here, in a `LanguageModel` or a transformers model."""
        model = transformer_of(model)
        module, _ = self.resolve(model)
        if self.kind not in ("heads", "neurons"):
            return int(model.config.get_text_config().hidden_size)
        # GPT-2's Conv1D calls its number of inputs nx.
        inputs: Any = module.in_features if hasattr(module, "in_features") else module.nx
        return int(inputs)

    def resolve(self, model: Any) -> tuple[nn.Module, Side]:
        """The module to listen to and the side of it, in a `LanguageModel` or a transformers model.

        Raises:
            InputError: the model has no such layer, or is of a family that the table in ``families.py`` lacks.
        """
        model = transformer_of(model)
        block = self.block(model)
        if self.kind == "embeddings":
            return block, "input"
        if self.kind == "residual":
            return block, "output"
        layout = layout_of(model)
        path, side = {
            "attn_out": (layout.attention_output, "output"),
            "heads": (layout.attention_output, "input"),
            "neurons": (layout.neurons, "input"),
            "mlp_in": (layout.mlp_input, "input"),
            "mlp_out": (layout.mlp_output, "output"),
        }[self.kind]
        module = find_module(block, path)
        if module is None:
            raise InputError(f"site {self} does not exist in {type(model).__name__}: block {self.layer} has no {path}")
        return module, side  # type: ignore[return-value]

    def block(self, model: Any) -> nn.Module:
        """The block that the site lies in (block 0 for ``embeddings``).

        Raises:
            InputError: the model has no such layer.
        """
        blocks = blocks_of(transformer_of(model))
        layer = self.layer or 0
        if layer >= len(blocks):
            raise InputError(f"site {self}: the model has {len(blocks)} layers, 0 to {len(blocks) - 1}")
        return blocks[layer]
