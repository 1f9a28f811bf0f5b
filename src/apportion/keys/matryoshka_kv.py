"""MatryoshkaKV: prefixes of keys and values in trained orthogonal bases (Lin et al. 2024, arXiv 2410.14731, ICLR 2025).

What is allocated: coordinates of cached keys and values. Every layer and key-value head has an orthogonal basis for its
rotated keys and one for its values, and keeps a prefix of the coordinates of each. Bases begin as principal components
and are trained so that every prefix serves (`MatryoshkaKV.distil`); how long each prefix is, is the same everywhere or
found greedily (`MatryoshkaKV.allocate`).

| paper | here |
|---|---|
| R_k, R_v | ``bases`` ``[2, groups, d, d]`` of a layer: keys, values; basis vectors in columns |
| mu_k, mu_v | ``means`` ``[2, groups, d]`` |
| r_k, r_v | ``ranks`` ``[2, groups]`` |
| X, A, Q | ``HeadBases.angles``, its skew part, `cayley` |
| gamma, Delta | ``share``, ``step`` |

A token keeps ``(k - mu_k) R_k[:, :r_k]`` and ``(v - mu_v) R_v[:, :r_v]``; a query asks with ``q R_k[:, :r_k]`` at the
scale of the whole width; the output is ``P v~ R_v[:, :r_v]^T + mu_v``.

Departures from the paper and its code:

- one basis a key-value head, shared by its query heads; the code has one a query head and caches keys and values
  repeated, which loses with grouped queries what is meant to be saved;
- ``q mu_k^T`` is left out: it is the same for all keys, and the softmax removes it (models that squash products first
  keep their keys uncentred instead). By the same argument mu_k has no effect at any rank, so it is not trained;
- a prompt's own attention is exact unless ``prompt="projected"``, which is the paper's (and how bases are trained);
- signs of initial basis vectors are chosen by elimination rather than by turning the first one around;
- the loss is the divergence alone, as the paper says; the code's mixture is ``Distillation(cross_entropy=0.75)``;
- the learning rate falls in a line, not along a cosine; batches are not accumulated;
- `allocate` computes errors as the paper's Algorithm 1 does, from the whole model; the code compares the last hidden
  state with that of the compressed model, and takes 1536 entries at a time.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.matryoshka_basis import KEYS, VALUES, HeadBases, cayley, principal_bases
from apportion.keys.matryoshka_moments import head_moments
from apportion.keys.matryoshka_ranks import greedy_ranks, losses_by_attention, losses_by_divergence
from apportion.keys.matryoshka_training import Distillation, distil, encode_rows
from apportion.keys.memory import ComposedMemory
from apportion.keys.method import KeyMethod, OpenMethod
from apportion.keys.projected_store import HeadSpace, ProjectedStore
from apportion.keys.trace import record_trace
from apportion.models import LanguageModel
from apportion.models.heads import heads_written_by, write_weight
from apportion.models.key_memory import LayerFacts, LayerMemory


@dataclass(eq=False)
class MatryoshkaKV(KeyMethod):
    """Keys and values as prefixes of their coordinates in an orthogonal basis of each head.

    ``MatryoshkaKV(share=0.5).fit(lm, texts)`` gives principal components, ``.distil(lm, texts)`` trains them, and
    ``.at(0.75)`` is the same bases at other ranks.

    Attributes:
        share: of the numbers of a plain cache that is kept. Without `allocate` every head keeps this share of its
            width, rounded.
        prompt: ``dense`` for a prompt that reads itself exactly; ``projected`` for one that reads coordinates, which
            also never holds a whole cache.
        fold: compute output projections from the coordinates of the values (``R_v^T W_o`` in place of ``W_o``), so that
            values are never brought back; needs ``prompt="projected"``, since exact values cannot be read that way.

    Raises:
        InputError: a setting that cannot work.
    """

    slug: ClassVar[str] = "matryoshka_kv"
    needs_fit: ClassVar[bool] = True
    share: float = 0.4
    prompt: str = "dense"
    fold: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share={self.share}: above 0, at most 1, such as 0.5")
        if self.prompt not in ("dense", "projected"):
            raise InputError(f"prompt={self.prompt!r}: dense or projected")
        if self.fold and self.prompt != "projected":
            raise InputError('fold=True needs prompt="projected": folded projections cannot read exact values')

    @override
    def fit(
        self,
        model: LanguageModel,
        texts: Sequence[str],
        *,
        tokens: int = 512,
        generate: int = 0,
        **options: Any,
    ) -> "MatryoshkaKV":
        """Find means and principal components of each head's keys and values.

        Args:
            model: a decoder.
            texts: calibration texts.
            tokens: of each text at most.
            generate: go on for so many tokens after each text and count them too; the paper has 50, after prompts.
            options: none.

        Raises:
            InputError: no text, or one of fewer than two tokens.
        """
        if options:
            raise InputError(f"{', '.join(options)}: fit takes tokens and generate; training is distil's business")
        layers, means, covariances = head_moments(model, texts, tokens=tokens, generate=generate)
        bases = principal_bases(covariances)
        self.fitted, self.fitted_to = {}, model.fingerprint
        for row, layer in enumerate(layers):
            self.fitted[f"layer.{layer}.bases"] = bases[row].float()
            self.fitted[f"layer.{layer}.means"] = means[row].float()
        return self

    def distil(
        self,
        model: LanguageModel,
        texts: Sequence[str],
        how: Distillation | None = None,
        folder: Path | str | None = None,
        *,
        progress: bool = True,
    ) -> "MatryoshkaKV":
        """Train the bases that were fitted, by distillation from the model itself; see `Distillation`.

        Args:
            model: the one that it was fitted to.
            texts: long enough for rows of ``how.tokens``.
            how: None for the paper's settings.
            folder: keeps checkpoints; called again with the same arguments, training goes on from there.
            progress: shown on stderr.

        Raises:
            InputError: not fitted to this model; no text is long enough; the folder holds another run.
        """
        self.check(model)
        how = Distillation() if how is None else how
        bases = self.head_bases().to(model.device)
        distil(model, bases, encode_rows(model, texts, how.tokens), how, folder, progress=progress)
        self.take(bases)
        return self

    def allocate(
        self,
        model: LanguageModel,
        texts: Sequence[str],
        share: float | None = None,
        *,
        by: Literal["divergence", "attention"] = "divergence",
        step: int | None = None,
        floor: int | None = None,
        at_once: int = 1,
        tokens: int = 256,
    ) -> "MatryoshkaKV":
        """Give each head ranks of its own, greedily, and keep them until `fit` or `at`.

        Args:
            model: the one that it was fitted to.
            texts: calibration texts; if they are those of a task, the ranks are that task's.
            share: to keep on average; None for the setting's.
            by: ``divergence`` from the whole model (the paper's: a forward pass for each layer, head and kind, again in
                each round), or the error of each layer's own ``attention`` output (ours: seconds).
            step: coordinates that an entry loses at a time; None for the code's quarter of the width.
            floor: least rank; None for one step.
            at_once: entries that lose a step before errors are computed anew.
            tokens: of each text.

        Raises:
            InputError: see `greedy_ranks`; not fitted to this model; no text is long enough.
        """
        self.check(model)
        bases = self.head_bases().to(model.device)
        step = max(1, bases.width // 4) if step is None else step
        floor = step if floor is None else floor
        share = self.share if share is None else share
        if step < 1 or bases.width % step:
            raise InputError(f"step={step} does not divide {bases.width}, the width of a head")
        if by == "attention":
            trace = record_trace(model, texts, tokens=tokens, layers=bases.layers)
            errors = losses_by_attention(trace, bases, step)
        else:
            errors = losses_by_divergence(model, bases, encode_rows(model, texts, tokens), step)
        ranks = greedy_ranks(errors, bases.shape, bases.width, share, step=step, floor=floor, at_once=at_once)
        self.share = share
        self.set_ranks(ranks)
        return self

    def at(self, share: float) -> "MatryoshkaKV":
        """The same bases with the same rank for every head."""
        other = dataclasses.replace(self, share=share)
        other.fitted = {name: tensor for name, tensor in self.fitted.items() if not name.endswith(".ranks")}
        return other

    def set_ranks(self, ranks: Int[Tensor, "layers 2 groups"]) -> None:
        """Give each layer's keys and values (second dimension) in each head a rank."""
        for row, layer in enumerate(self._layers()):
            self.fitted[f"layer.{layer}.ranks"] = ranks[row].clone()

    def ranks(self) -> Int[Tensor, "layers 2 groups"]:
        """Those in force, of the fitted layers in order."""
        return torch.stack([self._ranks_of(self.of_layer(layer)) for layer in self._layers()])

    def head_bases(self) -> HeadBases:
        """The fitted bases as a module; training changes it, not this method, until `take`."""
        layers = self._layers()
        bases, means = (
            torch.stack([self.fitted[f"layer.{layer}.{what}"] for layer in layers]) for what in ("bases", "means")
        )
        return HeadBases(layers, bases, means)

    def take(self, bases: HeadBases) -> None:
        """Use these bases and means from now on."""
        with torch.no_grad():
            orthogonal, means = cayley(bases.angles), bases.means()
        for row, layer in enumerate(bases.layers):
            self.fitted[f"layer.{layer}.bases"] = orthogonal[row].cpu()
            self.fitted[f"layer.{layer}.means"] = means[row].detach().cpu()

    @override
    def memory(self, facts: LayerFacts) -> LayerMemory:
        keys, values = self._spaces(facts)
        projected = self.prompt == "projected"
        return ComposedMemory(facts, ProjectedStore(keys, values, project_prompt=projected, bring_back=not self.fold))

    @override
    @contextlib.contextmanager
    def __call__(self, model: Any) -> Iterator[OpenMethod]:
        with super().__call__(model) as run, contextlib.ExitStack() as stack:
            if self.fold:
                for facts in run.door.facts.values():
                    self._fold(model, facts, stack)
            yield run

    def _fold(self, model: Any, facts: LayerFacts, stack: contextlib.ExitStack) -> None:
        """The layer's output projection reads coordinates; the means of all heads become a bias."""
        _, values = self._spaces(facts)
        weight = write_weight(model, facts.layer)
        of_groups = weight.unflatten(0, (facts.groups, facts.heads // facts.groups)).float()
        columns, mean = (each.to(weight.device) for each in (values.columns, values.mean))
        folded = torch.einsum("gdr,ghdm->ghrm", columns, of_groups).flatten(0, 1)
        bias = torch.einsum("gd,ghdm->m", mean, of_groups)
        stack.enter_context(heads_written_by(model, facts.layer, folded.to(weight.dtype), bias.to(weight.dtype)))

    def _spaces(self, facts: LayerFacts) -> tuple[HeadSpace, HeadSpace]:
        found = self.of_layer(facts.layer)
        wanted = (2, facts.groups, facts.width, facts.width)
        if "bases" not in found or tuple(found["bases"].shape) != wanted:
            raise InputError(
                f"layer {facts.layer} has {facts.groups} key-value heads of width {facts.width}, for which nothing was "
                "fitted: fit the method to this model"
            )
        ranks = self._ranks_of(found).tolist()
        return tuple(HeadSpace(found["bases"][kind], found["means"][kind], ranks[kind]) for kind in (KEYS, VALUES))  # type: ignore[return-value]

    def _ranks_of(self, found: dict[str, Tensor]) -> Int[Tensor, "2 groups"]:
        groups, width = found["bases"].shape[1:3]
        return found.get("ranks", torch.full((2, groups), max(1, round(self.share * width))))

    def _layers(self) -> list[int]:
        return sorted(int(name.split(".")[1]) for name in self.fitted if name.endswith(".bases"))
