"""The training loop: a module, an objective, and a batch for every step.

A batch is a pure function of the step and the optimiser, the module and torch's random stream are all in the
checkpoint, so a run that is killed and started again ends with the very weights of one that was not.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from apportion.data.files import write_json
from apportion.errors import InputError
from apportion.training.finite import FirstNonFinite, NonFiniteLossError
from apportion.training.interrupts import Interrupts, held_interrupts
from apportion.training.log import RESERVED_NAMES, Record, TrainingLog
from apportion.training.optimizer import OptimizerFactory, build_optimizer, clip_gradients, set_learning_rate
from apportion.training.processes import Processes
from apportion.training.progress import progress_display
from apportion.training.run import Run
from apportion.training.schedule import learning_rate_factor
from apportion.training.settings import TrainingSettings

Metrics: TypeAlias = Mapping[str, int | float | Tensor]
"""Values to log by name; scalar tensors are read back from the device on logged steps only."""

LearningRateSchedule: TypeAlias = Callable[[int, int], float]
"""The factor on the peak learning rate at a step (0-based) of a run of so many steps."""

Module = TypeVar("Module", bound=nn.Module)
Batch = TypeVar("Batch")
_Module = TypeVar("_Module", bound=nn.Module, contravariant=True)
_Batch = TypeVar("_Batch", contravariant=True)


@runtime_checkable
class Objective(Protocol[_Module, _Batch]):
    """What is minimised: a scalar loss, and metrics to log beside it (the loss itself is logged anyway)."""

    def __call__(self, module: _Module, batch: _Batch, step: int, /) -> tuple[Tensor, Metrics]:
        """Loss and metrics of a batch at ``step`` (0-based)."""


@runtime_checkable
class Hook(Protocol[_Module]):
    """Something that happens around the optimiser; subclass it and override what is needed.

    A hook that must survive a restart keeps its state in buffers of the module, which are part of every checkpoint.
    """

    def before_step(self, module: _Module, step: int, /) -> None:
        """After the backward pass, before gradients are clipped. ``step`` is 0-based."""
        return

    def after_step(self, module: _Module, step: int, metrics: dict[str, int | float | Tensor], /) -> None:
        """After the optimiser's step. What is added to ``metrics`` is logged."""
        return


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """How a call of `train` ended.

    Attributes:
        steps_done: steps of the run that are done, those of earlier calls included.
        history: the logged records of the whole run.
        seconds: time spent in the steps of the whole run.
        resumed_from: the step of the checkpoint that this call went on from, or None.
    """

    steps_done: int
    history: list[Record]
    seconds: float
    resumed_from: int | None


def train(
    module: Module,
    objective: Objective[Module, Batch],
    batches: Callable[[int], Batch],
    settings: TrainingSettings,
    folder: Path | str | None,
    *,
    hooks: Sequence[Hook[Module]] = (),
    optimizer: OptimizerFactory | None = None,
    schedule: LearningRateSchedule | None = None,
    provenance: Mapping[str, str | int | float | bool | None] | None = None,
    progress: bool = True,
    stop_after: int | None = None,
    processes: Processes | None = None,
) -> TrainingResult:
    """Train ``module`` in place; with a folder, go on where an earlier call with the same folder left off.

    Args:
        module: trained in train mode on the device it is on.
        objective: gives the loss of a batch.
        batches: gives the batch of a step (0-based): a tensor or a tuple of tensors. The same step must always give
            the same batch, in this process and the next.
        settings: see `TrainingSettings`.
        folder: gets ``settings.json``, ``log.jsonl``, ``checkpoints/`` and, at the end, ``finished.json``. None keeps
            nothing on disk.
        hooks: called around every optimiser step, in order.
        optimizer: makes an optimiser of the trainable parameters; Adam of the settings if None. The schedule scales
            the learning rate of each of its parameter groups.
        schedule: another factor on the peak learning rate than the settings' warm-up, plateau and decay, as a function
            of the step (0-based) and the steps of the run. It is not compared when a run is resumed: name it in the
            provenance.
        provenance: what else decides the weights (data, model, rule); a checkpoint with another one is refused.
        progress: show progress on stderr.
        stop_after: pause, with a checkpoint, once this many steps of the run are done.
        processes: who trains it, if this process does not do so alone; all of them call `train` alike. Only the first
            writes and keeps the log, so the others' ``history`` lacks what was logged before they resumed.

    Raises:
        InputError: nothing to train; the folder holds another run, or cannot be written; the disk is full.
        NonFiniteLossError: the loss or its gradient became NaN or infinite; earlier checkpoints are kept.
        KeyboardInterrupt: Ctrl-C or SIGTERM came; with a folder, the state at the end of that step was saved.
    """
    if stop_after is not None and stop_after < 1:
        raise InputError(f"stop_after={stop_after} cannot work: it must be at least 1, or None to run to the end")
    if folder is None and settings.tensorboard:
        raise InputError("tensorboard=True needs a folder to write to: give one, or leave it off")
    folder = None if folder is None else Path(folder)
    processes = processes or Processes()
    with _own_random_stream(module, settings.seed), _train_mode(module), contextlib.ExitStack() as stack:
        run = Run(module, build_optimizer(module, settings, optimizer), settings, folder, provenance or {}, processes)
        log_folder = folder if processes.writes else None
        log = stack.enter_context(TrainingLog(log_folder, run.steps_done, settings.tensorboard))
        display = stack.enter_context(
            progress_display(progress and processes.writes, settings.steps, run.steps_done, settings.progress_metrics)
        )
        # Without a folder there is nothing to save, so Ctrl-C need not wait.
        interrupts = stack.enter_context(held_interrupts()) if folder is not None else Interrupts()
        steps = _Steps(run, objective, hooks, schedule)
        last = settings.steps if stop_after is None else min(stop_after, settings.steps)
        while run.steps_done < last:
            steps.take(batches(run.steps_done))
            logged = run.steps_done % settings.log_every == 0 or run.steps_done in (1, settings.steps)
            interrupted = folder is not None and processes.any_of(interrupts.requested)
            saved = run.steps_done % settings.checkpoint_every == 0 or run.steps_done == last or interrupted
            if logged or saved:
                steps.require_finite()
            if logged:
                log.write(steps.record())
            display.update(run.steps_done, log.history[-1] if logged else None)
            if saved:
                log.sync()
                run.save()
            if interrupted:
                raise KeyboardInterrupt(f"paused after step {run.steps_done}: run the same again to go on from there")
    if log_folder is not None and run.steps_done == settings.steps:
        write_json(
            log_folder / "finished.json", {"steps": run.steps_done, "final": log.history[-1] if log.history else None}
        )
    return TrainingResult(run.steps_done, log.history, run.seconds, run.resumed_from)


