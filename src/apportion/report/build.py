"""`build_report`: from a trained dictionary and a view of activations to `ReportData`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from apportion.features.contexts import ContextView, SparseEncoder, collect_contexts
from apportion.features.geometry import nearest_features
from apportion.features.logit_lens import logit_lens
from apportion.features.mutual_feature_choice import ZipfFit
from apportion.models.spelling import byte_level_alphabet, kind_of_vocabulary
from apportion.report.data import ErrorByDifficulty, ExplainedFeature, Metric, ReportData, ScorerFigures


@runtime_checkable
class Dictionary(SparseEncoder, Protocol):
    """What a report needs of a dictionary; `apportion.features.SparseAutoencoder` is one."""

    @property
    def decoder_weight(self) -> Tensor:
        """Directions ``[n_features, d_in]``."""

    def decode(self, codes: Any) -> Tensor:
        """Reconstruction ``[tokens, d_in]`` from what ``encode`` returned."""


def build_report(
    sae: Dictionary,
    view: ContextView,
    *,
    title: str,
    decode_tokens: Callable[[Sequence[int]], Sequence[str]],
    lm_unembedding: Float[Tensor, "vocabulary d_model"] | None = None,
    final_norm_weight: Float[Tensor, " d_model"] | None = None,
    summary: Mapping[str, str | int | float] | None = None,
    metrics: Sequence[Metric] = (),
    history: Sequence[Mapping[str, float]] = (),
    zipf: ZipfFit | None = None,
    labels: Mapping[int, str] | None = None,
    explanations: Mapping[int, ExplainedFeature] | None = None,
    document_names: Mapping[int, str] | None = None,
    held_out: ContextView | None = None,
    difficulty_contexts: int = 64,
    progress: bool = True,
    **context_settings: Any,
) -> ReportData:
    """Collect everything the HTML report shows.

    Args:
        sae: the dictionary, used in evaluation (threshold) mode.
        view: the contexts to pick examples from; the more, the better the examples.
        title: heading of the report.
        decode_tokens: one text for each token id given; `token_texts` makes one from a transformers tokenizer.
        lm_unembedding: the model's output embedding; None leaves the logit lens out.
        final_norm_weight: gain of the model's last norm, folded into the unembedding.
        summary: facts of the run, shown in order.
        metrics: judged quality.
        history: training log.
        zipf: law fitted to the densities.
        labels: what features are called.
        explanations: what they mean and how well that holds, see ``explained_features``.
        document_names: names of the documents by number.
        held_out: contexts that were not trained on, for error by token difficulty; default ``view``.
        difficulty_contexts: how many of them, spread evenly; 0 leaves it out.
        progress: show a progress bar when the error stream is a terminal.
        context_settings: further arguments of `collect_contexts`.

    Raises:
        ValueError: the view is empty, or ``decode_tokens`` returned another number of texts than it was given ids.
    """
    contexts = collect_contexts(sae, view, progress=progress, **context_settings)
    weight = sae.decoder_weight.detach()
    lens = None if lm_unembedding is None else logit_lens(weight, lm_unembedding, final_norm_weight=final_norm_weight)
    shown = [contexts.token_ids.reshape(-1)]
    if lens is not None:
        shown += [lens.promoted_ids.reshape(-1), lens.suppressed_ids.reshape(-1)]
    ids = [token for token in np.unique(np.concatenate(shown)).tolist() if token >= 0]
    texts = list(decode_tokens(ids))
    if len(texts) != len(ids):
        raise ValueError(f"decode_tokens gave {len(texts)} texts for {len(ids)} token ids: it must give one for each")
    return ReportData(
        title=title,
        contexts=contexts,
        token_text=dict(zip(ids, texts, strict=True)),
        summary=summary or {},
        metrics=metrics,
        history=history,
        zipf=zipf,
        error_by_difficulty=error_by_difficulty(
            sae, view if held_out is None else held_out, contexts=difficulty_contexts
        )
        if difficulty_contexts
        else None,
        lens=lens,
        nearest=nearest_features(weight),
        labels=labels or {},
        explanations=explanations or {},
        document_names=document_names or {},
    )


def explained_features(
    records: Mapping[int, Mapping[str, Any]], style: str = "", judge: str = ""
) -> dict[int, ExplainedFeature]:
    """What a report shows of the records that `apportion.features.auto_interp.read_results` reads.

    Args:
        records: by feature; those without an explanation are left out.
        style: of the explanations.
        judge: who made and judged them.
    """
    return {
        feature: ExplainedFeature(
            record["explanation"],
            style,
            judge,
            record["flagged"],
            {
                name: ScorerFigures(
                    auroc=score["auroc"],
                    balanced_accuracy=score["balanced_accuracy"],
                    expected_precision=score["expected_precision"],
                    by_quantile=score["by_quantile"],
                    by_source={source: each["auroc"] for source, each in score["by_source"].items()},
                    failed=score["failed"],
                    notes=score["extra"],
                )
                for name, score in record["scores"].items()
            },
        )
        for feature, record in records.items()
        if record["status"] == "explained"
    }


@torch.no_grad()
def error_by_difficulty(
    sae: Dictionary, view: ContextView, *, contexts: int = 64, groups: int = 10
) -> ErrorByDifficulty | None:
    """Error and active features of tokens cut into equal groups by their squared distance from the mean activation.

    That distance is what a dictionary has to explain, and does not depend on the dictionary. Errors are relative to the
    mean squared distance over all tokens, so the mean over the groups is the fraction of variance unexplained.

    Returns:
        None where there are fewer than two tokens a group, or where the dictionary does not reconstruct its own input
        (a transcoder).

    Raises:
        ValueError: ``contexts`` or ``groups`` is below 1.
    """
    if contexts < 1 or groups < 1:
        raise ValueError(f"contexts={contexts}, groups={groups}: both must be at least 1")
    chosen = np.unique(np.linspace(0, view.n_contexts - 1, min(contexts, view.n_contexts)).round().astype(int))
    parts = []
    for number in chosen.tolist():
        _, activations, valid, _ = view.contexts(number, number + 1)
        parts.append(activations[valid].float())
    x = torch.cat(parts).to(sae.decoder_weight.device)
    if len(x) < 2 * groups or sae.decoder_weight.shape[1] != x.shape[1]:
        return None
    was_training = bool(getattr(sae, "training", False))
    if was_training:
        sae.eval()  # type: ignore[attr-defined]
    try:
        codes = sae.encode(x)
        error = (x - sae.decode(codes)).square().sum(dim=1)
    finally:
        if was_training:
            sae.train()  # type: ignore[attr-defined]
    winners = torch.bincount(codes.row_indices()[codes.values > 0], minlength=len(x)).float()
    distance = (x - x.mean(dim=0)).square().sum(dim=1)
    relative = error / distance.mean().clamp(min=torch.finfo(torch.float32).tiny)
    by_distance = distance.argsort(stable=True).tensor_split(groups)

    def mean_and_stderr(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
        cut = [values[group].double() for group in by_distance]
        means = torch.stack([part.mean() for part in cut])
        errors = torch.stack([part.std() / len(part) ** 0.5 for part in cut])
        return means.cpu().numpy(), errors.cpu().numpy()

    return ErrorByDifficulty(
        "squared distance from the mean activation", *mean_and_stderr(relative), *mean_and_stderr(winners)
    )


def token_texts(tokenizer: Any) -> Callable[[Sequence[int]], list[str]]:
    """A ``decode_tokens`` from a transformers tokenizer that keeps what its own ``decode`` loses for single tokens.

    Leading spaces survive (SentencePiece drops them), WordPiece tokens get the space that precedes a new word, and a
    token that is only part of a character shows its bytes, e.g. ``⟨E2 80⟩``, rather than a replacement character.
    """
    byte_of = {character: byte for byte, character in byte_level_alphabet().items()}

    def texts(ids: Sequence[int]) -> list[str]:
        return [
            _token_text(token, piece)
            for token, piece in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True)
        ]

    special = set(tokenizer.all_special_ids)
    kind = kind_of_vocabulary(tokenizer)

    def _token_text(token: int, piece: str | None) -> str:
        if piece is None:
            return f"⟨token {token}⟩"
        if token in special:
            return piece
        if kind == "##":
            return piece[2:] if piece.startswith("##") else " " + piece
        if kind == "▁":
            if len(piece) == 6 and piece.startswith("<0x"):
                return _bytes_text(bytes([int(piece[3:5], 16)]))
            return piece.replace("▁", " ")
        if all(character in byte_of for character in piece):
            return _bytes_text(bytes(byte_of[character] for character in piece))
        return str(tokenizer.decode([token]))

    return texts


def _bytes_text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return f"⟨{raw.hex(' ').upper()}⟩"
