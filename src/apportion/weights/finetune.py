"""Training a pruned language model on text, under its masks: what it forgot comes back, and its zeros stay zeros.

The settings are those of the sparse finetuning of Kurtic et al. (2023, arXiv 2310.06927); which loss is minimised is
`apportion.weights.squarehead`'s matter. All of the model is trained, its embeddings and norms too; only pruned weights
are not.

A run holds the student, its gradients and two moments of AdamW, and the teacher: five times the weights in float32
(2.7 GB for SmolLM2-135M), and the activations of a batch. A checkpoint of the run is three times the weights.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from apportion.data import Document
from apportion.errors import InputError
from apportion.models import LanguageModel
from apportion.models.harvest import text_contexts
from apportion.models.hidden_states import hidden_states, logits_of
from apportion.training import Hook, TrainingResult, TrainingSettings
from apportion.weights.layers import WeightLayer, prunable
from apportion.weights.masks import (
    Counts,
    add_masks,
    counts,
    masked_layers,
    masks_from_zeros,
    masks_of,
    remove_masks,
    train_masked,
    zero_pruned,
)
from apportion.weights.squarehead import Distillation, DistillationObjective, Seen

# Characters read for each token that is wanted: code has 3 to a token, English 4 to 5.
_CHARACTERS_PER_TOKEN = 6
_HELD_OUT_OF = 10
_LONG_FILE = 4_000_000  # characters
_NO_ANSWER = -100
_EVALUATED_AT_ONCE = 4


# --- text ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Contexts:
    """Text as rows of tokens; the two parts share no document.

    Attributes:
        train: to learn from.
        held_out: to judge on.
    """

    train: Int64[Tensor, "n time"]
    held_out: Int64[Tensor, "k time"]

    def batches(self, size: int, seed: int) -> Callable[[int], Int64[Tensor, "batch time"]]:
        """The batch of a step, a function of the step alone: every row once an epoch, in a new order each time."""
        rows = len(self.train)

        def order(epoch: int) -> Tensor:
            return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))

        def batch(step: int) -> Tensor:
            first, last = step * size, (step + 1) * size - 1
            orders = torch.cat([order(epoch) for epoch in range(first // rows, last // rows + 1)])
            start = first % rows
            return self.train[orders[start : start + size]]

        return batch

    def digest(self) -> str:
        """A hash of what is learned from."""
        return hashlib.sha256(self.train.numpy().tobytes()).hexdigest()[:32]


def read_contexts(
    lm: LanguageModel, documents: Iterable[Document], *, context: int = 128, train: int = 1000, held_out: int = 32
) -> Contexts:
    """Read text for `finetune`.

    Of every ten files the first is held out (of a single file, every tenth of the documents that it was cut into), so
    that no file is in both parts.

    Args:
        lm: whose tokeniser cuts the text.
        documents: read until there is enough.
        context: tokens a row.
        train: rows to learn from; fewer where the text ends, so that they come again sooner.
        held_out: rows to judge on; fewer where the text ends.

    Raises:
        InputError: a number is too small; the text is too short for a row of each part.
    """
    for name, value, least in (("context", context, 2), ("train", train, 1), ("held_out", held_out, 1)):
        if value < least:
            raise InputError(f"{name}={value}: use at least {least}")
    needed = [_CHARACTERS_PER_TOKEN * context * count for count in (train, held_out)]
    texts = _read_apart(documents, needed)
    parts = [
        text_contexts(part, lm.tokenizer, context, count) for part, count in zip(texts, (train, held_out), strict=True)
    ]
    if not all(len(part) for part in parts):
        raise InputError(
            f"the text is too short: {sum(map(len, texts))} documents give {len(parts[0])} rows of {context} tokens to "
            f"learn from and {len(parts[1])} to judge on, where one of each is needed; give more text, or a smaller "
            "context"
        )
    return Contexts(*(torch.from_numpy(part.astype(np.int64)) for part in parts))


def _read_apart(documents: Iterable[Document], needed: Sequence[int]) -> tuple[list[Document], list[Document]]:
    """Documents to learn from and to judge on, read until there are so many characters of each."""
    by_file: tuple[list[Document], list[Document]] = ([], [])
    by_part: tuple[list[Document], list[Document]] = ([], [])
    of_file, of_part, files = [0, 0], [0, 0], dict[str, int]()
    for place, document in enumerate(documents):
        file = files.setdefault(document.name.partition(" (part ")[0], len(files))
        for number, lists, amounts in ((file, by_file, of_file), (place, by_part, of_part)):
            judged = number % _HELD_OUT_OF == 0
            lists[judged].append(document)
            amounts[judged] += len(document.text)
        if len(files) > 1:
            enough = all(amount >= least for amount, least in zip(of_file, needed, strict=True))
        else:
            # Another file may yet come, but a book need not be read to its end.
            enough = sum(of_part) > _LONG_FILE and all(
                amount >= least for amount, least in zip(of_part, needed, strict=True)
            )
        if enough:
            break
    return by_file if len(files) > 1 else by_part


@torch.no_grad()
def perplexity(lm: LanguageModel, rows: Int64[Tensor, "k time"]) -> float:
    """The exponential of the mean next-token loss; infinite where it is beyond all numbers."""
    losses = [lm.loss_per_token(part.to(lm.device)) for part in rows.split(_EVALUATED_AT_ONCE)]
    return float(torch.cat(losses).double().mean().exp())


def read_language(model: nn.Module, batch: Any, want_logits: bool) -> Seen:
    """How `DistillationObjective` reads a language model.

    Args:
        model: a transformers model.
        batch: token ids ``[batch, time]`` where nothing is padded and every token is an answer; else a tuple of them,
            the attention mask (0 for padding) and labels as transformers has them (the ids, -100 for tokens of the
            prompt and of padding).
        want_logits: whether to run the head.

    Raises:
        InputError: the model gives no hidden states or has no head.
    """
    ids, mask, labels = batch if isinstance(batch, tuple) else (batch, None, batch)
    states = hidden_states(model, ids, mask)
    # The logits after a token are about the next one.
    targets = labels[:, 1:].long()
    answers = targets != _NO_ANSWER
    real = None if mask is None else mask.bool()
    if real is not None:
        answers = answers & real[:, 1:]
    logits = logits_of(model, states[-1][:, :-1][answers]) if want_logits else None
    return Seen(states, logits, targets[answers], real)


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of `finetune`; the defaults are the paper's for 60 % of a model of 7 billion parameters.

    The paper has 3e-5 at 40 and 50 %, 1e-4 at 60 and 80 % and for N:M, 8e-5 at 70 %.

    Attributes:
        steps: batches to learn from.
        batch_size: rows of text a batch.
        learning_rate: peak of AdamW's; it falls linearly to 0.
        warmup_steps: over which it rises, at most a quarter of the steps.
        betas, eps, weight_decay: of AdamW.
        clip_norm: largest norm of all gradients together, those of pruned weights left out; None does not clip.
        precision: ``bfloat16`` runs both networks under autocast; weights and losses stay in float32.
        seed: of the order of the text.
        checkpoint_every: steps between checkpoints.

    Raises:
        InputError: a value that cannot work.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-4
    warmup_steps: int = 20
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("warmup_steps", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}: use at least {least}")
        self.training()

    def training(self) -> TrainingSettings:
        """The same for `train`."""
        warmup = min(self.warmup_steps, self.steps // 4) / self.steps if self.steps > 0 else 0
        return TrainingSettings(
            steps=self.steps,
            learning_rate=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            warmup_fraction=warmup,
            decay_fraction=1 - warmup,
            clip_norm=self.clip_norm,
            precision=self.precision,
            seed=self.seed,
            checkpoint_every=self.checkpoint_every,
        )


@dataclass(frozen=True)
class Finetuned:
    """What finetuning changed.

    Attributes:
        before, after: perplexity of the student on held-out text.
        teacher: that of the teacher, or None.
        weights_before, weights_after: how many weights there are, and how many are not 0. A weight that stays can
            become 0 by itself, so there may be fewer afterwards, but never more.
        training: how training went.
    """

    before: float
    after: float
    teacher: float | None
    weights_before: Counts
    weights_after: Counts
    training: TrainingResult


def finetune(
    student: LanguageModel,
    contexts: Contexts,
    settings: FinetuneSettings,
    folder: Path | str | None = None,
    *,
    teacher: LanguageModel | None = None,
    distillation: Distillation | None = None,
    masks: Mapping[str, Bool[Tensor, "out in"]] | None = None,
    hooks: Sequence[Hook[nn.Module]] = (),
    progress: bool = True,
    stop_after: int | None = None,
) -> Finetuned:
    """Train a pruned language model in place; which weights are 0 does not change.

    Afterwards it is a plain model in eval mode again, without masks. With a folder, a run that was interrupted goes on
    where it was, and ends with the very same weights.

    Args:
        student: the pruned model.
        contexts: the text.
        settings: how long and how fast.
        folder: keeps checkpoints and a log.
        teacher: the dense model, for losses that need one; it is not changed.
        distillation: the loss; the paper's if None.
        masks: of the weights as matrices, by the layers' names. If None, those that the model has; if it has none,
            every layer with at least 10 % zeros keeps its zeros. Give them for a model that was quantised, whose zeros
            mean nothing.
        hooks: of training; one that chooses masks anew prunes while it distils.
        progress: show progress on stderr.
        stop_after: see `train`.

    Raises:
        InputError: no layer has zeros; a model does not predict the next token; the teacher is missing, or is of
            another depth, width, vocabulary or tokeniser; the folder holds another run.
        NonFiniteLossError: the loss became NaN or infinite; try a smaller learning rate.
    """
    distillation = distillation or Distillation()
    _check_models(student, teacher if distillation.needs_teacher else None)
    objective = DistillationObjective(read_language, distillation, None if teacher is None else teacher.model)
    model = student.model
    provenance = {
        "student": student.fingerprint,
        "teacher": teacher.fingerprint if teacher is not None and distillation.needs_teacher else None,
        "text": contexts.digest(),
        "batch_size": settings.batch_size,
        "loss": json.dumps(asdict(distillation), sort_keys=True),
    }
    layers = _mask(student, masks)
    provenance["masks"] = _digest(masks_of(model))
    try:
        weights_before = counts(model, layers)
        before = perplexity(student, contexts.held_out)
        expected = None if objective.teacher is None or teacher is None else perplexity(teacher, contexts.held_out)
        model.requires_grad_(True)
        training = train_masked(
            model,
            objective,
            contexts.batches(settings.batch_size, settings.seed),
            settings.training(),
            folder,
            hooks=hooks,
            optimizer=_adamw(settings),
            provenance=provenance,
            progress=progress,
            stop_after=stop_after,
        )
    finally:
        remove_masks(model)
        model.eval().requires_grad_(False)
        # It is of the weights that there were.
        student.__dict__.pop("fingerprint", None)
    layers = [WeightLayer(each.name, model.get_submodule(each.name)) for each in layers]
    after = perplexity(student, contexts.held_out)
    return Finetuned(before, after, expected, weights_before, counts(model, layers), training)


def _check_models(student: LanguageModel, teacher: LanguageModel | None) -> None:
    for each in (student, teacher):
        if each is not None and not each.is_causal:
            raise InputError(
                f"{each.name} does not predict the next token: use a causal language model, such as smollm2"
            )
    if teacher is None:
        return
    for what, own, its in (
        ("layers", student.n_layers, teacher.n_layers),
        ("numbers a token (width)", student.d_model, teacher.d_model),
    ):
        if own != its:
            raise InputError(
                f"{student.name} has {own} {what}, its teacher {teacher.name} {its}: they are compared layer by layer, "
                "so use the dense model that it was pruned from"
            )
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise InputError(
            f"{student.name} and its teacher {teacher.name} have other vocabularies: use the dense model that it was "
            "pruned from"
        )
    if student.device != teacher.device:
        raise InputError(
            f"{student.name} is on {student.device}, its teacher {teacher.name} on {teacher.device}: load both on one"
        )


def _mask(student: LanguageModel, masks: Mapping[str, Tensor] | None) -> list[WeightLayer]:
    """Give the student its masks; the layers that have one."""
    model = student.model
    if masks is not None:
        add_masks(model, masks)
        zero_pruned(model)
    elif not masked_layers(model):
        head = model.get_output_embeddings()
        names = [name for name, each in model.named_modules() if each is head]
        tied = head.weight is model.get_input_embeddings().weight
        masks_from_zeros(model, prunable(model, include=("*", *([] if tied else names))))
    layers = masked_layers(model)
    if not layers:
        raise InputError(
            f"{student.name} has no layer with 10 % zeros or more: prune it first (`apportion prune`), or give masks"
        )
    return layers


def _adamw(settings: FinetuneSettings) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameters,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    return make


def _digest(masks: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, mask in masks.items():
        digest.update(name.encode() + np.packbits(mask.cpu().numpy()).tobytes())
    return digest.hexdigest()[:32]
