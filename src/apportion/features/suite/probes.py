"""Linear probes as SAEBench trains them.

| probe | where |
|---|---|
| ``logistic_accuracy``: scikit-learn's logistic regression, L2 with C = 1, at most 1,000 iterations | sparse probing |
| ``LinearProbe.fit``: AdamW, an L1 penalty, the epoch of best test accuracy | full probes, SCR, TPP |
| ``fit_multi_probe``: Adam, all classes at once, positives weighted up, learning rate decaying to 1e-5 | absorption |
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


def balanced_rows(sizes: dict[str, int], positive: str, generator: torch.Generator) -> dict[str, Int[Tensor, "_"]]:
    """All texts of a class, and as many of the others, drawn evenly from them: one class against the rest.

    Where the others together have fewer texts, all of them.

    Returns:
        Class -> which of its texts.
    """
    wanted = sizes[positive]
    others = [name for name in sizes if name != positive]
    each = -(-wanted // len(others))
    drawn = {name: torch.randperm(sizes[name], generator=generator)[:each] for name in others}
    # Rounding up gave too many: the last ones of a random order go.
    places = [(name, int(row)) for name, rows in drawn.items() for row in rows]
    kept = [places[index] for index in torch.randperm(len(places), generator=generator)[:wanted].tolist()]
    chosen = {positive: torch.arange(wanted)}
    for name in others:
        chosen[name] = torch.tensor(sorted(row for owner, row in kept if owner == name), dtype=torch.int64)
    return chosen


def best_by_mean_difference(
    values: Float[Tensor, "texts units"], positive: Bool[Tensor, "texts"], k: int
) -> Int[Tensor, "k"]:
    """The k units whose means differ most between positives and negatives, whichever is larger."""
    difference = (values[positive].mean(dim=0) - values[~positive].mean(dim=0)).abs()
    return difference.argsort(descending=True)[:k]


def logistic_accuracy(
    train: tuple[Float[Tensor, "_ units"], Bool[Tensor, "_"]],
    test: tuple[Float[Tensor, "_ units"], Bool[Tensor, "_"]],
) -> float:
    """Test accuracy of scikit-learn's logistic regression with its default penalty."""
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(max_iter=1000).fit(train[0].cpu().float().numpy(), train[1].numpy())
    return float((probe.predict(test[0].cpu().float().numpy()) == test[1].numpy()).mean())


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """``values @ weight + bias > 0`` means positive."""

    weight: Float[Tensor, "units"]
    bias: float

    def right(self, values: Float[Tensor, "texts units"], positive: Bool[Tensor, "texts"]) -> Bool[Tensor, "texts"]:
        """Which texts it is right about."""
        found: Tensor = (values @ self.weight.to(values) + self.bias > 0).cpu() == positive
        return found

    def accuracy(self, values: Float[Tensor, "texts units"], positive: Bool[Tensor, "texts"]) -> float:
        """The share of texts it is right about."""
        return float(self.right(values, positive).double().mean())

    @classmethod
    def fit(
        cls,
        train: tuple[Float[Tensor, "_ units"], Bool[Tensor, "_"]],
        test: tuple[Float[Tensor, "_ units"], Bool[Tensor, "_"]] | None,
        *,
        batch: int,
        epochs: int,
        learning_rate: float,
        l1: float = 0.0,
        seed: int = 0,
    ) -> "LinearProbe":
        """Train by AdamW.

        Of the epochs the one of best accuracy on ``test`` is kept, as SAEBench does (which makes that accuracy a little
        too good); the last one where ``test`` is None.
        """
        values, positive = train[0].float(), train[1].to(train[0].device)
        generator = torch.Generator().manual_seed(seed)
        bound = values.shape[1] ** -0.5
        start = (torch.rand(values.shape[1] + 1, generator=generator) * 2 - 1) * bound
        weight = start[:-1].to(values.device).requires_grad_(True)
        bias = start[-1:].to(values.device).requires_grad_(True)
        optimizer = torch.optim.AdamW([weight, bias], lr=learning_rate)
        best, best_accuracy = None, -1.0
        for _ in range(epochs):
            order = torch.randperm(len(values), generator=generator).to(values.device)
            for rows in order.split(batch):
                logits = values[rows] @ weight + bias
                loss = nn.functional.binary_cross_entropy_with_logits(logits, positive[rows].float())
                if l1:
                    loss = loss + l1 * weight.abs().sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            now = cls(weight.detach().clone(), float(bias.detach()))
            accuracy = now.accuracy(*test) if test is not None else best_accuracy + 1
            if accuracy > best_accuracy:
                best, best_accuracy = now, accuracy
        assert best is not None
        return best


def fit_multi_probe(
    values: Float[Tensor, "texts units"],
    labels: Int[Tensor, "texts"],
    classes: int,
    *,
    l1: float = 0.0,
    l2: float = 1e-6,
    epochs: int = 50,
    batch: int | None = None,
    seed: int = 0,
) -> tuple[Float[Tensor, "classes units"], Float[Tensor, "classes"]]:
    """One probe a class against the rest, trained together by Adam from 0.01 to 1e-5, positives weighted up.

    SAEBench's batch of 4,096 makes some twenty steps an epoch of the words of large vocabularies; the default here is
    what makes twenty steps of the words that there are (ours), at most 4,096.

    Returns:
        Weights and biases.
    """
    generator = torch.Generator().manual_seed(seed)
    values = values.float()
    batch = max(1, min(4096, len(values) // 20)) if batch is None else batch
    targets = nn.functional.one_hot(labels.to(values.device), classes).float()
    positives = targets.sum(dim=0)
    balance = (len(targets) - positives) / positives.clamp(min=1)
    bound = values.shape[1] ** -0.5
    weight = ((torch.rand(classes, values.shape[1], generator=generator) * 2 - 1) * bound).to(values.device)
    bias = ((torch.rand(classes, generator=generator) * 2 - 1) * bound).to(values.device)
    weight.requires_grad_(True)
    bias.requires_grad_(True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.01, weight_decay=l2)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=float(np.exp(np.log(1e-5 / 0.01) / epochs)))
    for _ in range(epochs):
        order = torch.randperm(len(values), generator=generator).to(values.device)
        for rows in order.split(batch):
            logits = values[rows] @ weight.T + bias
            loss = nn.functional.binary_cross_entropy_with_logits(logits, targets[rows], pos_weight=balance)
            if l1:
                loss = loss + l1 * weight.abs().sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decay.step()
    return weight.detach(), bias.detach()
