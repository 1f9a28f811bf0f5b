"""How good is a dictionary? Measured in inference mode on held-out documents, each figure with its standard error.

Names and definitions are those of SAELens 6 and SAEBench's core evaluation where they have one (``mse``, ``cossim``,
``l2_ratio``, ``relative_reconstruction_bias``, ``explained_variance``, ``l0``, ``l1``, ``ce_loss_score``). ``fvu`` is
``1 - explained_variance``: squared error over squared distance from the mean of all evaluated tokens, summed over
dimensions.

``fvu_without_sinks`` is the same over the tokens whose norm is at most 4 times the median. A few tokens, attention
sinks mostly, are many times as large as all others, and rare enough to be missing from the training text; squared
error lets one of them outweigh a thousand others (Sun et al. 2024, *Massive Activations*, arXiv 2402.17762).

Standard errors treat documents as the independent units (tokens of one document are alike): a figure is a ratio of two
sums over documents, and its error is that of the linearised ratio, ``sqrt(n / (n - 1) * sum((A_i - r B_i)^2)) / sum B``
(Cochran, *Sampling Techniques*, section 6.4). With a single document it is not defined and given as None.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from apportion.errors import InputError
from apportion.features.dictionary import Reconstruction, SparseAutoencoder
from apportion.features.mutual_feature_choice import ZipfFit, fit_zipf, ranks_by
from apportion.models import LanguageModel, Site, splice
from apportion.models.splice import splice_from

_CONTEXTS_AT_ONCE = 16
_DIFFICULTY_GROUPS = 10
_SINK = 4.0  # times the median norm; on SmolLM2, layer 15, no token of 162,000 of code reached twice the median


@runtime_checkable
class Contexts(Protocol):
    """Held-out text with activations: an ``ActivationStore`` or a part of one."""

    @property
    def n_contexts(self) -> int:
        """Number of contexts."""
        ...

    def contexts(self, start: int, stop: int, site: Any = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token ids, activations (at a site of the store; default the view's), which tokens count, and documents."""
        ...


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        name: as in SAELens where it has one.
        value: over all evaluated tokens.
        stderr: standard error over documents, or None.
        n: documents.
        definition: one line.
    """

    name: str
    value: float
    stderr: float | None
    n: int
    definition: str


@dataclass
class Evaluation:
    """Everything measured of one dictionary.

    Attributes:
        metrics: by name.
        tokens: evaluated.
        density: share of tokens on which each feature fires.
        l0_histogram: tokens by number of firing features; the last bin holds the rest.
        difficulty: for tenths of the tokens by distance from the mean, nearest first: mean distance, FVU and L0.
        zipf: fit of the densities, or None if too few features fire.
    """

    metrics: dict[str, Metric]
    tokens: int
    density: Float[Tensor, "features"]
    l0_histogram: Int64[Tensor, "bins"]
    difficulty: list[dict[str, float]] = field(default_factory=list)
    zipf: ZipfFit | None = None

    def to_json(self) -> dict[str, Any]:
        """All figures, without the per-feature arrays."""
        return {
            "tokens": self.tokens,
            "metrics": {name: asdict(metric) for name, metric in self.metrics.items()},
            "zipf": None if self.zipf is None else asdict(self.zipf),
            "difficulty": self.difficulty,
            "l0_histogram": self.l0_histogram.tolist(),
        }


class RatioOfSums:
    """A ratio of two sums over documents, with its standard error."""

    def __init__(self) -> None:
        self.above: dict[int, float] = {}
        self.below: dict[int, float] = {}

    def add(self, documents: Tensor, above: Tensor, below: Tensor | None = None) -> None:
        """Add tokens (or contexts) that belong to the given documents."""
        below = torch.ones_like(above) if below is None else below
        unique, place = documents.unique(return_inverse=True)
        for sums, part in ((self.above, above), (self.below, below)):
            totals = torch.zeros(unique.numel(), dtype=torch.float64).index_add_(0, place, part.double())
            for document, total in zip(unique.tolist(), totals.tolist(), strict=True):
                sums[document] = sums.get(document, 0.0) + total

    def metric(self, name: str, definition: str, transform: Callable[[float], float] = float) -> Metric:
        """The ratio as a metric; ``transform`` must be a shift or a change of sign, which leave the error alone."""
        above = np.array([self.above[document] for document in sorted(self.above)])
        below = np.array([self.below[document] for document in sorted(self.above)])
        n, total = len(above), below.sum()
        value = above.sum() / total if total else math.nan
        error = None
        if n > 1 and total:
            error = float(np.sqrt(n / (n - 1) * np.square(above - value * below).sum()) / abs(total))
        return Metric(name, transform(float(value)), error, n, definition)


def evaluate_reconstruction(
    sae: SparseAutoencoder,
    view: Contexts,
    *,
    max_contexts: int | None = None,
    underused_cut: float = 0.5,
    target: Site | None = None,
    device: str | torch.device = "cpu",
) -> Evaluation:
    """Reconstruction and sparsity on held-out activations, in inference (threshold) mode.

    Args:
        sae: the dictionary; it is evaluated in evaluation mode whatever mode it is in.
        view: held-out contexts; tokens that were left out of the store do not count.
        max_contexts: look at the first ones only.
        underused_cut: a feature counts as underused below this share of its Zipf expectation.
        target: of a transcoder, the site whose activations its output is compared with; default its input.
        device: where to compute.

    Raises:
        InputError: no tokens to evaluate on.
    """
    was_training = sae.training
    sae.eval()
    try:
        with torch.no_grad():
            return _evaluate(sae, view, max_contexts, underused_cut, target, device)
    finally:
        sae.train(was_training)


def _evaluate(
    sae: SparseAutoencoder,
    view: Contexts,
    max_contexts: int | None,
    underused_cut: float,
    target: Site | None,
    device: str | torch.device,
) -> Evaluation:
    mean, median_norm, tokens = _first_look(view, max_contexts, target)
    names = ("fvu", "fvu_without_sinks", "mse", "cossim", "l2_ratio", "relative_reconstruction_bias", "l0", "l1")
    ratios = {name: RatioOfSums() for name in names}
    fired = torch.zeros(sae.n_features, dtype=torch.int64)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    sinks = 0
    for (_, documents), (x_cpu, _), out in _outputs(sae, view, max_contexts, target, device):
        x = x_cpu.to(device)
        error = (x - out.output).square().sum(dim=1).cpu()
        distance = (x_cpu - mean).square().sum(dim=1)
        norm_in, norm_out = x_cpu.norm(dim=1), out.output.norm(dim=1).cpu()
        inner = (x * out.output).sum(dim=1).cpu()
        l0 = out.codes.winners_per_row().cpu()
        l1 = torch.zeros(x.shape[0]).index_add_(0, out.codes.row_indices().cpu(), out.codes.values.cpu())
        ratios["fvu"].add(documents, error, distance)
        usual = norm_in <= _SINK * median_norm
        sinks += int((~usual).sum())
        ratios["fvu_without_sinks"].add(documents, error * usual, distance * usual)
        ratios["mse"].add(documents, error)
        ratios["cossim"].add(documents, inner / (norm_in * norm_out).clamp(min=1e-12))
        ratios["l2_ratio"].add(documents, norm_out / norm_in.clamp(min=1e-4))
        ratios["relative_reconstruction_bias"].add(documents, norm_out.square(), inner)
        ratios["l0"].add(documents, l0)
        ratios["l1"].add(documents, l1)
        fired += out.codes.winners_per_column().cpu()
        parts.append((error, distance, l0))
    error, distance, l0 = (torch.cat(each) for each in zip(*parts, strict=True))
    density = fired / tokens
    metrics = {
        "fvu": ratios["fvu"].metric("fvu", "squared error / squared distance from the mean; 0 is perfect"),
        "fvu_without_sinks": ratios["fvu_without_sinks"].metric(
            "fvu_without_sinks", f"fvu without the {sinks} tokens whose norm exceeds {_SINK:g} x the median"
        ),
        "explained_variance": ratios["fvu"].metric("explained_variance", "1 - fvu", lambda value: 1 - value),
        "mse": ratios["mse"].metric("mse", "squared error per token, summed over dimensions"),
        "cossim": ratios["cossim"].metric("cossim", "mean cosine of activation and reconstruction"),
        "l2_ratio": ratios["l2_ratio"].metric("l2_ratio", "mean norm of the reconstruction / norm of the activation"),
        "relative_reconstruction_bias": ratios["relative_reconstruction_bias"].metric(
            "relative_reconstruction_bias", "mean |x_hat|^2 / mean x . x_hat; 1 is unbiased, below 1 is shrinkage"
        ),
        "l0": ratios["l0"].metric("l0", "mean number of features that fire on a token"),
        "l1": ratios["l1"].metric("l1", "mean sum of a token's feature activations"),
    }
    zipf = _zipf(density)
    documents_seen = metrics["fvu"].n
    dead = float((fired == 0).double().mean())
    metrics["dead"] = Metric(
        "dead", dead, None, documents_seen, f"share of features that never fire on these {tokens} tokens"
    )
    if zipf is not None:
        under = density < underused_cut * zipf.expected(ranks_by(density)).float()
        metrics["underused"] = Metric(
            "underused",
            float(under.double().mean()),
            None,
            documents_seen,
            f"share of features that fire less than {underused_cut:g} x what the Zipf fit expects of their rank",
        )
    return Evaluation(metrics, tokens, density, _histogram(l0), _by_difficulty(error, distance, l0), zipf)


def _zipf(density: Tensor) -> ZipfFit | None:
    try:
        return fit_zipf(density)
    except InputError:
        return None


def _histogram(l0: Tensor) -> Int64[Tensor, "bins"]:
    """Counts by L0 up to four times the mean, the rest in the last bin."""
    top = max(8, int(4 * float(l0.double().mean())) + 1)
    return torch.bincount(l0.clamp(max=top), minlength=top + 1)


def _by_difficulty(error: Tensor, distance: Tensor, l0: Tensor) -> list[dict[str, float]]:
    groups = distance.argsort().tensor_split(_DIFFICULTY_GROUPS)
    return [
        {
            "distance": float(distance[group].mean()),
            "fvu": float(error[group].sum() / distance[group].sum().clamp(min=1e-12)),
            "l0": float(l0[group].double().mean()),
        }
        for group in groups
        if group.numel()
    ]


def _outputs(
    sae: SparseAutoencoder, view: Contexts, max_contexts: int | None, target: Site | None, device: str | torch.device
) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Reconstruction]]:
    """Inputs and targets with the document of each token, and what the dictionary makes of the inputs."""
    if target is None:
        for inputs in _batches(view, max_contexts):
            yield inputs, inputs, sae(inputs[0].to(device))
        return
    pairs = zip(_batches(view, max_contexts), _batches(view, max_contexts, target), strict=True)
    for inputs, targets in pairs:
        yield inputs, targets, sae(inputs[0].to(device))


def _batches(view: Contexts, max_contexts: int | None, site: Site | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Valid activations and the document of each, a few contexts at a time."""
    stop = view.n_contexts if max_contexts is None else min(max_contexts, view.n_contexts)
    for start in range(0, stop, _CONTEXTS_AT_ONCE):
        end = min(start + _CONTEXTS_AT_ONCE, stop)
        found = view.contexts(start, end) if site is None else view.contexts(start, end, site)
        _, activations, valid, documents = found
        if bool(valid.any()):
            yield activations[valid], documents.unsqueeze(1).expand_as(valid)[valid]


