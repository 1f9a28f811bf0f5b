"""Settings refuse what cannot work, with the name and the remedy."""

import pytest

from apportion.errors import InputError
from apportion.training import TrainingSettings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 cannot work: it must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 cannot work: it must be a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
        ({"eps": 0.0}, r"eps=0.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"warmup_fraction": 1.5}, "warmup_fraction=1.5 cannot work: it must be between 0 and 1"),
        ({"warmup_fraction": 0.6, "decay_fraction": 0.6}, "overlap: together they must be at most 1"),
        ({"clip_norm": 0.0}, "clip_norm=0.0 cannot work: it must be a positive number or None"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
        ({"log_every": 0}, "log_every=0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        TrainingSettings(**{"steps": 10, "learning_rate": 0.1} | changes)


def test_only_what_decides_the_weights_is_compared():
    one = TrainingSettings(steps=10, learning_rate=0.1)
    other = TrainingSettings(steps=10, learning_rate=0.1, log_every=3, checkpoint_every=7, tensorboard=True)
    assert one.that_decide_weights() == other.that_decide_weights()
    assert one.that_decide_weights() != TrainingSettings(steps=10, learning_rate=0.1, seed=1).that_decide_weights()
