"""CSKV: keys and values as joint low-rank codes, and a window of recent tokens as they are.

Wang et al. 2024, *CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios*, arXiv 2409.10593.

Allocated are channels: how many numbers a token's keys, and how many its values, keep in every layer. All key-value
heads of a layer share one code; candidates are directions of the joint key (value) space, scored by how much of a
calibration text's keys (values) lies along them. The newest ``window`` tokens are kept exactly beside their codes.

===========================  ==========================================================================================
paper                        here
===========================  ==========================================================================================
c_k = X A_k, c_v = X A_v     the codes of `CodeCache`, made by ``Factors.down`` from keys before the rotary embedding
K^ = RoPE(c_k B_k)           `CompressedStore.read`: ``Factors.up``, then each token's own rotation
V^ = c_v B_v                 never made: attention mixes codes, and ``up`` is applied to the mix, o = (P c_v) B_v
m = 32                       ``window``
k_density, v_density         ``key_density``, ``value_density``; r = int(density * d) * G
===========================  ==========================================================================================

Departures:

- the factors' default is the closed form, the optimum of the paper's reconstruction loss (see `principal`), not a
  trained singular value decomposition; ``Reconstruction()`` as ``training`` with ``init="asvd"`` is the paper's recipe;
- the window slides, as the paper describes; ``window_kind="blocks"`` is the code's: exact tokens are gathered until
  there are ``window`` of them, are read once more, and go all at once;
- projections with a bias (refused by the code) have it added after ``up``; where a model norms its keys the code reads
  the normed keys, and the factors cannot come from weights;
- random factors are orthonormal directions of the joint space, so that untrained ones are projections;
- quantised codes are packed bytes, where the code only rounds numbers; ranges include zero; the newest tokens wait in
  full for their group to be whole;
- learning rates follow this package's schedule (5 % warm-up, 20 % decay).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.compressed_store import CompressedStore, Window
from apportion.keys.low_rank import (
    PARTS,
    Factors,
    Moments,
    activation_scale,
    at_random,
    biases_of,
    from_weights,
    measure_moments,
    principal,
    rank_of,
)
from apportion.keys.memory import ComposedMemory
from apportion.keys.method import KeyMethod
from apportion.keys.quantising import CodeCache, quantisers
from apportion.keys.reconstruction import Reconstruction, model_batches, pieces_of, train_factors
from apportion.keys.trace import encode_texts
from apportion.models import LanguageModel
from apportion.models.key_door import layer_facts
from apportion.models.key_memory import LayerFacts
from apportion.models.key_projections import KeyProjections, key_projections

INITS = ("exact", "svd", "asvd", "random")
WINDOWS = ("sliding", "blocks")


@dataclass(eq=False)
class CSKV(KeyMethod):
    """Joint low-rank codes of keys and values, and a window of exact ones; see the module's docstring.

    Attributes:
        key_density: share of a head's width that its codes' numbers come to, in keys.
        value_density: likewise in values.
        window: newest tokens that are kept exactly.
        window_kind: ``sliding`` (the paper's text) or ``blocks`` (its code).
        init: where factors come from: ``exact`` (closed form), ``svd`` or ``asvd`` of the projections' weights,
            ``random``.
        alpha: of ``asvd``.
        training: None, or how the factors are trained from there.
        bits: of quantised codes (2, 4 or 8); None to keep them in full. Without ``training`` this is post-training
            quantisation.
        group: tokens that share a range in each channel of the keys' codes.
        seed: of random factors.
    """

    slug: ClassVar[str] = "cskv"
    needs_fit: ClassVar[bool] = True
    key_density: float = 0.25
    value_density: float = 0.75
    window: int = 32
    window_kind: str = "sliding"
    init: str = "exact"
    alpha: float = 0.5
    training: Reconstruction | None = None
    bits: int | None = None
    group: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("key_density", "value_density"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)}: above 0, at most 1")
        if self.window < 0:
            raise InputError(f"window={self.window}: 0 or above")
        if self.window_kind not in WINDOWS:
            raise InputError(f"window_kind={self.window_kind!r}: one of {', '.join(WINDOWS)}")
        if self.init not in INITS:
            raise InputError(f"init={self.init!r}: one of {', '.join(INITS)}")
        quantisers(self.bits, self.group)

    @override
    def fit(  # type: ignore[override]  # options are named, so that a wrong one is refused
        self,
        model: LanguageModel,
        texts: Sequence[str],
        *,
        tokens: int = 4096,
        folder: Path | str | None = None,
        progress: bool = True,
        stop_after: int | None = None,
    ) -> "CSKV":
        """Find the factors of every full-attention layer.

        Args:
            model: a decoder.
            texts: calibration texts; the paper takes 256 of 4,096 tokens.
            tokens: of each at most.
            folder: where training keeps its checkpoints, so that an interrupted fit goes on; None keeps nothing.
            progress: show training's.
            stop_after: pause training, with a checkpoint, after that many steps; the factors are as they are then.

        Raises:
            InputError: no text; a density that leaves a head nothing; factors from weights where keys are normed; texts
                shorter than training wants.
        """
        widths = {part: layer_facts(model)[0].width for part in PARTS}
        for part, density in self._densities().items():
            rank_of(density, widths[part], 1, f"{part.removesuffix('s')}_density")
        if not texts:
            raise InputError("texts is empty: give at least one calibration text")
        encoded = encode_texts(model, texts, tokens)
        projections = key_projections(model)
        factors = self.initial_factors(model, projections, measure_moments(model, encoded, projections))
        if (training := self.training) is not None:
            pieces = pieces_of(encoded, training.length)
            factors, _ = train_factors(
                model_batches(model, pieces, sorted(factors), training.seed),
                training.steps or training.epochs * len(pieces),
                factors,
                projections,
                quantisers(self.bits if training.quantised else None, self.group),
                training,
                device=model.device,
                folder=folder,
                provenance=self._provenance(model, encoded),
                progress=progress,
                stop_after=stop_after,
            )
        self.take(factors, model)
        return self

    def take(self, factors: Mapping[int, Mapping[str, Factors]], model: LanguageModel) -> None:
        """Use these factors of each layer of a model."""
        self.fitted = {
            f"layer.{layer}.{name}": tensor.contiguous()
            for layer, parts in factors.items()
            for part in PARTS
            for name, tensor in parts[part].named(part).items()
        }
        self.fitted_to = model.fingerprint

    def initial_factors(
        self, model: LanguageModel, projections: Mapping[int, KeyProjections], moments: Mapping[int, Moments]
    ) -> dict[int, dict[str, Factors]]:
        """The factors that `init` says, by layer and part, before any training.

        Raises:
            InputError: they should come from weights, and keys are normed.
        """
        found: dict[int, dict[str, Factors]] = {}
        for facts in layer_facts(model):
            layer = facts.layer
            sizes = {part: len(second) for part, second in moments[layer].second.items()}
            biases = biases_of(projections[layer], sizes)
            found[layer] = {}
            for part, density in self._densities().items():
                name = f"{part.removesuffix('s')}_density"
                rank = rank_of(density, sizes[part] // facts.groups, facts.groups, name)
                if self.init == "exact":
                    found[layer][part] = principal(moments[layer].second[part], rank, biases[part])
                elif self.init == "random":
                    found[layer][part] = at_random(rank, biases[part], self.seed + 2 * layer + PARTS.index(part))
                else:
                    found[layer][part] = self._from_weights(model, projections[layer], moments[layer], part, rank)
        return found

    @override
    def memory(self, facts: LayerFacts) -> ComposedMemory:
        tensors = self.of_layer(facts.layer)
        factors = {part: Factors.of_layer(tensors, part) for part in PARTS}
        codes = {part: CodeCache(each) for part, each in quantisers(self.bits, self.group).items()}
        window = Window(self.window, self.window_kind)
        return ComposedMemory(facts, CompressedStore(factors, codes, window, facts.layers))

    @override
    @classmethod
    def from_plain(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if isinstance(settings.get("training"), Mapping):
            settings["training"] = Reconstruction(**settings["training"])
        return super().from_plain(settings)

    def _densities(self) -> dict[str, float]:
        return {"keys": self.key_density, "values": self.value_density}

    def _from_weights(
        self, model: LanguageModel, projections: KeyProjections, moments: Moments, part: str, rank: int
    ) -> Factors:
        projection = getattr(projections, part)
        if projection is None:
            raise InputError(
                f"init={self.init!r}: {model.name} norms its {part} after projecting them, so that no factors of the "
                "weights stand for them: use init='exact'"
            )
        return from_weights(projection, rank, activation_scale(moments, self.alpha) if self.init == "asvd" else None)

    def _provenance(self, model: LanguageModel, texts: Sequence[Tensor]) -> dict[str, str]:
        digest = hashlib.sha256()
        for ids in texts:
            digest.update(ids.cpu().numpy().tobytes() + b"\0")
        settings = {name: value for name, value in self.settings().items() if not name.startswith("window")}
        return {"model": model.fingerprint, "texts": digest.hexdigest(), "method": repr(settings)}
