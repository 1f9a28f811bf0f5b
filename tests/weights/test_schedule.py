"""When weights are removed, and how many by then."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.errors import InputError
from apportion.weights.schedule import GeometricSchedule, OneShot, PolynomialSchedule, SparsitySchedule

SPARSITIES = st.floats(0, 0.99)


@settings(max_examples=60, deadline=None)
@given(SPARSITIES, SPARSITIES, st.integers(0, 50), st.integers(1, 20), st.integers(1, 20), st.floats(0.5, 4))
def test_a_polynomial_goes_from_the_first_sparsity_to_the_last_and_never_back(a, b, begin, every, updates, power):
    initial, final = sorted((a, b))
    schedule = PolynomialSchedule(final, begin, every, updates, initial, power)
    assert schedule.at(begin) == pytest.approx(initial, abs=1e-12)
    assert schedule.at(schedule.end) == final
    values = [schedule.at(step) for step in range(begin + every * updates + 5)]
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(values))
    assert set(values[:begin]) <= {values[begin]}
    assert set(values[schedule.end :]) == {final}
    assert [step for step in range(schedule.end + 9) if schedule.is_update(step)] == [
        begin + every * k for k in range(updates + 1)
    ]


def test_halfway_a_cubic_has_removed_seven_eighths_and_a_line_half():
    assert PolynomialSchedule(0.9, 10, 5, 20, 0.1).at(60) == pytest.approx(0.1 + 0.875 * 0.8)
    assert PolynomialSchedule(0.9, 10, 5, 20, 0.1, power=1).at(60) == pytest.approx(0.5)


def test_a_constant_and_a_single_update():
    assert {PolynomialSchedule(0.5, 3, 2, 4, 0.5).at(step) for step in range(20)} == {0.5}
    once = PolynomialSchedule(0.8, 10, 5, 1)
    assert [once.at(step) for step in (9, 10, 15, 16)] == [0, 0, 0.8, 0.8]
    assert [step for step in range(30) if once.is_update(step)] == [10, 15]


def test_from_one_step_to_another():
    assert PolynomialSchedule.over(0.9, 100, 700, every=50) == PolynomialSchedule(0.9, 100, 50, 12)
    with pytest.raises(InputError, match="begin=100, end=710, every=50"):
        PolynomialSchedule.over(0.9, 100, 710, every=50)
    with pytest.raises(InputError, match="must come after begin"):
        PolynomialSchedule.over(0.9, 100, 100)


def test_one_shot_removes_nothing_before_its_step():
    shot = OneShot(0.9, 7)
    assert [shot.at(step) for step in (0, 6, 7, 99)] == [0, 0, 0.9, 0.9]
    assert [step for step in range(20) if shot.is_update(step)] == [7]
    assert shot.start == shot.end == 7


@settings(max_examples=40, deadline=None)
@given(SPARSITIES, st.integers(1, 8), st.integers(1, 9), st.integers(0, 9))
def test_each_phase_removes_the_same_share_of_what_is_left(final, phases, every, begin):
    schedule = GeometricSchedule(final, phases, every, begin)
    updates = [step for step in range(begin + every * phases + 9) if schedule.is_update(step)]
    assert updates == [begin + every * k for k in range(phases)]
    left = [1.0] + [1 - schedule.at(step) for step in updates]
    for before, after in itertools.pairwise(left):
        assert after == pytest.approx(before * (1 - schedule.removed), abs=1e-9)
    assert schedule.at(begin - 1) == 0
    assert schedule.at(schedule.end) == schedule.at(10**6) == final


def test_one_phase_is_one_shot():
    schedule, shot = GeometricSchedule(0.9, 1, 50, 4), OneShot(0.9, 4)
    assert [schedule.at(step) for step in range(99)] == [shot.at(step) for step in range(99)]
    assert schedule.end == shot.end


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PolynomialSchedule(1.0, 0, 1, 1), "final=1.0.*below 1"),
        (lambda: PolynomialSchedule(-0.1, 0, 1, 1), "final=-0.1"),
        (lambda: PolynomialSchedule(float("nan"), 0, 1, 1), "final=nan"),
        (lambda: PolynomialSchedule(0.5, 0, 1, 1, 0.6), "initial=0.6 is above final=0.5"),
        (lambda: PolynomialSchedule(0.5, -1, 1, 1), "begin=-1"),
        (lambda: PolynomialSchedule(0.5, 0, 0, 1), "every=0"),
        (lambda: PolynomialSchedule(0.5, 0, 1, 0), "updates=0"),
        (lambda: PolynomialSchedule(0.5, 0, 1, 1, power=0), "power=0"),
        (lambda: OneShot(1.5), "final=1.5"),
        (lambda: OneShot(0.5, -2), "step=-2"),
        (lambda: GeometricSchedule(0.5, 0, 10), "phases=0"),
        (lambda: GeometricSchedule(0.5, 2, 0), "every=0"),
    ],
)
def test_what_cannot_be_a_schedule_says_so(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_all_of_them_are_schedules():
    for each in (PolynomialSchedule(0.5, 0, 1, 1), OneShot(0.5), GeometricSchedule(0.5, 2, 3)):
        assert isinstance(each, SparsitySchedule)
