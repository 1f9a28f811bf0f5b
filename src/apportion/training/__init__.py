"""One training loop for every room: it knows modules, losses and batches, and nothing about any one method."""

from apportion.training.finite import NonFiniteLossError
from apportion.training.loop import Hook, LearningRateSchedule, Metrics, Objective, TrainingResult, train
from apportion.training.processes import Processes
from apportion.training.schedule import learning_rate_factor
from apportion.training.settings import TrainingSettings

__all__ = [
    "Hook",
    "LearningRateSchedule",
    "Metrics",
    "NonFiniteLossError",
    "Objective",
    "Processes",
    "TrainingResult",
    "TrainingSettings",
    "learning_rate_factor",
    "train",
]
