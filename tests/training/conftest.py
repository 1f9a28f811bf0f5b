"""What the training tests share: a small model with dropout and changing buffers, and data by step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Regressor(nn.Module):
    """Dropout draws from torch's random stream and the buffers change, so exact resume needs both."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Dropout(0.2), nn.Linear(width, 1))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.mean(0), 0.1)
            self.seen += len(x)
        return self.layers(x - self.mean)


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    return x, x.sum(1, keepdim=True).sin()


def squared_error(module: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
    prediction = module(batch[0])
    return (prediction - batch[1]).square().mean(), {"size": prediction.detach().abs().mean()}


def settings(**changes: Any) -> Any:
    """Settings of a short run that checkpoints often."""
    # Imported late: tests/conftest.py must install the checks of shapes and types first.
    from apportion.training import TrainingSettings

    return TrainingSettings(
        **{"steps": 20, "learning_rate": 1e-2, "checkpoint_every": 4, "log_every": 2} | changes,
    )


def run(folder: Path | None, *, module: nn.Module | None = None, stop_after: int | None = None, **changes: Any) -> Any:
    """Train the regressor (or ``module``) in ``folder``; returns the result with the module beside it."""
    from apportion.training import train

    module = Regressor() if module is None else module
    given = {name: changes.pop(name) for name in ("hooks", "optimizer", "provenance", "schedule") if name in changes}
    objective = changes.pop("objective", squared_error)
    batches = changes.pop("batches", batch_of)
    result = train(
        module, objective, batches, settings(**changes), folder, stop_after=stop_after, progress=False, **given
    )
    return module, result


@pytest.fixture(name="run")
def run_fixture() -> Callable[..., Any]:
    return run


@pytest.fixture(name="regressor")
def regressor_fixture() -> type[Regressor]:
    return Regressor


@pytest.fixture(name="objective")
def objective_fixture() -> Callable[..., Any]:
    return squared_error


@pytest.fixture(name="batches")
def batches_fixture() -> Callable[..., Any]:
    return batch_of


@pytest.fixture
def same_weights() -> Callable[[nn.Module, nn.Module], bool]:
    """Whether two modules have bit-equal parameters and buffers."""

    def same(one: nn.Module, other: nn.Module) -> bool:
        ones, others = ([*module.parameters(), *module.buffers()] for module in (one, other))
        return all(torch.equal(mine, yours) for mine, yours in zip(ones, others, strict=True))

    return same


@pytest.fixture
def log_of() -> Callable[[Path], list[dict[str, Any]]]:
    """The records of a run's log, without its timings."""

    def read(folder: Path) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [{name: value for name, value in record.items() if name != "seconds"} for record in records]

    return read
