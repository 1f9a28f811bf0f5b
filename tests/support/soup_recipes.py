"""A small network to make soups of, in a module that other processes can import."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from apportion.weights.retraining import Branch, retrain
from apportion.weights.sparse_model_soups import SoupRecipe


def tiny(norm: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        between: list[nn.Module] = [nn.BatchNorm1d(12)] if norm else []
        return nn.Sequential(nn.Linear(6, 12), *between, nn.Tanh(), nn.Linear(12, 3))


def batch_of(seed: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed * 1000 + step)
    x = torch.randn(16, 6, generator=generator)
    return x, torch.stack([x[:, 0], x[:, 1] * x[:, 2], x[:, 3].sin()], dim=1)


def squared(module, pair, step):
    return (module(pair[0]) - pair[1]).square().mean(), {}


@dataclass
class Recipe(SoupRecipe):
    """Regression on noise. Branches leave a file each in ``marks``; that of seed ``fails`` fails beside "broken"."""

    marks: str
    norm: bool = False
    fails: int | None = None

    def network(self) -> nn.Module:
        return tiny(self.norm)

    def retrain(self, network: nn.Module, branch: Branch, folder: Path | None) -> None:
        (Path(self.marks) / f"{branch.seed}-{len(list(Path(self.marks).iterdir()))}").touch()
        broken = Path(self.marks).parent / "broken"
        if branch.seed == self.fails and broken.exists():
            raise ValueError("this branch is to fail")
        retrain(network, branch, squared, lambda step: batch_of(branch.seed % 1000, step), folder)

    def score(self, network: nn.Module) -> float:
        with torch.no_grad():
            return -float(squared(network, batch_of(999, 0), 0)[0])

    def calibration(self):
        return [batch_of(500, step)[0] for step in range(4)]
