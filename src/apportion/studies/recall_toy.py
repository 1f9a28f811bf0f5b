"""The one-layer model of the studies `routing_transformer` and `sea`, which learns to recall values by their keys.

Section 8.7 of the method sheet: a token's embedding plus a learned map of the embedding of the token *before* it, one
attention layer, one MLP. The map spares a first layer that would have to find out which key stands before a value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import override

from apportion.data.tasks.recall import Recall
from apportion.training import Hook, TrainingSettings, train


class RecallModel(nn.Module):
    """Embedding, map of the token before, attention, MLP, unembedding.

    Args:
        task: gives the vocabulary.
        width: of the residual stream.
        attention: gets [batch, n, width] and returns the same, or an object whose ``output`` is that.
    """

    def __init__(self, task: Recall, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.task = task
        self.embedding = nn.Embedding(task.vocabulary, width)
        self.before = nn.Linear(width, width, bias=False)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.unembed = nn.Linear(width, task.vocabulary, bias=False)

    def attention_input(self, texts: Int[Tensor, "batch n"]) -> tuple[Tensor, Tensor]:
        """The residual stream before attention, and what attention is given of it."""
        tokens = self.embedding(texts)
        before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)
        stream = tokens + self.before(before)
        return stream, self.norms[0](stream)

    def after_attention(self, stream: Tensor) -> Tensor:
        """Logits from the residual stream that attention has added to."""
        stream = stream + self.mlp(self.norms[1](stream))
        logits: Tensor = self.unembed(self.norms[2](stream))
        return logits

    @override
    def forward(self, texts: Int[Tensor, "batch n"]) -> tuple[Float[Tensor, "batch n vocabulary"], Any]:
        """Logits, and what the attention layer gave."""
        stream, normed = self.attention_input(texts)
        attended = self.attention(normed)
        output = attended if isinstance(attended, Tensor) else attended.output
        return self.after_attention(stream + output), attended


@dataclass(frozen=True)
class RecallTraining:
    """How all arms are trained.

    Attributes:
        steps: of training.
        batch: texts a step.
        rate: learning rate at its peak, a tenth of the way; then it falls to zero.
        weight_decay: of AdamW.
    """

    steps: int
    batch: int = 32
    rate: float = 4e-3
    weight_decay: float = 0.01

    def settings(self, seed: int) -> TrainingSettings:
        """For `train`."""
        return TrainingSettings(
            steps=self.steps, learning_rate=self.rate, warmup_fraction=0.1, decay_fraction=0.9, seed=seed, log_every=50
        )

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """AdamW, everything in one pass."""
        return torch.optim.AdamW(parameters, lr=self.rate, weight_decay=self.weight_decay, fused=True)

    def texts(self, task: Recall, seed: int, step: int) -> Tensor:
        """The batch of a step; seeds share none with one another or with `accuracy`."""
        return task.draw(self.batch, 1_000_000 * (seed + 1) + step)


def answer_loss(model: RecallModel, texts: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy of the answers."""
    return cross_entropy(logits[:, model.task.asked].flatten(0, 1), model.task.answers(texts).flatten())


def train_recall(
    model: RecallModel, training: RecallTraining, seed: int, hooks: Sequence[Hook[RecallModel]] = ()
) -> None:
    """Train a model from where it is; a ``commitment_loss`` that the attention reports is added."""

    def objective(module: RecallModel, texts: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        logits, attended = module(texts)
        loss = answer_loss(module, texts, logits)
        return loss + getattr(attended, "commitment_loss", 0.0), {}

    train(
        model,
        objective,
        lambda step: training.texts(model.task, seed, step),
        training.settings(seed),
        None,
        hooks=hooks,
        optimizer=training.optimizer,
        progress=False,
    )


@torch.no_grad()
def accuracy(model: RecallModel, texts: Tensor) -> float:
    """Share of the answers that come first among all tokens."""
    logits, _ = model.eval()(texts)
    return float((logits[:, model.task.asked].argmax(-1) == model.task.answers(texts)).float().mean())
