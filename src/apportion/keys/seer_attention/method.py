"""SeerAttention as a key method: settings, fitting, and the memory of a layer."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.blocks import POOLS, BlockMemory, BlockRule
from apportion.keys.budget import KeyBudget
from apportion.keys.memory import ComposedMemory
from apportion.keys.method import KeyMethod
from apportion.keys.seer_attention.fitting import GateRecipe, train_gates
from apportion.keys.seer_attention.gate import (
    DecodeGates,
    Example,
    Gate,
    Gates,
    GateShape,
    PromptGates,
    rotary_frequencies,
)
from apportion.keys.seer_attention.reading import DecodeGate, GateBlocks
from apportion.keys.trace import encode_texts, watch_steps
from apportion.models import LanguageModel
from apportion.models.key_door import layer_facts
from apportion.models.key_memory import LayerFacts, LayerMemory, Step

_PROMPT_THRESHOLD = 5e-4
_DECODE_TOKENS = 4096


@dataclass(eq=False)
class SeerAttention(KeyMethod):
    """Prompts read in blocks that a distilled gate chooses; see the package's docstring.

    How much is read is one of ``threshold``, ``sparsity`` and ``blocks`` for prompts (``threshold=5e-4`` if none is
    given), and ``budget`` or ``threshold`` with ``decode`` (4096 tokens if none is).

    Attributes:
        size: tokens of a block.
        width: of the gate's queries and keys.
        query_pooling: see `GateShape`.
        key_pooling: see `GateShape`.
        threshold: see `BlockRule`; the authors take 5e-4 to 5e-3 for long prompts.
        sparsity: see `BlockRule`.
        blocks: see `BlockRule`.
        dense_rows: the last so many rows of blocks of a prompt read everything.
        always: see `BlockRule`.
        decode: choose for each token after the prompt, which stays dense (SeerAttention-R).
        budget: tokens that such a token reads, its own block included.
        norm: see `GateShape`.
        recipe: how gates are trained.

    Raises:
        InputError: a value that cannot work, or two ways to say how much is read.
    """

    slug: ClassVar[str] = "seer_attention"
    needs_fit: ClassVar[bool] = True
    size: int = 64
    width: int = 128
    query_pooling: tuple[str, ...] = ("mean",)
    key_pooling: tuple[str, ...] = ("max", "min", "mean")
    threshold: float | None = None
    sparsity: float | None = None
    blocks: int | None = None
    dense_rows: int = 2
    always: tuple[str, ...] = ()
    decode: bool = False
    budget: KeyBudget | None = None
    norm: bool = False
    recipe: GateRecipe = field(default_factory=GateRecipe)

    def __post_init__(self) -> None:
        if self.decode:
            if self.sparsity is not None or self.blocks is not None:
                raise InputError(
                    f"sparsity={self.sparsity}, blocks={self.blocks}: decode takes a budget or a threshold"
                )
            if self.budget is not None and self.threshold is not None:
                raise InputError(f"budget={self.budget} and threshold={self.threshold}: give one of them")
        elif self.budget is not None:
            raise InputError(f"budget={self.budget}: of tokens after the prompt; it needs decode=True")
        # Both check their values.
        self.shape  # noqa: B018
        self.rule  # noqa: B018

    @property
    def shape(self) -> GateShape:
        """What the gates' weights are made for."""
        return GateShape(self.size, self.width, self.query_pooling, self.key_pooling, self.norm)

    @property
    def rule(self) -> BlockRule:
        """How blocks are chosen for a prompt."""
        given = (self.threshold, self.sparsity, self.blocks)
        if given == (None, None, None):
            given = (_PROMPT_THRESHOLD, None, None)
        return BlockRule(*given, self.dense_rows, self.always)

    @override
    def fit(
        self,
        model: LanguageModel,
        texts: Sequence[str],
        *,
        folder: Path | str | None = None,
        progress: bool = True,
        **options: Any,
    ) -> "SeerAttention":
        """Distil the gates of all full-attention layers from a decoder's attention to some texts.

        Each text is read once, and kept as pooled queries and keys and one matrix of blocks a head: ``layers * heads *
        blocks**2`` numbers. The model stays dense and as it is.

        Args:
            model: a decoder.
            texts: of more than one block each; several, since gates can learn one by heart. See `GateRecipe`.
            folder: of the run's log and checkpoints; a run that was interrupted goes on from there, called alike.
            progress: show progress on stderr.
            options: none; the recipe says how gates are trained.

        Raises:
            InputError: texts too few or too short; an unsuitable model; the folder holds another run.
        """
        if options:
            raise InputError(f"fit takes no {', '.join(sorted(options))}: how gates are trained is the recipe's")
        kind = _kind(self.decode)
        examples, frequencies = distil(model, texts, kind, self.shape, self.recipe.tokens)
        facts = layer_facts(model)
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.seed)
            gates = kind(self.shape, facts, frequencies).to(model.device)
        provenance = {
            "model": model.fingerprint,
            "texts": hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest(),
            "size": self.size,
            "tokens": self.recipe.tokens,
            "pooling": f"{self.query_pooling} {self.key_pooling}",
        }
        train_gates(gates, examples, self.recipe, folder, provenance=provenance, progress=progress)
        self.fitted = {**gates.tensors(), "trained_with": _trained_with(self)}
        self.fitted_to = model.fingerprint
        return self

    @override
    def check(self, model: Any) -> None:
        super().check(model)
        trained, now = self.fitted["trained_with"], _trained_with(self)
        for place, name in enumerate(("size", "width", "query_pooling", "key_pooling", "decode", "norm")):
            if trained.shape != now.shape or trained[place] != now[place]:
                raise InputError(
                    f"{name}={getattr(self, name)!r}: these gates were trained with another one; set it back, or fit "
                    "anew"
                )

    @override
    def memory(self, facts: LayerFacts) -> LayerMemory:
        gate = self.gate_of(facts.layer)
        if self.decode:
            budget = self.budget
            if budget is None and self.threshold is None:
                budget = KeyBudget(keys=_DECODE_TOKENS)
            return ComposedMemory(facts, selector=DecodeGate(gate, self.shape, budget, self.threshold))
        return BlockMemory(facts, GateBlocks(gate, self.shape), self.rule, self.size)

    def gate_of(self, layer: int) -> Gate:
        """The fitted gate of a layer."""
        return Gate(**{name: tensor[None] for name, tensor in self.of_layer(layer).items()})

    @override
    @classmethod
    def from_plain(cls, settings: dict[str, Any]) -> dict[str, Any]:
        settings = super().from_plain(settings)
        for name in ("query_pooling", "key_pooling", "always"):
            if name in settings:
                settings[name] = tuple(settings[name])
        if isinstance(settings.get("recipe"), Mapping):
            settings["recipe"] = GateRecipe(**settings["recipe"])
        return settings


