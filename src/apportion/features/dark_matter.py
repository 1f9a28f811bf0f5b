"""What a dictionary leaves unexplained: how much of its error is linear in the activation, and what that costs.

*Decomposing the Dark Matter of Sparse Autoencoders* (Engels, Smith & Tegmark 2024, arXiv 2410.14670). Nothing is
allocated: this is an audit of what an allocation of k features a token misses. For a token x the error is
``e = x - SAE(x)``; a linear map with bias, fitted on other documents, predicts a part of it, and the rest is nonlinear.

| paper | here |
|---|---|
| SaeError(x) | ``errors``, e |
| linear error, W x | ``linear``: what ``LinearMap`` predicts of e from x |
| NonlinearError(x) | ``errors - linear`` |
| FVU, FVU_nonlinear | ``fvu``, ``fvu_nonlinear``: squared error over squared distance from the mean |
| R^2 of the error (mean over dimensions) | ``r2_error_mean_over_dimensions``; in ``r2_error`` large ones weigh more |
| R^2 of the error norm squared | ``r2_squared_norm`` |

Where we differ from the released scripts: the map always has a bias; its ridge is chosen on held-out documents; fit and
test share no document; and a control for shrinkage is fitted first. A reconstruction that is only too short,
``x_hat = 0.9 x``, or none at all, has an error proportional to x: 100 % linear, though no feature is missing. So the
audit reports what the best single rescaling of the code, and the best rescaling of each feature, remove of the linear
error, and warns where that is much.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.errors import InputError
from apportion.features.dictionary import SparseAutoencoder
from apportion.features.evaluate import Contexts, Metric, RatioOfSums, SplicedLoss
from apportion.features.linear_fit import RIDGES, LinearMap, Tokens, determination, fit_by_document

# As many as in the paper.
FIT_TOKENS, TEST_TOKENS = 150_000, 97_000
_ROWS_AT_ONCE = 4096
_CONTEXTS_AT_ONCE = 16
# Solving for a scale of every feature takes features cubed operations and features squared numbers.
_MOST_FEATURES_TO_RESCALE = 6144
# Tokens for each input dimension below which R^2 on other tokens is mostly about how few there are.
_FEW_TOKENS = 20
_MUCH_SHRINKAGE = 0.25

Reconstruct = Callable[[Tensor], Tensor]


# --- the audit -------------------------------------------------------------------------------------------------------


@dataclass
class ErrorAudit:
    """What is known of a dictionary's error.

    Attributes:
        metrics: by name, with standard errors over documents where they are ratios of sums.
        linear: the map from activations to errors.
        errors: of the test tokens.
        warnings: what a reader must know before believing the figures.
        tokens: fitted on, and tested on.
    """

    metrics: dict[str, Metric]
    linear: LinearMap
    errors: Float[Tensor, "tokens d"]
    warnings: list[str] = field(default_factory=list)
    tokens: tuple[int, int] = (0, 0)

    def to_json(self) -> dict[str, Any]:
        """The figures."""
        return {
            "fit_tokens": self.tokens[0],
            "test_tokens": self.tokens[1],
            "ridge": self.linear.ridge,
            "warnings": self.warnings,
            "metrics": {name: asdict(metric) for name, metric in self.metrics.items()},
        }


def read_tokens(view: Contexts, limit: int | None = None) -> Tokens:
    """The tokens of a view with their documents, up to ``limit``.

    Raises:
        InputError: there are none.
    """
    parts, count = [], 0
    for start in range(0, view.n_contexts, _CONTEXTS_AT_ONCE):
        _, activations, valid, documents = view.contexts(start, min(start + _CONTEXTS_AT_ONCE, view.n_contexts))
        parts.append((activations[valid], documents.unsqueeze(1).expand_as(valid)[valid]))
        count += len(parts[-1][0])
        if limit is not None and count >= limit:
            break
    if count == 0:
        raise InputError("there are no held-out tokens to audit: harvest more text, or hold out more of it")
    x, documents = (torch.cat(each)[:limit] for each in zip(*parts, strict=True))
    return Tokens(x, documents)


@torch.no_grad()
def audit_errors(
    dictionary: SparseAutoencoder | Reconstruct,
    fit: Tokens,
    test: Tokens,
    *,
    ridges: Sequence[float] = RIDGES,
    validation: float = 0.2,
    device: str | torch.device = "cpu",
) -> ErrorAudit:
    """Split a dictionary's error into what is linear in the activation and what is not.

    Args:
        dictionary: a dictionary, in inference mode; or any map from activations to reconstructions.
        fit: tokens that the linear maps are fitted to; the paper has 40 for each dimension. Neither these nor the test
            tokens should be those that the dictionary was trained on.
        test: tokens of other documents, on which everything is measured.
        ridges: see ``fit_linear``.
        validation: share of ``fit``, by document, on which the ridge is chosen.
        device: where the dictionary computes.

    Raises:
        InputError: fit and test share a document, or are of different widths; too few tokens.
    """
    shared = set(fit.documents.unique().tolist()) & set(test.documents.unique().tolist())
    if shared:
        raise InputError(
            f"fit and test share {len(shared)} documents, such as {min(shared)}: tokens of one document are alike, "
            "so split by document"
        )
    if fit.x.shape[1] != test.x.shape[1]:
        raise InputError(f"fit has width {fit.x.shape[1]}, test {test.x.shape[1]}: give tokens of one site")
    reconstruct = _reconstruction_of(dictionary, device)
    fit_errors, errors = (each.x - _in_parts(reconstruct, each.x) for each in (fit, test))
    warnings: list[str] = []
    width = fit.x.shape[1]
    per_dimension = (1 - validation) * len(fit) / width
    if per_dimension < _FEW_TOKENS:
        warnings.append(
            f"the linear map is fitted to {per_dimension:.0f} tokens for each of {width} dimensions: with more it "
            "would predict more, so the linear part is underrated"
        )
    if not bool(_varies(test.x - errors, test.x)):
        warnings.append("the reconstruction is the same for every token: the dictionary is dead, its error is x itself")
    rescaling = _Rescaling.fitted(dictionary, fit, fit.x - fit_errors)
    rescaled = rescaling.errors(fit.x, fit_errors)
    targets = torch.cat([fit_errors, rescaled, fit_errors.square().sum(dim=1, keepdim=True)], dim=1)
    linear, linear_rescaled, norms = fit_by_document(
        fit.x, targets, fit.documents, ridges, validation, groups=(width, width, 1)
    )
    metrics = _decomposition(test, errors, linear, norms)
    left, scale = rescaling.errors(test.x, errors), rescaling.scale
    metrics |= _shrinkage(dictionary, fit, test, scale, left, linear_rescaled, metrics, device)
    removed = metrics["linear_error_by_rescaling"].value
    if removed > _MUCH_SHRINKAGE:
        warnings.append(
            f"rescaling the codes alone removes {100 * removed:.0f} % of the linear error (best factor {scale:.3f}): "
            "that part is shrinkage, not missing features"
        )
    return ErrorAudit(metrics, linear, errors, warnings, (len(fit), len(test)))


def audit_run(
    dictionary: SparseAutoencoder,
    fit: Contexts,
    test: Contexts,
    loss: SplicedLoss | None = None,
    *,
    device: str | torch.device = "cpu",
) -> ErrorAudit:
    """``audit_errors`` on parts of a store, with the paper's numbers of tokens, and what the parts cost the model.

    Args:
        dictionary: of the site of the store.
        fit: held-out contexts that the linear maps are fitted to, such as those that thresholds were calibrated on.
        test: others.
        loss: measures the model's loss; None leaves it out.
        device: where the dictionary is.
    """
    audit = audit_errors(dictionary, read_tokens(fit, FIT_TOKENS), read_tokens(test, TEST_TOKENS), device=device)
    if loss is not None:
        audit.metrics |= loss_shares(loss, dictionary, audit.linear)
    return audit


def _reconstruction_of(dictionary: SparseAutoencoder | Reconstruct, device: Any) -> Reconstruct:
    if not isinstance(dictionary, SparseAutoencoder):
        return dictionary
    if dictionary.d_in != dictionary.d_out:
        raise InputError(
            f"the dictionary maps width {dictionary.d_in} to width {dictionary.d_out}: give a function from "
            "activations to reconstructions of them instead"
        )
    return lambda x: dictionary.decode(dictionary.encode(x.to(device), mode="threshold")).cpu()


def _in_parts(reconstruct: Reconstruct, x: Tensor) -> Tensor:
    return torch.cat([reconstruct(part) for part in x.split(_ROWS_AT_ONCE)])


def _varies(reconstruction: Tensor, x: Tensor) -> Tensor:
    spread = [(each - each.mean(dim=0)).square().sum() for each in (reconstruction, x)]
    return spread[0] > 1e-9 * spread[1]


def _decomposition(test: Tokens, errors: Tensor, linear: LinearMap, norms: LinearMap) -> dict[str, Metric]:
    predicted = linear(test.x)
    total, distance = errors.square().sum(dim=1), (test.x - test.x.mean(dim=0)).square().sum(dim=1)
    nonlinear = (errors - predicted).square().sum(dim=1)
    spread = (errors - errors.mean(dim=0)).square().sum(dim=1)
    norm_error = (total - norms(test.x).flatten()).square()
    norm_spread = (total - total.mean()).square()
    dimensions = determination(predicted, errors)

    def ratio(name: str, definition: str, above: Tensor, below: Tensor, r2: bool = False) -> Metric:
        sums = RatioOfSums()
        sums.add(test.documents, above, below)
        return sums.metric(name, definition, (lambda value: 1 - value) if r2 else float)

    found = [
        ratio("fvu", "squared error / squared distance from the mean", total, distance),
        ratio("fvu_linear", "fvu - fvu_nonlinear: what a linear map of x adds back", total - nonlinear, distance),
        ratio("fvu_nonlinear", "fvu of reconstruction + linear error", nonlinear, distance),
        ratio("r2_error", "share of the error's variance that is linear in x", nonlinear, spread, r2=True),
        Metric(
            "r2_error_mean_over_dimensions",
            dimensions.mean_over_dimensions,
            None,
            len(test.documents.unique()),
            "the same for each dimension, averaged"
            + (f"; {dimensions.constant_dimensions} do not vary" if dimensions.constant_dimensions else ""),
        ),
        ratio("r2_squared_norm", "R^2 of the error's squared norm, from x", norm_error, norm_spread, r2=True),
    ]
    return {metric.name: metric for metric in found}


# --- the control: is the reconstruction only too short? --------------------------------------------------------------


@dataclass(frozen=True)
class _Rescaling:
    """``centre + scale * (reconstruction - origin)``, with the best factor on all codes.

    For a plain function, on all that varies of what it returns.
    """

    scale: float
    origin: Float[Tensor, " d"]
    centre: Float[Tensor, " d"]

    @classmethod
    def fitted(cls, dictionary: SparseAutoencoder | Reconstruct, fit: Tokens, reconstruction: Tensor) -> "_Rescaling":
        if isinstance(dictionary, SparseAutoencoder):
            origin = centre = (dictionary.decoder_bias / dictionary.input_scale).detach().cpu()
        else:
            origin, centre = reconstruction.mean(dim=0), fit.x.mean(dim=0)
        contribution = (reconstruction - origin).double()
        energy = float(contribution.square().sum())
        wanted = float(((fit.x - centre).double() * contribution).sum())
        return cls(wanted / energy if energy > 0 else 1.0, origin, centre)

    def errors(self, x: Tensor, errors: Tensor) -> Tensor:
        """What is then left of errors."""
        return x - self.centre - self.scale * (x - errors - self.origin)


def _shrinkage(
    dictionary: SparseAutoencoder | Reconstruct,
    fit: Tokens,
    test: Tokens,
    scale: float,
    left: Tensor,
    linear_rescaled: LinearMap,
    metrics: Mapping[str, Metric],
    device: Any,
) -> dict[str, Metric]:
    """What rescaling the code removes of the error, and how linear the rest is."""
    distance = (test.x - test.x.mean(dim=0)).square().sum(dim=1)
    n = len(test.documents.unique())

    def ratio(name: str, definition: str, errors: Tensor) -> Metric:
        sums = RatioOfSums()
        sums.add(test.documents, errors.square().sum(dim=1), distance)
        return sums.metric(name, definition)

    r2 = determination(linear_rescaled(test.x), left).weighted
    found = [
        Metric("best_scale", scale, None, n, "the factor on all codes that reconstructs best; above 1 is shrinkage"),
        ratio("fvu_rescaled", "fvu with all codes times best_scale", left),
        Metric("r2_error_rescaled", r2, None, n, "share of the variance of what is then left that is linear in x"),
    ]
    best = left
    if isinstance(dictionary, SparseAutoencoder) and dictionary.n_features <= _MOST_FEATURES_TO_RESCALE:
        scales = feature_scales(dictionary, fit, device=device)
        best = test.x - _in_parts(lambda x: _decode_rescaled(dictionary, x.to(device), scales).cpu(), test.x)
        found.append(ratio("fvu_feature_rescaled", "fvu with a best factor for each feature", best))
    linear = metrics["fvu_linear"].value
    removed = metrics["fvu"].value - float(best.square().sum() / distance.sum())
    share = removed / linear if linear > 0 else 0.0
    found.append(
        Metric("linear_error_by_rescaling", share, None, n, "share of the linear error that rescaling codes removes")
    )
    return {metric.name: metric for metric in found}


@torch.no_grad()
def feature_scales(
    dictionary: SparseAutoencoder, tokens: Tokens, *, ridge: float = 1e-2, device: str | torch.device = "cpu"
) -> Float[Tensor, " features"]:
    """For each feature the factor on its code that reconstructs best, all features together.

    Least squares, with a ridge (a share of a feature's own energy) that draws rarely used features to 1.
    """
    from scipy import sparse

    n_features = dictionary.n_features
    weight = (dictionary.decoder_weight / dictionary.input_scale).detach().double().cpu()
    origin = (dictionary.decoder_bias / dictionary.input_scale).detach().cpu()
    energy = sparse.csr_matrix((n_features, n_features))
    right = torch.zeros(n_features, dtype=torch.float64)
    for x in tokens.x.split(_ROWS_AT_ONCE):
        codes = dictionary.encode(x.to(device), mode="threshold")
        values = codes.values.double().cpu().numpy()
        z = sparse.csr_matrix((values, codes.col_indices.cpu().numpy(), codes.crow_indices.cpu().numpy()), codes.shape)
        energy = energy + z.T @ z
        right += (torch.from_numpy(z.T @ (x.double() - origin).numpy()) * weight).sum(dim=1)
    system = torch.from_numpy(energy.toarray()) * (weight @ weight.T)
    own = system.diagonal().clone()
    pull = ridge * own.mean() + 1e-12
    system.diagonal().add_(pull)
    scales: Tensor = torch.linalg.solve(system, right + pull)
    return scales.float()


def _decode_rescaled(dictionary: SparseAutoencoder, x: Tensor, scales: Tensor) -> Tensor:
    codes = dictionary.encode(x, mode="threshold")
    return dictionary.decode(codes.with_values(codes.values * scales.to(x.device)[codes.col_indices]))


# --- what else is known of the error ---------------------------------------------------------------------------------


def norm_agreement(small: Float[Tensor, "tokens d"], big: Float[Tensor, "tokens d"]) -> float:
    """R^2 of the error norms of one dictionary regressed, with a constant, on those of another, token by token."""
    if len(small) != len(big) or len(small) < 3:
        raise InputError(f"{len(small)} and {len(big)} errors: give those of the same tokens, at least 3")
    return float(torch.corrcoef(torch.stack([small.double().norm(dim=1), big.double().norm(dim=1)]))[0, 1] ** 2)


@torch.no_grad()
def explained_elsewhere(
    fit: Tokens,
    fit_errors: Float[Tensor, "fit d"],
    test: Tokens,
    test_errors: Float[Tensor, "test d"],
    sources: Mapping[str, tuple[Float[Tensor, "fit _"], Float[Tensor, "test _"]]],
    *,
    ridges: Sequence[float] = RIDGES,
    validation: float = 0.2,
) -> dict[str, dict[str, float]]:
    """How much of a dictionary's error is linear in what other dictionaries (or activations) say of the same tokens.

    Args:
        fit: tokens, with the activations of the audited dictionary.
        fit_errors: its errors on them.
        test: tokens of other documents.
        test_errors: its errors on those.
        sources: by name, one row a token: for example the reconstruction of the previous layer, of the MLP's output,
            of the attention's output.
        ridges: see ``fit_linear``.
        validation: see ``audit_errors``.

    Returns:
        For each source ``r2_error``, the share of the error's variance that it predicts alone, and ``fvu_left``, the
        fraction of the activation's variance that is left when the error is predicted from the activation *and* the
        source. Under the name ``""`` stands the activation alone: its ``fvu_left`` is the nonlinear error.
    """
    distance = float((test.x - test.x.mean(dim=0)).double().square().sum())

    def predicted(fit_inputs: Tensor, test_inputs: Tensor) -> Tensor:
        (linear,) = fit_by_document(fit_inputs, fit_errors, fit.documents, ridges, validation)
        return linear(test_inputs)

    def left(prediction: Tensor) -> float:
        return float((test_errors - prediction).double().square().sum()) / distance

    alone = predicted(fit.x, test.x)
    found = {"": {"r2_error": determination(alone, test_errors).weighted, "fvu_left": left(alone)}}
    for name, (fit_inputs, test_inputs) in sources.items():
        by_itself = predicted(fit_inputs, test_inputs)
        together = predicted(torch.cat([fit.x, fit_inputs], dim=1), torch.cat([test.x, test_inputs], dim=1))
        found[name] = {"r2_error": determination(by_itself, test_errors).weighted, "fvu_left": left(together)}
    return found


def loss_shares(loss: SplicedLoss, dictionary: SparseAutoencoder, linear: LinearMap) -> dict[str, Metric]:
    """How much of the damage to the model's loss each part of the error repairs, when it alone is put back.

    ``(CE of x_hat - CE of x_hat + part) / (CE of x_hat - CE of x)``; compare with the part's share of the squared
    error. The shares need not add up to 1.
    """

    def x_hat(x: Tensor) -> Tensor:
        return dictionary.decode(dictionary.encode(x.float(), mode="threshold"))

    def with_linear(x: Tensor) -> Tensor:
        return x_hat(x) + linear(x)

    def with_nonlinear(x: Tensor) -> Tensor:
        return x.float() - linear(x)

    damage, documents = loss.increase(x_hat)
    found = {}
    for name, replace in (("linear", with_linear), ("nonlinear", with_nonlinear)):
        remaining, _ = loss.increase(replace)
        sums = RatioOfSums()
        sums.add(documents, damage - remaining, damage)
        label = f"ce_share_{name}"
        found[label] = sums.metric(label, f"share of the loss increase that the {name} error repairs when put back")
    return found


# --- does the logic hold where the truth is known? -------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseGrid:
    """Estimates of the two parts of the error, where noise of known size was put into each.

    Attributes:
        dense: standard deviation of the noise in the activation, before encoding; one a cell.
        error: of the noise in the reconstruction.
        linear, nonlinear: the estimated mean squared norms of the two parts.
    """

    dense: list[float]
    error: list[float]
    linear: list[float]
    nonlinear: list[float]

    def correlations(self) -> dict[str, float]:
        """Spearman's rank correlations of estimates with noises; the paper's matrix is near diagonal."""
        from scipy.stats import spearmanr

        return {
            f"{estimate} error with {noise} noise": float(
                spearmanr(getattr(self, estimate), getattr(self, "dense" if noise == "dense" else "error")).statistic
            )
            for estimate in ("linear", "nonlinear")
            for noise in ("dense", "reconstruction")
        }


@torch.no_grad()
def noise_grid(
    dictionary: SparseAutoencoder,
    fit: Tokens,
    test: Tokens,
    *,
    scales: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    seed: int = 0,
    ridges: Sequence[float] = RIDGES,
) -> NoiseGrid:
    """The paper's check of the logic, where the truth is known.

    Activations ``x' = SAE(x)`` are sparse by construction. Dense noise added to them before they are encoded should
    appear as linear error, noise added to their reconstruction as nonlinear error.

    Args:
        dictionary: any.
        fit: see ``audit_errors``.
        test: see ``audit_errors``.
        scales: of both noises, as shares of the standard deviation of x'.
        seed: of the noise.
        ridges: see ``fit_linear``.
    """
    generator = torch.Generator().manual_seed(seed)
    reconstruct = _reconstruction_of(dictionary, dictionary.decoder_weight.device)
    sparse = [Tokens(_in_parts(reconstruct, each.x), each.documents) for each in (fit, test)]
    deviation = float(sparse[0].x.std(dim=0).square().mean().sqrt())
    noises = [[torch.randn(each.x.shape, generator=generator) for each in sparse] for _ in range(2)]
    grid = NoiseGrid([], [], [], [])
    for dense in scales:
        noisy = [
            Tokens(each.x + dense * deviation * noise, each.documents)
            for each, noise in zip(sparse, noises[0], strict=True)
        ]
        clean = [_in_parts(reconstruct, each.x) for each in noisy]
        for error in scales:
            errors = [
                each.x - output - error * deviation * noise
                for each, output, noise in zip(noisy, clean, noises[1], strict=True)
            ]
            (linear,) = fit_by_document(noisy[0].x, errors[0], fit.documents, ridges)
            predicted = linear(noisy[1].x)
            left = float((errors[1] - predicted).square().sum(dim=1).mean())
            grid.dense.append(dense)
            grid.error.append(error)
            grid.nonlinear.append(left)
            grid.linear.append(float(errors[1].square().sum(dim=1).mean()) - left)
    return grid