class _Steps:
    """Takes the steps of a run and remembers what the last one gave."""

    def __init__(
        self,
        run: Run,
        objective: Objective[Any, Any],
        hooks: Sequence[Hook[Any]],
        schedule: LearningRateSchedule | None = None,
    ) -> None:
        self._run = run
        self._objective = objective
        self._hooks = hooks
        self._schedule = schedule or _as_set(run.settings)
        self._non_finite = FirstNonFinite(run.device)
        self._metrics: dict[str, int | float | Tensor] = {}

    def take(self, batch: Any) -> None:
        """One step: loss, gradients, hooks, clipping, optimiser."""
        run, step, module = self._run, self._run.steps_done, self._run.module
        set_learning_rate(run.optimizer, run.peak_learning_rates, self._schedule(step, run.settings.steps))
        # Before the forward pass, which then need not find room beside the gradients of the last step.
        run.optimizer.zero_grad(set_to_none=True)
        loss, metrics = self._loss(_to_device(batch, run.device))
        torch.autograd.backward(loss)
        for hook in self._hooks:
            hook.before_step(module, step)
        gradient_norm = clip_gradients(run.optimizer, run.settings.clip_norm, run.processes)
        self._non_finite.watch(loss, gradient_norm, step + 1)
        if run.device.type == "cpu":
            # Nothing to wait for here, and the weights stay those of the last good step.
            self.require_finite()
        run.optimizer.step()
        run.steps_done += 1
        self._metrics = dict(metrics)
        for hook in self._hooks:
            hook.after_step(module, step, self._metrics)
        self._metrics |= {"loss": loss.detach(), "gradient_norm": gradient_norm}

    def require_finite(self) -> None:
        """Raise if a step so far had a loss or gradient that is not finite."""
        first = self._non_finite.found()
        if first is not None:
            run = self._run
            kept = f"the checkpoints in {run.folder} are from before it" if run.folder else "folder=None keeps nothing"
            raise NonFiniteLossError(first, run.settings.learning_rate, kept)

    def record(self) -> Record:
        """The log record of the last step; reads its tensors back from the device."""
        values = {name: _number(name, value) for name, value in self._metrics.items()}
        learning_rate = self._run.optimizer.param_groups[0]["lr"]
        return {
            "step": self._run.steps_done,
            "loss": values.pop("loss"),
            "learning_rate": learning_rate,
            "gradient_norm": values.pop("gradient_norm"),
            "seconds": round(self._run.seconds, 3),
            **values,
        }

    def _loss(self, batch: Any) -> tuple[Tensor, Metrics]:
        run = self._run
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.settings.precision == "bfloat16"):
            loss, metrics = self._objective(run.module, batch, run.steps_done)
        if loss.ndim != 0:
            raise ValueError(f"the objective returned a loss of shape {list(loss.shape)}: it must be a scalar")
        reserved = sorted(set(metrics) & set(RESERVED_NAMES))
        if reserved:
            raise ValueError(f"the objective returned metrics named {reserved}, which the log already has: rename them")
        return loss, metrics


def _as_set(settings: TrainingSettings) -> LearningRateSchedule:
    return lambda step, steps: learning_rate_factor(step, steps, settings.warmup_fraction, settings.decay_fraction)


def _number(name: str, value: int | float | Tensor) -> int | float:
    if isinstance(value, Tensor) and value.ndim != 0:
        raise ValueError(f"metric {name} has shape {list(value.shape)}: a metric must be a number or a scalar tensor")
    return value.item() if isinstance(value, Tensor) else value


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, tuple):
        return tuple(_to_device(part, device) for part in batch)
    return batch


@contextlib.contextmanager
def _own_random_stream(module: nn.Module, seed: int) -> Iterator[None]:
    """Seed torch for the block; the caller's random stream goes on afterwards as if nothing had happened."""
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices, key=str)):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _train_mode(module: nn.Module) -> Iterator[None]:
    before = module.training
    module.train()
    try:
        yield
    finally:
        module.train(before)
