"""Training of `HeadBases`: by what the whole model says, or by what each layer's attention puts out.

Both draw ranks for every step, layer, head, and for keys and values apart, so that each basis serves all of its
prefixes. Both compute the student with the store that inference uses, from the first token on.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.keys.matryoshka_basis import HeadBases
from apportion.keys.memory import ComposedMemory
from apportion.keys.projected_store import HeadSpace, ProjectedStore
from apportion.keys.trace import Trace
from apportion.models import LanguageModel
from apportion.models.key_door import attend_with
from apportion.models.key_memory import LayerFacts, LayerMemory, Step
from apportion.ops.attend import attend
from apportion.training import TrainingResult, TrainingSettings, train

Spaces = Mapping[int, tuple[HeadSpace, HeadSpace]]


@dataclass(frozen=True)
class Distillation:
    """How bases are trained; the defaults are those of the paper's scripts but for `batch_size` (theirs: 64).

    Attributes:
        steps: optimiser steps.
        learning_rate: of Adam, at its peak; a tenth of the steps leads up to it (theirs: 100 steps), and it falls to 0.
        batch_size: texts a step.
        tokens: of each text.
        cross_entropy: share of the loss that is cross-entropy on the text, the rest being the divergence from the whole
            model. The paper says 0, its code 0.75.
        fixed_share: train at this share of every head's width alone, without drawing ranks (the ablation).
        seed: of the order of texts and of the ranks.
        checkpoint_every: steps, where training has a folder.
    """

    steps: int = 1000
    learning_rate: float = 1e-3
    batch_size: int = 1
    tokens: int = 2048
    cross_entropy: float = 0.0
    fixed_share: float | None = None
    seed: int = 0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        if not 0 <= self.cross_entropy <= 1:
            raise InputError(f"cross_entropy={self.cross_entropy}: a share of the loss, from 0 to 1")
        if self.fixed_share is not None and not 0 < self.fixed_share <= 1:
            raise InputError(f"fixed_share={self.fixed_share}: above 0, at most 1, or None to draw ranks")
        if self.batch_size < 1:
            raise InputError(f"batch_size={self.batch_size}: at least 1")

    def settings(self) -> TrainingSettings:
        """For the loop."""
        return TrainingSettings(
            steps=self.steps,
            learning_rate=self.learning_rate,
            warmup_fraction=0.1,
            decay_fraction=0.9,
            checkpoint_every=self.checkpoint_every,
            seed=self.seed,
        )

    def ranks(self, bases: HeadBases) -> Int[Tensor, "layers 2 groups"]:
        """Those of one step: drawn from torch's own random stream, which is part of every checkpoint."""
        if self.fixed_share is not None:
            return torch.full(bases.shape, round(self.fixed_share * bases.width))
        return torch.randint(1, 9, bases.shape) * bases.width // 8

    def order(self, step: int, items: int) -> Int[Tensor, " chosen"]:
        """Which of some items a step gets: all of them in turn, each time round in another order."""
        places = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        rounds = (places // items).unique().tolist()
        shuffled = {
            turn: torch.randperm(items, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + turn))
            for turn in rounds
        }
        return torch.stack([shuffled[int(place) // items][int(place) % items] for place in places])


@contextlib.contextmanager
def stored_in(model: Any, spaces: Spaces) -> Iterator[None]:
    """In a ``with`` block, layers keep all their tokens, and read them, in these spaces; gradients flow."""

    def make(facts: LayerFacts) -> LayerMemory:
        return ComposedMemory(facts, ProjectedStore(*spaces[facts.layer], project_prompt=True))

    with attend_with(model, make):
        yield


def distil(
    model: LanguageModel,
    bases: HeadBases,
    ids: Int[Tensor, "texts tokens"],
    how: Distillation,
    folder: Path | str | None = None,
    *,
    progress: bool = True,
) -> TrainingResult:
    """Train bases in place so that the model, which stays as it is, says with few coordinates what it says with all.

    The loss is ``KL(whole model || model in the drawn ranks)`` of the next token, a mean over tokens, in nats.

    Args:
        model: a decoder, without gradients of its own.
        bases: of all its full-attention layers.
        ids: texts without padding.
        how: settings.
        folder: see `apportion.training.train`; a killed run goes on from it.
        progress: shown on stderr.
    """

    def objective(module: HeadBases, batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            teacher = model.model(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)
        with stored_in(model, module.spaces(how.ranks(module))):
            student = model.model(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)
        divergence = nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()
        loss = (1 - how.cross_entropy) * divergence
        if how.cross_entropy:
            loss = loss + how.cross_entropy * nn.functional.nll_loss(
                student[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
            )
        return loss, {"kl": divergence.detach()}

    provenance: dict[str, str | int | float | bool | None] = {
        "model": model.fingerprint,
        "texts": hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest(),
        "bases": hashlib.sha256(bases.angles.detach().cpu().numpy().tobytes()).hexdigest(),
        "batch_size": how.batch_size,
        "cross_entropy": how.cross_entropy,
        "fixed_share": how.fixed_share,
    }
    return train(
        bases,
        objective,
        lambda step: ids[how.order(step, len(ids))],
        how.settings(),
        folder,
        provenance=provenance,
        progress=progress,
    )


def fit_to_attention(trace: Trace, bases: HeadBases, how: Distillation, *, progress: bool = False) -> TrainingResult:
    """Train bases in place on recorded layers, each by itself: cheaper than `distil`, and blind to what comes after.

    The loss is `attention_errors`, a mean over layers. Each step sees one text.
    """
    exact = {layer: [_exact(step) for step in trace.steps[layer]] for layer in bases.layers}
    texts = len(exact[bases.layers[0]])

    def objective(module: HeadBases, batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        spaces, text = module.spaces(how.ranks(module)), int(batch)
        errors = [
            _error(trace.facts[layer], trace.steps[layer][text], spaces[layer], exact[layer][text])
            for layer in module.layers
        ]
        return torch.stack(errors).mean(), {}

    return train(bases, objective, lambda step: how.order(step, texts)[0], how.settings(), None, progress=progress)


@torch.no_grad()
def attention_errors(trace: Trace, spaces: Spaces) -> dict[int, float]:
    """By layer, the squared error of the heads' outputs over their squared length, a mean over texts."""
    found = {}
    for layer, pair in spaces.items():
        facts = trace.facts[layer]
        errors = [float(_error(facts, step, pair, _exact(step))) for step in trace.steps[layer]]
        found[layer] = sum(errors) / len(errors)
    return found


def _exact(step: Step) -> Float[Tensor, "batch heads new d"]:
    return attend(step.queries, step.keys, step.values, step.scaling, step.softcap)


def _error(
    facts: LayerFacts, step: Step, spaces: tuple[HeadSpace, HeadSpace], exact: Float[Tensor, "batch heads new d"]
) -> Float[Tensor, ""]:
    out = ComposedMemory(facts, ProjectedStore(*spaces, project_prompt=True)).attend(step)
    return (out - exact).float().square().sum() / exact.float().square().sum()


def encode_rows(model: LanguageModel, texts: Sequence[str], tokens: int) -> Int[Tensor, "rows tokens"]:
    """Texts cut into rows of the same length; what is left at the end of each is dropped.

    Raises:
        InputError: no text is that long.
    """
    rows = []
    for text in texts:
        ids = torch.tensor(model.tokenizer(text)["input_ids"])
        rows += list(ids[: len(ids) // tokens * tokens].view(-1, tokens))
    if not rows:
        raise InputError(f"tokens={tokens}: no text is that long; take fewer tokens, or longer texts")
    return torch.stack(rows).to(model.device)
