"""Two small networks that studies of the weights room train on the spot: on digits, and on the next character."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from apportion.data.characters import VOCABULARY, windows
from apportion.data.digits import Digits, digits
from apportion.studies.workbench import Workbench
from apportion.training import Hook, TrainingSettings
from apportion.training.optimizer import OptimizerFactory
from apportion.weights import train_masked

WINDOW = 12
TUNING_SEED = 1000
Batches = Callable[[int], tuple[Tensor, Tensor]]


class DigitsNetwork(nn.Sequential):
    """Linear layers with a non-linearity in between: 64-128-128-10 unless told otherwise."""

    def __init__(
        self, widths: Sequence[int] = (64, 128, 128, 10), activation: Callable[[], nn.Module] = nn.ReLU
    ) -> None:
        layers: list[nn.Module] = []
        for width, following in pairwise(widths):
            layers += [nn.Linear(width, following), activation()]
        super().__init__(*layers[:-1])


class CharacterNetwork(nn.Module):
    """Twelve characters in, the next one out: embedding, two hidden layers with LayerNorm and GELU, a linear head.

    Smooth and normalised, since pruning networks of rectified units measures dead units more than pruning.
    """

    def __init__(self, width: int = 256, embedding: int = 16, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.first = nn.Linear(WINDOW * embedding, width)
        self.first_norm = nn.LayerNorm(width)
        self.second = nn.Linear(width, width)
        self.second_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, codes: Int64[Tensor, "batch time"]) -> Float[Tensor, "batch vocabulary"]:
        """Logits of the character that follows."""
        hidden = self.embedding(codes).flatten(1)
        hidden = nn.functional.gelu(self.first_norm(self.first(hidden)))
        hidden = nn.functional.gelu(self.second_norm(self.second(hidden)))
        return self.head(hidden)


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network with weights of a seed of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def batches_of(x: Tensor, y: Tensor, size: int, seed: int) -> Batches:
    """Batches drawn at random, each a function of its step."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randint(len(y), (size,), generator=generator)
        return x[chosen], y[chosen]

    return batch


def character_batches(codes: Int64[Tensor, "n"], size: int, seed: int) -> Batches:
    """Windows at random places, each batch a function of its step."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(codes) - WINDOW, (size,), generator=generator)
        window = windows(codes, starts, WINDOW)
        return window[:, :-1], window[:, -1]

    return batch


def cross_entropy(network: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective of both."""
    x, y = batch
    return nn.functional.cross_entropy(network(x), y), {}


def fit(
    network: nn.Module,
    batches: Batches,
    steps: int,
    learning_rate: float,
    *,
    seed: int = 0,
    hooks: Sequence[Hook[nn.Module]] = (),
    optimizer: OptimizerFactory | None = None,
    objective: Callable[..., tuple[Tensor, dict[str, Tensor]]] = cross_entropy,
    settings: TrainingSettings | None = None,
) -> nn.Module:
    """Train in place, quietly and without a folder, under whatever masks the network has; in eval mode afterwards."""
    chosen = settings or TrainingSettings(steps=steps, learning_rate=learning_rate, clip_norm=None, log_every=steps)
    chosen = replace(chosen, steps=steps, learning_rate=learning_rate, seed=seed)
    train_masked(network, objective, batches, chosen, None, hooks=hooks, optimizer=optimizer, progress=False)
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Share of pictures whose digit has the largest logit."""
    x, y = part
    return float((network(x).argmax(dim=1) == y).float().mean())


@torch.no_grad()
def loss_of(network: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Mean cross-entropy in nats."""
    x, y = part
    return float(nn.functional.cross_entropy(network(x), y))


def judged(network: nn.Module, data: Digits) -> dict[str, float]:
    """Accuracy and loss on test pictures."""
    return {"accuracy": accuracy(network, data.test), "loss": loss_of(network, data.test)}


def best_rate(
    bench: Workbench,
    arm: str,
    settings: Any,
    rates: Sequence[float],
    trained: Callable[[float, Digits, int], nn.Module],
) -> float:
    """The learning rate that leaves the lowest loss on validation pictures.

    Args:
        bench: keeps the losses.
        arm: whose rate it is.
        settings: all else that decides the losses, JSON-ready.
        rates: to choose from.
        trained: gives a network trained at a rate, on digits, with a seed. Both are of `TUNING_SEED`, which no study
            judges by.
    """

    def losses() -> list[float]:
        data = digits(TUNING_SEED)
        networks = [trained(rate, data, TUNING_SEED) for rate in rates]
        return [loss_of(network.eval(), data.validation) for network in networks]

    found = bench.measure(f"learning rates of {arm}", [settings, arm, rates], losses)
    return rates[found.index(min(found))]


@torch.no_grad()
def bits_per_character(network: nn.Module, codes: Int64[Tensor, "n"], count: int = 20_000) -> float:
    """Mean cross-entropy in bits of characters at evenly spaced places, the same for every network."""
    starts = torch.linspace(0, len(codes) - WINDOW - 1, count).long()
    total = 0.0
    for part in starts.split(4096):
        window = windows(codes, part, WINDOW)
        total += float(nn.functional.cross_entropy(network(window[:, :-1]), window[:, -1], reduction="sum"))
    return total / count / float(torch.log(torch.tensor(2.0)))