def distil(
    model: LanguageModel, texts: Sequence[str], kind: type[Gates], shape: GateShape, tokens: int
) -> tuple[list[Example], Float[Tensor, "layers half"] | None]:
    """What texts teach the gates of all full-attention layers, one example each, and the layers' rotary frequencies.

    Only one layer's queries and keys are held at a time.

    Raises:
        InputError: no text, or one of a single block.
    """
    examples, frequencies = [], None
    for number, ids in enumerate(encode_texts(model, texts, tokens)):
        if len(ids) <= shape.size:
            raise InputError(
                f"text {number} has {len(ids)} tokens, one block of size={shape.size}: there is nothing to choose "
                "from; give longer texts or smaller blocks"
            )
        taught: dict[int, tuple[Example, Tensor | None]] = {}

        def teach(layer: int, step: Step, taught: dict[int, tuple[Example, Tensor | None]] = taught) -> None:
            taught[layer] = kind.example(step, shape), rotary_frequencies(step, shape.width)

        watch_steps(model, [ids], teach)
        parts = [taught[layer] for layer in sorted(taught)]
        examples.append(Example.of_layers([example for example, _ in parts]))
        turning = [each for _, each in parts if each is not None]
        if len(turning) == len(parts):
            frequencies = torch.stack(turning)
    return examples, frequencies


def _kind(decode: bool) -> type[Gates]:
    return DecodeGates if decode else PromptGates


def _trained_with(method: SeerAttention) -> Tensor:
    """What the weights alone do not tell, or tell only by an error of shapes."""
    pools = [
        sum((POOLS.index(each) + 1) * 10**place for place, each in enumerate(pooling))
        for pooling in (method.query_pooling, method.key_pooling)
    ]
    return torch.tensor([method.size, method.width, *pools, method.decode, method.norm])