def _first_look(view: Contexts, max_contexts: int | None, site: Site | None) -> tuple[Float[Tensor, "d"], float, int]:
    """Mean activation, median norm and number of the tokens."""
    total, norms = torch.zeros(()), []
    for x, _ in _batches(view, max_contexts, site):
        total = total + x.double().sum(dim=0)
        norms.append(x.norm(dim=1))
    if not norms:
        raise InputError("there are no held-out tokens to evaluate on: harvest more text, or hold out more of it")
    norm = torch.cat(norms)
    return (total / norm.numel()).float(), float(norm.median()), norm.numel()


# --- what the model loses when the reconstruction takes the activation's place ---------------------------------------


class SplicedLoss:
    """Next-token loss with a site's activations replaced; the runs that no dictionary changes are done once.

    Tokens that the store left out (position 0 and attention sinks) keep their own activations, as the dictionary was
    not trained on them. ``ce_loss_score`` compares with zero ablation, as SAELens does; ``ce_loss_score_mean``
    compares with mean ablation, the harder standard.

    Args:
        lm: the model the activations came from.
        site: where they came from.
        view: held-out contexts.
        contexts: how many of them, spread evenly over the view.
        source: for transcoders, where their input comes from; then their output is spliced in at ``site``.
    """

    def __init__(
        self, lm: LanguageModel, site: Site, view: Contexts, contexts: int = 64, source: Site | None = None
    ) -> None:
        if view.n_contexts == 0:
            raise InputError("there are no held-out contexts to measure the model's loss on: harvest more text")
        self.lm, self.site, self.source = lm, site, source
        chosen = np.unique(np.linspace(0, view.n_contexts - 1, min(contexts, view.n_contexts)).astype(int))
        at = () if source is None else (site,)
        parts = [view.contexts(int(each), int(each) + 1, *at) for each in chosen]
        self.ids, _, self.valid, self.documents = (torch.cat(each) for each in zip(*parts, strict=True))
        total = torch.stack([part[1][part[2]].double().sum(dim=0) for part in parts]).sum(dim=0)
        self.mean = (total / max(int(self.valid.sum()), 1)).float()
        self.clean = self._losses(None)
        self.zero = self._losses(torch.zeros_like)
        self.mean_ablated = self._losses(lambda x: self.mean.to(x.device, x.dtype).expand_as(x))

    @torch.no_grad()
    def evaluate(self, sae: SparseAutoencoder) -> dict[str, Metric]:
        """Cross-entropy with the reconstruction spliced in, and the share of loss recovered."""
        was_training = sae.training
        sae.eval()
        try:
            spliced = self.losses(lambda x: sae(x.float()).output.to(x.dtype))
        finally:
            sae.train(was_training)
        counted = self._counted()
        documents = self.documents.unsqueeze(1).expand_as(counted)[counted]
        values = {
            name: losses[counted]
            for name, losses in (
                ("clean", self.clean),
                ("spliced", spliced),
                ("zero", self.zero),
                ("mean", self.mean_ablated),
            )
        }

        def ratio(name: str, definition: str, above: Tensor, below: Tensor | None = None) -> Metric:
            sums = RatioOfSums()
            sums.add(documents, above, below)
            return sums.metric(name, definition)

        metrics = [
            ratio("ce_loss_without_sae", "cross-entropy of the model itself, nats per token", values["clean"]),
            ratio("ce_loss_with_sae", "cross-entropy with the reconstruction spliced in", values["spliced"]),
            ratio("ce_loss_with_ablation", "cross-entropy with the site set to zero", values["zero"]),
            ratio("ce_loss_with_mean_ablation", "cross-entropy with the site set to its mean", values["mean"]),
            ratio("ce_increase", "ce_loss_with_sae - ce_loss_without_sae", values["spliced"] - values["clean"]),
            ratio(
                "ce_loss_score",
                "share of loss recovered against zero ablation: (zero - spliced) / (zero - clean)",
                values["zero"] - values["spliced"],
                values["zero"] - values["clean"],
            ),
            ratio(
                "ce_loss_score_mean",
                "share of loss recovered against mean ablation: (mean - spliced) / (mean - clean)",
                values["mean"] - values["spliced"],
                values["mean"] - values["clean"],
            ),
        ]
        return {metric.name: metric for metric in metrics}

    def increase(
        self, replace: Callable[[Tensor], Tensor]
    ) -> tuple[Float[Tensor, " tokens"], Int64[Tensor, " tokens"]]:
        """The rise in cross-entropy when ``replace(activations)`` is spliced in, prediction by prediction.

        Returns:
            The rise in nats of every prediction that counts, and the document that each belongs to.
        """
        counted = self._counted()
        documents = self.documents.unsqueeze(1).expand_as(counted)[counted]
        return (self._losses(lambda x: replace(x).to(x.dtype)) - self.clean)[counted], documents

    def losses(self, function: Callable[[Tensor], Tensor]) -> Float[Tensor, "contexts time_minus_1"]:
        """The loss of every token with a function of the site's activations (or of the source's) in their place."""
        return self._losses(function, self.source)

    def _counted(self) -> Bool[Tensor, "contexts time_minus_1"]:
        """Predictions made from tokens that were spliced."""
        return self.valid[:, :-1]

    @torch.no_grad()
    def _losses(
        self, replace: Callable[[Tensor], Tensor] | None, source: Site | None = None
    ) -> Float[Tensor, "contexts time_minus_1"]:
        losses = []
        for start in range(0, self.ids.shape[0], _CONTEXTS_AT_ONCE):
            ids = self.ids[start : start + _CONTEXTS_AT_ONCE].to(self.lm.device)
            valid = self.valid[start : start + _CONTEXTS_AT_ONCE].to(self.lm.device)
            if replace is None:
                losses.append(self.lm.loss_per_token(ids))
                continue
            if source is None:
                spliced = splice(self.lm, self.site, only_where(valid, replace))
            else:
                spliced = splice_from(self.lm, source, self.site, _only_where_from(valid, replace))
            with spliced:
                losses.append(self.lm.loss_per_token(ids))
        return torch.cat(losses).cpu()


def only_where(valid: Tensor, replace: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Replace the activations of valid tokens, leave the others."""

    def replaced(activations: Tensor) -> Tensor:
        out = activations.clone()
        out[valid] = replace(activations[valid])
        return out

    return replaced


def _only_where_from(valid: Tensor, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """`only_where`, with what the function makes of the activations at another site."""

    def replaced(source: Tensor, activations: Tensor) -> Tensor:
        out = activations.clone()
        out[valid] = function(source[valid])
        return out

    return replaced
