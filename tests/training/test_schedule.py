"""The learning rate rises, stays and falls, all by the step alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.errors import InputError
from apportion.training import learning_rate_factor


def test_schedule_of_twenty_steps():
    factors = [learning_rate_factor(step, 20, warmup_fraction=0.15, decay_fraction=0.2) for step in range(20)]
    assert factors == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 13 + [0.8, 0.6, 0.4, 0.2])


def test_no_warmup_and_no_decay_is_constant():
    assert {learning_rate_factor(step, 10, 0.0, 0.0) for step in range(10)} == {1.0}


@given(steps=st.integers(1, 500), warmup=st.floats(0, 0.5), decay=st.floats(0, 0.5))
def test_schedule_is_positive_rises_before_it_falls_and_has_no_jump(steps, warmup, decay):
    factors = [learning_rate_factor(step, steps, warmup, decay) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)


@pytest.mark.parametrize("step", [-1, 10])
def test_step_outside_the_run_is_refused(step):
    with pytest.raises(InputError, match=rf"step={step} is outside a run of steps=10"):
        learning_rate_factor(step, 10)
