"""The learning rate over a run: linear warm-up, a plateau, linear decay to zero."""

from apportion.errors import InputError


def learning_rate_factor(step: int, steps: int, warmup_fraction: float = 0.05, decay_fraction: float = 0.2) -> float:
    """Factor in (0, 1] on the peak learning rate at ``step`` (0-based) of a run of ``steps``.

    A pure function of the step, so that a resumed run needs no scheduler state. The lines meet zero just outside the
    run, one step before the first and one after the last: no step is spent at a learning rate of zero.

    Raises:
        InputError: ``step`` is outside the run.
    """
    if not 0 <= step < steps:
        raise InputError(f"step={step} is outside a run of steps={steps}: it must be in [0, {steps})")
    warmup_steps = round(warmup_fraction * steps)
    decay_steps = round(decay_fraction * steps)
    rise = (step + 1) / (warmup_steps + 1) if step < warmup_steps else 1.0
    fall = (steps - step) / (decay_steps + 1) if steps - step <= decay_steps else 1.0
    return min(rise, fall)
