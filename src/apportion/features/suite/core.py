"""Core: reconstruction, sparsity, and what the model does with the reconstruction, under SAEBench's names.

SAEBench: *A Comprehensive Benchmark for Sparse Autoencoders in Language Model Interpretability* (Karvonen et al. 2025,
arXiv 2503.09532), ``sae_bench.evals.core`` 0.6.0, and the same functions in SAELens 6 (``sae_lens.evals``).

With activation x, reconstruction x_hat, and three runs of the model: as it is, with x_hat in place of x, with 0:

| figure | definition |
|---|---|
| ``kl_div_score`` | (KL_0 - KL_sae) / KL_0, KL(clean, .) in nats a token |
| ``ce_loss_score`` | (CE_0 - CE_sae) / (CE_0 - CE_clean) |
| ``explained_variance`` | 1 - sum of squared errors / sum of squared distances from the mean, over all tokens |
| ``explained_variance_legacy`` | the mean over tokens of 1 - that ratio of the token: in published tables |
| ``l2_norm_in``, ``l2_norm_out``, ``l2_ratio``, ``relative_reconstruction_bias`` | shrinkage |
| ``l0``, ``l1``, ``mse``, ``cossim`` | a token, on average |
| ``encoder_decoder_cosine_sim``, ``max_decoder_cosine_sim``, ``max_encoder_cosine_sim`` | mean over features |
| ``consistent_activation_heuristic`` | tokens by context in which a feature fires; mean over features |

**Where figures differ from SAEBench's, and why.** They equal those of ``sae_lens.evals`` to 1e-3 on the same dictionary
and tokens (``tests/features/suite/test_peers.py``), with these exceptions. SAEBench 0.6.0 centres
``explained_variance`` with the mean of *squared* activations (fixed in SAELens 6, whose formula this is), and divides
``mse`` by the number of tokens twice (likewise). ``explained_variance_legacy`` and ``relative_reconstruction_bias``
depend on the batch there (the mean of each batch; the mean of the batches' ratios); here one mean and one ratio are
over all tokens, and they are equal where all fits one batch. Tokens that the store left out (position 0, sinks) keep
their activations and are not counted, also under zero ablation; SAELens zeroes them there too. SAEBench's figures of
each feature are lists; here they are means.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from apportion.features.dictionary import SparseAutoencoder
from apportion.features.evaluate import Contexts, Metric, RatioOfSums, evaluate_reconstruction, only_where
from apportion.features.geometry import nearest_features
from apportion.features.suite.result import SuiteResult, mean_metric
from apportion.features.suite.units import RANDOM, DictionaryUnits, Subject
from apportion.models import LanguageModel, Site, splice
from apportion.models.families import base_of, finish_logits

_CONTEXTS_AT_ONCE = 8
# Logits of this many numbers at a time, for each of the runs that are compared.
_LOGITS_AT_ONCE = 2**23
_FROM_RECONSTRUCTION = (
    "explained_variance",
    "fvu",
    "mse",
    "cossim",
    "l2_ratio",
    "relative_reconstruction_bias",
    "l0",
    "l1",
)


def evaluate_core(
    subject: Subject, view: Contexts, *, contexts: int | None = 160, reconstruction_contexts: int | None = None
) -> SuiteResult:
    """Core metrics of a dictionary and of a random one of the same size.

    Args:
        subject: the dictionary and its model.
        view: held-out text with its activations.
        contexts: contexts for the model's behaviour (SAEBench: 10 batches of 16), spread evenly; None: all.
        reconstruction_contexts: contexts for reconstruction and sparsity; None: all.
    """
    DictionaryUnits(subject.sae)
    found = {"": subject.sae, RANDOM: subject.random_dictionary()}
    figures = {name: reconstruction_figures(sae, view, reconstruction_contexts) for name, sae in found.items()}
    why = None
    if subject.lm.is_causal:
        behaviour = behaviour_figures(subject.lm, subject.site, view, found, contexts)
        for name, more in behaviour.items():
            figures[name] = more | figures[name]
    else:
        why = f"{subject.lm.name} predicts no next token: no kl_div_score and no ce_loss_score"
    for name, sae in found.items():
        figures[name] |= weight_figures(sae)
    return SuiteResult(
        "core",
        figures[""],
        {RANDOM: figures[RANDOM]},
        details={} if why is None else {"left_out": why},
        settings={"contexts": contexts, "reconstruction_contexts": reconstruction_contexts},
    )


@torch.no_grad()
def reconstruction_figures(sae: SparseAutoencoder, view: Contexts, contexts: int | None) -> dict[str, Metric]:
    """Reconstruction, shrinkage and sparsity on held-out activations."""
    device = sae.decoder_weight.device
    evaluation = evaluate_reconstruction(sae, view, max_contexts=contexts, device=device)
    figures = {name: evaluation.metrics[name] for name in _FROM_RECONSTRUCTION}
    mean, legacy, norms_in, norms_out = _mean_activation(view, contexts), RatioOfSums(), RatioOfSums(), RatioOfSums()
    tokens_by_feature = torch.zeros(sae.n_features)
    contexts_by_feature = torch.zeros(sae.n_features)
    for _, x, owner, documents in _valid_batches(view, contexts):
        out = sae(x.to(device), "threshold")
        y = out.output.cpu()
        error, distance = (x - y).square().sum(dim=1), (x - mean).square().sum(dim=1)
        legacy.add(documents, 1 - error / distance)
        norms_in.add(documents, x.norm(dim=1))
        norms_out.add(documents, y.norm(dim=1))
        column, row = out.codes.col_indices.cpu(), out.codes.row_indices().cpu()
        tokens_by_feature += torch.bincount(column, minlength=sae.n_features)
        pairs = torch.unique(owner[row] * sae.n_features + column)
        contexts_by_feature += torch.bincount(pairs % sae.n_features, minlength=sae.n_features)
    fires = contexts_by_feature > 0
    figures["explained_variance_legacy"] = legacy.metric(
        "explained_variance_legacy", "mean over tokens of 1 - |x - x_hat|^2 / |x - mean|^2; older tables have this one"
    )
    figures["l2_norm_in"] = norms_in.metric("l2_norm_in", "mean norm of the activation")
    figures["l2_norm_out"] = norms_out.metric("l2_norm_out", "mean norm of the reconstruction")
    figures["consistent_activation_heuristic"] = mean_metric(
        "consistent_activation_heuristic",
        (tokens_by_feature[fires] / contexts_by_feature[fires]).tolist(),
        "tokens on which a feature fires, by context in which it does; mean over features that fire",
    )
    figures["freq_dead"] = Metric(
        "freq_dead", float((~fires).double().mean()), None, sae.n_features, "share of features that never fire here"
    )
    return figures


@torch.no_grad()
def behaviour_figures(
    lm: LanguageModel, site: Site, view: Contexts, dictionaries: dict[str, SparseAutoencoder], contexts: int | None
) -> dict[str, dict[str, Metric]]:
    """Cross-entropy and KL divergence with reconstructions spliced in, of several dictionaries in one pass.

    Cross-entropy counts predictions made from spliced tokens; KL counts all spliced tokens, the last one included, as
    SAELens does.
    """
    total = view.n_contexts if contexts is None else min(contexts, view.n_contexts)
    chosen = np.unique(np.linspace(0, view.n_contexts - 1, total).astype(int))
    runs: dict[str, Callable[[Tensor], Tensor]] = {
        name: (lambda x, sae=sae: sae(x.float(), "threshold").output.to(x.dtype))  # type: ignore[misc]
        for name, sae in dictionaries.items()
    }
    runs["zero ablation"] = torch.zeros_like
    losses: dict[str, list[Tensor]] = {name: [] for name in ("clean", *runs)}
    divergences: dict[str, list[Tensor]] = {name: [] for name in runs}
    of_losses, of_tokens = [], []
    for start in range(0, len(chosen), _CONTEXTS_AT_ONCE):
        parts = [view.contexts(int(each), int(each) + 1) for each in chosen[start : start + _CONTEXTS_AT_ONCE]]
        ids, _, valid, documents = (torch.cat(each) for each in zip(*parts, strict=True))
        ids, mask = ids.to(lm.device), valid.to(lm.device)
        hidden = {"clean": _final_hidden(lm, ids)}
        for name, replace in runs.items():
            with splice(lm, site, only_where(mask, replace)):
                hidden[name] = _final_hidden(lm, ids)
        _compare(lm, ids, hidden, valid, losses, divergences)
        of_losses.append(documents.unsqueeze(1).expand_as(valid)[:, :-1][valid[:, :-1]])
        of_tokens.append(documents.unsqueeze(1).expand_as(valid)[valid])
    loss = {name: torch.cat(parts) for name, parts in losses.items()}
    divergence = {name: torch.cat(parts) for name, parts in divergences.items()}
    by_loss, by_token = torch.cat(of_losses), torch.cat(of_tokens)

    def ratio(name: str, owner: Tensor, definition: str, above: Tensor, below: Tensor | None = None) -> Metric:
        sums = RatioOfSums()
        sums.add(owner, above, below)
        return sums.metric(name, definition)

    zero_loss, zero_kl = loss["zero ablation"], divergence["zero ablation"]
    found = {}
    for name in dictionaries:
        metrics = [
            ratio(
                "kl_div_score", by_token, "(KL_zero - KL_sae) / KL_zero; 1 is the model itself",
                zero_kl - divergence[name], zero_kl,
            ),
            ratio("kl_div_with_sae", by_token, "KL(clean, with reconstruction), nats a token", divergence[name]),
            ratio("kl_div_with_ablation", by_token, "KL(clean, with the site set to zero)", zero_kl),
            ratio(
                "ce_loss_score", by_loss, "(CE_zero - CE_sae) / (CE_zero - CE_clean); 1 is the model itself",
                zero_loss - loss[name], zero_loss - loss["clean"],
            ),
            ratio("ce_loss_with_sae", by_loss, "cross-entropy with the reconstruction", loss[name]),
            ratio("ce_loss_with_ablation", by_loss, "cross-entropy with the site set to zero", zero_loss),
            ratio("ce_loss_without_sae", by_loss, "cross-entropy of the model itself", loss["clean"]),
        ]  # fmt: skip
        found[name] = {metric.name: metric for metric in metrics}
    return found


@torch.no_grad()
def weight_figures(sae: SparseAutoencoder) -> dict[str, Metric]:
    """How the directions lie to each other, averaged over features."""
    encoder = torch.nn.functional.normalize(sae.encoder_weight.detach().float(), dim=1)
    decoder = torch.nn.functional.normalize(sae.decoder_weight.detach().float(), dim=1)
    nearest = {
        name: nearest_features(weight, top=1).cosine[:, 0].tolist() if sae.n_features > 1 else [math.nan]
        for name, weight in (("decoder", decoder), ("encoder", encoder))
    }
    return {
        "encoder_decoder_cosine_sim": mean_metric(
            "encoder_decoder_cosine_sim", (encoder * decoder).sum(dim=1).tolist(), "mean over features"
        ),
        "max_decoder_cosine_sim": mean_metric(
            "max_decoder_cosine_sim", nearest["decoder"], "cosine with the most alike other feature; mean over features"
        ),
        "max_encoder_cosine_sim": mean_metric(
            "max_encoder_cosine_sim", nearest["encoder"], "the same between encoder directions"
        ),
    }


def _final_hidden(lm: LanguageModel, ids: Tensor) -> Float[Tensor, "batch time d"]:
    hidden: Tensor = base_of(lm.model)(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def _compare(
    lm: LanguageModel,
    ids: Tensor,
    hidden: dict[str, Tensor],
    valid: Tensor,
    losses: dict[str, list[Tensor]],
    divergences: dict[str, list[Tensor]],
) -> None:
    """Add the losses and divergences of the valid tokens of a batch, a few tokens at a time."""
    head = lm.model.get_output_embeddings()
    row, time = valid.nonzero(as_tuple=True)
    predicts = time < ids.shape[1] - 1
    next_ids = ids.cpu()[row, (time + 1).clamp(max=ids.shape[1] - 1)]
    step = max(1, _LOGITS_AT_ONCE // head.weight.shape[0])
    for start in range(0, len(row), step):
        part = slice(start, start + step)
        places = (row[part].to(ids.device), time[part].to(ids.device))

        def log_probabilities(name: str, places: tuple[Tensor, Tensor] = places) -> Tensor:
            logits: Tensor = finish_logits(lm.model, head(hidden[name][places]).float())
            return logits.log_softmax(dim=-1)

        clean = log_probabilities("clean")
        targets, counted = next_ids[part].to(ids.device), predicts[part]
        losses["clean"].append(-clean.gather(1, targets.unsqueeze(1))[:, 0].cpu()[counted])
        for name in divergences:
            other = log_probabilities(name)
            divergences[name].append((clean.exp() * (clean - other)).sum(dim=1).cpu())
            losses[name].append(-other.gather(1, targets.unsqueeze(1))[:, 0].cpu()[counted])


def _valid_batches(view: Contexts, contexts: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of a few contexts at a time: ids, valid activations, the context and the document of each."""
    stop = view.n_contexts if contexts is None else min(contexts, view.n_contexts)
    for start in range(0, stop, 2 * _CONTEXTS_AT_ONCE):
        ids, activations, valid, documents = view.contexts(start, min(start + 2 * _CONTEXTS_AT_ONCE, stop))
        if not bool(valid.any()):
            continue
        owner = torch.arange(start, start + len(ids)).unsqueeze(1).expand_as(valid)[valid]
        yield ids, activations[valid].float(), owner, documents.unsqueeze(1).expand_as(valid)[valid]


def _mean_activation(view: Contexts, contexts: int | None) -> Float[Tensor, "d"]:
    total, tokens = torch.zeros(()), 0
    for _, x, _, _ in _valid_batches(view, contexts):
        total, tokens = total + x.double().sum(dim=0), tokens + len(x)
    return (total / max(tokens, 1)).float()
