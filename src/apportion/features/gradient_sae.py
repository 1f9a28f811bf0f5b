"""Features that Make a Difference: gradient SAEs (Olmo, Wilson, Forsey, Hepner, Howe, Wingate 2024, arXiv 2411.10397).

Allocated: the budget of any rule (the paper's: k features per token), by a score that also counts what a feature does.
A feature's affinity with the token is raised by how steeply the model's loss changes along the feature's direction;
training thereby shapes a dictionary whose features act. Inference needs no gradient: it is that of the plain rule.

| paper | here |
|---|---|
| x, the activation; g = gradient of L at x | a batch ``(x, gradients)``, as ``harvest(gradients=...)`` keeps them |
| z = W_enc x + b_enc, here rectified | the affinity |
| w = abs(W_dec^T g) | ``effects`` |
| s = z + beta z * w | ``GradientScore(beta)`` |
| TopK(s) | ``TokenChoice``; ``MutualChoice`` and ``FeatureChoice`` take the score as well |

Three things the paper leaves open, with our defaults: the kept value is the affinity (``value="score"`` keeps s);
there is no gradient at inference (``encode_with_gradients`` is for analysis); z is rectified before it is weighted.
Ours, too: ``norm="mean"`` divides w by its running mean over features and tokens, so that beta = 1 doubles the score of
a feature of average effect whatever the loss, the layer and the model. No gradient flows through the score, and the
loss that revives silent features looks at plain affinities: a feature of little effect must be able to come back.

The gradient of the loss on the true next tokens knows the answer. Where it chooses the code, the code tells the answer:
cross-entropy falls while the divergence from the model's own predictions rises. Never take the cross-entropy of codes
from ``encode_with_gradients`` for fidelity.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from apportion.allocate import Allocation, FeatureChoice, MutualChoice, Rule, TokenChoice
from apportion.errors import InputError
from apportion.features.dictionary import SparseAutoencoder
from apportion.features.fitting import Batch, Batches, DictionaryObjective, Recipe, fit_dictionary
from apportion.ops.csr import csr_matmul, csr_sampled_product, csr_transposed_matmul, touched_columns
from apportion.training import TrainingResult

# Below this mean of beta * w the score is the affinity for all that selection can tell.
_INERT = 1e-3
_HORIZON = 200  # batches that the running mean remembers, as in FeatureStatistics


@dataclass(frozen=True)
class GradientScore:
    """How gradients enter the score ``z * (1 + beta * w)``.

    Args:
        beta: weight of the effect; 0 is the plain rule. With ``norm="mean"`` the range worth trying is 0.1 to 3.
        norm: ``mean`` divides effects by their running mean; ``none`` takes them as they are (the paper's form): then
            beta means something else for every loss, layer and model.
        value: what the code keeps of a winner, its ``affinity`` or its ``score``. A dictionary trained with the latter
            expects gradients at inference too.

    Raises:
        InputError: a negative or infinite beta, or another norm or value.
    """

    beta: float = 1.0
    norm: Literal["mean", "none"] = "mean"
    value: Literal["affinity", "score"] = "affinity"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise InputError(f"beta={self.beta}: must be a number from 0 (plain affinities) on, such as 1")
        if self.norm not in ("mean", "none"):
            raise InputError(f"norm={self.norm!r}: one of mean, none")
        if self.value not in ("affinity", "score"):
            raise InputError(f"value={self.value!r}: one of affinity, score")


def effects(sae: SparseAutoencoder, gradients: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens features"]:
    """How steeply the loss changes along each feature's direction, up or down: ``abs(W_dec g)``, without gradient.

    Raises:
        InputError: the decoder's rows are not unit vectors, along which alone this is a slope.
        ValueError: wrong width, or NaN or infinite gradients.
    """
    weight = sae.decoder_weight.detach()
    if gradients.ndim != 2 or gradients.shape[1] != sae.d_out:
        raise ValueError(f"gradients has shape {tuple(gradients.shape)}: give [tokens, {sae.d_out}]")
    if not bool(gradients.sum().isfinite()) and not bool(gradients.isfinite().all()):
        wrong = int((~gradients.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(
            f"gradients[{wrong}] has NaN or infinite entries: drop such tokens, or use a wider model dtype"
        )
    off = float((weight.norm(dim=1) - 1).abs().max())
    if off > 1e-2:
        raise InputError(f"the decoder's rows are up to {off:.2g} off unit norm: call normalise_decoder() first")
    return (gradients.detach() @ weight.T).abs_()


def encode_with_gradients(
    sae: SparseAutoencoder,
    x: Float[Tensor, "tokens d"],
    gradients: Float[Tensor, "tokens d"],
    score: GradientScore | None = None,
    *,
    rule: Rule | None = None,
    effect_mean: float | None = None,
) -> Allocation:
    """The code of tokens whose gradients are known, for analysis: gradients help to choose it.

    Not for fidelity: with gradients of the loss on the true next tokens the code tells what comes next.

    Args:
        sae: the dictionary, trained with gradients or without.
        x: activations as the model gives them.
        gradients: of the sum of losses, at the same tokens. A token with gradient 0 is encoded as by the plain rule.
        score: default ``GradientScore()``.
        rule: allocate by this rule, over this batch; default the dictionary's own.
        effect_mean: what ``norm="mean"`` divides effects by; default their mean over this batch.

    Raises:
        InputError: a rule without a budget, a gated dictionary, decoder rows off unit norm.
        ValueError: shapes that do not fit, NaN or infinite numbers.
    """
    score = score or GradientScore()
    _check_rule(rule or sae.rule, sae)
    centred = sae.centred(x)
    weights = effects(sae, gradients)
    mean = effect_mean if effect_mean is not None else float(_mean_effect(weights, gradients))
    return _select(sae, centred, weights.mul_(_factor(score, mean)), rule or sae.rule, score.value)  # type: ignore[arg-type]


def attribution_rank(
    sae: SparseAutoencoder, x: Float[Tensor, "tokens d"], gradients: Float[Tensor, "tokens d"]
) -> tuple[Int64[Tensor, "features"], Float[Tensor, "features"]]:
    """Rank the features of a trained dictionary by activation times gradient; no training (arXiv 2505.08080, GradSAE).

    A feature's influence is the mean over tokens of ``relu(z_i * (d_i . g))``, to first order what it adds to the
    objective that ``gradients`` are of; with the gradients of a loss turn their sign to rank what lowers it.

    Returns:
        Features, the most influential first, and the influence of every feature (in their own order).
    """
    with torch.no_grad():
        codes = sae.encode(x)
        effects(sae, gradients[:0])  # the checks
        slopes = csr_sampled_product(codes.crow_indices, codes.col_indices, gradients, sae.decoder_weight)
        shares = (codes.values * slopes).clamp_(min=0)
        influence = shares.new_zeros(sae.n_features).index_add_(0, codes.col_indices, shares) / max(x.shape[0], 1)
    return influence.sort(descending=True, stable=True).indices, influence


# --- training --------------------------------------------------------------------------------------------------------


class GradientAutoencoder(SparseAutoencoder):
    """The dictionary while it trains: it also remembers the mean effect, so that a resumed run goes on with it."""

    effect_mean: Tensor
    effect_now: Tensor
    effect_batches: Tensor

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register_buffer("effect_mean", torch.zeros(()))
        self.register_buffer("effect_now", torch.zeros(()))
        self.register_buffer("effect_batches", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def see_effects(self, mean: Float[Tensor, ""]) -> None:
        """Take in the mean effect of a batch: a plain mean at first, an exponential one later."""
        self.effect_batches += 1
        self.effect_now.copy_(mean)
        self.effect_mean.lerp_(mean, max(1 / int(self.effect_batches), 1 / _HORIZON))

    def plain(self) -> SparseAutoencoder:
        """The trained dictionary without what only training needs."""
        sae = SparseAutoencoder(self.d_in, self.n_features, self.rule)
        sae.load_state_dict({name: each for name, each in self.state_dict().items() if not name.startswith("effect_")})
        sae.precision, sae.metadata = self.precision, self.metadata
        return sae.to(self.decoder_weight.device).train(self.training)


class GradientObjective(DictionaryObjective):
    """The recipe's objective on batches ``(x, gradients)``: gradients help to choose winners, all else is as ever.

    Warns at the first step if the mean of ``beta * w`` is below 0.001, which a loss averaged over tokens makes it.
    """

    def __init__(self, recipe: Recipe, score: GradientScore) -> None:
        super().__init__(recipe)
        self.score = score

    def codes(self, sae: SparseAutoencoder, x: Tensor, batch: Batch, rule: Rule | None) -> Allocation:
        """Selected by the score; see ``GradientScore.value`` for the values."""
        if self.score.beta == 0:
            return super().codes(sae, x, batch, rule)
        assert isinstance(sae, GradientAutoencoder)
        if isinstance(batch, Tensor) or len(batch) < 2:
            raise InputError(
                f"beta={self.score.beta:g}, but batches hold no gradients: harvest(..., gradients='label'), and give "
                "store.joint_batches(..., sites=[site, gradient_of(site)])"
            )
        if batch[1].shape != batch[0].shape:
            raise InputError(f"gradients {tuple(batch[1].shape)} and activations {tuple(batch[0].shape)}: must agree")
        weights = effects(sae, batch[1])
        sae.see_effects(_mean_effect(weights, batch[1]))
        if int(sae.effect_batches) == 1:
            self._warn_if_inert(float(sae.effect_mean))
        weights.mul_(_factor(self.score, float(sae.effect_mean)))
        return _select(sae, x, weights, rule or sae.rule, self.score.value)  # type: ignore[arg-type]

    def _counts(self, sae: SparseAutoencoder, codes: Allocation) -> dict[str, float | Tensor]:
        counts = super()._counts(sae, codes)
        if isinstance(sae, GradientAutoencoder) and self.score.beta:
            counts["mean_beta_w"] = sae.effect_now * _factor(self.score, float(sae.effect_mean))
        return counts

    def _warn_if_inert(self, mean: float) -> None:
        weight = mean * _factor(self.score, mean)
        if weight < _INERT:
            warnings.warn(
                f"the mean of beta * w is {weight:.1e}: gradients change no choice. Were they of a loss averaged over "
                "tokens, not summed? norm='mean' makes beta independent of such factors",
                stacklevel=2,
            )


def fit_gradient_dictionary(
    recipe: Recipe, batches: Batches, d_in: int, score: GradientScore | None = None, **options: Any
) -> tuple[SparseAutoencoder, TrainingResult]:
    """``fit_dictionary`` with winners chosen by ``z * (1 + beta * w)``; inference is that of the recipe's rule.

    Args:
        recipe: its rule must have a budget (``TokenChoice``, the paper's; ``MutualChoice``, ``FeatureChoice``). Give
            rules of the batch ``calibration``, too: thresholds must come from plain affinities.
        batches: pairs ``(activations, gradients)`` of a step, such as
            ``store.joint_batches(size, sites=[site, gradient_of(site)])``.
        d_in: width of both.
        score: default ``GradientScore()``.
        options: of ``fit_dictionary``.

    Returns:
        A plain dictionary, whose metadata names the score and the mean effect, and how training ended.

    Raises:
        InputError: a rule without a budget, no gradients, or gradients of another shape.
    """
    score = score or GradientScore()
    if recipe.gated or not recipe.has_budget:
        raise InputError(
            f"rule={recipe.rule}{', gated' if recipe.gated else ''}: gradients help to share out a budget; use "
            "TokenChoice, MutualChoice or FeatureChoice"
        )
    provenance = {**(options.pop("provenance", None) or {}), "gradient_score": asdict(score)}
    sae = GradientAutoencoder(d_in, recipe.n_features, recipe.rule, seed=recipe.seed)
    objective = GradientObjective(recipe, score)
    fitted, result = fit_dictionary(
        recipe, batches, d_in, sae=sae, objective=objective, provenance=provenance, **options
    )
    assert isinstance(fitted, GradientAutoencoder)
    plain = fitted.plain()
    if result.steps_done >= recipe.steps:
        plain.metadata["mean_effect"] = float(fitted.effect_mean)
    return plain, result


# --- selection -------------------------------------------------------------------------------------------------------


def _factor(score: GradientScore, mean: float) -> float:
    if score.norm == "none":
        return score.beta
    return score.beta / mean if mean > 0 else 0.0


def _mean_effect(weights: Tensor, gradients: Tensor) -> Tensor:
    """Over features and those tokens that have a gradient at all."""
    tokens = gradients.ne(0).any(dim=1).sum()
    return weights.sum() / (tokens * weights.shape[1]).clamp(min=1)


def _check_rule(rule: Any, sae: SparseAutoencoder) -> None:
    if sae.gated or not isinstance(rule, (TokenChoice, MutualChoice, FeatureChoice)):
        raise InputError(f"rule={rule}: gradients help to share out a budget; give rule=TokenChoice(k), say")


def _select(sae: SparseAutoencoder, x: Tensor, weights: Tensor, rule: Rule, value: str) -> Allocation:
    """The winners by ``z (1 + weights)``; differentiable in their values alone, by the products of the sparse ops."""
    with torch.no_grad():
        affinity = torch.addmm(sae.encoder_bias, x, sae.encoder_weight.T).clamp_(min=0)
        weights.add_(1)
        crow, col = sae._batch_selection(x.shape[0], rule).places(affinity * weights)
    rows = torch.repeat_interleave(crow.diff(), output_size=col.numel())
    values = _At.apply(x, sae.encoder_weight, sae.encoder_bias, crow, col, affinity[rows, col], sae.sparse_gradients)
    codes = Allocation(crow, col, values, (x.shape[0], sae.n_features))
    if value == "score":
        codes = codes.with_values(values * weights[rows, col])
    return codes.active()


class _At(torch.autograd.Function):
    """Affinities at chosen places, found before; the gradient is that of ``apportion.ops.encode_select``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, crow: Tensor, col: Tensor, found: Tensor, sparse: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, crow, col)
        ctx.sparse = sparse
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, crow, col = ctx.saved_tensors
        (grad,) = grads
        to_x = csr_matmul(crow, col, grad, weight) if ctx.needs_input_grad[0] else None
        transposed: Callable[..., Tensor] = touched_columns if ctx.sparse else csr_transposed_matmul
        to_weight = transposed(crow, col, grad, x, weight.shape[0]) if ctx.needs_input_grad[1] else None
        to_bias = grad.new_zeros(weight.shape[0]).index_add_(0, col, grad) if ctx.needs_input_grad[2] else None
        return to_x, to_weight, to_bias, None, None, None, None
