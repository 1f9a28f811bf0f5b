"""A run in progress: module, optimiser, how far it is, and the checkpoints it can go on from."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apportion.data.files import write_json
from apportion.errors import InputError
from apportion.training.checkpoint import Checkpoint
from apportion.training.processes import Processes
from apportion.training.settings import TrainingSettings
from apportion.training.state import (
    differences,
    identity,
    module_tensors,
    optimizer_numbers,
    optimizer_tensors,
    random_state,
    restore_module,
    restore_optimizer,
    restore_random_state,
)

_DIFFERENCES_NAMED = 6


class Run:
    """What `train` works on.

    Args:
        module: being trained.
        optimizer: fresh, of the module's parameters.
        settings: of the run.
        folder: of the run, or None to keep nothing.
        provenance: what else decides the weights.
        processes: who trains it.

    Attributes:
        steps_done: optimiser steps since the start of the run.
        resumed_from: the step of the checkpoint it went on from, or None.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: TrainingSettings,
        folder: Path | None,
        provenance: Mapping[str, Any],
        processes: Processes,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.settings = settings
        self.folder = folder
        self.processes = processes
        self.device = optimizer.param_groups[0]["params"][0].device
        self.steps_done = 0
        self.resumed_from: int | None = None
        self.peak_learning_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._seconds_before = 0.0
        self._started = time.perf_counter()
        if folder is None:
            return
        tensors = processes.whole(module_tensors(module))
        self._identity = identity(module, optimizer, settings.that_decide_weights(), provenance, tensors)
        self._checkpoints = processes.checkpoints(folder / "checkpoints", settings.keep_checkpoints)
        checkpoint = self._checkpoints.newest_intact()
        if checkpoint is not None:
            self._restore(checkpoint)
        if not processes.writes:
            return
        for leftover in folder.glob(".*.json*.partial"):
            # A process killed in the middle of a write could not tidy up behind itself.
            leftover.unlink()
        write_json(folder / "settings.json", settings.to_json() | {"provenance": dict(provenance)})

    @property
    def seconds(self) -> float:
        """Time spent since the start of the run, without the pauses between its calls."""
        return self._seconds_before + time.perf_counter() - self._started

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            InputError: the disk is full or the folder cannot be written; older checkpoints are untouched.
        """
        if self.folder is None:
            return
        self._checkpoints.save(
            self.steps_done,
            {"module": module_tensors(self.module), "optimizer": optimizer_tensors(self.optimizer, self.module)},
            {
                "identity": self._identity,
                "optimizer": optimizer_numbers(self.optimizer, self.module),
                "random": random_state(self.device),
                "seconds": self.seconds,
            },
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        different = differences(state["identity"], self._identity)
        if different:
            named = "; ".join(different[:_DIFFERENCES_NAMED])
            more = f"; and {len(different) - _DIFFERENCES_NAMED} more" if len(different) > _DIFFERENCES_NAMED else ""
            raise InputError(
                f"{self.folder} holds another run, which this one cannot continue: {named}{more}. "
                "Choose another folder, or repeat the run with what the checkpoint says"
            )
        restore_module(self.module, checkpoint.tensors("module"))
        restore_optimizer(self.optimizer, self.module, checkpoint.tensors("optimizer"), state["optimizer"])
        restore_random_state(state["random"], self.device)
        self.steps_done = self.resumed_from = checkpoint.step
        self._seconds_before = float(state["seconds"])
        self._started = time.perf_counter()
