"""Fit a dictionary: the recipe, the objective that the training loop minimises, and what follows the last step."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.allocate import Allocation, FeatureChoice, MutualChoice, Rule, TokenChoice, Zipf
from apportion.errors import InputError
from apportion.features.dictionary import SparseAutoencoder
from apportion.features.jump_relu import LearnedThreshold
from apportion.features.losses import aux_k_loss, gated_loss, l0_loss, l1_loss, reconstruction_loss
from apportion.features.mutual_feature_choice import Phases, fit_zipf, set_shares_by_demand, underused_features
from apportion.features.optimizer import dictionary_adam
from apportion.features.resampling import ResampleDead, Resampling
from apportion.features.rules import rule_to_dict
from apportion.training import Hook, TrainingResult, TrainingSettings, train
from apportion.training.optimizer import OptimizerFactory

MATRYOSHKA = (1 / 32, 3 / 32, 7 / 32, 15 / 32)
"""The nested shares of Bussmann et al. 2025 (arXiv 2503.17547): groups of 1/32, 1/16, 1/8, 1/4 and the rest."""

Batch = Float[Tensor, "tokens d"] | tuple[Tensor, ...]
"""Activations of a step; or, for objectives that know what to do with more, several tensors whose rows are aligned,
the input of the dictionary first (targets or gradients of the same tokens, say)."""
Batches = Callable[[int], Batch]


@dataclass(frozen=True)
class Recipe:
    """How to train one dictionary; the defaults are those of the method sheet of arXiv 2411.02124 and its peers.

    Args:
        rule: who gets the budget, see ``SparseAutoencoder``.
        n_features: F.
        steps: optimiser steps.
        batch_size: tokens a step.
        gated: see ``SparseAutoencoder``.
        nested: shares of the features, ascending; the first so many of them must reconstruct by themselves, too
            (Matryoshka dictionaries).
        learning_rate: of Adam; default ``2e-4 / sqrt(F / 2**14)``.
        auxiliary: revive features that are underused by Zipf's law (``zipf``), or silent for long (``dead``), or none.
        auxiliary_weight: of that loss.
        auxiliary_size: candidates per token; default half the width.
        underused_cut: below which share of its Zipf expectation a feature counts as underused.
        dead_after: tokens of silence after which a feature is dead; default a quarter of the run, at most 10 million.
        phases: see ``Phases``.
        target_l0: for rules without a budget (ReLU, JumpReLU, Gated): the mean L0 to steer the penalty to.
        penalty: weight of their sparsity loss at the start (and for good, without ``target_l0``).
        precision: of the encoder product, ``float32`` or ``bfloat16``.
        seed: of the initial directions and of the training loop.
    """

    rule: Rule | LearnedThreshold
    n_features: int
    steps: int
    batch_size: int = 4096
    gated: bool = False
    nested: tuple[float, ...] = ()
    learning_rate: float | None = None
    auxiliary: Literal["zipf", "dead", "none"] = "zipf"
    auxiliary_weight: float = 1 / 32
    auxiliary_size: int | None = None
    underused_cut: float = 0.5
    dead_after: int | None = None
    phases: Phases = field(default_factory=Phases)
    target_l0: float | None = None
    penalty: float = 1e-3
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_features", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.auxiliary not in ("zipf", "dead", "none"):
            raise InputError(f"auxiliary={self.auxiliary!r}: one of zipf, dead, none")
        if self.precision not in ("float32", "bfloat16"):
            raise InputError(f"precision={self.precision!r}: one of float32, bfloat16")
        shares = (0.0, *self.nested, 1.0)
        if any(low >= high for low, high in pairwise(shares)) or any(s * self.n_features < 1 for s in self.nested):
            raise InputError(
                f"nested={self.nested}: give ascending shares between 0 and 1 of at least one of the {self.n_features} "
                f"features each, such as {MATRYOSHKA}"
            )
        if self.target_l0 is not None and not 0 < self.target_l0 <= self.n_features:
            raise InputError(f"target_l0={self.target_l0}: must be above 0 and at most n_features={self.n_features}")

    @property
    def has_budget(self) -> bool:
        """Whether the rule itself sets the sparsity, rather than a penalty."""
        return isinstance(self.rule, (TokenChoice, MutualChoice, FeatureChoice))

    @property
    def silence(self) -> int:
        """Tokens without firing after which a feature counts as dead."""
        if self.dead_after is not None:
            return self.dead_after
        return max(self.batch_size, min(10_000_000, self.steps * self.batch_size // 4))

    def settings(self, **overrides: Any) -> TrainingSettings:
        """Settings of the training loop."""
        rate = self.learning_rate or 2e-4 / math.sqrt(self.n_features / 2**14)
        shown = ("loss", "fvu", "l0", "dead")
        return TrainingSettings(
            **{"steps": self.steps, "learning_rate": rate, "seed": self.seed, "progress_metrics": shown, **overrides}
        )

    def to_json(self) -> dict[str, Any]:
        """Everything that decides the weights, as JSON-ready values."""
        return {**asdict(self), "rule": rule_to_dict(self.rule)}


class DictionaryObjective:
    """Loss of a batch under a recipe. Holds no state: what changes from step to step is in the dictionary's buffers.

    The objective is what knows what a batch holds. One for batches of several tensors overrides ``initialise`` and
    ``input_and_target``; one with another score, or that decodes to something else, ``codes`` and ``output``.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def initialise(self, sae: SparseAutoencoder, batch: Batch) -> None:
        """Prepare the dictionary by a first batch, see ``SparseAutoencoder.initialise_from``."""
        sae.initialise_from(_input_of(batch))

    def input_and_target(self, sae: SparseAutoencoder, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the encoder sees (``SparseAutoencoder.centred``), and what is to be explained, in scaled units."""
        x = _input_of(batch)
        return sae.centred(x), x * sae.input_scale

    def codes(self, sae: SparseAutoencoder, x: Tensor, batch: Batch, rule: Rule | None) -> Allocation:
        """The codes of a batch; ``x`` is what ``input_and_target`` made of it."""
        return sae.encode_centred(x, "batch", rule)

    def output(self, sae: SparseAutoencoder, codes: Allocation, x: Tensor) -> Tensor:
        """What the codes say of the target, in scaled units."""
        return sae.decode_scaled(codes)

    def __call__(
        self, sae: SparseAutoencoder, batch: Batch, step: int
    ) -> tuple[Float[Tensor, ""], dict[str, float | Tensor]]:
        """Loss and metrics; updates the dictionary's statistics."""
        recipe = self.recipe
        x, target = self.input_and_target(sae, batch)
        rule = None
        if not isinstance(recipe.rule, LearnedThreshold):
            rule = recipe.phases.rule(recipe.rule, recipe.n_features, step, recipe.steps)
        self._refresh(sae, x, step)
        codes = self.codes(sae, x, batch, rule)
        output = self.output(sae, codes, x)
        loss = fvu = self._reconstruction_loss(sae, target, output)
        if recipe.nested:
            loss = self._nested_loss(sae, x, target, codes, fvu)
        if not recipe.has_budget:
            loss = loss + self._penalty(sae, x, target, codes.nnz / max(codes.shape[0], 1))
        if recipe.auxiliary != "none" and step > 0:
            revive = sae.statistics.dead(recipe.silence) | sae.statistics.underused
            loss = loss + recipe.auxiliary_weight * self._auxiliary_loss(sae, x, target - output.detach(), revive)
        sae.statistics.update(codes.detach(), shared_threshold=not isinstance(rule, FeatureChoice))
        if isinstance(recipe.rule, FeatureChoice) and isinstance(rule, MutualChoice):
            sae.statistics.update_demand(codes.detach())
        return loss, {"fvu": fvu.detach(), **self._counts(sae, codes)}

    def _nested_loss(self, sae: SparseAutoencoder, x: Tensor, target: Tensor, codes: Allocation, fvu: Tensor) -> Tensor:
        """The mean of what the dictionary and each of its prefixes leave unexplained (Matryoshka dictionaries).

        Early features must be useful without the later ones, which keeps general features from being absorbed by
        special ones (Bussmann et al. 2025, arXiv 2503.17547). The code is that of the whole dictionary; a prefix
        decodes its part of it. The paper sums; with the mean an auxiliary loss weighs as much as without prefixes.
        """
        losses = [fvu]
        for share in self.recipe.nested:
            prefix = codes.keep(codes.col_indices < int(share * self.recipe.n_features))
            losses.append(self._reconstruction_loss(sae, target, self.output(sae, prefix, x)))
        return torch.stack(losses).mean()

    def _reconstruction_loss(self, sae: SparseAutoencoder, target: Tensor, output: Tensor) -> Tensor:
        return reconstruction_loss(target, output)

    def _auxiliary_loss(self, sae: SparseAutoencoder, x: Tensor, residual: Tensor, revive: Tensor) -> Tensor:
        return aux_k_loss(sae, x, residual, revive, self.recipe.auxiliary_size)

    def _counts(self, sae: SparseAutoencoder, codes: Allocation) -> dict[str, float | Tensor]:
        return {
            "l0": codes.nnz / max(codes.shape[0], 1),
            "dead": sae.statistics.dead(self.recipe.silence).float().mean(),
            "underused": sae.statistics.underused.float().mean(),
        }

    @torch.no_grad()
    def _refresh(self, sae: SparseAutoencoder, x: Tensor, step: int) -> None:
        """Now and then: which features are underused, and how Feature Choice ranks them."""
        recipe, phases = self.recipe, self.recipe.phases
        first = phases.feature_choice_starts(recipe.steps)
        if isinstance(recipe.rule, FeatureChoice) and first > 0 and step >= first:
            if step == first:
                set_shares_by_demand(sae, self._profile(sae), hysteresis=0.0)
            elif step % phases.refresh_every == 0:
                sae.statistics.update_demand(
                    sae.encode_centred(x, "batch", MutualChoice(recipe.rule.mean_budget(recipe.n_features)))
                )
                set_shares_by_demand(sae, self._current_profile(sae))
        if recipe.auxiliary == "zipf" and step > 0 and step % phases.refresh_every == 0:
            density = sae.statistics.of_all(sae.statistics.density)
            try:
                underused = underused_features(density, fit_zipf(density), recipe.underused_cut)
            except InputError:  # almost nothing fires: there is no law to compare with, only the dead to revive
                underused = density == 0
            sae.statistics.underused.copy_(sae.statistics.of_these(underused))

    def _profile(self, sae: SparseAutoencoder) -> Zipf:
        """The law that the Mutual Choice phase showed, kept in the dictionary's buffers for later steps."""
        try:
            profile = fit_zipf(sae.statistics.of_all(sae.statistics.demand)).profile
        except InputError:
            profile = Zipf()
        sae.zipf.copy_(torch.tensor([profile.exponent, profile.offset], dtype=sae.zipf.dtype))
        return profile

    @staticmethod
    def _current_profile(sae: SparseAutoencoder) -> Zipf:
        exponent, offset = sae.zipf.tolist()
        return Zipf(exponent, offset)

    def _penalty(self, sae: SparseAutoencoder, x: Tensor, target: Tensor, l0: float) -> Tensor:
        """The weighted sparsity loss of a rule without a budget; steers its weight to the target L0."""
        recipe = self.recipe
        weight = recipe.penalty * sae.statistics.log_penalty.exp()
        if recipe.target_l0 is not None:
            # A step of at most 2 % (up when too much fires): slow enough for the thresholds and norms to follow.
            error = math.log(max(l0, 1e-3) / recipe.target_l0)
            sae.statistics.log_penalty += 0.02 * max(-1.0, min(1.0, error))
        if recipe.gated:
            sparsity, auxiliary = gated_loss(sae, x, target)
            return weight * sparsity + auxiliary
        if isinstance(recipe.rule, LearnedThreshold):
            return weight * l0_loss(sae, x)
        return weight * l1_loss(sae.encode_centred(x, "batch"), sae.decoder_weight)


class UnitDecoder(Hook[SparseAutoencoder]):
    """Before each step, take from the decoder's gradient what would only change the norm of its rows.

    `DictionaryAdam`, which ``fit_dictionary`` trains with, brings the rows back to unit norm after the step.
    """

    def before_step(self, module: SparseAutoencoder, step: int) -> None:
        """Project."""
        module.project_decoder_gradient()


def fit_dictionary(
    recipe: Recipe,
    batches: Batches,
    d_in: int,
    *,
    sae: SparseAutoencoder | None = None,
    objective: DictionaryObjective | None = None,
    calibration: Callable[[], Iterable[Float[Tensor, "tokens d"]]] | None = None,
    start_from: Callable[[SparseAutoencoder], None] | None = None,
    resampling: Resampling | None = None,
    folder: Path | str | None = None,
    provenance: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    stop_after: int | None = None,
    **settings: Any,
) -> tuple[SparseAutoencoder, TrainingResult]:
    """Train a dictionary by a recipe: initialise, train, calibrate, fold the input scale.

    Args:
        recipe: see ``Recipe``.
        batches: activations of a step, [batch_size, d_in], or a tuple of tensors where the objective wants one; the
            same step always gives the same batch.
        d_in: width of the dictionary's input.
        sae: the dictionary to train in place, of the recipe's rule and size; default a new ``SparseAutoencoder`` of the
            recipe. Name what is special about it in ``provenance`` if the run has a folder.
        objective: what is minimised; default ``DictionaryObjective(recipe)``. Name it in ``provenance`` likewise.
        calibration: gives batches of held-out activations for the inference thresholds; without it the running
            estimates of training serve.
        start_from: changes the initialised dictionary before the first step, say to the directions of another one. Name
            it in ``provenance`` if the run has a folder.
        resampling: give dead features a new start now and then, see ``Resampling``.
        folder: for checkpoints and logs; an interrupted run in it is resumed. None keeps nothing on disk.
        provenance: what else decides the weights (the data); a run that was trained on something else is not resumed.
        device: where to train.
        progress: show it on stderr.
        stop_after: pause, with a checkpoint, after this many steps of the run.
        settings: overrides of ``TrainingSettings``.

    Returns:
        The dictionary in evaluation mode, in the units of the activations, and how training ended. If training was
        paused before its end the dictionary is neither calibrated nor folded.

    Raises:
        InputError: ``sae`` is of another width, size or rule than was asked for.
    """
    if sae is None:
        sae = SparseAutoencoder(d_in, recipe.n_features, recipe.rule, gated=recipe.gated, seed=recipe.seed)
    else:
        _check_fits(sae, recipe, d_in)
    objective = objective or DictionaryObjective(recipe)
    sae.precision = recipe.precision
    objective.initialise(sae, batches(0))
    if start_from is not None:
        start_from(sae)
    sae.to(device)
    # A gradient with a row for every feature is read and written whole, whoever won. Below one winner in two features
    # at least half of it is zeros, and leaving them out saves more than finding the rows that are not costs.
    budget = recipe.rule.mean_budget(recipe.n_features)
    sae.sparse_gradients = budget is not None and budget * recipe.batch_size < recipe.n_features / 2
    planned = recipe.settings(**settings)
    optimizer: OptimizerFactory = dictionary_adam(sae, planned)
    hooks: list[Hook[SparseAutoencoder]] = [UnitDecoder()]
    if resampling is not None:
        hook = ResampleDead(resampling, lambda step: _input_of(batches(step)).to(device), recipe.seed)
        optimizer = hook.watching(optimizer)
        hooks.append(hook)
        provenance = {**(provenance or {}), "resampling": asdict(resampling)}
    result = train(
        sae,
        objective,
        batches,
        planned,
        folder,
        hooks=hooks,
        optimizer=optimizer,
        provenance=flat_provenance(recipe, d_in, provenance),
        progress=progress,
        stop_after=stop_after,
    )
    if result.steps_done < recipe.steps:
        return sae, result
    finish_dictionary(sae, recipe, calibration, provenance, device)
    return sae, result


def _input_of(batch: Batch) -> Tensor:
    """What of a batch the dictionary reads."""
    return batch if isinstance(batch, Tensor) else batch[0]


def _check_fits(sae: SparseAutoencoder, recipe: Recipe, d_in: int) -> None:
    for name, found, wanted in (
        ("d_in", sae.d_in, d_in),
        ("n_features", sae.n_features, recipe.n_features),
        ("rule", rule_to_dict(sae.rule), rule_to_dict(recipe.rule)),
        ("gated", sae.gated, recipe.gated),
    ):
        if found != wanted:
            raise InputError(f"sae.{name}={found}: the recipe and the batches are for {name}={wanted}")


def finish_dictionary(
    sae: SparseAutoencoder,
    recipe: Recipe,
    calibration: Callable[[], Iterable[Float[Tensor, "tokens d"]]] | None,
    provenance: dict[str, Any] | None,
    device: str | torch.device,
) -> None:
    """What follows the last step, see ``fit_dictionary``: evaluation mode, calibration, the scale folded in."""
    sae.eval()
    if calibration is not None:
        rows = sum(each.shape[0] for each in calibration())
        sae.calibrate((each.to(device) for each in calibration()), rows)
    sae.fold_scale()
    sae.metadata = {"recipe": recipe.to_json(), "tokens_seen": int(sae.statistics.tokens_seen), **(provenance or {})}


def flat_provenance(
    recipe: Recipe, d_in: int, more: dict[str, Any] | None
) -> dict[str, str | int | float | bool | None]:
    """What decides the weights of a dictionary, as the training loop compares it."""
    return _flat({"recipe": recipe.to_json(), "d_in": d_in, **(more or {})})


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool | None]:
    """Nested JSON as one level with dotted names, so that what differs between two runs can be named."""
    return dict(_walk(content, prefix))


def _walk(content: Any, name: str) -> Iterator[tuple[str, str | int | float | bool | None]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _walk(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, (list, tuple)):
        yield name, str(list(content))
    else:
        yield name, content
